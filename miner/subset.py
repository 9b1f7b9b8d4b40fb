"""A gamma-subset on disk: tars of original bytes, manifest, recipe. Write it, verify it, read it with torch."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from miner.errors import MinerError
from miner.files import Place, atomic, open_binary, place, portions, read_json, read_ranges, regular_size, sha256
from miner.images import whole
from miner.pool import Pool
from miner.run_dir import write_json
from miner.tars import MAX_IMAGE, TarWriter

if TYPE_CHECKING:
    from torch.utils.data import ConcatDataset, Dataset

    from miner.stream import SubsetStream
else:
    Dataset = object  # torch asks no more than __len__ and __getitem__, and takes seconds to import

FORMAT = "outlier-miner/subset"
VERSION = 1
PER_TAR = 10_000
Transform = Callable[[Image.Image], Any]
NO_TARS = "missing; export the subset again, or get its images from the pool: python -m pipelines.export --rehydrate"
OUTLIER = -1  # the label that OpenOOD and pytorch-ood give to outliers

MANIFEST = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("ext", pa.string(), nullable=False),
        pa.field("pool_shard", pa.string(), nullable=False),
        pa.field("pool_offset", pa.int64(), nullable=False),
        pa.field("pool_size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the image member as it stands in the tar
        pa.field("label", pa.int32()),  # the pool's own class
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("rank", pa.uint64(), nullable=False),
        pa.field("nn_id_row", pa.int32()),
        pa.field("nn_id_cosine", pa.float32()),
        pa.field("tar", pa.string(), nullable=False),
        pa.field("tar_offset", pa.int64(), nullable=False),
        pa.field("tar_size", pa.int64(), nullable=False),
    ]
)


def write_subset(
    pool: Pool, chosen: pa.Table, folder: Place, recipe: dict[str, Any], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Write the images of ``chosen`` (weights-table rows in rank order) as a subset; returns subset.json's content.

    Data first, ``subset.json`` last: a reader never sees half a subset. The same rows and recipe give the same
    bytes. Raises MinerError when the disk is full; what was written before is replaced on the next run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "subset.json").unlink(missing_ok=True)
    for stale in folder.glob("outliers-*.tar"):
        stale.unlink()
    places = _places(pool, chosen)
    tars, tables = [], [MANIFEST.empty_table()]
    for number, start in enumerate(range(0, len(chosen), PER_TAR)):
        name = f"outliers-{number:06d}.tar"
        rows: list[dict[str, Any]] = []
        with TarWriter(folder / name) as tar:
            for part in portions(places["size"][start : start + PER_TAR].tolist()):
                at = slice(start + part.start, start + part.stop)
                rows += _fill(tar, name, pool, chosen[at], {k: v[at] for k, v in places.items()})
        tables.append(pa.Table.from_pylist(rows, schema=MANIFEST))  # Python's objects never for more than one tar
        tars.append({"name": name, "count": len(rows), "bytes": tar.size, "sha256": tar.sha256})
        advance(len(rows))
    manifest = pa.concat_tables(tables).combine_chunks()
    with atomic(folder / "manifest.parquet") as sink:
        pq.write_table(manifest, sink, compression="zstd")
    write_json(folder / "sizes.json", {tar["name"]: tar["count"] for tar in tars})
    content = {
        "format": FORMAT,
        "version": VERSION,
        "count": len(manifest),
        "fingerprint": fingerprint(manifest["uid"]),
        **recipe,
        "tars": tars,
        "manifest_sha256": sha256(folder / "manifest.parquet"),
    }
    write_json(folder / "subset.json", content)
    return content


def fingerprint(uids: pa.ChunkedArray) -> str:
    """BLAKE2b-128 of the sorted uids, 32 hex characters: names the choice of images, not how they are stored."""
    digest, rising = hashlib.blake2b(digest_size=16), uids.take(pc.sort_indices(uids))
    for start in range(0, len(rising), PER_TAR):
        digest.update("".join(rising.slice(start, PER_TAR).to_pylist()).encode())
    return digest.hexdigest()


def is_written(folder: Place, chosen: pa.Table, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """subset.json's content when just this subset lies in ``folder`` already, every byte as recorded; else None."""
    try:
        subset = Subset(folder)
        subset.verify()
        rows = subset.manifest.select(["uid", "weight", "rank"])
    except (MinerError, OSError, ValueError, KeyError):
        return None
    told = json.loads(json.dumps(recipe))
    same = rows.equals(chosen.select(["uid", "weight", "rank"]).cast(rows.schema))
    return subset.recipe if same and all(subset.recipe.get(name) == value for name, value in told.items()) else None


def class_histogram(chosen: pa.Table, classes: tuple[str, ...]) -> dict[str, int]:
    """How many chosen images each pool class has, most frequent first."""
    counts = pc.value_counts(chosen["label"].drop_null()).to_pylist()
    counts.sort(key=lambda c: (-c["counts"], c["values"]))
    return {classes[c["values"]] if 0 <= c["values"] < len(classes) else str(c["values"]): c["counts"] for c in counts}


def _places(pool: Pool, chosen: pa.Table) -> dict[str, np.ndarray]:
    """Byte range and extension in the pool of each chosen row, in the order chosen."""
    shard, row = chosen["shard"].to_numpy(), chosen["row"].to_numpy()
    found = {"offset": np.zeros(len(shard), np.int64), "size": np.zeros(len(shard), np.int64)}
    ext = np.full(len(shard), "", dtype=object)
    for s in np.unique(shard).tolist():
        here = np.flatnonzero(shard == s)
        index = pool.shard_index(int(s), ["offset", "size", "ext"]).take(pa.array(row[here]))
        found["offset"][here], found["size"][here] = index["offset"].to_numpy(), index["size"].to_numpy()
        ext[here] = index["ext"].to_pylist()
    return found | {"ext": ext}


def _fill(
    tar: TarWriter, name: str, pool: Pool, chosen: pa.Table, places: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Write the images of ``chosen``, all held at once, into ``tar``; their rows of the manifest."""
    images: list[bytes] = [b""] * len(chosen)
    shard, row = chosen["shard"].to_numpy(), chosen["row"].to_numpy()
    for s in np.unique(shard).tolist():
        here = np.flatnonzero(shard == s)
        here = here[np.argsort(places["offset"][here])]  # forward through the file
        for at, data in zip(here, pool.read(int(s), row[here].tolist()), strict=True):
            images[at] = data
    rows = []
    for i, (record, data) in enumerate(zip(chosen.to_pylist(), images, strict=True)):
        ext = places["ext"][i]
        offset = write_sample(tar, record | {"ext": ext}, data)
        rows.append(
            {field: record[field] for field in MANIFEST.names if field in record}
            | {
                "ext": ext,
                "pool_shard": pool.shards[record["shard"]].name,
                "pool_offset": int(places["offset"][i]),
                "pool_size": int(places["size"][i]),
                "sha256": hashlib.sha256(data).hexdigest(),
                "tar": name,
                "tar_offset": offset,
                "tar_size": len(data),
            }
        )
    return rows


def write_sample(tar: TarWriter, row: dict[str, Any], data: bytes) -> int:
    """Append one image as subsets hold it: its bytes, its class if it has one, its uid; the offset of its bytes."""
    offset = tar.write(f"{row['key']}.{row['ext']}", data)
    if row["label"] is not None:
        tar.write(f"{row['key']}.cls", str(row["label"]).encode())
    tar.write(f"{row['key']}.json", json.dumps({"uid": row["uid"]}).encode())
    return offset


class Subset(Dataset):
    """Map-style torch dataset of a gamma-subset: item i is (image, -1), the images in rank order.

    ``image`` is a uint8 tensor ``[3, H, W]``, or what ``transform`` makes of the PIL image (RGB).
    """

    def __init__(self, path: str | os.PathLike[str] | Place, transform: Transform | None = None) -> None:
        self.path, self.transform = place(path), transform
        self.recipe = _recipe(self.path / "subset.json")
        self.manifest = _manifest(self.path / "manifest.parquet")
        if len(self.manifest) != self.recipe["count"]:
            raise MinerError(f"{self.path}/manifest.parquet: {len(self.manifest)} rows, not {self.recipe['count']}")
        self._tar = self.manifest["tar"].to_pylist()
        offsets, sizes = (self.manifest[name].to_pylist() for name in ("tar_offset", "tar_size"))
        self._extent = list(zip(offsets, sizes, strict=True))
        if unknown := set(self._tar) - {tar["name"] for tar in self.recipe["tars"]}:
            raise MinerError(f"{self.path}/manifest.parquet: names {min(unknown)!r}, no tar of this subset")

    @property
    def uids(self) -> list[str]:
        """Content hashes, 32 hex characters each, in rank order."""
        return list(self.manifest["uid"].to_pylist())

    def __len__(self) -> int:
        return len(self._tar)

    def encoded(self, i: int) -> bytes:
        """The image's bytes as they stood in the pool."""
        path, (offset, size) = self.path / self._tar[i], self._extent[i]
        if isinstance(path, Path) and not path.exists():
            raise MinerError(f"{path}: {NO_TARS}")
        end = regular_size(path) if isinstance(path, Path) else 2**63  # reading at a URL tells where it ends
        if offset < 0 or not 0 <= size <= MAX_IMAGE or offset + size > end:
            raise MinerError(f"{path}: no image of {size} bytes at byte {offset} of it; export the subset again")
        return read_ranges(str(path), [(offset, size)])[0]

    def __getitem__(self, i: int) -> tuple[Any, int]:
        try:
            rgb = whole(self.encoded(i))
        except ValueError as error:
            where = f"{self.path / self._tar[i]}: {self.manifest['key'][i]}"
            raise MinerError(f"{where}: does not decode ({error}); export the subset again") from None
        if self.transform is not None:
            return self.transform(rgb), OUTLIER
        import torch

        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1), OUTLIER

    def __add__(self, other: "Dataset[Any]") -> "ConcatDataset[Any]":
        from torch.utils.data import ConcatDataset

        return ConcatDataset([self, other])

    def stream(self, seed: int | None = None) -> "SubsetStream":
        """The same items as an iterable data set that can be resumed, shuffled where ``seed`` is given."""
        from miner.stream import SubsetStream

        return SubsetStream(self, seed)

    def verify(self) -> None:
        """Re-hash every tar, the manifest and every image; raises MinerError naming the first that differs."""
        for tar in self.recipe["tars"]:
            if not (self.path / tar["name"]).exists():
                raise MinerError(f"{self.path / tar['name']}: {NO_TARS}")
            if tar["sha256"] and sha256(self.path / tar["name"]) != tar["sha256"]:  # none: never written as it is now
                raise MinerError(f"{self.path / tar['name']}: its bytes changed since it was written; export it again")
        if sha256(self.path / "manifest.parquet") != self.recipe["manifest_sha256"]:
            raise MinerError(f"{self.path}/manifest.parquet: its bytes changed since it was written; export it again")
        for i, expected in enumerate(self.manifest["sha256"].to_pylist()):
            if hashlib.sha256(self.encoded(i)).hexdigest() != expected:
                raise MinerError(f"{self.path / self._tar[i]}: image {self.manifest['key'][i]} is not the one recorded")


def _recipe(path: Place) -> dict[str, Any]:
    """The content of subset.json, with what is read of it in its types."""
    if not path.exists():
        raise MinerError(f"{path}: missing; not a subset, or one whose export was cut off: export it again")
    recipe = read_json(path)
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT or recipe.get("version") != VERSION:
        raise MinerError(f"{path}: not a subset that this version reads; update outlier-miner")
    settings, tars = recipe.get("settings", {}), recipe.get("tars")
    sound = (
        type(recipe.get("count")) is int
        and all(isinstance(recipe.get(name), str) for name in ("fingerprint", "manifest_sha256"))
        and isinstance(settings, dict)
        and isinstance(settings.get("game", {}), dict)
        and isinstance(tars, list)
        and all(isinstance(tar, dict) and isinstance(tar.get("sha256", 0), str | None) for tar in tars)
        and all(re.fullmatch(r"outliers-[0-9]{6}\.tar", str(tar.get("name"))) for tar in tars)
    )
    if not sound:
        raise MinerError(f"{path}: damaged; export the subset again")
    return recipe


def _manifest(path: Place) -> pa.Table:
    """The rows of manifest.parquet: MANIFEST's columns, nothing missing where nothing may be."""
    if isinstance(path, Path) and path.exists():
        regular_size(path)
    try:
        with open_binary(path) as file:
            table = pq.ParquetFile(file).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MinerError(f"{path}: cannot be read ({error}); export it again") from None
    if not table.schema.equals(MANIFEST) or any(table[f.name].null_count for f in MANIFEST if not f.nullable):
        raise MinerError(f"{path}: its columns are not those of a subset's manifest; export it again")
    return table


def load_subset(path: str | os.PathLike[str] | Place, transform: Transform | None = None) -> Subset:
    """Open a gamma-subset, a folder or a URL: ``subset[i]`` is (image, -1), ``subset.stream()`` iterates.

    ``subset.uids`` names the images. Raises MinerError for what is missing or damaged.

    >>> subset = load_subset("runs/demo/subset-0.1")
    >>> len(subset), len(subset.uids[0]), subset.encoded(0)[1:4], subset.manifest.num_rows
    (2, 32, b'PNG', 2)
    """
    return Subset(path, transform)
