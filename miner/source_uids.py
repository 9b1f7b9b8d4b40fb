"""What the source calls its images: `uid` in the KEY.json of img2dataset and DataComp, the path in an archive.

These names stand beside the pool's index, in `sources.parquet`, a row group a shard: readers that do not know the file
lose nothing, and our own uid stays the hash of an image's bytes, whoever names it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from miner.errors import MinerError
from miner.files import atomic, open_binary, place, regular_size
from miner.pool import Pool

FILE = "sources.parquet"
COLUMN = pa.field("source_uid", pa.string())
SCHEMA = pa.schema([pa.field("uid", pa.string(), nullable=False), COLUMN])
LONGEST = 256  # characters


def with_names(table: pa.Table, names: Sequence[Any]) -> pa.Table:
    """A shard's index rows, with a column for the source's own names if there is any fit to be kept."""
    kept = [name if _is_fit(name) else None for name in names]
    return table.append_column(COLUMN, pa.array(kept, COLUMN.type)) if any(kept) else table


def _is_fit(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= LONGEST and name.isprintable()


def join_names(folder: str, parts: Sequence[str]) -> None:
    """Write `sources.parquet` from the shards' own files, if one of them has names."""
    with_some = [_has_names(part) for part in parts]
    if not any(with_some):
        return
    with atomic(os.path.join(folder, FILE)) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for part, known in zip(parts, with_some, strict=True):
            with open_binary(part) as source:
                table = pq.read_table(source, columns=["uid", COLUMN.name] if known else ["uid"])
            if not known:
                table = table.append_column(COLUMN, pa.nulls(len(table), COLUMN.type))
            writer.write_table(table.cast(SCHEMA), row_group_size=len(table))


def _has_names(path: str) -> bool:
    with open_binary(path) as file:
        return COLUMN.name in pq.read_schema(file).names


def source_uids(pool: Pool, shard: int) -> pa.ChunkedArray | None:
    """What the source calls the images of one shard: strings, null where it has no name; None for a pool without names.

    Raises MinerError when the file is not the one of this pool.
    """
    with _opened(pool) as file:
        return None if file is None else _names(pool, file, shard, pool.shard_index(shard, ["uid"])["uid"])


@contextmanager
def _opened(pool: Pool) -> Iterator[pq.ParquetFile | None]:
    """The file of names, None for a pool without one: of thousands of shards it takes long to open."""
    path = place(pool.path) / FILE
    if not path.exists():
        yield None
        return
    if isinstance(path, Path):
        regular_size(path)
    try:
        with open_binary(path) as file:
            yield pq.ParquetFile(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MinerError(f"{path}: damaged ({error}); make the pool again") from None


def _names(pool: Pool, file: pq.ParquetFile, shard: int, uids: pa.ChunkedArray) -> pa.ChunkedArray:
    """The names of one shard, whose images have these ``uids``."""
    table = file.read_row_group(shard)
    table.validate(full=True)
    if not table.schema.equals(SCHEMA) or not table["uid"].equals(uids):
        raise MinerError(f"{pool.path}/{FILE}: not the names of this pool's images; make the pool again")
    return table[COLUMN.name]


def named_by_source(pool: Pool, uids: pa.ChunkedArray) -> pa.ChunkedArray:
    """What the source calls the images with these uids, in their order. MinerError when it has no name for one."""
    rows = {uid: row for row, uid in enumerate(uids.to_pylist())}
    names: list[str | None] = [None] * len(uids)
    looked_for = uids.combine_chunks()
    with _opened(pool) as file:
        if file is None:
            raise MinerError(f"{pool.path}: its source had no uids of its own; leave --pool out")
        for shard, part in enumerate(pool.index_parts(["uid"])):
            found, wanted = _names(pool, file, shard, part["uid"]), pc.is_in(part["uid"], looked_for)
            for uid, name in zip(part["uid"].filter(wanted).to_pylist(), found.filter(wanted).to_pylist(), strict=True):
                names[rows[uid]] = names[rows[uid]] or name
    lacking = names.count(None)
    if lacking:
        raise MinerError(
            f"{pool.path}: no uid of its source for {lacking} of {len(names)} images; is it the right pool?"
        )
    return pa.chunked_array([names])
