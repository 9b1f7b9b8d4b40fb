"""The headers of tars that are not trusted: nothing is extracted or followed, and no member can ask for memory."""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, cast

from miner.errors import MinerError
from miner.files import regular_size

PICKLES = frozenset(("pkl", "pickle", "pyd", "pth", "pt"))
MAX_HEADER = 1 << 20  # bytes of one extended (pax or GNU) header
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Headers:
    """An archive, or ``size`` bytes of it from byte ``start``, of which tarfile may read headers only.

    No member can make it allocate gigabytes. A context manager.
    """

    def __init__(self, path: str, start: int = 0, size: int | None = None) -> None:
        self.whole = regular_size(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self.start, self.size, self._at = start, self.whole - start if size is None else size, 0

    def __enter__(self) -> "Headers":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        """The file's descriptor, for ``os.pread`` at absolute offsets."""
        return self._file.fileno()

    def tell(self) -> int:
        """Bytes from ``start``."""
        return self._at

    def seek(self, at: int) -> int:
        """Go to ``at`` bytes from ``start``."""
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        """As much of ``size`` bytes as there is; tarfile.ReadError for more than a header may have."""
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"extended header of {size} bytes")
        data = os.pread(self.fileno(), max(min(size, self.size - self._at), 0), self.start + self._at)
        self._at += len(data)
        return data


def safe_headers(name: str, file: Headers, ended: bool = True) -> Iterator[tarfile.TarInfo]:
    """The plain files of an archive, in its order; offsets count from ``file.start``, messages call it ``name``.

    Without ``ended`` there need be no end mark: ``file`` is a part of an archive that ends between two members. Raises
    MinerError for an archive that is cut off or corrupt, and for links, devices, pickles and names that lead elsewhere.
    """
    stop = 0
    try:
        tar = tarfile.open(fileobj=cast(IO[bytes], file), mode="r:")  # noqa: SIM115 - the caller closes the file
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # a million headers need not stay
            plain = _is_plain(name, info)
            if info.size < 0 or info.offset_data + info.size > file.size:
                raise fault(name, info, f"cut off: its {info.size} bytes pass the end of the file")
            if plain:
                yield info
            stop = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise MinerError(f"{name}: not a sound uncompressed tar: {error}, after byte {stop}") from None
    if ended or tar.offset < file.size:
        _check_end(name, file, tar.offset)


def _check_end(path: str, file: Headers, stop: int) -> None:
    # tarfile ends its iteration without a word at a header that is cut off or has a wrong checksum.
    file.seek(stop)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise MinerError(f"{path}: cut off or corrupt header at byte {stop}; fetch or write this tar again")
    while block := file.read(MAX_HEADER):
        if block.count(0) != len(block):
            raise MinerError(f"{path}: data after the end mark at byte {stop}; split joined tars first")


def why_not(name: str) -> str | None:
    """Why a member of this name is neither read nor written, if so."""
    if name.startswith("/") or ".." in name.split("/"):
        return "refused: the name leaves the archive's folder"
    if CONTROL.search(name):
        return "refused: control or undecodable characters in the name"
    if not PICKLES.isdisjoint(name.rpartition("/")[2].lower().split(".")[1:]):
        return "refused: a pickle, which can run code"
    return None


def _is_plain(path: str, info: tarfile.TarInfo) -> bool:
    """Whether a member is a file, not a folder. MinerError for all else, and for names that are refused."""
    if (why := why_not(info.name)) is not None:
        raise fault(path, info, why)
    if info.type == tarfile.DIRTYPE:
        return False
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.sparse is not None:
        raise fault(path, info, "refused: a link, device or sparse member; only plain files are read")
    return True


def fault(path: str, info: tarfile.TarInfo, why: str) -> MinerError:
    """The error of one member: where it stands, and why it is refused."""
    return MinerError(f"{path}: member {info.name!r} at byte {info.offset}: {why}")
