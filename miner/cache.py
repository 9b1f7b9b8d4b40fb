"""Decode once: each shard as a memory-mapped uint8 [n, size, size, 3] array, complete or absent."""

import contextlib
import json
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miner.buckets import is_url
from miner.errors import MinerError
from miner.files import NPY_ERRORS, atomic, read_json
from miner.images import decode, fit
from miner.manifest import Shard
from miner.pool import Pool
from trainers.image_set import ImageSet

VERSION = 1  # raise when decoding gives other pixels
ABANDONED = 3600.0  # seconds without a write after which a half-written array is nobody's
CHUNK = 256  # images decoded between two writes
MAPPED = 64 << 20  # bytes of a file that stay in a process after they were lent


def open_shard(pool: Pool, shard: int, size: int, directory: str | None = None) -> tuple[np.ndarray, dict[int, str]]:
    """Pixels of one shard and the rows that did not decode.

    Returns read-only uint8 [n, size, size, 3], memory-mapped, and {row: reason} (zeros there). The first
    call writes ``<folder>/<size>/000000.npy``: under ``directory`` or $OUTLIER_CACHE where one is given (a quick disk
    of each machine), else in the pool, or for a read-only or remote pool under ~/.cache/outlier-miner.
    A local raw shard of that very size is its own cache. Raises MinerError when the disk is full or the shard cannot be
    read.
    """
    entry = pool.shards[shard]
    if _is_own_cache(entry, size):
        return pool.records(shard), {}
    stem = _stem(pool, shard, size, directory)
    found = _load(stem, entry, size)
    if found is None:
        os.makedirs(os.path.dirname(stem), exist_ok=True)
        _build(pool, shard, size, stem)
        found = _load(stem, entry, size)
    if found is None:
        raise MinerError(f"{stem}.npy: changed while it was written; remove it and run again")
    return found


def is_there(pool: Pool, shard: int, size: int) -> bool:
    """Whether ``open_shard`` has nothing to decode."""
    entry = pool.shards[shard]
    return _is_own_cache(entry, size) or _load(_stem(pool, shard, size), entry, size) is not None


def _is_own_cache(entry: Shard, size: int) -> bool:
    return entry.kind == "raw" and entry.record_shape == (size, size, 3) and not is_url(entry.path)


def _stem(pool: Pool, shard: int, size: int, directory: str | None = None) -> str:
    """Path of a shard's cache without its ending."""
    return os.path.join(_folder(pool, directory), str(size), f"{shard:06d}")


def gather(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy of these rows of what ``open_shard`` gave."""
    found = images[rows]
    let_go(images)
    return found


class Lender:
    """Lends images of decoded shards to who copies them at once, and lets go of the pages of those lent before."""

    def __init__(self) -> None:
        self.images, self.bytes = np.empty(0), 0

    def lend(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """As ``gather``, but rows that follow each other are a view of the file."""
        if images is not self.images or self.bytes > MAPPED:
            let_go(self.images)
            self.images, self.bytes = images, 0
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            view = np.asarray(images)[int(rows[0]) :][: len(rows)]
            if view.flags.c_contiguous:
                self.bytes += view.nbytes
                return view
        return gather(images, rows)


def digests(images: np.ndarray) -> np.ndarray:
    """``ImageSet.digests`` of what ``open_shard`` gave."""
    found = ImageSet("shard", (images,)).digests()
    let_go(images)
    return found


def let_go(images: np.ndarray) -> None:
    """Unmap the pages of a file: they stay in the system's cache, but no process grows as large as the pool."""
    mapped = getattr(images, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def is_shared(pool: Pool) -> bool:
    """Whether the cache lies in the pool's own folder, so that all who see the pool see it."""
    return _folder(pool, None) == os.path.join(pool.path, "cache")


def _folder(pool: Pool, directory: str | None) -> str:
    base = directory or os.environ.get("OUTLIER_CACHE")
    if base is None and not is_url(pool.path) and os.access(pool.path, os.W_OK):
        return os.path.join(pool.path, "cache")
    return os.path.join(base or os.path.expanduser("~/.cache/outlier-miner"), pool.fingerprint)


def _stamp(entry: Shard, size: int) -> dict[str, Any]:
    return {"version": VERSION, "sha256": entry.sha256, "count": entry.count, "size": size}


def _load(stem: str, entry: Shard, size: int) -> tuple[np.ndarray, dict[int, str]] | None:
    try:
        note = read_json(f"{stem}.json")
        pixels = np.load(f"{stem}.npy", mmap_mode="r", allow_pickle=False)
        bad = {int(row): str(reason) for row, reason in note.pop("bad").items()}
    except (FileNotFoundError, MinerError, AttributeError, *NPY_ERRORS):
        return None
    if not all(0 <= row < entry.count for row in bad):
        return None
    if note != _stamp(entry, size) or pixels.shape != (entry.count, size, size, 3) or pixels.dtype != np.uint8:
        return None
    return pixels, bad


def _build(pool: Pool, shard: int, size: int, stem: str) -> None:
    entry = pool.shards[shard]
    records = pool.records(shard) if entry.kind == "raw" else None  # at a URL, one request
    bad: dict[int, str] = {}
    folder, name = os.path.split(stem)
    for left in Path(folder).glob(f".{name}.npy.*.tmp"):  # of a process that was killed; others may be at it right now
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    header = {"descr": "|u1", "fortran_order": False, "shape": (entry.count, size, size, 3)}
    # Without this an old array would pass for the new note's if we stopped between the two.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{stem}.npy")
    with atomic(f"{stem}.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, entry.count, CHUNK):
            rows = range(start, min(start + CHUNK, entry.count))
            # Plain writes, no writable map: a full disk is then an error and not a SIGBUS.
            file.write(pixels_of(pool, shard, records, rows, size, bad).tobytes())
        with atomic(f"{stem}.json") as note:
            note.write(json.dumps({**_stamp(entry, size), "bad": bad}).encode())


def pixels_of(
    pool: Pool, shard: int, records: np.ndarray | None, rows: range, size: int, bad: dict[int, str]
) -> np.ndarray:
    """Decode some rows of a shard, uint8 ``[n, size, size, 3]``, past the cache; reasons of what fails go to ``bad``.

    ``records`` are ``Pool.records`` of a raw shard, None for a tar. Raises MinerError as ``Pool.read`` does.
    """
    pixels = np.zeros((len(rows), size, size, 3), np.uint8)
    if records is not None:
        for i, record in enumerate(records[rows.start : rows.stop]):
            pixels[i] = fit(Image.fromarray(np.ascontiguousarray(record)), size)
        return pixels
    for i, data in enumerate(pool.read(shard, rows)):
        try:
            pixels[i] = decode(data, size)
        except ValueError as error:
            bad[rows.start + i] = str(error)
    return pixels
