"""What a pool can be made from. `plan` only looks at names, sizes and headers and cuts the work into jobs, one a shard.

The cut depends on the source and `per_shard`, never on the number of workers. Each kind has a module: source_files.py,
source_archive.py, source_arrays.py, source_npz.py, source_parquet.py. `detect` tells which one it is.
"""

import fnmatch
import os
from itertools import islice

from miner.errors import MinerError, UsageError
from miner.files import check_name
from miner.headers import Headers, safe_headers
from miner.recipe import Plan, Recipe, class_of
from miner.source_archive import plan_imagenet, plan_packed_folder
from miner.source_arrays import plan_npy, plan_tiny
from miner.source_files import plan_folder, plan_tars
from miner.source_npz import BATCH, plan_npz
from miner.source_parquet import plan_parquet
from miner.tars import IMAGES

PEEK = 256  # members of a tar that tell what it is
WORDS = {
    "folder": "image files in folders",
    "places365": "image files in folders like a/abbey",
    "tars": "WebDataset tars",
    "imagenet": "one tar of images a class, as ImageNet is distributed",
    "parquet": "Hugging Face Parquet files",
    "npz": "batches of downsampled ImageNet (.npz)",
    "npy": "arrays (.npy)",
    "tiny-images": "tiny_images.bin",
}


def plan(recipe: Recipe) -> Plan:
    """Cut a source into jobs. UsageError or MinerError when it is missing, empty or of another kind."""
    packed = len(recipe.inputs) == 1 and recipe.inputs[0].endswith(".tar") and os.path.isfile(recipe.inputs[0])
    folder = plan_packed_folder if packed else plan_folder
    plans = {
        "folder": folder,
        "places365": folder,
        "tars": plan_tars,
        "imagenet": plan_imagenet,
        "parquet": plan_parquet,
        "npz": plan_npz,
        "npy": plan_npy,
        "tiny-images": plan_tiny,
    }
    if recipe.source not in plans:
        raise UsageError(f"--source {recipe.source}: one of {', '.join(plans)}")
    if recipe.per_shard is not None and recipe.per_shard < 1:
        raise UsageError(f"--per-shard {recipe.per_shard}: at least 1")
    if recipe.exclude_list and recipe.source != "tiny-images":
        raise UsageError("--exclude-list goes with --source tiny-images only")
    if recipe.per_shard is not None and recipe.source in ("tars", "imagenet"):
        raise UsageError(f"--per-shard: --source {recipe.source} makes one shard of each tar; leave it out")
    _check_there(recipe.inputs)
    chosen_from = (packed and plans[recipe.source] is plan_packed_folder) or any(map(os.path.isdir, recipe.inputs))
    if recipe.glob != "*" and not chosen_from:
        raise UsageError("--glob: chooses in folders, and --input names none; leave it out")
    return plans[recipe.source](recipe)


def detect(inputs: tuple[str, ...], glob: str = "*") -> tuple[str, str]:
    """The source that lies at ``inputs``, and in words what was found. UsageError where that is not clear."""
    _check_there(inputs)
    first = inputs[0]
    names = [
        os.path.join(path, name)
        for path in inputs
        for name in (sorted(os.listdir(path)) if os.path.isdir(path) else [""])
        if fnmatch.fnmatch(name, glob) or not name
    ]
    files = [name.rstrip("/") for name in names if not os.path.isdir(name)]
    kinds = {
        "tars": [name for name in files if name.endswith((".tar", ".tar.gz"))],  # sidecars may lie beside them
        "parquet": [name for name in files if name.endswith(".parquet")],
        "npz": [name for name in files if name.endswith(".npz") or BATCH.fullmatch(os.path.basename(name))],
        "npy": [name for name in files if name.endswith(".npy")],
        "tiny-images": [name for name in files if os.path.basename(name) == "tiny_images.bin"],
    }
    found = {kind: paths for kind, paths in kinds.items() if paths}
    if "tars" in found:
        found = {_kind_of_tars(found["tars"], inputs): found["tars"]}
    if len(found) > 1:
        raise UsageError(f"{first}: holds {' and '.join(WORDS[kind] for kind in found)}; choose with --source")
    if found:
        [(kind, paths)] = found.items()
        return kind, f"{WORDS[kind]} ({len(paths):,} file{'s' * (len(paths) > 1)})"
    if os.path.isdir(data := os.path.join(first, "data")) and any(n.endswith(".parquet") for n in os.listdir(data)):
        return "parquet", WORDS["parquet"]
    if not os.path.isdir(first):
        raise UsageError(f"{first}: neither a folder nor .tar, .parquet, .npz, .npy or tiny_images.bin; see --source")
    folders = [name for name in os.listdir(first) if os.path.isdir(os.path.join(first, name)) and name[0] != "."]
    if not folders and not any(name.rpartition(".")[2].lower() in IMAGES for name in os.listdir(first)):
        raise UsageError(f"{first}: nothing in it that makes a pool (--glob {glob!r}); see --source")
    letters = bool(folders) and all(len(name) == 1 and name.isalpha() for name in folders)
    kind = "places365" if letters else "folder"
    return kind, WORDS[kind]


def _kind_of_tars(paths: list[str], inputs: tuple[str, ...]) -> str:
    """By the first members of the first one: tars, images beside labels or captions, or images in folders alone."""
    if paths[0].endswith(".gz"):
        return "tars"
    with Headers(paths[0]) as file:
        names = [info.name.removeprefix("./") for info in islice(safe_headers(paths[0], file), PEEK)]
    if any(name.endswith(".tar") for name in names):
        return "imagenet"
    base = os.path.basename(paths[0]).removesuffix(".tar")
    images = {name for name in names if name.rpartition(".")[2].lower() in IMAGES}
    alike = all(os.path.basename(name).startswith(f"{base}_") for name in names)
    if names and alike and len(images) == len(names):
        return "imagenet"  # n01440764.tar with n01440764_10026.JPEG: one of its inner tars
    beside = {_key(name) for name in names if name not in images} & {_key(name) for name in images}
    alone = not beside and all("/" in name for name in images)
    if tuple(paths) != inputs or len(paths) > 1 or not images or not alone:
        return "tars"
    return "places365" if all(class_of("places365", os.path.dirname(name)) for name in images) else "folder"


def _key(name: str) -> str:
    """What WebDataset takes for the key of a member."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _check_there(inputs: tuple[str, ...]) -> None:
    if not inputs:
        raise UsageError("--input: give at least one path")
    for path in inputs:
        if not os.path.exists(path):
            raise MinerError(f"{path}: no such file or folder; check --input")
        check_name(os.path.abspath(path))
