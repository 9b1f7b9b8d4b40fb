"""Paths in object stores (``s3://``, ``gs://``, ...) through fsspec, with pathlib's names and errors of one line.

A store shows an object only when its upload is complete, so writing is put a whole file or nothing; there are no
folders to make, no renames and no appends. Only what the project needs is here, and for a reason: fsspec's own
``exists``, ``glob`` and ``rm`` take a failed request for "nothing there", which would let a run begin anew over
committed rounds. Here a failed request is always an error, and listings are never cached, because pool actors on
other machines write beside us.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, BinaryIO

from miner.errors import MinerError, StoreError, UsageError, disk_full

SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "abfs", "az", "hf", "memory")
WRITABLE = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")
_S3 = ("s3", "s3a")
_EXTRA = dict.fromkeys(_S3, "s3") | {"gs": "gcs", "gcs": "gcs"}
_PART = 16 << 20  # bytes of a part of a large upload; s3fs would keep ten of 50 MiB in memory
_PARTS_AT_ONCE = 4
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "google", "adlfs", "azure", "requests"}


def is_url(path: object) -> bool:
    """True for ``scheme://...`` and for anything that fsspec or a shell would not take as a plain path."""
    text = str(path)
    return "://" in text or "::" in text or text.startswith(("pipe:", "|"))


def check_url(url: str) -> None:
    """UsageError for schemes outside SCHEMES (``pipe:`` would run a shell) and chained URLs (``a::b``)."""
    scheme = url.partition("://")[0]
    if "::" in url or scheme not in SCHEMES:
        raise UsageError(f"{url}: refused; URLs are {', '.join(SCHEMES)}://...")


def check_writable(url: str) -> None:
    """UsageError for URLs that nothing can be written to, as for those that ``check_url`` refuses."""
    check_url(url)
    if url.partition("://")[0] not in WRITABLE:
        raise UsageError(f"{url}: only read from; give a folder or an object store, s3://... or gs://...")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of ``url`` and the path inside it. Use both under ``explained``.

    Asked for at every use, not kept: in a forked process fsspec gives a new one. Raises UsageError like
    ``check_url``, and MinerError when the store's library is not installed.
    """
    check_url(url)
    import fsspec  # takes a while, and most runs are local

    scheme = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **(_s3_options() if scheme in _S3 else {}))
    except ImportError as error:
        extra = _EXTRA.get(scheme)
        todo = f"{scheme}:// needs one more package; pip install 'outlier-miner[{extra}]'" if extra else str(error)
        raise MinerError(f"{url}: {todo}") from None
    return fs, path


def _s3_options() -> dict[str, Any]:
    """Bounds of what botocore does when nobody answers; the AWS SDK's environment variables go first."""
    config: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 30}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        config["retries"] = {"mode": "standard", "total_max_attempts": 3}
    if "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
        # s3fs sends multipart uploads without the checksums that newer SDKs announce, and not all stores know them.
        config["request_checksum_calculation"] = "when_required"
    return {"config_kwargs": config, "max_concurrency": _PARTS_AT_ONCE}


@contextlib.contextmanager
def explained(path: object) -> Iterator[None]:
    """THE place where errors of object stores become ours; the work inside is about ``path``, a URL.

    FileNotFoundError names the URL; everything else that a store's client raises is a MinerError that names it.
    Nothing is done about a local path.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MinerError) or not is_url(path):
            raise
        told = _reason(error)
        if told is not None:
            raise StoreError(f"{path}: {told}") from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise


def _reason(error: Exception) -> str | None:
    """What a store's client means, in a line; None for a file that is not there, and for errors that are not its."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split()) or type(error).__name__
    cause = getattr(error.__cause__, "response", None) or {}
    if cause.get("Error", {}).get("Code") == "NoSuchBucket":
        return "there is no such bucket; make it, or check the name"
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and disk_full(error, "")):
        return None  # the disk is this machine's
    if "NoCredentialsError" in kinds or "PartialCredentialsError" in kinds:
        return f"no credentials ({text}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in"
    if isinstance(error, PermissionError):
        return f"access denied ({text}); check the credentials, and what they may do"
    homes = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, OSError) or homes & _CLIENTS:
        return f"cannot be reached or used ({text}); check URL, endpoint and network, then run the same command again"
    return None


def upload(file: BinaryIO, url: str) -> None:
    """Put a local file's content at ``url`` as a whole: what was there stays until the last byte has arrived.

    A process that is killed leaves nothing to be seen, at most parts that a lifecycle rule of the bucket should
    clear away. Raises MinerError when it cannot be done.
    """
    check_writable(url)
    file.flush()
    file.seek(0)
    parts = {"chunksize": _PART} if url.partition("://")[0] in (*_S3, "gs", "gcs") else {}
    try:
        with explained(url):
            fs, inner = filesystem(url)
            fs.put_file(f"/dev/fd/{file.fileno()}", inner, **parts)
    except FileNotFoundError:
        raise MinerError(f"{url}: there is no such bucket; make it, or check the name") from None


@dataclass(frozen=True)
class BucketPath:
    """A place at a URL, as far as it is like a ``pathlib.Path``. Nothing is kept open: it travels between processes.

    Raises MinerError naming the URL wherever the store does not answer as it should.
    """

    url: str

    def __post_init__(self) -> None:
        check_url(self.url)
        scheme, _, inner = self.url.partition("://")
        object.__setattr__(self, "url", f"{scheme}://{inner.rstrip('/')}")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "BucketPath":
        """The folder above; a bucket's is the bucket itself."""
        above = self.url.rpartition("/")[0]
        return self if above.endswith("/") else BucketPath(above)

    def resolve(self) -> "BucketPath":
        """The same place: a URL is absolute."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: an object brings its folders along."""

    def exists(self) -> bool:
        """Whether an object, or anything below a folder of this name, is there."""
        try:
            self._call("info")
        except FileNotFoundError:
            return False
        return True

    def iterdir(self) -> Iterator["BucketPath"]:
        """What lies directly in this folder, sorted; nothing when there is no such folder."""
        try:
            found = {path.rstrip("/") for path in self._call("ls", detail=False)}
        except FileNotFoundError:
            return
        own = filesystem(self.url)[1].rstrip("/")  # a listing of an object, or of an empty "folder", holds itself
        yield from (self / path.rpartition("/")[2] for path in sorted(found - {own}))

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Paths below that match ``pattern``, part by part (no ``**``), sorted."""
        first, _, rest = pattern.partition("/")
        if rest and not set("*?[") & set(first):
            yield from (self / first).glob(rest)
            return
        for path in self.iterdir():
            if fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest else (path,)

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError when it is not there."""
        return bytes(self._call("cat_file"))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The whole object as text. Raises FileNotFoundError when it is not there."""
        return self.read_bytes().decode(encoding, errors)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object; some stores do not say whether there was one."""
        try:
            self._call("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _call(self, method: str, **options: Any) -> Any:
        with explained(self.url):
            fs, inner = filesystem(self.url)
            return getattr(fs, method)(inner, **options)
