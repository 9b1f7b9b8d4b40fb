"""What a pool is made from and how the work is cut: the recipe, its jobs, and what all kinds of source share."""

import fnmatch
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from miner.errors import MinerError, UsageError
from miner.files import check_name, read_json

PER_TAR = 10_000
PER_RAW = 65_536
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class Recipe:
    """What was asked for; with the input files it decides every byte of the pool."""

    source: str
    inputs: tuple[str, ...]
    glob: str = "*"
    exclude_list: str | None = None
    per_shard: int | None = None


@dataclass(frozen=True)
class Job:
    """One shard's work. ``stamp`` changes whenever the source files behind it do."""

    number: int
    kind: str  # "folder", "parquet": written to a tar; "npz": to a .npy; "tar", "class-tar", "folder-tar", "raw": stay
    path: str  # the file adopted or read, or the image folder
    stamp: str
    first: int = 0  # running number of the first image
    count: int = 0  # images, 0 where only reading the tar tells
    items: tuple[tuple[str, int | None], ...] = ()  # folder: relative path, class; archives: folder in it, class
    start: int = 0  # parquet, npz: first row of the file
    record_offset: int = 0  # first byte of this shard's part of the file
    size: int = 0  # archives: bytes of that part
    record_shape: tuple[int, ...] = ()
    order: str = "C"
    excluded: tuple[int, ...] = ()  # rows of this shard


@dataclass(frozen=True)
class Plan:
    """The jobs in shard order, and what the source says of its classes."""

    jobs: tuple[Job, ...]
    classes: tuple[str, ...] = ()
    class_info: Any = None
    skipped: dict[str, int] = field(default_factory=dict)


class Item(NamedTuple):
    """An image on its way into a tar: its bytes as they stand in the source, its class, its path there."""

    number: int
    ext: str
    data: bytes
    label: int | None
    path: str | None


def class_names(path: str) -> tuple[tuple[str, ...], Any]:
    """Class names in index order and the verbatim content of a `classes.json`.

    A list of names or of {"name": ..., "index": ...}, or an object from index to either. Raises MinerError.
    """
    info = read_json(path)
    try:
        pairs: Any = info.items() if isinstance(info, dict) else enumerate(info)
        named = [
            (int(value.get("index", index)), str(value["name"])) if isinstance(value, dict) else (int(index), value)
            for index, value in pairs
        ]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise MinerError(f"{path}: not a list or table of class names ({error!r})") from None
    named.sort()
    if [index for index, _ in named] != list(range(len(named))) or not all(isinstance(n, str) for _, n in named):
        raise MinerError(f"{path}: class numbers must run from 0 without gaps, each with a name")
    return tuple(name for _, name in named), info


def files_of(recipe: Recipe, suffixes: tuple[str, ...]) -> list[str]:
    """The input files with one of these endings, absolute, each once; folders give those that match ``glob``."""
    found: list[str] = []
    for path in map(os.path.abspath, recipe.inputs):
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if fnmatch.fnmatch(name, recipe.glob))
            found += [os.path.join(path, name) for name in names if name.endswith(suffixes)]
        elif path.endswith(suffixes):
            found.append(path)
        else:
            raise UsageError(f"{path}: --source {recipe.source} takes {' or '.join(suffixes)}")
    if not found:
        raise MinerError(f"{recipe.inputs[0]}: no {' or '.join(suffixes)} matching --glob {recipe.glob!r}")
    return list(dict.fromkeys(map(check_name, found)))


def class_of(source: str, folder: str) -> str | None:
    """The class of an image in this folder, relative to the root ("" is the root itself); None where it has none.

    Source "folder": its first part, as in torchvision. "places365": all of it from the single letter on, written as in
    the authors' list: `/a/apartment_building/outdoor`.
    """
    parts = folder.split("/")
    if source == "folder":
        return parts[0] or None
    letter = next((i for i, part in enumerate(parts) if len(part) == 1 and part.isalpha()), len(parts))
    return "/" + "/".join(parts[letter:]) if letter < len(parts) - 1 else None


def check_splits(path: str, classes: list[str], template: str) -> None:
    """UsageError where the "classes" are the splits of a data set, whose classes lie one folder deeper.

    ``template`` says how to choose one of them, SPLIT standing for its name.
    """
    if classes and SPLITS.issuperset(classes):
        one = "train" if "train" in classes else classes[0]
        raise UsageError(f"{path}: holds {', '.join(classes)}, no classes; choose: {template.replace('SPLIT', one)}")


def state(path: str) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def digest(value: Any) -> str:
    """A stamp of anything that JSON can say."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
