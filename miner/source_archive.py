"""Data sets as distributed in one tar, read where it lies: ImageNet's tar of tars, and image folders in a tar.

Nothing is unpacked: the pool's index points into the archive. Sources "imagenet", "folder" and "places365".
"""

import fnmatch
import os
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from miner.errors import MinerError, UsageError
from miner.files import read_ranges
from miner.recipe import PER_TAR, Job, Plan, Recipe, check_splits, class_of, digest, files_of, state
from miner.tars import IMAGES, MAX_IMAGE, Headers, safe_headers, why_no_key

BLOCK = tarfile.BLOCKSIZE
AT_ONCE = 256  # images read before their rows are made


def plan_imagenet(recipe: Recipe) -> Plan:
    """One job a class: the tars inside `ILSVRC2012_img_train.tar`, or those tars by themselves."""
    found: list[tuple[str, str, int, int]] = []  # class, file, first byte, bytes
    for path in files_of(recipe, (".tar",)):
        with Headers(path) as file:
            inner = [
                (_stem(info.name), path, info.offset_data, info.size)
                for info in safe_headers(path, file)
                if info.name.endswith(".tar")
            ]
            found += inner or [(_stem(path), path, 0, file.size)]
    found.sort()
    classes = [name for name, *_ in found]
    for name, other in pairwise(classes):
        if name == other:
            raise MinerError(f"{found[0][1]}: two tars of class {name!r}; give each once")
    jobs = [
        Job(i, "class-tar", path, digest([path, *state(path)]), items=((name, i),), record_offset=start, size=size)
        for i, (name, path, start, size) in enumerate(found)
    ]
    return Plan(tuple(jobs), tuple(classes))


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".tar")


def plan_packed_folder(recipe: Recipe) -> Plan:
    """Jobs of up to 10,000 images that lie together in a tar of an image folder; ``glob`` chooses among its folders."""
    paths = files_of(recipe, (".tar",))
    if len(paths) != 1:
        raise UsageError(f"--source {recipe.source}: --input takes one folder, or one .tar of a folder")
    path, skipped = paths[0], {"not an image": 0, "over 16 MB": 0}
    parts: list[dict[str, Any]] = []
    with Headers(path) as file:
        for info in safe_headers(path, file):
            folder = _folder(info)
            if not fnmatch.fnmatch(folder, recipe.glob):
                continue
            if not _is_image(info) or info.size > MAX_IMAGE:
                skipped["over 16 MB" if _is_image(info) else "not an image"] += 1
                continue
            if not parts or parts[-1]["count"] == (recipe.per_shard or PER_TAR):
                parts.append({"start": info.offset, "count": 0, "folders": set()})
            parts[-1]["count"] += 1
            parts[-1]["folders"].add(folder)
            parts[-1]["stop"] = info.offset_data + -(-info.size // BLOCK) * BLOCK
    if not parts:
        raise MinerError(f"{path}: no images ({', '.join(IMAGES)}) in its folders that match --glob {recipe.glob!r}")
    labels, classes = _labels(recipe.source, path, set().union(*(part["folders"] for part in parts)))
    jobs: list[Job] = []
    for number, part in enumerate(parts):
        items = tuple((folder, labels[folder]) for folder in sorted(part["folders"]))
        first = jobs[-1].first + jobs[-1].count if jobs else 0
        stamp, size = digest([path, *state(path)]), part["stop"] - part["start"]
        job = Job(number, "folder-tar", path, stamp, first, part["count"], items, 0, part["start"], size)
        jobs.append(job)
    return Plan(tuple(jobs), classes, skipped=skipped)


def _labels(source: str, path: str, folders: set[str]) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """The class number of each folder, and the names of all classes."""
    root = os.path.commonpath(folders) if source == "folder" else ""
    names = {folder: class_of(source, folder.removeprefix(root).lstrip("/")) for folder in folders}
    classes = sorted({name for name in names.values() if name is not None})
    if source == "folder":
        check_splits(path, classes, f"--glob '{os.path.join(root, 'SPLIT')}/*'")
    elif not classes:
        raise MinerError(f"{path}: no folders like data_256/a/abbey; take --source folder")
    numbers = {name: number for number, name in enumerate(classes)}
    return {folder: None if name is None else numbers[name] for folder, name in names.items()}, tuple(classes)


def _folder(info: tarfile.TarInfo) -> str:
    return info.name.removeprefix("./").rpartition("/")[0]


def _is_image(info: tarfile.TarInfo) -> bool:
    parts = info.name.split("/")
    hidden = any(part.startswith(".") and part != "." for part in parts)
    return parts[-1].rpartition(".")[2].lower() in IMAGES and not hidden


def archive_rows(job: Job) -> Iterator[dict[str, Any]]:
    """key, ext, offset (in the file), data, label and path of each image of one job, in archive order.

    An image of a class tar is known by its name (`n01440764_10026`, dots made underscores: WebDataset cuts keys at the
    first), one of a packed folder by its running number.
    """
    labels = dict(job.items)
    name = job.path if job.kind == "folder-tar" or not job.record_offset else f"{job.path}: {job.items[0][0]}.tar"
    with Headers(job.path, job.record_offset, job.size) as file:
        if job.record_offset + job.size > file.whole:
            raise MinerError(f"{name}: cut off; fetch it again")
        waiting: list[dict[str, Any]] = []
        number = job.first
        for info in safe_headers(name, file, ended=job.kind == "class-tar"):
            folder = _folder(info)
            if not _is_image(info) or (job.kind == "folder-tar" and (folder not in labels or info.size > MAX_IMAGE)):
                continue
            if info.size > MAX_IMAGE:
                raise MinerError(f"{name}: member {info.name!r}: {info.size} bytes; at most {MAX_IMAGE} are read")
            stem, _, ext = info.name.rpartition("/")[2].rpartition(".")
            in_class = job.kind == "class-tar"
            key = stem.replace(".", "_") if in_class else f"{number:09d}"
            if (why := why_no_key(key)) is not None:
                raise MinerError(f"{name}: member {info.name!r}: {why}; unpack it, take --source folder")
            row = {
                "key": key,
                "ext": ext.lower().replace("jpeg", "jpg"),
                "offset": job.record_offset + info.offset_data,
                "size": info.size,
                "label": job.items[0][1] if in_class else labels[folder],
                "path": info.name.removeprefix("./"),
            }
            waiting.append(row)
            number += 1
            if len(waiting) == AT_ONCE:
                yield from _read(job.path, waiting)
                waiting = []
        yield from _read(job.path, waiting)
    if number == job.first or (job.count and number != job.first + job.count):
        raise MinerError(f"{name}: {number - job.first} images, not {job.count or 'some'}; fetch it again")


def _read(path: str, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    images = read_ranges(path, [(row["offset"], row["size"]) for row in rows])
    for row, data in zip(rows, images, strict=True):
        yield {**row, "data": data}
