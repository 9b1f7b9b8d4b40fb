"""Files that are complete or absent, and ranged reads from a local path or an object store."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import fsspec

from miner.errors import MinerError, UsageError, disk_full

SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "abfs", "az", "hf", "memory")
MERGE_GAP = 64 << 10  # bytes between two wanted ranges that are cheaper to read than to ask for twice
MERGE_SPAN = 16 << 20
CHUNK = 4 << 20


@contextlib.contextmanager
def atomic(path: str) -> Iterator[BinaryIO]:
    """Write ``path`` through a temporary file beside it: fsync, then rename; nothing is left after an error.

    Raises MinerError when the disk is full.
    """
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    file: BinaryIO | None = None
    try:
        file = open(part, "xb")  # noqa: SIM115 - closed before the rename
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(part, path)
    except BaseException as error:
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        full = disk_full(error, path) if isinstance(error, OSError) else None
        if full:
            raise full from error
        raise


def is_url(path: str) -> bool:
    """True for ``scheme://...`` and for anything that fsspec or a shell would not take as a plain path."""
    return "://" in path or "::" in path or path.startswith(("pipe:", "|"))


def check_url(url: str) -> None:
    """UsageError for schemes outside SCHEMES (``pipe:`` would run a shell) and chained URLs (``a::b``)."""
    scheme = url.partition("://")[0]
    if "::" in url or scheme not in SCHEMES:
        raise UsageError(f"{url}: refused; a pool lies in a folder or at {', '.join(SCHEMES)}://...")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of ``url`` and the path inside it. Raises UsageError like ``check_url``."""
    check_url(url)
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MinerError(f"{url}: {error}") from None
    return fs, path


def read_whole(path: str) -> bytes:
    """All bytes of a small file, local or at a URL. Raises FileNotFoundError when it is not there."""
    if is_url(path):
        fs, inner = filesystem(path)
        return bytes(fs.cat_file(inner))
    with open(path, "rb") as file:
        return file.read()


def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, size); near neighbours in a remote file share one request.

    Raises MinerError when the file ends before a range does.
    """
    if not is_url(path):
        with open(path, "rb", buffering=0) as file:
            return [_full(path, os.pread(file.fileno(), size, offset), offset, size) for offset, size in ranges]
    fs, inner = filesystem(path)
    found: dict[int, bytes] = {}
    for group in _spans(ranges):
        start, stop = ranges[group[0]][0], max(sum(ranges[i]) for i in group)
        block = bytes(fs.cat_file(inner, start=start, end=stop))
        for i in group:
            offset, size = ranges[i]
            found[i] = _full(path, block[offset - start : offset - start + size], offset, size)
    return [found[i] for i in range(len(ranges))]


def _full(path: str, data: bytes, offset: int, size: int) -> bytes:
    if len(data) != size:
        raise MinerError(f"{path}: {size} bytes wanted at byte {offset}, {len(data)} found; restore it")
    return data


def _spans(ranges: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    group: list[int] = []
    start = stop = 0
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        offset, size = ranges[i]
        if group and (offset > stop + MERGE_GAP or offset + size > start + MERGE_SPAN):
            yield group
            group = []
        if not group:
            start = stop = offset
        group.append(i)
        stop = max(stop, offset + size)
    if group:
        yield group


def sha256(path: str, offset: int = 0, size: int | None = None) -> str:
    """Hex SHA-256 of ``size`` bytes at ``offset`` (default: to the end) of a local file or a URL."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        fs, inner = filesystem(path) if is_url(path) else (None, path)
        file = stack.enter_context(fs.open(inner, "rb") if fs else open(inner, "rb"))  # noqa: SIM115
        file.seek(offset)
        left = size
        while left is None or left > 0:
            block = file.read(CHUNK if left is None else min(CHUNK, left))
            if not block:
                break
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()
