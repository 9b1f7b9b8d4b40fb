"""Exact duplicates among sets of images, found by hashing the pixels, and the record of what a training saw."""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miner.errors import MinerError
from miner.files import Place, atomic, local_copy
from trainers.image_set import ImageSet

EXAMPLES = 3  # pairs shown of an overlap
ROWS = 1 << 17  # of a record written or read at once: as Python strings each takes hundreds of bytes


def overlap(images: ImageSet | pa.Table, others: Mapping[str, ImageSet]) -> list[tuple[str, str, str]]:
    """Exact duplicates: (key, name of the other set, key there), one for each image and each set that holds it.

    ``images`` may be the table that ``record`` made. Raises MinerError for sets opened at different sizes, whose
    pixels say nothing about each other.
    """
    key, ours, size = _hashed(images)
    found = []
    for name, other in others.items():
        if other.size != size:
            raise MinerError(f"{name}: opened at {other.size} px, the outliers at {size}; duplicates cannot be told")
        theirs = other.digests()
        order = np.argsort(theirs, kind="stable")
        place = np.searchsorted(theirs, ours, sorter=order)
        place = order[np.minimum(place, len(order) - 1)]
        same = np.flatnonzero(theirs[place] == ours)
        found += [(key(row), name, other.key(int(place[row]))) for row in same.tolist()]
    return found


def refuse_overlap(outliers: ImageSet | pa.Table, others: Mapping[str, ImageSet], allow: bool) -> int:
    """The number of outliers that stand in one of the ``others`` too; MinerError for any unless ``allow``."""
    pairs = overlap(outliers, others)
    count = len({key for key, _, _ in pairs})
    if pairs and not allow:
        names = " and ".join(dict.fromkeys(name for _, name, _ in pairs))
        examples = ", ".join(f"{key} = {there}" for key, _, there in pairs[:EXAMPLES])
        more = ", ..." if len(pairs) > EXAMPLES else ""
        raise MinerError(
            f"{count} of {len(outliers)} outliers are also in {names} (e.g. {examples}{more}); "
            "remove them or pass --allow-overlap"
        )
    return count


def record(images: ImageSet, start: int = 0, stop: int | None = None) -> pa.Table:
    """Rows as a table of ``key`` and ``pixels`` (hash of ``digests``, 32 hex characters), the size in its metadata."""
    digits = images.digests()[start:stop].tobytes().hex()
    pixels = [digits[at : at + 32] for at in range(0, len(digits), 32)]
    keys = [images.key(row) for row in range(start, start + len(pixels))]
    schema = pa.schema([("key", pa.string()), ("pixels", pa.string())], {"size": str(images.size)})
    return pa.table({"key": keys, "pixels": pixels}, schema=schema)


def write_record(images: ImageSet, path: Place) -> None:
    """Write ``record`` to a parquet file, complete or absent, with memory for ROWS of it."""
    with atomic(path) as sink, pq.ParquetWriter(sink, record(images, 0, 0).schema, compression="zstd") as writer:
        for start in range(0, len(images), ROWS):
            writer.write_table(record(images, start, start + ROWS))


def readable(path: Place) -> bool:
    """Whether a whole record is there."""
    try:
        with local_copy(path) as local:
            pq.ParquetFile(local).read()
    except (pa.ArrowException, OSError, MinerError):
        return False
    return True


def _hashed(images: ImageSet | pa.Table) -> tuple[Callable[[int], str], np.ndarray, int]:
    """Key of a row, digests "S16" and size of a set or of its record."""
    if isinstance(images, ImageSet):
        return images.key, images.digests(), images.size
    digits = ("".join(part["pixels"].to_pylist()) for part in images.to_batches(ROWS))
    digests = np.frombuffer(b"".join(map(bytes.fromhex, digits)), "S16")
    return lambda row: str(images["key"][row]), digests, int(images.schema.metadata[b"size"])
