"""Sources "npy" and "tiny-images": records of pixels in one file, which stays where it is."""

import os
from typing import IO

import numpy as np

from miner.errors import MinerError, UsageError
from miner.files import NPY_ERRORS, regular_size
from miner.recipe import PER_RAW, Job, Plan, Recipe, digest, files_of, state
from miner.tars import MAX_IMAGE

TINY = (32, 32, 3)


def plan_npy(recipe: Recipe) -> Plan:
    """Runs of up to 65,536 records of uint8 arrays [N, H, W, 3]."""
    jobs: list[Job] = []
    for path in files_of(recipe, (".npy",)):
        shape, offset = _npy_layout(path)
        first = jobs[-1].first + jobs[-1].count if jobs else 0
        jobs += _raw_jobs(path, offset, shape[0], shape[1:], "C", recipe.per_shard, len(jobs), first)
    return Plan(tuple(jobs))


def plan_tiny(recipe: Recipe) -> Plan:
    """Runs of records of `tiny_images.bin`; what the exclusion list names stays in the index, marked."""
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
    size, record, stamp = per_shard or PER_RAW, int(np.prod(shape)), digest([path, *state(path)])
    jobs: list[Job] = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        rows: tuple[int, ...] = ()
        if listed is not None:
            low, high = np.searchsorted(listed, [start, stop])
            rows = tuple((listed[low:high] - start).tolist())
        jobs.append(
            Job(
                number + len(jobs), "raw", path, stamp, first + start, stop - start, (), start,
                offset + start * record, 0, shape, order, rows,
            )
        )  # fmt: skip
    return jobs


def _npy_layout(path: str) -> tuple[tuple[int, ...], int]:
    regular_size(path)
    with open(path, "rb") as file:
        shape, fortran, dtype = npy_header(path, file)
        offset = file.tell()
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise MinerError(f"{path}: {dtype} {shape}; wanted a C-ordered uint8 array [N, H, W, 3]")
    if int(np.prod(shape[1:])) > MAX_IMAGE:
        raise MinerError(f"{path}: images of {shape[1:]} pass {MAX_IMAGE} bytes each")
    expected = offset + int(np.prod(shape, dtype=np.int64))
    if os.path.getsize(path) != expected:
        raise MinerError(f"{path}: {os.path.getsize(path)} bytes where its header says {expected}; fetch it again")
    return tuple(shape), offset


def npy_header(path: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype that a .npy header names; ``file`` then stands at its data."""
    try:
        old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        return read(file)
    except NPY_ERRORS as error:
        raise MinerError(f"{path}: no readable .npy header ({error})") from None


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
