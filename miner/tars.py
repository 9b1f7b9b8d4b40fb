"""Reading foreign WebDataset tars without trusting them, and writing tars whose bytes repeat.

Nothing is extracted, unpickled or followed: the reader looks at headers, takes the byte range of each image
and the number in each `.cls`, and refuses an archive that holds anything dangerous or ambiguous.
"""

import gzip
import hashlib
import io
import itertools
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from types import TracebackType
from typing import IO, BinaryIO, cast

from miner.errors import MinerError, disk_full
from miner.files import Place, atomic, regular_size
from miner.headers import Headers, fault, safe_headers, why_not

IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE = 16 << 20  # bytes
MAX_LABEL = 1_000_000  # labels count into tables: a huge one must not make a huge table; -1 is no class
LIMITS = {**dict.fromkeys(IMAGES, MAX_IMAGE), "cls": 64, "json": 1 << 20}
MAX_TAR = 64 << 30  # bytes that one .tar.gz may expand to
MAX_RATIO = 250  # expanded over compressed; DEFLATE reaches 1032, image tars stay under 30
CHUNK = 4 << 20
PLAIN_KEY = "^[A-Za-z0-9_-]{1,95}$"  # fine at sight
DOT = "a key must not hold a dot (WebDataset cuts keys at the first)"


@dataclass(frozen=True)
class Sample:
    """One image of a tar: ``size`` bytes at ``offset`` of the archive; label None without a .cls.

    ``note`` is the (offset, size) of its .json, (0, 0) without one.
    """

    key: str
    ext: str
    offset: int
    size: int
    label: int | None
    note: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Member:
    name: str
    key: str
    ext: str
    header: int
    offset: int
    size: int

    @property
    def role(self) -> str:
        return "image" if self.ext in IMAGES else self.ext


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """The images of an uncompressed WebDataset tar, in archive order.

    Raises MinerError, naming file, member and byte offset, for: links, devices, sparse members, pickles,
    absolute or climbing names, oversized members, a key with a dot, two images of one key, a key whose
    members are not adjacent, a label that is no integer, an archive that is empty, cut off or corrupt.
    """
    where = os.fspath(path)
    samples: list[Sample] = []
    first: dict[str, _Member] = {}
    with Headers(where) as file:
        members_of_it = filter(None, (_member(where, info) for info in safe_headers(where, file)))
        for key, group in itertools.groupby(members_of_it, key=lambda member: member.key):
            members = list(group)
            if key in first:
                raise _twice(where, first[key], members[0], "members of one key must be adjacent")
            first[key] = members[0]
            sample = _sample(where, file.fileno(), members)
            if sample is not None:
                samples.append(sample)
    if not samples:
        raise MinerError(f"{where}: no images in this tar (looked for {', '.join(IMAGES)})")
    return samples


def _member(path: str, info: tarfile.TarInfo) -> _Member | None:
    name = info.name
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    ext = suffix.lower()
    parts = ext.split(".")
    if not stem or parts[-1] not in LIMITS:
        return None
    if len(parts) > 1:
        raise fault(path, info, f"{DOT}; rename it")
    if info.size > LIMITS[ext]:
        raise fault(path, info, f"{info.size} bytes; at most {LIMITS[ext]} are read of a .{ext}")
    key = f"{folder}/{stem}" if folder else stem
    return _Member(name, key, ext, info.offset, info.offset_data, info.size)


def _sample(path: str, descriptor: int, members: list[_Member]) -> Sample | None:
    roles: dict[str, _Member] = {}
    for member in members:
        if member.role in roles:
            raise _twice(path, roles[member.role], member, f"one {member.role} a key")
        roles[member.role] = member
    image, label = roles.get("image"), roles.get("cls")
    if image is None:
        if label is not None:
            raise MinerError(f"{path}: member {label.name!r} at byte {label.header}: label without image")
        return None
    number = _label(path, descriptor, label) if label else None
    note = (roles["json"].offset, roles["json"].size) if "json" in roles else (0, 0)
    return Sample(image.key, image.ext, image.offset, image.size, number, note)


def _label(path: str, descriptor: int, member: _Member) -> int:
    text = os.pread(descriptor, member.size, member.offset).strip()
    if not re.fullmatch(rb"-?[0-9]{1,10}", text) or not -1 <= int(text) < MAX_LABEL:
        raise MinerError(f"{path}: member {member.name!r} at byte {member.header}: {text!r} is no label")
    return int(text)


def _twice(path: str, one: _Member, other: _Member, why: str) -> MinerError:
    return MinerError(
        f"{path}: key {one.key!r} comes twice: member {one.name!r} at byte {one.header} and {other.name!r} "
        f"at byte {other.header}; {why}"
    )


def why_no_key(key: str) -> str | None:
    """Why ``TarWriter`` could not write an image of this key so that it is read again, if so."""
    if re.fullmatch(PLAIN_KEY, key):
        return None
    base = key.rpartition("/")[2]
    if "." in base or not base:
        return DOT if base else "a key must not be empty"
    name = f"{key}.json"  # an image's, `.jpg` to `.webp`, and `.cls` are no longer
    if (why := why_not(name)) is not None:
        return why
    if len(name.encode()) > tarfile.LENGTH_NAME:  # a longer one fits where it can be cut at a folder
        try:
            tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)
        except ValueError:
            return "too long a key for a plain tar (over 95 bytes)"
    return None


def expand(source: str | os.PathLike[str], target: IO[bytes]) -> None:
    """Write what a .tar.gz holds to ``target``; MinerError for a broken one and for one that expands too far."""
    limit = min(MAX_TAR, max(64 << 20, MAX_RATIO * regular_size(os.fspath(source))))
    written = 0
    try:
        with gzip.open(source, "rb") as packed:
            while block := packed.read(CHUNK):
                written += len(block)
                if written > limit:
                    raise MinerError(f"{source}: expands past {limit} bytes; unpack it yourself if you trust it")
                target.write(block)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MinerError(f"{source}: cut off or corrupt gzip ({error}); fetch it again") from None


class _Hashed:
    """What tarfile writes to: passes bytes on and hashes them. It is written front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


class TarWriter:
    """A plain ustar file, complete or absent, whose bytes depend on names and data alone.

    Modification time 0, owner 0, mode 0644. Use as a context manager, or call ``close``. Then ``size`` and
    ``sha256`` (hex) are those of the archive: one at a URL need not be fetched back for them.
    """

    def __init__(self, path: str | Place) -> None:
        self.path = str(path)
        self.size, self.sha256 = 0, ""
        self._atomic = atomic(path)
        self._hashed = _Hashed(self._atomic.__enter__())
        sink = cast(BinaryIO, self._hashed)
        self._tar = tarfile.open(fileobj=sink, mode="w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def write(self, name: str, data: bytes) -> int:
        """Append one member; returns the offset of its data in the archive, in bytes.

        Raises MinerError for a name that ustar cannot hold (over 100 bytes) or that our own reader would refuse, and
        for a full disk.
        """
        if (why := why_not(name)) is not None:
            raise MinerError(f"{self.path}: member {name!r}: {why}")
        info = tarfile.TarInfo(name)
        info.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        try:
            self._tar.addfile(info, io.BytesIO(data))
        except ValueError as error:
            raise MinerError(f"{self.path}: member {name!r}: {error}; shorten the name") from None
        except OSError as error:
            raise disk_full(error, self.path) or error from error
        return offset

    def close(self) -> None:
        """Finish the archive and move it to its name."""
        self.__exit__(None, None, None)

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._tar.close()
            except OSError as failure:
                self._atomic.__exit__(type(failure), failure, failure.__traceback__)
                raise
            self.size, self.sha256 = self._hashed.tell(), self._hashed.digest.hexdigest()
        self._atomic.__exit__(kind, error, trace)
