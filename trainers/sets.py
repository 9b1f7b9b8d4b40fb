"""Outlier sets and OOD test sets, opened from any kind of file.

A set may be far larger than memory: a pool's images stay in the memory maps of its cache and `.npy` files are
mapped.
"""

import errno
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miner.buckets import is_url
from miner.cache import open_shard
from miner.errors import MinerError, UsageError
from miner.files import Place, check_name, place
from miner.images import decode
from miner.pool import Pool, resolve
from miner.subset import load_subset
from trainers.image_set import ImageSet
from trainers.noise import COUNT, NOISE, draw_noise
from trainers.read import (
    TORCHVISION,
    datasets_folder,
    fit_all,
    image_files,
    npy_images,
    read_image,
    tar_files,
    tar_images,
    torchvision_set,
)

BLOCK = 4096  # images decoded into one array
Split = Literal["train", "test"]


def open_images(spec: str, size: int, seed: int = 0, split: Split = "test") -> list[ImageSet]:
    """Open outliers or OOD test sets at ``size`` px; several only for "demo", the demo's nine held-out families.

    ``spec`` is a gamma-subset (folder or URL); a pool (folder, name or URL); a folder of tars (its test-*.tar where
    it has some) or one .tar or .tar.gz; a .npy file uint8 [N, H, W, 3]; a folder of images (its test/ where it has
    train/ and test/); a torchvision name (its test split; Places365: the validation split); "lsun" (a folder in
    $OUTLIER_DATASETS); noise drawn from ``seed``: gaussian, uniform, rademacher, blob; "demo"; "demo-pool". With
    ``split`` "train" it is that one instead. Images that do not decode stay out and are counted on stderr. Raises
    MinerError for what is empty, damaged or of another type, UsageError for an unknown ``spec``.
    """
    if spec in NOISE:
        images, origin = draw_noise(spec, size, seed), {"kind": "noise", "seed": seed, "count": COUNT}
        return [_finish(spec, (images,), None, origin, "noise")]
    if spec in ("demo", "demo-pool"):
        return _open_demo(spec, size)
    if spec in TORCHVISION:
        images = torchvision_set(spec, split == "train", size)[1][0]
        origin = {"kind": "torchvision", "path": datasets_folder(), "split": split}
        return [_finish(spec, (images,), None, origin)]
    if spec == "lsun":
        return [_open_lsun(size, split)]
    if os.path.exists(spec):
        check_name(os.path.realpath(spec))
    if os.path.isfile(spec):
        return [_open_file(Path(spec), size)]
    if os.path.isdir(spec):
        return [_open_folder(Path(spec), size, split)]
    if is_url(spec) and (place(spec) / "subset.json").exists():
        return [_open_subset(place(spec), size)]
    return [_open_pool(_resolve(spec), size)]


def open_outliers(spec: str, size: int, seed: int) -> ImageSet:
    """The one set of --outliers ``spec``, its train half where it has one: the test half is for evaluation.

    Raises UsageError for a spec of several sets, and as ``open_images`` does.
    """
    sets = open_images(spec, size, seed, "train")
    if len(sets) > 1:
        raise UsageError(f"--outliers {spec}: holds {len(sets)} sets of images; name one")
    return sets[0]


def _resolve(spec: str) -> str:
    try:
        return resolve(spec)
    except UsageError as error:
        if is_url(spec):
            raise
        known = ", ".join((*NOISE, *TORCHVISION, "lsun", "demo", "demo-pool"))
        raise UsageError(f"images {spec!r}: no such file or folder, none of {known}, and {error}") from None


def _open_file(path: Path, size: int) -> ImageSet:
    if path.name.endswith((".tar", ".tar.gz")):
        return _open_tars([path], path, path.name.removesuffix(".gz").removesuffix(".tar"), size)
    if path.suffix == ".npy":
        images = npy_images(path)
        return _finish(path.stem, (fit_all(images, size),), None, {"kind": "npy", "path": str(path.resolve())})
    raise UsageError(f"{path}: images come as .tar, .tar.gz or .npy (uint8 [N, H, W, 3]), or as a folder of them")


def _open_folder(path: Path, size: int, split: Split) -> ImageSet:
    if (path / "pool.json").exists():
        return _open_pool(str(path), size)
    if (path / "subset.json").exists() or any(path.glob("outliers-*.tar")):
        return _open_subset(path, size)
    name = path.resolve().name
    tars = tar_files(path, f"{split}-*") or tar_files(path, "*")
    for tar in tars:
        check_name(str(tar))
    if tars:
        return _open_tars(tars, path, name, size)
    both = (path / "train").is_dir() and (path / "test").is_dir()
    files = image_files(path / split if both else path)
    if files:
        for file in files:
            check_name(str(file))
        pairs = ((str(file.relative_to(path)), read_image(file)) for file in files)
        return _decoded(name, pairs, size, {"kind": "images", "path": str(path.resolve())})
    subsets = sorted(found.name for found in path.glob("subset-*"))
    hint = f"give one of its subsets, {path / subsets[0]}" if subsets else "give a folder of tars or images"
    raise MinerError(f"{path}: no images (jpg, png, webp) and no tars in it; {hint}")


def _open_lsun(size: int, split: Split) -> ImageSet:
    path = Path(datasets_folder(), "lsun")
    if not path.is_dir():  # torchvision reads it with lmdb and a pickle, and cannot download it
        raise MinerError(f"{path}: missing; LSUN has no download here: put its test images or tars into that folder")
    return _open_folder(path, size, split)


def _open_tars(tars: Sequence[Path], path: Path, name: str, size: int) -> ImageSet:
    prefix = [f"{tar.name}/" if len(tars) > 1 else "" for tar in tars]
    pairs = ((f"{at}{one.key}", data) for at, tar in zip(prefix, tars, strict=True) for one, data in tar_images(tar))
    return _decoded(name, pairs, size, {"kind": "tars", "path": str(path.resolve())})


def _open_subset(path: Place, size: int) -> ImageSet:
    """A gamma-subset in rank order, after a check of all its hashes: its fingerprint will stand for it."""
    subset = load_subset(path)
    subset.verify()
    recipe = subset.recipe
    origin = {"kind": "subset", "path": str(path.resolve()), "fingerprint": recipe["fingerprint"]}
    origin |= {name: recipe[name] for name in ("gamma", "draw", "pool", "id", "run_id") if name in recipe}
    origin["rule"] = recipe.get("settings", {}).get("game", {}).get("rule")
    keys = subset.manifest["key"].to_pylist()
    return _decoded(path.resolve().name, ((key, subset.encoded(i)) for i, key in enumerate(keys)), size, origin)


class _PoolKeys(Sequence[str]):
    """Keys of a pool's rows, read shard by shard when asked for: those of 80 M images need not stay in memory."""

    def __init__(self, pool: Pool, rows: np.ndarray) -> None:
        self.pool, self.rows = pool, rows
        self._shard, self._column = -1, pa.chunked_array([], pa.string())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        place = int(self.rows[row])
        shard = int(np.searchsorted(self.pool.edges, place, "right")) - 1
        if shard != self._shard:
            self._shard, self._column = shard, self.pool.shard_index(shard, ["key"])["key"]
        return self._column[place - int(self.pool.edges[shard])].as_py()


def _open_pool(path: str, size: int) -> ImageSet:
    pool = Pool.open(path)
    keep = pc.is_null(pool.index(["excluded_by"])["excluded_by"]).to_numpy().copy()
    parts, undecodable = [], []
    try:
        for shard, start in enumerate(pool.edges[:-1].tolist()):
            pixels, bad = open_shard(pool, shard, size)
            parts.append(pixels)
            undecodable += [(start + row, reason) for row, reason in bad.items() if keep[start + row]]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise MinerError(f"{path}: {len(pool.shards)} shards need as many open files; raise ulimit -n") from None
    tried = int(keep.sum())
    keep[[row for row, _ in undecodable]] = False
    rows = np.flatnonzero(keep)
    named = [(_PoolKeys(pool, np.array([row]))[0], reason) for row, reason in undecodable[:1]]
    _count(pool.path, named * len(undecodable), tried)
    origin = {"kind": "pool", "path": pool.path, "pool": pool.name, "fingerprint": pool.fingerprint}
    return _finish(pool.name, tuple(parts), _PoolKeys(pool, rows), origin, rows=rows)


def _open_demo(spec: str, size: int) -> list[ImageSet]:
    from miner import demo  # here, because it draws with matplotlib and scikit-learn, which are slow to import

    drawn = demo.held_out() if spec == "demo" else {"demo-pool": demo.pool_arrays()[0]}
    return [_finish(name, (fit_all(images, size),), None, {"kind": spec}) for name, images in drawn.items()]


def _decoded(name: str, pairs: Iterable[tuple[str, bytes]], size: int, origin: dict[str, Any]) -> ImageSet:
    """A set of the (key, encoded image) that decode."""
    parts: list[np.ndarray] = []
    block: list[np.ndarray] = []
    keys, bad = [], []
    for key, data in pairs:
        try:
            block.append(decode(data, size))
        except ValueError as error:
            bad.append((key, str(error)))
            continue
        keys.append(key)
        if len(block) == BLOCK:
            parts.append(np.stack(block))
            block = []
    _count(origin["path"], bad, len(keys) + len(bad))
    return _finish(name, (*parts, np.stack(block)) if block else tuple(parts), keys, origin)


def _count(where: str, bad: Sequence[tuple[str, str]], tried: int) -> None:
    """Say how many images did not decode; MinerError when nothing is left."""
    if len(bad) == tried:
        why = f"none of its {tried} images decodes ({bad[0][0]}: {bad[0][1]})" if bad else "no image is left in it"
        raise MinerError(f"{where}: {why}; give other images")
    if bad:
        first = f"{bad[0][0]}: {bad[0][1]}"
        print(f"{where}: {len(bad)} of {tried} images do not decode and are left out ({first})", file=sys.stderr)


def _finish(
    name: str,
    parts: tuple[np.ndarray, ...],
    keys: Sequence[str] | None,
    origin: dict[str, Any],
    kind: str = "natural",
    rows: np.ndarray | None = None,
) -> ImageSet:
    """The set, with a fingerprint of its sorted pixel hashes where the origin has none of its own."""
    images = ImageSet(name, parts, keys, origin, kind, rows)
    if "fingerprint" not in origin:
        origin["fingerprint"] = hashlib.blake2b(np.sort(images.digests()).tobytes(), digest_size=16).hexdigest()
    return images
