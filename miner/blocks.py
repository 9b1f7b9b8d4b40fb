"""The images of a subset block by block, and what its manifest must be like for them to be written anew.

What makes the tars is the manifest alone: which images, in which tar, in which order, under which keys. So they come
out the same from the subset's own tars and from a pool that keeps the same images in other places.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miner.errors import MinerError
from miner.files import portions, read_ranges, regular_size
from miner.subset import Subset
from miner.tars import IMAGES, MAX_IMAGE, MAX_LABEL

BLOCK_SIZE = 512  # of a tar
RECORD_SIZE = 10_240  # a tar ends on a multiple of it
OTHER_BYTES = "other bytes than the manifest records (SHA-256)"
Read = Callable[[np.ndarray], list[bytes | str]]  # rows of the manifest -> bytes of each image, or why there are none


@dataclass(frozen=True)
class Block:
    """Images that follow each other in one tar: their rows of the manifest, and the bytes of each."""

    tar: str
    rows: pa.Table
    images: list[bytes]


@dataclass
class Stream:
    """What is exported: rows of the manifest, and where their images come from. ``blocks`` may be gone through once."""

    rows: pa.Table
    read: Read
    advance: Callable[[int], None]
    lost: dict[int, str] = field(default_factory=dict)  # row: why it could not be had

    def blocks(self) -> Iterator[Block]:
        """The images that are to be had and are what the manifest says, in its order; the others go to ``lost``."""
        sizes, digests = self.rows["tar_size"].to_numpy(), self.rows["sha256"].to_pylist()
        for tar, start, stop in spans(self.rows):
            for part in portions(sizes[start:stop].tolist()):
                rows = np.arange(start, stop)[part]
                kept, images = [], []
                for row, data in zip(rows.tolist(), self.read(rows), strict=True):
                    if isinstance(data, bytes) and hashlib.sha256(data).hexdigest() != digests[row]:
                        data = OTHER_BYTES
                    if isinstance(data, str):
                        self.lost[row] = data
                    else:
                        kept.append(row)
                        images.append(data)
                self.advance(len(rows))
                yield Block(tar, self.rows.take(pa.array(kept, pa.int64())), images)


def spans(rows: pa.Table) -> Iterator[tuple[str, int, int]]:
    """Name, first row and end of each tar."""
    names = rows["tar"].combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy()
    edges = np.flatnonzero(np.diff(codes, prepend=-1, append=-1)) if len(codes) else np.zeros(1, int)
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        yield str(names.dictionary[codes[start]]), start, stop


def layout(rows: pa.Table) -> tuple[np.ndarray, dict[str, int]]:
    """Offset of each image in its tar, int64 ``[n]``, and the bytes of each tar, as ``write_sample`` lays them out.

    A member is a header block and its content in whole blocks; those of class and uid take two blocks each.
    """
    content = -(-rows["tar_size"].to_numpy() // BLOCK_SIZE) * BLOCK_SIZE
    labelled = rows["label"].is_valid().to_numpy(zero_copy_only=False)
    step = BLOCK_SIZE + content + 2 * BLOCK_SIZE * labelled + 2 * BLOCK_SIZE
    offsets, sizes = np.zeros(len(rows), np.int64), {}
    for tar, start, stop in spans(rows):
        ends = np.cumsum(step[start:stop])
        offsets[start:stop] = ends - step[start:stop] + BLOCK_SIZE
        sizes[tar] = -(-(int(ends[-1]) + 2 * BLOCK_SIZE) // RECORD_SIZE) * RECORD_SIZE
    return offsets, sizes


def checked_rows(subset: Subset) -> pa.Table:
    """The manifest's rows, when it is one that this program writes. Raises MinerError: it may come from anywhere."""
    rows, where = subset.manifest, f"{subset.path}/manifest.parquet"
    sizes, told = rows["tar_size"].to_numpy(), subset.recipe["tars"]
    tests = {
        "uid": _all(rows, "uid", "^[0-9a-f]{32}$") and _unique(rows["uid"]),
        "sha256": _all(rows, "sha256", "^[0-9a-f]{64}$"),
        "key": _all(rows, "key", "^(.*/)?[^./]+$") and _unique(rows["key"]),  # WebDataset cuts keys at the first dot
        "ext": bool(pc.all(pc.is_in(rows["ext"], pa.array(IMAGES))).as_py()),
        "label": all(-1 <= label < MAX_LABEL for label in pc.unique(rows["label"].drop_null()).to_pylist()),
        "tar_size": bool(((sizes >= 0) & (sizes <= MAX_IMAGE)).all()),
    }
    wrong = [name for name, sound in tests.items() if not sound]
    if wrong:
        raise MinerError(f"{where}: column {wrong[0]} is not a subset manifest's; get the subset again")
    counts = [(tar, stop - start) for tar, start, stop in spans(rows)]
    if counts != [(tar["name"], tar.get("count")) for tar in told] or len({tar for tar, _ in counts}) != len(counts):
        raise MinerError(f"{where}: its tars are not those of subset.json; get the subset again")
    if not np.array_equal(layout(rows)[0], rows["tar_offset"].to_numpy()):
        raise MinerError(f"{where}: column tar_offset is not a subset manifest's; get the subset again")
    return rows


def _all(rows: pa.Table, column: str, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(rows[column], pattern)).as_py())


def _unique(column: pa.ChunkedArray) -> bool:
    return bool(pc.count_distinct(column).as_py() == len(column))


class TarImages:
    """Reads images from the tars of a subset. Raises MinerError when it has none: it is manifest-only.

    ``rows`` are those rows of the subset's manifest that are asked for, as they stand there.
    """

    def __init__(self, subset: Subset, rows: pa.Table) -> None:
        self.path, self.rows = subset.path, rows
        if not (subset.path / rows["tar"][0].as_py()).exists():
            raise MinerError(
                f"{subset.path}: holds no tars, only the manifest; name the pool that has the images: "
                f"python -m pipelines.export --rehydrate {subset.path} --pool NAME"
            )

    def __call__(self, rows: np.ndarray) -> list[bytes | str]:
        """The bytes of these rows (int64 ``[n]``), which follow each other in one tar."""
        part = self.rows.slice(int(rows[0]), len(rows))
        path = self.path / part["tar"][0].as_py()
        if isinstance(path, Path):
            regular_size(path)
        ranges = list(zip(part["tar_offset"].to_pylist(), part["tar_size"].to_pylist(), strict=True))
        return list(read_ranges(str(path), ranges))


def without(rows: pa.Table, gone: np.ndarray) -> pa.Table:
    """The rows that are not ``gone`` (bool ``[n]``), each in its tar, at the places that they have there now."""
    kept = rows.filter(pa.array(~gone)).combine_chunks()
    place = kept.schema.get_field_index("tar_offset")
    return kept.set_column(place, kept.schema.field(place), pa.array(layout(kept)[0]))
