"""One shard of a pool: make its tar or adopt a file; gives index rows and a manifest entry."""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from miner.errors import MinerError
from miner.files import atomic, read_ranges, sha256
from miner.images import dimensions
from miner.pool import INDEX_SCHEMA, uid_of
from miner.recipe import Job
from miner.source_archive import archive_rows
from miner.source_files import folder_items
from miner.source_npz import unpack_npz
from miner.source_parquet import parquet_items
from miner.source_uids import with_names
from miner.tars import TarWriter, expand, read_samples, why_no_key

CHUNK = 4 << 20


@dataclass(frozen=True)
class Made:
    """One shard: its index rows (INDEX_SCHEMA, perhaps with the source's names), its entry for pool.json (None where
    its part of the source holds no image), and how many images of the source it lacks, by reason."""

    table: pa.Table
    entry: dict[str, Any] | None
    skipped: dict[str, int] = field(default_factory=dict)


def shard_job(folder: str, job: Job) -> Made:
    """Make or adopt one shard."""
    makers = {"raw": _adopt_raw, "npz": _unpack, "tar": _adopt_tar, "class-tar": _point_into, "folder-tar": _point_into}
    return makers.get(job.kind, _write_tar)(folder, job)


def _write_tar(folder: str, job: Job) -> Made:
    name, rows, skipped = f"{job.number:06d}.tar", [], dict[str, int]()
    items = folder_items(job) if job.kind == "folder" else parquet_items(job, skipped)
    first = next(items, None)
    if first is None:
        return Made(index_table(job.number, []), None, skipped)
    with TarWriter(os.path.join(folder, name)) as tar:
        for item in chain([first], items):
            note = None if item.path is None else {"path": item.path}
            rows.append(write_image(tar, f"{item.number:09d}", item.ext, item.data, item.label, note))
    return Made(index_table(job.number, rows), made_entry(name, tar, len(rows)), skipped)


def write_image(
    tar: TarWriter, key: str, ext: str, data: bytes, label: int | None, note: dict[str, Any] | None
) -> dict[str, Any]:
    offset = tar.write(f"{key}.{ext}", data)
    if label is not None:
        tar.write(f"{key}.cls", str(label).encode())
    if note is not None:
        tar.write(f"{key}.json", json.dumps(note).encode())
    return _row(key, ext, offset, data, label)


def _row(key: str, ext: str, offset: int, data: bytes, label: int | None) -> dict[str, Any]:
    width, height = dimensions(data)
    return {
        "uid": uid_of(data),
        "key": key,
        "offset": offset,
        "size": len(data),
        "ext": ext,
        "label": label,
        "width": width,
        "height": height,
    }


def index_table(shard: int, rows: list[dict[str, Any]]) -> pa.Table:
    full = [{**row, "shard": shard, "row": number} for number, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=INDEX_SCHEMA)


def made_entry(name: str, tar: TarWriter, count: int) -> dict[str, Any]:
    """Entry of a tar that was just written into the pool as ``name``."""
    return _entry(name, name, count, tar.size, tar.sha256)


def _entry(name: str, path: str, count: int, size: int, digest: str) -> dict[str, Any]:
    entry = {"name": name, "kind": "tar", "path": path, "count": count}
    return {**entry, "bytes": size, "sha256": digest, "file_bytes": size}


def _adopt_tar(folder: str, job: Job) -> Made:
    path = job.path
    if path.endswith(".gz"):
        path = os.path.join(os.path.abspath(folder), f"{job.number:06d}.tar")
        with atomic(path) as file:
            expand(job.path, file)
    rows, names = [], []
    samples = read_samples(path)
    for sample in samples:
        if (why := why_no_key(sample.key)) is not None:
            raise MinerError(f"{job.path}: key {sample.key!r}: {why}; rename it")
    for start in range(0, len(samples), 256):
        part = samples[start : start + 256]
        images = read_ranges(path, [(sample.offset, sample.size) for sample in part])
        rows += [_row(s.key, s.ext, s.offset, data, s.label) for s, data in zip(part, images, strict=True)]
        names += [_uid_in(note) for note in read_ranges(path, [sample.note for sample in part])]
    inside = os.path.dirname(path) == os.path.abspath(folder)
    name = os.path.basename(job.path).removesuffix(".gz")
    entry = _entry(name, os.path.basename(path) if inside else path, len(rows), os.path.getsize(path), sha256(path))
    return Made(with_names(index_table(job.number, rows), names), entry)


def _uid_in(note: bytes) -> Any:
    """`uid` of a KEY.json; None where there is none, and where it is no JSON: nothing else is wanted of it."""
    try:
        content = json.loads(note)
    except (ValueError, RecursionError):
        return None
    return content.get("uid") if isinstance(content, dict) else None


def _point_into(folder: str, job: Job) -> Made:
    """A part of an archive that stays where it is."""
    rows, names = [], []
    for row in archive_rows(job):
        rows.append(_row(row["key"], row["ext"], row["offset"], row["data"], row["label"]))
        names.append(row["path"])
    label = job.items[0][0] if job.kind == "class-tar" else f"{job.number:06d}"
    entry = _entry(label, job.path, len(rows), job.size, sha256(job.path, job.record_offset, job.size))
    entry |= {"file_bytes": os.path.getsize(job.path), "record_offset": job.record_offset}
    return Made(with_names(index_table(job.number, rows), names), entry)


def _adopt_raw(folder: str, job: Job) -> Made:
    record = math.prod(job.record_shape)
    step = max(1, CHUNK // record)
    digest, uids = hashlib.sha256(), []
    for start in range(0, job.count, step):
        count = min(step, job.count - start)
        block = read_ranges(job.path, [(job.record_offset + start * record, count * record)])[0]
        digest.update(block)
        view = memoryview(block)
        uids += [uid_of(view[i * record : (i + 1) * record]) for i in range(count)]
    entry = _raw_entry(job, job.path, job.record_offset, digest.hexdigest(), os.path.getsize(job.path))
    return Made(_raw_table(job, job.record_offset, uids, [None] * job.count), entry)


def _unpack(folder: str, job: Job) -> Made:
    """Images of an .npz as a .npy in the pool's folder."""
    name = f"{job.number:06d}.npy"
    path = os.path.join(folder, name)
    with atomic(path) as file:
        offset, digest, uids, labels = unpack_npz(job, file)
    return Made(_raw_table(job, offset, uids, labels), _raw_entry(job, name, offset, digest, os.path.getsize(path)))


def _raw_table(job: Job, offset: int, uids: list[str], labels: list[int | None]) -> pa.Table:
    """Index rows of records that follow each other from byte ``offset``."""
    height, width, _ = job.record_shape
    record, rows, listed = math.prod(job.record_shape), range(job.count), set(job.excluded)
    columns = {
        "uid": uids,
        "key": [f"{job.first + row:09d}" for row in rows],
        "shard": np.full(job.count, job.number, np.int32),
        "row": np.arange(job.count, dtype=np.int32),
        "offset": offset + record * np.arange(job.count, dtype=np.int64),
        "size": np.full(job.count, record, np.int64),
        "ext": ["png"] * job.count,
        "label": labels,
        "width": np.full(job.count, width, np.int32),
        "height": np.full(job.count, height, np.int32),
        "excluded_by": ["exclude-list" if row in listed else None for row in rows],
    }
    return pa.table(columns, schema=INDEX_SCHEMA)


def _raw_entry(job: Job, path: str, offset: int, digest: str, file_bytes: int) -> dict[str, Any]:
    return {
        "name": f"{job.number:06d}",
        "kind": "raw",
        "path": path,
        "count": job.count,
        "bytes": job.count * math.prod(job.record_shape),
        "sha256": digest,
        "file_bytes": file_bytes,
        "record_offset": offset,
        "record_shape": list(job.record_shape),
        "order": job.order,
    }
