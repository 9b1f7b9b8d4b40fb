"""Sources "folder" and "places365", image files on disk; source "tars", WebDataset tars that stay where they are."""

import fnmatch
import os
from collections.abc import Iterator

from miner.errors import MinerError, UsageError
from miner.files import check_name
from miner.recipe import PER_TAR, Item, Job, Plan, Recipe, check_splits, class_names, class_of, digest, files_of, state
from miner.tars import IMAGES, MAX_IMAGE


def plan_folder(recipe: Recipe) -> Plan:
    """Jobs of up to 10,000 image files, by name; classes are folders (see ``class_of``) that hold images.

    ``glob`` chooses among the files' paths below the folder; hidden files and folders stay out.
    """
    if len(recipe.inputs) != 1 or not os.path.isdir(recipe.inputs[0]):
        raise UsageError(f"--source {recipe.source}: --input takes one folder with a folder a class, or one .tar")
    root = os.path.abspath(recipe.inputs[0])
    skipped = {"not an image": 0, "over 16 MB": 0}
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if recipe.source == "folder":
        check_splits(root, folders, f"--input {os.path.join(root, 'SPLIT')}")
    seen = list(_images(root, "", recipe.glob, False, skipped))
    for name in folders:
        seen += _images(root, name, recipe.glob, True, skipped)
    if not seen:
        which = "" if recipe.glob == "*" else f" that match --glob {recipe.glob!r}"
        raise MinerError(f"{root}: no images ({', '.join(IMAGES)}) in it or its sub-folders{which}")
    names = [class_of(recipe.source, os.path.dirname(path)) for path, _, _ in seen]
    classes = sorted({name for name in names if name is not None})
    if recipe.source == "places365" and not classes:
        raise MinerError(f"{root}: no folders like a/abbey; give the folder that holds a, b, c, ...")
    labels = {name: label for label, name in enumerate(classes)}
    found = [
        (path, None if name is None else labels[name], size, time)
        for (path, size, time), name in zip(seen, names, strict=True)
    ]
    size = recipe.per_shard or PER_TAR
    jobs = []
    for number, start in enumerate(range(0, len(found), size)):
        part = found[start : start + size]
        stamp = digest(part)
        items = tuple(entry[:2] for entry in part)
        jobs.append(Job(number, "folder", root, stamp, first=start, count=len(part), items=items))
    return Plan(tuple(jobs), tuple(classes), skipped=skipped)


def _images(root: str, folder: str, glob: str, deep: bool, skipped: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """Path below ``root``, bytes and time of each image file whose path matches ``glob``."""
    for where, folders, names in os.walk(os.path.join(root, folder)):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if deep else []
        for name in sorted(names):
            path = os.path.join(where, name)
            if not fnmatch.fnmatch(os.path.relpath(path, root), glob):
                continue
            if name.rpartition(".")[2].lower() not in IMAGES or name.startswith("."):
                skipped["not an image"] += 1
                continue
            if not os.path.isfile(path):  # a pipe would never end
                skipped["not an image"] += 1
                continue
            size, time = state(path)
            if size > MAX_IMAGE:
                skipped["over 16 MB"] += 1
                continue
            yield os.path.relpath(check_name(path), root), size, time


def folder_items(job: Job) -> Iterator[Item]:
    """The images of one job, read from disk."""
    for number, (path, label) in enumerate(job.items, job.first):
        with open(os.path.join(job.path, path), "rb") as file:
            data = file.read(MAX_IMAGE + 1)
        if len(data) > MAX_IMAGE:
            raise MinerError(f"{os.path.join(job.path, path)}: grew over {MAX_IMAGE} bytes; run again")
        yield Item(number, path.rpartition(".")[2].lower().replace("jpeg", "jpg"), data, label, path)


def plan_tars(recipe: Recipe) -> Plan:
    """One job a WebDataset tar; class names from `classes.json` beside them."""
    paths = files_of(recipe, (".tar", ".tar.gz"))
    plain = set(paths)
    # `gunzip -k` leaves both: the same images twice.
    paths = [path for path in paths if not (path.endswith(".gz") and path.removesuffix(".gz") in plain)]
    jobs = [Job(number, "tar", path, digest([path, *state(path)])) for number, path in enumerate(paths)]
    notes = {os.path.join(os.path.dirname(path), "classes.json") for path in paths}
    read = [class_names(note) for note in sorted(notes) if os.path.exists(note)]
    if any(other != read[0] for other in read[1:]):
        raise MinerError(f"{', '.join(sorted(notes))}: different classes; make one pool of each folder")
    classes, info = read[0] if read else ((), None)
    return Plan(tuple(jobs), classes, info)
