"""Files that are complete or absent, and ranged reads from a local path or an object store."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from miner.buckets import BucketPath, explained, filesystem, is_url, upload
from miner.errors import MinerError, disk_full

MERGE_GAP = 64 << 10  # bytes between two wanted ranges that are cheaper to read than to ask for twice
MERGE_SPAN = 16 << 20
CHUNK = 4 << 20
PORTION = 256 << 20
# What numpy raises on a hostile .npy header: it is a Python literal.
NPY_ERRORS = (
    ValueError, EOFError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError, KeyError, IndexError,
    tokenize.TokenError,
)  # fmt: skip
MAX_JSON = 256 << 20  # bytes of a manifest; a pool of 80 million images in 8,000 shards has 3 MB

Place = Path | BucketPath  # where something lies: both have the same methods, as far as they are needed here


def place(path: str | os.PathLike[str] | BucketPath) -> Place:
    """A path or URL as an object with pathlib's methods. Raises UsageError for URLs that ``check_url`` refuses."""
    if isinstance(path, BucketPath):
        return path
    if not is_url(path):
        return Path(path)
    url = str(path)
    return Path(url.removeprefix("file://")) if url.startswith("file://") and "::" not in url else BucketPath(url)


@contextlib.contextmanager
def atomic(path: str | Place) -> Iterator[BinaryIO]:
    """Write ``path``, a local file or a URL, so that it is complete or absent; nothing is left after an error.

    Locally: a temporary file beside it, fsync, rename. At a URL: a temporary file here that has no name and so
    vanishes with the process, then one upload. Raises MinerError when the disk is full or the upload fails.
    """
    if is_url(path):
        with _temporary() as whole:
            yield whole
            upload(whole, str(path))
        return
    path = str(path)
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


@contextlib.contextmanager
def _temporary() -> Iterator[BinaryIO]:
    """A local file without a name. Raises MinerError when $TMPDIR is full."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        raise disk_full(error, f"{tempfile.gettempdir()} ($TMPDIR)") or error from None


def remove_folder(folder: Place) -> None:
    """Remove a folder's files, and the folder; what cannot be removed stays."""
    if isinstance(folder, BucketPath):
        with contextlib.suppress(MinerError):
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def local_copy(path: str | Place) -> Iterator[str]:
    """The name of a local file that holds the bytes of ``path``: itself, or a copy that lasts as long as the block.

    A memory map of it outlives the block. Raises FileNotFoundError when a URL has nothing, MinerError when the
    copy does not fit on the disk.
    """
    if not is_url(path):
        yield str(path)
        return
    with _temporary() as copy:
        with open_binary(path) as source:
            shutil.copyfileobj(source, copy, CHUNK)
        copy.flush()
        copy.seek(0)
        yield f"/dev/fd/{copy.fileno()}"


@contextlib.contextmanager
def open_binary(path: str | Place) -> Iterator[BinaryIO]:
    """A local file or a URL, open for reading from its first byte. Raises FileNotFoundError, and MinerError at URLs."""
    with explained(path), contextlib.ExitStack() as stack:
        if is_url(path):
            fs, inner = filesystem(str(path))
            yield cast(BinaryIO, stack.enter_context(fs.open(inner, "rb", block_size=MERGE_SPAN)))
        else:
            yield stack.enter_context(open(str(path), "rb"))


def file_size(path: str) -> int:
    """Size in bytes of a local file or an object. Raises FileNotFoundError when it is not there."""
    if not is_url(path):
        return os.path.getsize(path)
    with explained(path):
        fs, inner = filesystem(path)
        return int(fs.info(inner)["size"])


def regular_size(path: str | Path) -> int:
    """Bytes of a local file. MinerError when it is not there or no regular file: a pipe or device may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise MinerError(f"{path}: {getattr(error, 'strerror', None) or error}; restore this file") from None
    if not stat.S_ISREG(found.st_mode):
        raise MinerError(f"{path}: no regular file; put the file itself there")
    return found.st_size


def read_whole(path: str | Place) -> bytes:
    """All bytes of a small file, a manifest or note of at most 256 MB, local or at a URL.

    Raises FileNotFoundError or NotADirectoryError when it is not there, MinerError for all that cannot be read.
    """
    try:
        if not is_url(path) and os.path.exists(str(path)):
            regular_size(str(path))
        with _far(path), open_binary(path) as file:
            data = file.read(MAX_JSON + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise MinerError(f"{path}: cannot be read ({error})") from None
    if len(data) > MAX_JSON:
        raise MinerError(f"{path}: over {MAX_JSON} bytes; no manifest is as large")
    return data


def check_name(path: str) -> str:
    """A path that was found on disk, itself. MinerError when its name is not UTF-8: nothing could be written of it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise MinerError(f"{path}: this name is not UTF-8; rename it (convmv does it for whole folders)") from None
    return path


def portions(sizes: Sequence[int]) -> Iterator[slice]:
    """Neighbours to hold in memory together, by their ``sizes``: PORTION bytes, 10,000 items, or one larger item."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and (total + size > PORTION or i == start + 10_000):
            yield slice(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def read_json(path: str | Place) -> Any:
    """The value of a JSON file. Raises as ``read_whole`` and ``parse_json`` do."""
    return parse_json(read_whole(path), path)


def parse_json(data: bytes | str, where: object) -> Any:
    """The value of a JSON text. Raises MinerError, naming ``where``, for anything else and for nesting too deep.

    Also for strings that are no Unicode (half a surrogate pair): no table and no file could hold them.
    """
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise MinerError(f"{where}: not JSON that can be read (nested too deep); restore it or make it again") from None
    except ValueError as error:
        raise MinerError(f"{where}: not JSON ({error}); restore it or make it again") from None


def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, size); near neighbours in a remote file share one request.

    Raises MinerError when the file ends before a range does, and at a URL for all that cannot be read.
    """
    if not is_url(path):
        with open(path, "rb", buffering=0) as file:
            return [_full(path, os.pread(file.fileno(), size, offset), offset, size) for offset, size in ranges]
    found: dict[int, bytes] = {}
    for group in _spans(ranges):
        start, stop = ranges[group[0]][0], max(sum(ranges[i]) for i in group)
        with _there(path):
            fs, inner = filesystem(path)
            block = bytes(fs.cat_file(inner, start=start, end=stop))
        for i in group:
            offset, size = ranges[i]
            found[i] = _full(path, block[offset - start : offset - start + size], offset, size)
    return [found[i] for i in range(len(ranges))]


@contextlib.contextmanager
def _far(path: str | Place) -> Iterator[None]:
    """Reading a file at a URL and nothing else: what ``explained`` leaves is ours too, but for a missing file."""
    try:
        with explained(path):
            yield
    except Exception as error:
        if isinstance(error, MinerError | FileNotFoundError) or not is_url(path):
            raise
        raise MinerError(f"{path}: cannot be read ({type(error).__name__}: {error}); try again later") from None


@contextlib.contextmanager
def _there(path: str | Place) -> Iterator[None]:
    """The same for a file at a URL that must be there."""
    try:
        with _far(path):
            yield
    except FileNotFoundError:
        if not is_url(path):
            raise
        raise MinerError(f"{path}: missing; restore this file") from None


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


def sha256(path: str | Place, offset: int = 0, size: int | None = None) -> str:
    """Hex SHA-256 of ``size`` bytes at ``offset`` (default: to the end) of a local file or a URL."""
    digest = hashlib.sha256()
    with _there(path), open_binary(path) as file:
        file.seek(offset)
        left = size
        while left is None or left > 0:
            block = file.read(CHUNK if left is None else min(CHUNK, left))
            if not block:
                break
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()
