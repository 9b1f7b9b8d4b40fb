"""Files that are complete or absent, and ranged reads from a local path or an object store."""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import fsspec

from miner.errors import MinerError, UsageError, disk_full

SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "abfs", "az", "hf", "memory")
MERGE_GAP = 64 << 10  # bytes between two wanted ranges that are cheaper to read than to ask for twice
MERGE_SPAN = 16 << 20
CHUNK = 4 << 20
MAX_JSON = 256 << 20  # bytes of a manifest; a pool of 80 million images in 8,000 shards has 3 MB


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


def regular_size(path: str) -> int:
    """Bytes of a local file. MinerError when it is not there or no regular file: a pipe or device may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise MinerError(f"{path}: {getattr(error, 'strerror', None) or error}; restore this file") from None
    if not stat.S_ISREG(found.st_mode):
        raise MinerError(f"{path}: no regular file; put the file itself there")
    return found.st_size


def read_json(path: str) -> Any:
    """The value of a JSON file of at most 256 MB, local or at a URL.

    Raises FileNotFoundError or NotADirectoryError when it is not there, MinerError for all that cannot be read.
    """
    try:
        if not is_url(path):
            if os.path.exists(path):
                regular_size(path)
            with open(path, "rb") as file:
                data = file.read(MAX_JSON + 1)
        else:
            fs, inner = filesystem(path)
            with fs.open(inner, "rb") as remote:
                data = remote.read(MAX_JSON + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise MinerError(f"{path}: cannot be read ({error})") from None
    if len(data) > MAX_JSON:
        raise MinerError(f"{path}: over {MAX_JSON} bytes; no manifest is as large")
    return parse_json(data, path)


def parse_json(data: bytes | str, where: object) -> Any:
    """The value of a JSON text. Raises MinerError, naming ``where``, for anything else and for nesting too deep."""
    try:
        return json.loads(data)
    except RecursionError:
        raise MinerError(f"{where}: not JSON that can be read (nested too deep); restore it or make it again") from None
    except ValueError as error:
        raise MinerError(f"{where}: not JSON ({error}); restore it or make it again") from None


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
        with _far(path):
            block = bytes(fs.cat_file(inner, start=start, end=stop))
        for i in group:
            offset, size = ranges[i]
            found[i] = _full(path, block[offset - start : offset - start + size], offset, size)
    return [found[i] for i in range(len(ranges))]


@contextlib.contextmanager
def _far(path: str) -> Iterator[None]:
    """Reading a file at a URL: every file system of fsspec has its own errors."""
    try:
        yield
    except Exception as error:
        raise MinerError(f"{path}: cannot be read ({type(error).__name__}: {error}); try again later") from None


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
        if is_url(path):
            stack.enter_context(_far(path))
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
