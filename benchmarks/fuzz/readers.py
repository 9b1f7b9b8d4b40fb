"""Everything that reads untrusted files, each read to the last image. Returns how many images were quarantined."""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

from miner.build import finish, prepare, run_job
from miner.cache import open_shard
from miner.files import read_ranges
from miner.images import decode, dimensions
from miner.pool import INDEX_SCHEMA, Pool
from miner.recipe import Recipe
from miner.run_dir import RunDir
from miner.source_uids import source_uids
from miner.sources import detect
from miner.subset import load_subset
from miner.tars import read_samples
from miner.weights import TABLE, ShardState, excluded_counts, load_weights
from trainers.checkpoint import open_checkpoint
from trainers.data import load_id
from trainers.read import npy_images, tar_images
from trainers.sets import open_images

SIZE = 8
REMOTE = "memory://fuzz"


def _image(root: Path) -> int:
    bad = 0
    for path in sorted(root.iterdir()):
        data = path.read_bytes()
        width, height = dimensions(data)
        try:
            pixels = decode(data, SIZE)
        except ValueError:
            bad += 1
            continue
        assert pixels.shape == (SIZE, SIZE, 3)
        assert pixels.dtype == np.uint8
        assert width * height > 0
    return bad


def _tar(root: Path) -> int:
    path = str(root / "x.tar")
    samples = read_samples(path)
    read_ranges(path, [(sample.offset, sample.size) for sample in samples])
    return _decoded([path])


def _gz(root: Path) -> int:
    for _, data in tar_images(root / "x.tar.gz"):
        dimensions(data)
    return _decoded([str(root / "x.tar.gz")])


def _decoded(specs: list[str]) -> int:
    """Open as a set of images, which says on stderr how many do not decode."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for spec in specs:
            for images in open_images(spec, SIZE):
                pixels = images.take(np.arange(len(images)))
                assert pixels.shape[1:] == (SIZE, SIZE, 3)
                images.digests()
    return int("do not decode" in said.getvalue())


def _remote(root: Path) -> int:
    """The same pool at a URL; what is cached of it lies in the folder."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in (root / "in").iterdir():
        memory.pipe(f"/fuzz/{path.name}", path.read_bytes())
    before = os.environ.get("OUTLIER_CACHE")
    os.environ["OUTLIER_CACHE"] = str(root / "cache")
    try:
        return _read_pool(REMOTE)
    finally:
        os.environ.pop("OUTLIER_CACHE")
        os.environ |= {"OUTLIER_CACHE": before} if before else {}


def _pool(root: Path) -> int:
    return _read_pool(str(root / "in"))


def _read_pool(path: str) -> int:
    pool = Pool.open(path)
    table = pool.index()
    assert table.schema.equals(INDEX_SCHEMA)
    assert len(table.to_pylist()) == pool.count == pool.edges[-1]
    for shard, entry in enumerate(pool.shards):
        assert len(pool.read(shard, range(entry.count))) == entry.count
    bad = 0
    for shard, entry in enumerate(pool.shards):
        pixels, reasons = open_shard(pool, shard, SIZE)
        assert pixels.shape == (entry.count, SIZE, SIZE, 3)
        bad += len(reasons)
    _decoded([path])
    pool.verify()
    return bad


def _build(root: Path, source: str = "tars") -> int:
    one = next((root / "in").glob("*.tar"), root / "in")
    per_shard = None if source in ("tars", "imagenet") else 4
    recipe = Recipe(source, (str(one if source == "places365" else root / "in"),), per_shard=per_shard)
    out = str(root / "out")
    detect(recipe.inputs)
    planned = prepare(recipe, out)
    for job in planned.jobs:
        run_job(out, job)
    pool = finish(recipe, out, "fuzzed", planned)
    pool.verify()
    for shard in range(len(pool.shards)):
        source_uids(pool, shard)
    index = pool.index(["width"])
    return sum(width == 0 for width in index["width"].to_pylist())


def _snapshot(root: Path) -> int:
    state = ShardState.read(root / "shard-000000.arrow")
    state.weight()
    state.outcome()
    return 0


def _weights(root: Path) -> int:
    table = load_weights(root / "in")
    assert table.schema.equals(TABLE)
    excluded_counts(table)
    table.to_pylist()
    return 0


def _subset(root: Path) -> int:
    subset = load_subset(root / "in")
    for i in range(len(subset)):
        subset.encoded(i)
    assert len(subset.uids) == len(subset)
    with contextlib.suppress(ValueError):
        subset[0]
    subset.verify()
    _decoded([str(root / "in")])
    return 0


def _run(root: Path) -> int:
    run = RunDir(root / "in")
    for round_ in run.committed():
        run.verified(round_)
    run.metrics()
    run.begin({"data": {"pool": "demo", "seed": 0}, "game": {"eta": 1.0}}, True)
    return 0


def _checkpoint(root: Path) -> int:
    net, _ = open_checkpoint(root / "x.safetensors")
    assert all(parameter.numel() for parameter in net.parameters())
    return 0


def _npy(root: Path) -> int:
    images = npy_images(root / "x.npy")
    assert int(np.asarray(images).sum()) >= 0
    return _decoded([str(root / "x.npy")])


def _id(root: Path) -> int:
    found = load_id(str(root / "in"), SIZE)
    assert found.train_labels.max() < len(found.classes)
    return 0


READERS: dict[str, Callable[[Path], int]] = {
    "tar": _tar,
    "gz": _gz,
    "image": _image,
    "pool": _pool,
    "raw-pool": _pool,
    "remote-pool": _remote,
    "cache": _pool,
    "build": _build,
    "imagenet": lambda root: _build(root, "imagenet"),
    "places365": lambda root: _build(root, "places365"),
    "parquet": lambda root: _build(root, "parquet"),
    "npz": lambda root: _build(root, "npz"),
    "snapshot": _snapshot,
    "weights": _weights,
    "subset": _subset,
    "run": _run,
    "checkpoint": _checkpoint,
    "npy": _npy,
    "id": _id,
}
