"""A pool of background images: a manifest, an index of byte ranges, and the files that hold the images.

`pool.json` names the shards, `index.parquet` holds one row an image (one row group a shard). A shard is a
WebDataset tar or a run of fixed-size records in one uncompressed file. Pools are read from a folder or,
through fsspec, from a URL; this module only reads, `miner.build` writes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miner.buckets import check_url, explained, filesystem, is_url
from miner.errors import MinerError, UsageError
from miner.files import read_ranges, read_whole, sha256
from miner.images import png
from miner.tars import MAX_IMAGE

FORMAT = "outlier-miner/pool"
VERSION = 1
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
    "imagenet": "make it: python -m pipelines.shard --source folder --input IMAGENET/train --name imagenet",
    "tiny-images": "its authors withdrew 80 Million Tiny Images, so nothing is downloaded; adopt your "
    "own copy: python -m pipelines.shard --source tiny-images --input tiny_images.bin --name tiny-images",
}


@dataclass(frozen=True)
class Shard:
    """One shard. ``bytes`` and ``sha256`` cover its own range; ``file_bytes`` is the size of the whole file.

    kind "tar": a WebDataset tar. kind "raw": ``count`` records of ``record_shape`` [H, W, 3] uint8 from byte
    ``record_offset``, stored in ``order`` "C" or "F" (Fortran: tiny_images.bin).
    """

    name: str
    kind: str
    path: str
    count: int
    bytes: int
    sha256: str
    file_bytes: int
    record_offset: int = 0
    record_shape: tuple[int, ...] = ()
    order: str = "C"


@dataclass(frozen=True, eq=False)
class Pool:
    """An opened pool; ``count`` is the number of all rows, excluded ones included."""

    path: str
    name: str
    classes: tuple[str, ...]
    fingerprint: str
    shards: tuple[Shard, ...]
    count: int
    licence: str = ""
    class_info: Any = None
    _extents: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str) -> "Pool":
        """Read the manifest and compare it with what is there: file sizes (local shards), rows of the index.

        Raises MinerError naming the file when something is missing, shorter or newer than this program.
        """
        path = path.rstrip("/") if is_url(path) else os.path.abspath(path)
        manifest = _manifest(path)
        try:
            shards = tuple(_shard(path, entry) for entry in manifest["shards"])
            pool = cls(
                path=path,
                name=str(manifest["name"]),
                classes=tuple(map(str, manifest["classes"])),
                fingerprint=str(manifest["fingerprint"]),
                shards=shards,
                count=int(manifest["count"]),
                licence=str(manifest.get("licence") or ""),
                class_info=manifest.get("class_info"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MinerError(f"{path}/pool.json: damaged manifest ({error!r}); make the pool again") from None
        pool._check()
        return pool

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """The rows of all shards in order (shard, row), columns as in INDEX_SCHEMA."""
        with explained(self.path):
            return self._parquet().read(columns=columns)

    def index_parts(self, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of shard after shard: the index is opened once and never held as a whole."""
        with explained(self.path):
            parquet = self._parquet()
            yield from (parquet.read_row_group(shard, columns=columns) for shard in range(len(self.shards)))

    @property
    def edges(self) -> np.ndarray:
        """First row of each shard in ``index``, and the number of all rows at the end, int64 [shards + 1]."""
        return np.cumsum([0] + [shard.count for shard in self.shards])

    def shard_index(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one shard."""
        with explained(self.path):
            return self._parquet().read_row_group(shard, columns=columns)

    def read(self, shard: int, rows: Sequence[int]) -> list[bytes]:
        """Encoded images as stored (jpg, png, webp); from a raw shard: a PNG made of the record.

        Raises MinerError when the shard ends before an image does.
        """
        if self.shards[shard].kind == "raw":
            records = self.records(shard)
            return [png(records[row]) for row in rows]
        extents = self._ranges(shard)
        return read_ranges(self.shards[shard].path, [(int(a), int(b)) for a, b in extents[np.asarray(rows, int)]])

    def records(self, shard: int) -> np.ndarray:
        """Read-only uint8 [n, H, W, 3] of a raw shard: a view into the file when it is local."""
        entry = self.shards[shard]
        height, width, channels = entry.record_shape
        shape = entry.record_shape if entry.order == "C" else (channels, width, height)
        if is_url(entry.path):
            data = read_ranges(entry.path, [(entry.record_offset, entry.bytes)])[0]
            flat = np.frombuffer(data, np.uint8)
        else:
            flat = np.memmap(entry.path, np.uint8, "r", entry.record_offset, (entry.bytes,))
        stacked = flat.reshape(entry.count, *shape)
        return stacked if entry.order == "C" else stacked.transpose(0, 3, 2, 1)

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
        expected = self.shard_index(shard, ["uid"]).column("uid").to_pylist()
        for start in range(0, entry.count, 1024):
            part = self._ranges(shard)[start : start + 1024].tolist()
            for row, data in enumerate(read_ranges(entry.path, part), start):
                if uid_of(data) != expected[row]:
                    raise MinerError(f"{self.path}/index.parquet: another uid in row {row} of {entry.name}")

    def verify_fingerprint(self) -> None:
        """Compare the fingerprint of the index with the manifest's."""
        if fingerprint_of(self.index(["uid"]).column("uid")) != self.fingerprint:
            raise MinerError(f"{self.path}/index.parquet: its uids do not give the fingerprint of pool.json")

    def _parquet(self) -> pq.ParquetFile:
        path = f"{self.path}/index.parquet"
        try:
            if is_url(path):
                with explained(path):
                    fs, inner = filesystem(path)
                    return pq.ParquetFile(fs.open(inner, "rb"))
            return pq.ParquetFile(path)
        except FileNotFoundError:
            raise MinerError(f"{path}: missing; run the command that made the pool again") from None
        except pa.ArrowInvalid as error:
            raise MinerError(f"{path}: damaged ({str(error).splitlines()[0]}); make the pool again") from None

    def _check(self) -> None:
        parquet = self._parquet()
        if not parquet.schema_arrow.equals(INDEX_SCHEMA):
            raise MinerError(f"{self.path}/index.parquet: its columns are not those of a pool index")
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        counts = [shard.count for shard in self.shards]
        if groups != counts or sum(counts) != self.count:
            raise MinerError(
                f"{self.path}/index.parquet: {sum(groups)} rows in {len(groups)} shards; pool.json says "
                f"{self.count} in {len(counts)}; make the pool again"
            )
        local = {shard.path for shard in self.shards if not is_url(shard.path)}
        sizes = {path: _size(path) for path in local}
        for shard in self.shards:
            if shard.path in local and sizes[shard.path] != shard.file_bytes:
                told = f"{sizes[shard.path]} bytes, not {shard.file_bytes} as recorded"
                raise MinerError(f"{shard.path}: {told}; restore it")

    def _ranges(self, shard: int) -> np.ndarray:
        if shard not in self._extents:
            table = self.shard_index(shard, ["offset", "size"])
            extents = np.stack([table.column(0).to_numpy(), table.column(1).to_numpy()], axis=1)
            limit = self.shards[shard].file_bytes - extents[:, 1]
            if (extents < 0).any() or (extents[:, 1] > MAX_IMAGE).any() or (extents[:, 0] > limit).any():
                raise MinerError(f"{self.path}/index.parquet: byte ranges outside {self.shards[shard].path}")
            if len(self._extents) >= 64:  # a pool of thousands of shards must not keep every table in memory
                self._extents.clear()
            self._extents[shard] = extents
        return self._extents[shard]


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
    parts = [bytes.fromhex("".join(chunk.to_pylist())) for chunk in uids.chunks]
    raw = np.frombuffer(b"".join(parts), "S16").copy()
    raw.sort()
    return hashlib.blake2b(raw.tobytes(), digest_size=16).hexdigest()


def _manifest(path: str) -> dict[str, Any]:
    where = f"{path}/pool.json"
    try:
        manifest = json.loads(read_whole(where))
    except (FileNotFoundError, NotADirectoryError):
        raise MinerError(f"{where}: missing; to make a pool see python -m pipelines.shard --help") from None
    except OSError as error:
        raise MinerError(f"{where}: cannot be read ({error})") from None
    except ValueError as error:
        raise MinerError(f"{where}: not JSON ({error}); make the pool again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise MinerError(f"{where}: not a pool manifest (format {FORMAT!r} expected)")
    if manifest.get("version") != VERSION:
        raise MinerError(f"{where}: format version {manifest.get('version')}, this program reads {VERSION}; update it")
    return manifest


def _shard(pool: str, entry: dict[str, Any]) -> Shard:
    shard = Shard(**{**entry, "record_shape": tuple(entry.get("record_shape", ()))})
    if shard.kind not in ("tar", "raw") or shard.order not in ("C", "F") or min(shard.count, shard.bytes) < 1:
        raise ValueError(f"shard {shard.name}")
    if shard.kind == "raw" and (shard.record_offset < 0 or shard.bytes != shard.count * _volume(shard.record_shape)):
        raise ValueError(f"records of shard {shard.name}")
    if is_url(shard.path):
        check_url(shard.path)
        return shard
    if os.path.isabs(shard.path):
        if is_url(pool):
            raise ValueError(f"shard {shard.name} of a remote pool has a local path")
        return shard
    if ".." in shard.path.split("/"):
        raise ValueError(f"path of shard {shard.name}")
    return Shard(**{**shard.__dict__, "path": f"{pool}/{shard.path}"})


def _volume(shape: tuple[int, ...]) -> int:
    height, width, channels = shape
    if channels != 3 or min(height, width) < 1:
        raise ValueError(f"record shape {shape}")
    return height * width * channels


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise MinerError(f"{path}: {error.strerror}; restore this shard or make the pool again") from None
