"""A pool of background images: a manifest, an index of byte ranges, and the files that hold the images.

`pool.json` names the shards, `index.parquet` holds one row an image (one row group a shard). A shard is a
WebDataset tar or a run of fixed-size records in one uncompressed file. Pools are read from a folder or,
through fsspec, from a URL; this module only reads, `miner.build` writes.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from miner.buckets import check_url, explained, filesystem, is_url
from miner.errors import MinerError, UsageError
from miner.files import read_ranges, regular_size, sha256
from miner.images import png
from miner.manifest import Shard, checked_shard, class_list, read_manifest
from miner.tars import IMAGES, MAX_IMAGE, MAX_LABEL

INDEX_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("ext", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("excluded_by", pa.string()),
    ]
)
HINTS = {
    "imagenet": "make it: python -m pipelines.shard --input IMAGENET/train --name imagenet",
    "tiny-images": "its authors withdrew 80 Million Tiny Images, so nothing is downloaded; adopt your own copy: "
    "python -m pipelines.shard --input tiny_images.bin --name tiny-images",
}


@dataclass(frozen=True, eq=False)
class Pool:
    """An opened pool; ``count`` is the number of all rows, excluded ones included.

    >>> pool = Pool.open("pools/letters")
    >>> pool.count, pool.classes, len(pool.shards)
    (20, ('a', 'b'), 4)
    >>> pool.index(["uid", "label"]).num_rows
    20
    >>> [data[:4] for data in pool.read(0, [0, 1])]
    [b'\\x89PNG', b'\\x89PNG']
    """

    path: str
    name: str
    classes: tuple[str, ...]
    fingerprint: str
    shards: tuple[Shard, ...]
    count: int
    licence: str = ""
    class_info: Any = None
    _extents: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    _footer: list[pq.FileMetaData] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_extents": {}, "_footer": []}  # what was read is read again elsewhere

    @classmethod
    def open(cls, path: str) -> "Pool":
        """Read the manifest and compare it with what is there: file sizes (local shards), rows of the index.

        Raises MinerError naming the file when something is missing, shorter or newer than this program.
        """
        path = path.rstrip("/") if is_url(path) else os.path.abspath(path)
        manifest = read_manifest(path)
        try:
            shards = tuple(checked_shard(path, entry) for entry in manifest["shards"])
            pool = cls(
                path=path,
                name=str(manifest["name"]),
                classes=class_list(manifest["classes"]),
                fingerprint=str(manifest["fingerprint"]),
                shards=shards,
                count=int(manifest["count"]),
                licence=str(manifest.get("licence") or ""),
                class_info=manifest.get("class_info"),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MinerError(f"{path}/pool.json: damaged manifest ({error!r}); make the pool again") from None
        if not re.fullmatch("[0-9a-f]{32}", pool.fingerprint):  # it names a folder of caches
            raise MinerError(f"{path}/pool.json: fingerprint {pool.fingerprint!r} is no hash; make the pool again")
        pool._check()
        return pool

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """The rows of all shards in order (shard, row), columns as in INDEX_SCHEMA."""
        return self._rows(lambda parquet: parquet.read(columns=columns), range(len(self.shards)))

    def index_parts(self, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of shard after shard: the index is opened once and never held as a whole."""
        parquet = self._parquet()
        for shard in range(len(self.shards)):
            read = partial(pq.ParquetFile.read_row_group, i=shard, columns=columns)
            yield self._rows(read, range(shard, shard + 1), parquet)

    @property
    def edges(self) -> np.ndarray:
        """First row of each shard in ``index``, and the number of all rows at the end, int64 [shards + 1]."""
        return np.cumsum([0] + [shard.count for shard in self.shards])

    def shard_index(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one shard."""
        return self._rows(lambda parquet: parquet.read_row_group(shard, columns=columns), range(shard, shard + 1))

    def read(self, shard: int, rows: Sequence[int]) -> list[bytes]:
        """Encoded images as stored (jpg, png, webp); from a raw shard: a PNG made of the record.

        Raises MinerError when the shard ends before an image does, and when one is not what its uid says: a pool
        made elsewhere cannot pass off another file's bytes as an image.
        """
        images = []
        for row, data in zip(rows, self.read_unchanged(shard, rows), strict=True):
            if data is None:
                path = self.shards[shard].path
                raise MinerError(f"{path}: image {row} changed since the pool was made; restore this file")
            images.append(data)
        return images

    def read_unchanged(self, shard: int, rows: Sequence[int]) -> list[bytes | None]:
        """The same, with None for each image that is not what its uid says."""
        entry, (extents, uids) = self.shards[shard], self._ranges(shard)
        found = read_ranges(entry.path, [(int(a), int(b)) for a, b in extents[np.asarray(rows, int)]])
        images: list[bytes | None] = []
        for row, data in zip(rows, found, strict=True):
            if hashlib.blake2b(data, digest_size=16).digest() != uids[row].tobytes():
                images.append(None)
            elif entry.kind == "tar":
                images.append(data)
            else:
                images.append(png(_pixels(entry, np.frombuffer(data, np.uint8))[0]))
        return images

    def records(self, shard: int) -> np.ndarray:
        """Read-only uint8 [n, H, W, 3] of a raw shard: a view into the file when it is local."""
        entry = self.shards[shard]
        if is_url(entry.path):
            flat = np.frombuffer(read_ranges(entry.path, [(entry.record_offset, entry.bytes)])[0], np.uint8)
        else:
            flat = np.memmap(entry.path, np.uint8, "r", entry.record_offset, (entry.bytes,))
        return _pixels(entry, flat)

    def verify(self) -> None:
        """Hash every shard and every image again. Raises MinerError naming the first file that differs."""
        for shard in range(len(self.shards)):
            self.verify_shard(shard)
        self.verify_fingerprint()

    def verify_shard(self, shard: int) -> None:
        """Compare one shard's SHA-256 and the uid of each of its images with what was recorded."""
        entry = self.shards[shard]
        if sha256(entry.path, entry.record_offset, entry.bytes) != entry.sha256:
            raise MinerError(f"{entry.path}: its bytes changed since the pool was made (shard {entry.name})")
        extents, uids = self._ranges(shard)
        for start in range(0, entry.count, 1024):
            part = extents[start : start + 1024].tolist()
            for row, data in enumerate(read_ranges(entry.path, part), start):
                if uid_of(data) != uids[row].tobytes().hex():
                    raise MinerError(f"{self.path}/index.parquet: another uid in row {row} of {entry.name}")

    def verify_fingerprint(self) -> None:
        """Compare the fingerprint of the index with the manifest's."""
        if fingerprint_of(self.index(["uid"]).column("uid")) != self.fingerprint:
            raise MinerError(f"{self.path}/index.parquet: its uids do not give the fingerprint of pool.json")

    def _parquet(self) -> pq.ParquetFile:
        """The index, open. Its footer, long to read where shards are thousands, is read once; threads may share it."""
        path = f"{self.path}/index.parquet"
        try:
            with explained(path):
                fs, inner = filesystem(path) if is_url(path) else (None, path)
                parquet = pq.ParquetFile(fs.open(inner, "rb") if fs else path, metadata=next(iter(self._footer), None))
            self._footer[:] = [parquet.metadata]
            return parquet
        except FileNotFoundError:
            raise MinerError(f"{path}: missing; run the command that made the pool again") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise MinerError(f"{path}: damaged ({error}); make the pool again") from None

    def _rows(self, read: Callable[[Any], pa.Table], shards: range, parquet: Any = None) -> pa.Table:
        """What ``read`` reads of the index, checked: the index may come from anywhere, and much is looked up by it."""
        parquet = parquet or self._parquet()
        try:
            with explained(self.path):
                table = read(parquet)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise MinerError(f"{self.path}/index.parquet: damaged ({error}); make the pool again") from None
        wrong = [name for name in table.column_names if not self._sound(name, table[name], shards)]
        if wrong:
            raise MinerError(f"{self.path}/index.parquet: column {wrong[0]} is not a pool index's; make the pool again")
        return table

    def _sound(self, name: str, column: pa.ChunkedArray, shards: range) -> bool:
        counts = [self.shards[shard].count for shard in shards]
        if column.null_count and not INDEX_SCHEMA.field(name).nullable:
            return False
        if name == "shard":
            return np.array_equal(column.to_numpy(), np.repeat(np.array(shards), counts))
        if name == "row":
            return np.array_equal(column.to_numpy(), np.concatenate([np.arange(count) for count in counts]))
        if name == "label":
            low, high = pc.min_max(column).as_py().values()
            return low is None or -1 <= low <= high < MAX_LABEL
        if name == "ext":
            return bool(pc.all(pc.is_in(column, pa.array(IMAGES))).as_py())
        return name != "uid" or bool(pc.all(pc.match_substring_regex(column, "^[0-9a-f]{32}$")).as_py())

    def _check(self) -> None:
        parquet = self._parquet()
        if not parquet.schema_arrow.equals(INDEX_SCHEMA):
            raise MinerError(f"{self.path}/index.parquet: its columns are not those of a pool index")
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        counts = [shard.count for shard in self.shards]
        if groups != counts or sum(counts) != self.count:
            there, told = f"{sum(groups)} rows in {len(groups)} shards", f"{self.count} in {len(counts)}"
            raise MinerError(f"{self.path}/index.parquet: {there}; pool.json says {told}; make the pool again")
        sizes = {path: regular_size(path) for path in {shard.path for shard in self.shards} if not is_url(path)}
        for shard in self.shards:
            if (size := sizes.get(shard.path, shard.file_bytes)) != shard.file_bytes:
                raise MinerError(f"{shard.path}: {size} bytes, not {shard.file_bytes} as recorded; restore it")

    def _ranges(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(offset, size) of each image of a shard, int64 [n, 2], all inside its file; and its uids, "V16" [n]."""
        if (known := self._extents.get(shard)) is not None:
            return known
        entry, table = self.shards[shard], self.shard_index(shard, ["uid", "offset", "size"])
        extents = np.stack([table["offset"].to_numpy(), table["size"].to_numpy()], axis=1)
        limit = entry.file_bytes - extents[:, 1]
        if entry.kind == "raw":
            record = entry.bytes // entry.count
            extents = np.full_like(extents, record)
            extents[:, 0] = entry.record_offset + record * np.arange(entry.count)
        elif (extents < 0).any() or (extents[:, 1] > MAX_IMAGE).any() or (extents[:, 0] > limit).any():
            raise MinerError(f"{self.path}/index.parquet: byte ranges outside {entry.path}")
        if len(self._extents) >= 64:  # a pool of thousands of shards must not keep every table in memory
            self._extents.clear()
        uids = np.frombuffer(bytes.fromhex("".join(table["uid"].to_pylist())), "V16")
        self._extents[shard] = extents, uids
        return extents, uids


def pools_folder() -> str:
    """Where pools are kept by name: $OUTLIER_POOLS, else ~/.local/share/outlier-miner/pools."""
    return os.environ.get("OUTLIER_POOLS") or os.path.expanduser("~/.local/share/outlier-miner/pools")


def resolve(name: str) -> str:
    """The folder or URL of ``--pool NAME``. UsageError says how to make one that is not there."""
    if is_url(name):
        if name.startswith("file://") and "::" not in name:
            return name.removeprefix("file://")
        check_url(name)
        return name
    path = os.path.join(pools_folder(), name)
    for folder in (name, path):  # an image folder that happens to share a pool's name is not the pool
        if os.path.exists(os.path.join(folder, "pool.json")):
            return folder
    if os.path.exists(name):
        return name  # opening it says what it lacks
    hint = HINTS.get(name, "see python -m pipelines.shard --help, or give a folder or URL with a pool.json")
    raise UsageError(f"no pool {name!r} in {pools_folder()}; {hint}")


def uid_of(data: bytes | memoryview) -> str:
    """BLAKE2b-128 of an image's stored bytes, 32 hex characters."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def fingerprint_of(uids: pa.ChunkedArray) -> str:
    """BLAKE2b-128 of the sorted uids (16 bytes each): the same images give the same name however sharded."""
    raw = np.concatenate([np.frombuffer(bytes.fromhex("".join(part.to_pylist())), "S16") for part in uids.chunks])
    raw.sort()
    return hashlib.blake2b(raw.view(np.uint8).data, digest_size=16).hexdigest()


def _pixels(entry: Shard, flat: np.ndarray) -> np.ndarray:
    """Bytes of whole records, uint8 [bytes], as uint8 [n, H, W, 3] without a copy; a map of a file stays one."""
    height, width, channels = entry.record_shape
    shape = entry.record_shape if entry.order == "C" else (channels, width, height)
    stacked = flat.reshape(-1, *shape)
    return stacked if entry.order == "C" else stacked.transpose(0, 3, 2, 1)
