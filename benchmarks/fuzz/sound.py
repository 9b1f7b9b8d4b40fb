"""Small valid inputs of every kind, as {path: bytes}: what fuzzing starts from. Made by the program's own writers."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from miner.build import finish, prepare, run_job, write_arrays_pool
from miner.cache import open_shard
from miner.images import png
from miner.pool import Pool
from miner.recipe import Recipe
from miner.run_dir import RunDir, write_file
from miner.subset import write_subset
from miner.tars import TarWriter
from miner.weights import ShardState, final_table, write_arrow
from trainers import models
from trainers.checkpoint import save_checkpoint

Files = dict[str, bytes]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
CLASSES = ["a", "b", "c"]


@cache
def sound(kind: str) -> Files:
    """The files of one valid input of this kind (a name in MAKERS)."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        MAKERS[kind](root)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _tar(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(path) as tar:
        for i, image in enumerate(IMAGES):
            tar.write(f"{i:04d}.png", png(image))
            tar.write(f"{i:04d}.cls", str(i % 3).encode())
            tar.write(f"{i:04d}.json", b"{}")


def _gz(path: Path) -> None:
    _tar(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes(), 1, mtime=0))
    path.with_suffix("").unlink()


def _image(root: Path) -> None:
    for name, form in (("x.jpg", "JPEG"), ("x.png", "PNG"), ("x.webp", "WEBP")):
        Image.fromarray(IMAGES[0]).save(root / name, form)
    Image.fromarray(IMAGES[0]).quantize(16).save(root / "palette.png")
    Image.fromarray(IMAGES[0][:, :, 0]).convert("I;16").save(root / "grey.png")


def _pool(root: Path) -> Pool:
    return write_arrays_pool(str(root / "in"), "tiny", IMAGES, np.arange(6) % 3, CLASSES, shard_count=2)


def _cache(root: Path) -> None:
    """A pool that brings its decoded pixels along."""
    pool = _pool(root)
    for shard in range(len(pool.shards)):
        open_shard(pool, shard, 8)


def _raw_pool(root: Path) -> None:
    _npy(root / "x.npy")
    recipe = Recipe("npy", (str(root / "x.npy"),), per_shard=4)
    planned = prepare(recipe, str(root / "in"))
    for job in planned.jobs:
        run_job(str(root / "in"), job)
    finish(recipe, str(root / "in"), "raw", planned)
    shutil.rmtree(root / "in" / "shards")
    (root / "x.npy").rename(root / "in" / "x.npy")
    path = root / "in" / "pool.json"
    path.write_text(path.read_text().replace(str(root / "x.npy"), "x.npy"))


def _npy(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, IMAGES)


def _tars(root: Path) -> None:
    _tar(root / "in" / "train-0.tar")
    with TarWriter(root / "in" / "train-1.tar") as tar:
        tar.write("9999.png", png(IMAGES[0]))
    (root / "in" / "classes.json").write_text(json.dumps(CLASSES))


def _members(images: range, folder: str) -> bytes:
    """A tar of images as `tar` makes them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in images:
            data = png(IMAGES[i])
            info = tarfile.TarInfo(f"{folder}{i}.JPEG")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _imagenet(root: Path) -> None:
    (root / "in").mkdir()
    with tarfile.open(root / "in" / "x.tar", "w") as tar:
        for number, name in enumerate(("n01440764", "n01443537")):
            data = _members(range(3 * number, 3 * number + 3), f"{name}_")
            info = tarfile.TarInfo(f"{name}.tar")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _places(root: Path) -> None:
    (root / "in").mkdir()
    (root / "in" / "x.tar").write_bytes(_members(range(6), "data_256/a/abbey/"))


def _parquet(root: Path) -> None:
    (root / "in").mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    cells = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(IMAGES)]
    table = pa.table({"image": cells, "label": [i % 3 for i in range(6)]})
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(note), root / "in" / "train-00000-of-00001.parquet", row_group_size=4)


def _npz(root: Path) -> None:
    (root / "in").mkdir()
    data = IMAGES.transpose(0, 3, 1, 2).reshape(6, -1)
    np.savez(root / "in" / "train_data_batch_1.npz", data=data, labels=np.arange(1, 7), mean=data.mean(0))


def _table(root: Path) -> pa.Table:
    index = write_arrays_pool(str(root / "pool"), "tiny", IMAGES, np.arange(6) % 3, CLASSES, shard_count=1).index()
    state = ShardState.fresh("hedge", 6)
    return final_table(index, state, 1.0, np.arange(6), {"format": "1", "seed": "0"})


def _snapshot(root: Path) -> None:
    ShardState.fresh("hedge", 6).write(root / "shard-000000.arrow")


def _weights(root: Path) -> None:
    (root / "in" / "weights").mkdir(parents=True)
    write_arrow(_table(root), root / "in" / "weights" / "shard-000000.arrow")
    shutil.rmtree(root / "pool")


def _subset(root: Path) -> None:
    table = _table(root)
    recipe = {"gamma": 1.0, "draw": "rank", "pool": {"name": "tiny"}, "settings": {"game": {"rule": "hedge"}}}
    write_subset(Pool.open(str(root / "pool")), table, root / "in", recipe, lambda count: None)
    shutil.rmtree(root / "pool")


def _run(root: Path) -> None:
    run = RunDir(root / "in")
    run.begin({"data": {"pool": "demo", "seed": 0}, "game": {"eta": 1.0}}, False)
    for round_ in (0, 1):
        write_file(run.round(round_) / "round.json", b'{"loss_scale": 1.0}')
        run.commit(round_)
        run.log({"round": round_, "loss": 0.5})


def _checkpoint(root: Path) -> None:
    meta = {"model": "small", "classes": CLASSES, "id": "demo", "seed": 0, "accuracy": 0.5, "reject": False}
    save_checkpoint(root / "x.safetensors", models.create("small", 3), meta)


def _id(root: Path) -> None:
    _tar(root / "in" / "train-0.tar")
    _tar(root / "in" / "test-0.tar")
    (root / "in" / "classes.json").write_text(
        json.dumps([{"index": i, "name": name} for i, name in enumerate(CLASSES)])
    )


MAKERS: dict[str, Callable[[Path], object]] = {
    "tar": lambda root: _tar(root / "x.tar"),
    "gz": lambda root: _gz(root / "x.tar.gz"),
    "image": _image,
    "pool": _pool,
    "raw-pool": _raw_pool,
    "remote-pool": _pool,
    "cache": _cache,
    "build": _tars,
    "imagenet": _imagenet,
    "places365": _places,
    "parquet": _parquet,
    "npz": _npz,
    "snapshot": _snapshot,
    "weights": _weights,
    "subset": _subset,
    "run": _run,
    "checkpoint": _checkpoint,
    "npy": lambda root: _npy(root / "x.npy"),
    "id": _id,
}


def mended(files: Files) -> Files:
    """``files`` with sizes and hashes that agree again where one file records another's, so that readers go on."""
    mended = dict(files)
    for name in files:
        folder, _, base = name.rpartition("/")
        try:
            if base == "pool.json":
                content = json.loads(files[name])
                for shard in content["shards"]:
                    data = files[f"{folder}/{shard['path']}"]
                    start, size = shard.get("record_offset", 0), len(data)
                    shard["bytes"] = shard["bytes"] if "record_shape" in shard else size
                    shard |= {"file_bytes": size, "sha256": _sha(data[start : start + shard["bytes"]])}
            elif base == "subset.json":
                content = json.loads(files[name])
                content["manifest_sha256"] = _sha(files[f"{folder}/manifest.parquet"])
                for tar in content["tars"]:
                    tar["sha256"] = _sha(files[f"{folder}/{tar['name']}"])
            elif base == "COMMITTED":
                content = json.loads(files[name])
                content |= {one: _sha(files[f"{folder}/{one}"]) for one in content}
            else:
                continue
            mended[name] = json.dumps(content).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # spoiled beyond that
    return mended


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
