"""What a pool can be made from: an image folder, WebDataset tars, `.npy` arrays, `tiny_images.bin`.

`plan` only looks at names, sizes and headers and cuts the work into jobs, one a shard. The cut depends on the
source and `per_shard`, never on the number of workers.
"""

import fnmatch
import hashlib
import json
import os
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miner.errors import MinerError, UsageError
from miner.files import read_json, regular_size
from miner.tars import IMAGES, MAX_IMAGE

PER_TAR = 10_000
PER_RAW = 65_536
TINY = (32, 32, 3)
# What numpy raises on a hostile .npy header: it is a Python literal.
NPY_ERRORS = (
    ValueError, EOFError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError, KeyError, IndexError,
    tokenize.TokenError,
)  # fmt: skip


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
    kind: str  # "folder", "tar" or "raw"
    path: str  # the file adopted, or the image folder
    stamp: str
    first: int = 0  # running number of the first image
    count: int = 0  # images, 0 where only reading the tar tells
    items: tuple[tuple[str, int | None], ...] = ()  # folder: relative path, class
    record_offset: int = 0
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


def plan(recipe: Recipe) -> Plan:
    """Cut a source into jobs. UsageError or MinerError when it is missing, empty or of another kind."""
    plans = {"folder": _plan_folder, "tars": _plan_tars, "npy": _plan_npy, "tiny-images": _plan_tiny}
    if recipe.source not in plans:
        raise UsageError(f"--source {recipe.source}: one of {', '.join(plans)}")
    if recipe.per_shard is not None and recipe.per_shard < 1:
        raise UsageError(f"--per-shard {recipe.per_shard}: at least 1")
    if recipe.exclude_list and recipe.source != "tiny-images":
        raise UsageError("--exclude-list goes with --source tiny-images only")
    if not recipe.inputs:
        raise UsageError("--input: give at least one path")
    for path in recipe.inputs:
        if not os.path.exists(path):
            raise MinerError(f"{path}: no such file or folder; check --input")
    return plans[recipe.source](recipe)


def _plan_folder(recipe: Recipe) -> Plan:
    if len(recipe.inputs) != 1 or not os.path.isdir(recipe.inputs[0]):
        raise UsageError("--source folder: --input takes one folder, with a sub-folder for each class")
    root = os.path.abspath(recipe.inputs[0])
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    skipped = {"not an image": 0, "over 16 MB": 0}
    found = list(_images(root, "", None, False, skipped))
    for label, name in enumerate(classes):
        found += _images(root, name, label, True, skipped)
    if not found:
        raise MinerError(f"{root}: no images ({', '.join(IMAGES)}) in it or its sub-folders")
    size = recipe.per_shard or PER_TAR
    jobs = []
    for number, start in enumerate(range(0, len(found), size)):
        part = found[start : start + size]
        stamp = _digest([entry[:1] + entry[2:] for entry in part])
        items = tuple(entry[:2] for entry in part)
        jobs.append(Job(number, "folder", root, stamp, first=start, count=len(part), items=items))
    return Plan(tuple(jobs), tuple(classes), skipped=skipped)


def _images(
    root: str, folder: str, label: int | None, deep: bool, skipped: dict[str, int]
) -> Iterator[tuple[str, int | None, int, int]]:
    for where, folders, names in os.walk(os.path.join(root, folder)):
        folders[:] = sorted(folders) if deep else []
        for name in sorted(names):
            path = os.path.join(where, name)
            if name.rpartition(".")[2].lower() not in IMAGES or name.startswith("."):
                skipped["not an image"] += 1
                continue
            if not os.path.isfile(path):  # a pipe would never end
                skipped["not an image"] += 1
                continue
            size, time = _state(path)
            if size > MAX_IMAGE:
                skipped["over 16 MB"] += 1
                continue
            yield os.path.relpath(path, root), label, size, time


def _plan_tars(recipe: Recipe) -> Plan:
    paths = _files(recipe, (".tar", ".tar.gz"))
    plain = set(paths)
    # `gunzip -k` leaves both: the same images twice.
    paths = [path for path in paths if not (path.endswith(".gz") and path.removesuffix(".gz") in plain)]
    jobs = [Job(number, "tar", path, _digest([path, *_state(path)])) for number, path in enumerate(paths)]
    notes = {os.path.join(os.path.dirname(path), "classes.json") for path in paths}
    read = [class_names(note) for note in sorted(notes) if os.path.exists(note)]
    if any(other != read[0] for other in read[1:]):
        raise MinerError(f"{', '.join(sorted(notes))}: different classes; make one pool of each folder")
    classes, info = read[0] if read else ((), None)
    return Plan(tuple(jobs), classes, info)


def _plan_npy(recipe: Recipe) -> Plan:
    jobs: list[Job] = []
    for path in _files(recipe, (".npy",)):
        shape, offset = _npy_layout(path)
        first = jobs[-1].first + jobs[-1].count if jobs else 0
        jobs += _raw_jobs(path, offset, shape[0], shape[1:], "C", recipe.per_shard, len(jobs), first)
    return Plan(tuple(jobs))


def _plan_tiny(recipe: Recipe) -> Plan:
    if len(recipe.inputs) != 1 or not os.path.isfile(recipe.inputs[0]):
        raise UsageError("--source tiny-images: --input takes one file, tiny_images.bin")
    path = os.path.abspath(recipe.inputs[0])
    size, record = os.path.getsize(path), int(np.prod(TINY))
    if size == 0 or size % record:
        raise MinerError(f"{path}: {size} bytes are no whole number of {record}-byte records; fetch it again")
    count = size // record
    listed = _exclude_list(recipe.exclude_list, count) if recipe.exclude_list else np.empty(0, np.int64)
    return Plan(tuple(_raw_jobs(path, 0, count, TINY, "F", recipe.per_shard, 0, 0, listed)))


def _raw_jobs(
    path: str,
    offset: int,
    count: int,
    shape: tuple[int, ...],
    order: str,
    per_shard: int | None,
    number: int,
    first: int,
    listed: np.ndarray | None = None,
) -> list[Job]:
    size, record, stamp = per_shard or PER_RAW, int(np.prod(shape)), _digest([path, *_state(path)])
    jobs: list[Job] = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        rows: tuple[int, ...] = ()
        if listed is not None:
            low, high = np.searchsorted(listed, [start, stop])
            rows = tuple((listed[low:high] - start).tolist())
        jobs.append(
            Job(
                number + len(jobs), "raw", path, stamp, first + start, stop - start, (),
                offset + start * record, shape, order, rows,
            )
        )  # fmt: skip
    return jobs


def _npy_layout(path: str) -> tuple[tuple[int, ...], int]:
    regular_size(path)
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            old = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except NPY_ERRORS as error:
            raise MinerError(f"{path}: no readable .npy header ({error})") from None
        offset = file.tell()
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise MinerError(f"{path}: {dtype} {shape}; wanted a C-ordered uint8 array [N, H, W, 3]")
    if int(np.prod(shape[1:])) > MAX_IMAGE:
        raise MinerError(f"{path}: images of {shape[1:]} pass {MAX_IMAGE} bytes each")
    expected = offset + int(np.prod(shape, dtype=np.int64))
    if os.path.getsize(path) != expected:
        raise MinerError(f"{path}: {os.path.getsize(path)} bytes where its header says {expected}; fetch it again")
    return tuple(shape), offset


def _exclude_list(path: str, count: int) -> np.ndarray:
    """0-based rows from a file of 1-based numbers, one a line; sorted, int64."""
    rows = set()
    with open(path, encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if text and not (text.isdigit() and len(text) < 20 and 1 <= int(text) <= count):
                raise MinerError(f"{path}: line {number}: {text[:40]!r} is no image number from 1 to {count}")
            if text:
                rows.add(int(text) - 1)
    return np.array(sorted(rows), np.int64)


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


def _files(recipe: Recipe, suffixes: tuple[str, ...]) -> list[str]:
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
    return list(dict.fromkeys(found))


def _state(path: str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
