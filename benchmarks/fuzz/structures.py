"""Spoiling by structure: JSON, tar headers, tables, safetensors, arrays, gzip and PNG, with hostile values."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 511, 512, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40)
HUGE = (2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, 10**30, -(10**30))
WORDS = (
    "", ".", "..", "../../outside/canary", "/etc/passwd", "/dev/zero", "/proc/self/mem", "pipe:touch outside/ran",
    "| touch outside/ran", "file:///etc/passwd", "file::/etc/passwd", "memory://x", "simplecache::s3://b/c",
    "a/../../outside/canary", "\x00", "a\nb", "\x1b[2J", "\ud800", "ü", "x" * 300, "000000.tar", "NaN", "-0", "1e999",
    "__class__", "{0.__class__}", "%s%n", "jpg", "pkl", "F", "raw", "tar", "index.parquet", "pool.json",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, float("nan"), float("inf"), -float("inf"), 0.5, -0.0, 1e308, [], {}, [[]], {"a": 1}, [None],
)  # fmt: skip


def _scalar(random: Random) -> Any:
    way = random.randrange(4)
    if way == 0:
        return random.choice(VALUES)
    if way == 1:
        return random.choice(WORDS)
    return random.choice(NUMBERS if way == 2 else HUGE)


def as_json(random: Random, data: bytes) -> bytes:
    """A JSON text with one node changed; sometimes nested too deep, or with a number of 5,000 digits."""
    if random.random() < 0.05:
        deep = random.choice((100, 5_000, 100_000))
        return random.choice((b"[", b'{"a":')) * deep + random.choice((b"", b"]" * deep))
    value = _changed(random, json.loads(data), 0)
    text = json.dumps(value).encode()
    if random.random() < 0.03:
        text = text.replace(b"1", b"1" * 5_000, 1)
    return text


def _changed(random: Random, value: Any, depth: int) -> Any:
    """``value`` with one node of it replaced, dropped, repeated or nested."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1 * depth:
        return (
            random.choice((_scalar(random), [value], {"a": value})) if random.random() < 0.2 else _near(random, value)
        )
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, way = random.choice(keys), random.random()
    if isinstance(value, list):
        value = list(value)
        if way < 0.1:
            return [*value, value[key]]
        if way < 0.2:
            return value[:key] + value[key + 1 :]
        value[key] = _changed(random, value[key], depth + 1)
        return value
    value = dict(value)
    if way < 0.1:
        del value[key]
    elif way < 0.15:
        value[random.choice(WORDS)] = value[key]
    else:
        value[key] = _changed(random, value[key], depth + 1)
    return value


def _near(random: Random, value: Any) -> Any:
    if isinstance(value, int) and random.random() < 0.5:
        return value + random.choice((1, -1, 512, -512, 1 << 20))
    if isinstance(value, str) and random.random() < 0.3:
        return random.choice((value + "x", "/" + value, "../" + value, value[:-1], value * 2, value.upper()))
    return _scalar(random)


def _as_tar(random: Random, data: bytes) -> bytes:
    """One header's field changed, its checksum mended most of the time; or a hostile member put in."""
    blocks = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = random.choice(blocks)
    if random.random() < 0.3:
        return data[:at] + _member(random) + data[at:]
    block = bytearray(data[at : at + 512])
    start, size = random.choice(
        ((0, 100), (100, 8), (108, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
    )
    number = random.choice(NUMBERS + HUGE)
    fields = [
        random.choice(WORDS).encode("utf-8", "surrogatepass")[:size],
        (b"%o" % abs(number))[:size],
        (b"\x80" + (number % (1 << 88)).to_bytes(11, "big"))[:size],
        b"\xff" * size,
        random.choice([b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"3", b"6", b"7", b"D", b"5", b"\0", b"V", b"M"])[
            :size
        ],
    ]
    block[start : start + size] = random.choice(fields).ljust(size, b"\0")
    if random.random() < 0.9:
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return data[:at] + bytes(block) + data[at + 512 :]


def _member(random: Random) -> bytes:
    info = tarfile.TarInfo(
        random.choice(("x.jpg", "x.cls", "x.json", "x.pkl", "0000.jpg", "0000.cls", "d/x.png", *WORDS))
    )
    info.type = random.choice((b"0", b"0", b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"g", b"x", b"L"))
    info.linkname = random.choice(WORDS)
    body = random.choice(
        (b"", b"3", b"cposix\nsystem\n(S'touch outside/ran'\ntR.", b"30 size=99999999999999999999\n", b"x" * 600)
    )
    info.size = len(body)
    records = {
        random.choice(
            ("path", "size", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.size", "hdrcharset", "uid")
        ): str(random.choice(NUMBERS + HUGE + WORDS))
    }
    form = random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    if form == tarfile.PAX_FORMAT and random.random() < 0.5:
        info.pax_headers = records
    return info.tobuf(form, errors="surrogatepass") + body.ljust(-(-len(body) // 512) * 512, b"\0")


def _table(random: Random, table: pa.Table) -> pa.Table:
    """One column's values, type or name changed, a column or row dropped or repeated, or the metadata."""
    table.validate(full=True)  # it may have been spoiled before
    at, way = random.randrange(table.num_columns), random.random()
    field, values = table.schema.field(at), table.column(at).to_pylist()
    if way < 0.65 and values:
        row = random.randrange(len(values))
        if isinstance(values[row], int) and random.random() < 0.3:
            values[row] += random.choice((1, -1, 512, 1 << 20))
        else:
            values[row] = _scalar(random)
        try:
            column = pa.array(values, field.type)
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            column = pa.array(list(map(str, values)) if values[row] != "\ud800" else [None] * len(values))
        field = pa.field(field.name, column.type, field.nullable and column.null_count > 0)
        return table.set_column(at, field, column)
    if way < 0.7:
        return table.drop_columns([field.name])
    if way < 0.75:
        return table.rename_columns(
            [name if i != at else random.choice(table.column_names) for i, name in enumerate(table.column_names)]
        )
    if way < 0.8:
        return table.slice(0, random.randrange(len(table) + 1))
    if way < 0.85:
        return pa.concat_tables([table, table.slice(0, 1)])
    if way < 0.9:
        return table.set_column(at, field.name, pa.nulls(len(table), field.type))
    notes = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return table.replace_schema_metadata(notes | {random.choice([*notes, "a"]): str(random.choice(NUMBERS + HUGE))})


def _as_parquet(random: Random, data: bytes) -> bytes:
    file = pq.ParquetFile(io.BytesIO(data))
    groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    at = random.randrange(len(groups))
    changed = _table(random, groups[at])
    whole = [changed.select(changed.column_names) if i == at else g for i, g in enumerate(groups)]
    sink = io.BytesIO()
    schema = changed.schema
    with pq.ParquetWriter(sink, schema) as writer:
        for group in whole:
            group = (
                group
                if group.schema.equals(schema)
                else group.select([n for n in group.column_names if n in schema.names][: len(schema)])
            )
            if group.num_columns == len(schema):
                writer.write_table(
                    pa.Table.from_arrays(
                        [c.cast(f.type, safe=False) for c, f in zip(group.columns, schema, strict=True)], schema=schema
                    )
                )
    return sink.getvalue()


def _as_arrow(random: Random, data: bytes) -> bytes:
    table = _table(random, pa.ipc.open_file(pa.py_buffer(data)).read_all())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _as_safetensors(random: Random, data: bytes) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header = as_json(random, data[8 : 8 + size])
    if random.random() < 0.4:
        inner = json.loads(data[8 : 8 + size])
        notes = inner.get("__metadata__", {})
        if "outlier-miner" in notes:
            notes["outlier-miner"] = as_json(random, notes["outlier-miner"].encode()).decode()
        header = json.dumps(inner).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _as_npy(random: Random, data: bytes) -> bytes:
    (size,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + size].decode("latin-1")
    old = random.choice(("|u1", "False", "(6, 8, 8, 3)", "6", "8", "3", "'descr'", "{"))
    new = random.choice(
        (
            "|O",
            "<f8",
            "|V3",
            "True",
            "()",
            "(6,)",
            str(random.choice(NUMBERS + HUGE)),
            "__import__('os').system('touch outside/ran')",
            "(" * 300,
            "'shape'",
        )
    )
    header = header.replace(old, new, 1).rstrip().ljust(size - 1) + "\n"
    return (
        data[:8] + struct.pack("<H", min(len(header), 65535)) + header.encode("latin-1", "replace") + data[10 + size :]
    )


def _as_gzip(random: Random, data: bytes) -> bytes:
    plain = gzip.decompress(data)
    return gzip.compress(_as_tar(random, plain) if random.random() < 0.7 else plain + bytes(1 << 20), 1, mtime=0)


def _as_png(random: Random, data: bytes) -> bytes:
    """A chunk's bytes changed and its CRC mended: width and height most of the time."""
    start = (
        8
        if random.random() < 0.6
        else random.choice([at for at in range(8, len(data)) if data[at : at + 4] in (b"IHDR", b"IDAT", b"IEND")]) - 4
    )
    (size,) = struct.unpack(">I", data[start : start + 4])
    body = bytearray(data[start + 4 : start + 8 + size])
    at = random.randrange(4, len(body) - 3)
    body[at : at + 4] = (random.choice(NUMBERS) % 2**32).to_bytes(4, "big")
    return data[: start + 4] + bytes(body) + struct.pack(">I", zlib.crc32(bytes(body))) + data[start + 12 + size :]


STRUCTURES: dict[str, Any] = {
    "json": as_json,
    "tar": _as_tar,
    "parquet": _as_parquet,
    "arrow": _as_arrow,
    "safetensors": _as_safetensors,
    "npy": _as_npy,
    "gz": _as_gzip,
    "png": _as_png,
}
