"""Source "npz": ImageNet32 and ImageNet64 as distributed, unpacked into .npy files that the pool maps."""

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import IO

import numpy as np

from miner.errors import MinerError, disk_full
from miner.files import regular_size
from miner.recipe import PER_RAW, Job, Plan, Recipe, digest, files_of, state
from miner.source_arrays import npy_header
from miner.tars import MAX_IMAGE, MAX_LABEL

BATCH = re.compile(r"(train|val|test)_data(_batch_[0-9]+)?")  # the older ImageNet32: pickles without an ending
CHUNK = 4 << 20
NAMES = "map_clsloc.txt"


def plan_npz(recipe: Recipe) -> Plan:
    """Jobs of up to 65,536 images of the batches in which downsampled ImageNet is distributed."""
    for path in recipe.inputs:
        _refuse_pickles(path)
    jobs: list[Job] = []
    paths = files_of(recipe, (".npz",))
    for path in sorted(paths, key=_in_number_order):
        (count, side), size, stamp = _layout(path), recipe.per_shard or PER_RAW, digest([path, *state(path)])
        first = jobs[-1].first + jobs[-1].count if jobs else 0
        for start in range(0, count, size):
            rows, shape = min(size, count - start), (side, side, 3)
            jobs.append(Job(len(jobs), "npz", path, stamp, first + start, rows, start=start, record_shape=shape))
    notes = sorted({os.path.join(os.path.dirname(path), NAMES) for path in paths})
    found = [_wordnet_ids(note) for note in notes if os.path.exists(note)]
    return Plan(tuple(jobs), found[0] if found else ())


def _in_number_order(path: str) -> tuple[str, list[int], str]:
    return os.path.dirname(path), [int(digits) for digits in re.findall("[0-9]{1,9}", os.path.basename(path))], path


def _refuse_pickles(path: str) -> None:
    """MinerError for the batches of the first release."""
    names = os.listdir(path) if os.path.isdir(path) else [os.path.basename(path)]
    if any(name.endswith(".npz") for name in names):
        return
    for name in sorted(names):
        file = os.path.join(path, name) if os.path.isdir(path) else path
        if BATCH.fullmatch(name) and os.path.isfile(file):
            raise MinerError(f"{file}: a pickled batch, and unpickling runs code; fetch the .npz release instead")


def _wordnet_ids(path: str) -> tuple[str, ...]:
    """Class names from lines `n02119789 1 kit_fox`: the numbers are those of the batches' labels, from 1."""
    regular_size(path)
    rows: dict[int, str] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            match = re.fullmatch(r"(n[0-9]{8}) ([0-9]{1,6}) \S{1,200}\s*", line)
            if match is None or number > MAX_LABEL:
                raise MinerError(f"{path}: line {number}: not a WordNet id, number and name; restore or remove it")
            rows[int(match[2])] = match[1]
    if sorted(rows) != list(range(1, len(rows) + 1)):
        raise MinerError(f"{path}: class numbers must run from 1 without gaps; restore or remove it")
    return tuple(rows[number] for number in sorted(rows))


@contextmanager
def _archive(path: str) -> Iterator[zipfile.ZipFile]:
    """An .npz, every failure of which is a MinerError. numpy.load would read all of it at once."""
    regular_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (
        zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError, ValueError,
        OverflowError, OSError,
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and disk_full(error, path):
            raise  # of what is written meanwhile
        raise MinerError(f"{path}: not a sound .npz ({error}); fetch it again") from None


def _layout(path: str) -> tuple[int, int]:
    """Number of images in a `train_data_batch_1.npz`, and pixels a side."""
    with _archive(path) as archive:
        names = set(archive.namelist())
        if "data.npy" not in names:
            raise MinerError(f"{path}: no array `data`; --source npz takes ImageNet32's or 64's train_data_batch_1.npz")
        shape, dtype = _array(path, archive, "data")
        side = isqrt(shape[-1] // 3) if shape else 0
        sound = dtype == np.uint8 and len(shape) == 2 and shape[0] > 0 and side > 0 and shape[1] == 3 * side * side
        if not sound or shape[1] > MAX_IMAGE:
            raise MinerError(f"{path}: data is {dtype} {shape}; wanted uint8 [N, 3 x S x S]")
        if "labels.npy" in names:
            found, dtype = _array(path, archive, "labels")
            if found != shape[:1] or dtype.kind not in "iu":
                raise MinerError(f"{path}: labels are {dtype} {found}; wanted {shape[0]} integers")
    return shape[0], side


def _array(path: str, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one array of plain numbers, which has as many bytes as its header says."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MinerError(f"{path}: {name}: compressed in another way than numpy does")
    with archive.open(info) as file:
        shape, fortran, dtype = npy_header(path, file)
        offset = file.tell()
    if dtype.hasobject or fortran:
        raise MinerError(f"{path}: {name} is {dtype} {shape}: refused, not plain numbers in C order")
    expected = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if info.file_size != expected:
        raise MinerError(f"{path}: {name}: {info.file_size} bytes where its header says {expected}; fetch it again")
    return shape, dtype


def unpack_npz(job: Job, file: IO[bytes]) -> tuple[int, str, list[str], list[int | None]]:
    """Write one job's images to ``file`` as a .npy, uint8 [n, S, S, 3]; four megabytes at a time.

    Returns the offset of the first record, the SHA-256 of all, the uid of each and its class, counted from 0.
    """
    n, (side, _, _) = job.count, job.record_shape
    record = 3 * side * side
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *job.record_shape)}
    np.lib.format.write_array_header_1_0(file, header)
    offset, whole, uids = file.tell(), hashlib.sha256(), []
    with _archive(job.path) as archive:
        labels = _labels(job, archive)
        with archive.open("data.npy") as data:
            npy_header(job.path, data)
            data.seek(job.start * record, os.SEEK_CUR)
            step = max(1, CHUNK // record)
            for start in range(0, n, step):
                count = min(step, n - start)
                block = data.read(count * record)
                if len(block) != count * record:
                    raise MinerError(f"{job.path}: cut off; fetch it again")
                planes = np.frombuffer(block, np.uint8).reshape(count, 3, side, side)
                pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1)).reshape(count, record)
                uids += [hashlib.blake2b(image.data, digest_size=16).hexdigest() for image in pixels]
                whole.update(pixels.data)
                file.write(pixels.data)
    return offset, whole.hexdigest(), uids, labels


def _labels(job: Job, archive: zipfile.ZipFile) -> list[int | None]:
    if "labels.npy" not in archive.namelist():
        return [None] * job.count
    with archive.open("labels.npy") as file:
        dtype = npy_header(job.path, file)[2]
        file.seek(job.start * dtype.itemsize, os.SEEK_CUR)
        labels = np.frombuffer(file.read(job.count * dtype.itemsize), dtype)
    if len(labels) != job.count or labels.min() < 1 or labels.max() > MAX_LABEL:
        raise MinerError(f"{job.path}: labels count from 1, as downsampled ImageNet's do")
    return [int(label) - 1 for label in labels]
