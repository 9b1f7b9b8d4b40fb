"""One trial: spoil a sound input, read it, and judge: valid, quarantined or refused; anything else is a Violation."""

import resource
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.mutations import spoil
from benchmarks.fuzz.readers import READERS, REMOTE
from benchmarks.fuzz.sound import Files, mended, sound
from miner.errors import MinerError

SECONDS = 10.0  # a trial takes milliseconds; machines are busy
MEMORY = 3 << 30  # address space that one trial may take beyond what the process had
RUNS_CODE = (
    "subprocess.Popen",
    "os.system",
    "os.posix_spawn",
    "os.exec",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
WRITES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


class Violation(AssertionError):
    """A reader did what no input may make it do."""


class Watch:
    """Python's audit events while a reader runs: nothing may be started, nothing opened outside the folder."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.thread = 0  # Ray and others have threads of their own in a process that runs more than trials
        self.code = tuple(str(Path(path).resolve()) for path in {sys.prefix, sys.base_prefix, *sys.path} if path)
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self, root: Path) -> Iterator[None]:
        """Record what happens inside; ``root`` is the folder that may be read and written."""
        self.seen, self.root, self.thread = [], str(root), threading.get_ident()
        try:
            yield
        finally:
            self.root = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.root is None or threading.get_ident() != self.thread:
            return
        if event in RUNS_CODE:
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" or event in WRITES:
            path = args[0]
            if isinstance(path, int) or path is None:
                return
            text = path.decode("utf-8", "replace") if isinstance(path, bytes) else str(path)
            if text.startswith(self.root) and "/../" not in text:
                return
            writes = event in WRITES or (isinstance(args[1], str) and set(args[1]) & set("wxa+"))
            if writes or not text.startswith(self.code):  # modules are imported when first needed
                self.seen.append(f"{event} {text[:200]}")


_watch: list[Watch] = []  # audit hooks cannot be taken away again: one a process


def spoiled(random: Random, kind: str) -> Files:
    """A sound input of this kind with one file of it spoiled, sometimes two."""
    files = dict(sound(kind))
    others = list(files.values())
    for _ in range(random.choice((1, 1, 1, 2))):
        name = random.choice(sorted(files))
        files[name] = spoil(random, name, files[name], others)
    return mended(files) if random.random() < 0.5 else files


def attempt(kind: str, files: Files, folder: Path) -> str:
    """Read ``files`` as ``kind`` inside ``folder``: "accepted", "quarantined" or "refused". Violation for all else."""
    shutil.rmtree(folder, ignore_errors=True)
    root, outside = folder / "work", folder / "outside"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    outside.mkdir(parents=True)
    (outside / "canary").write_bytes(b"secret")
    watch = _watch[0] if _watch else Watch()
    if not _watch:
        _watch.append(watch)
    verdict = "accepted"
    try:
        with _limits(), warnings.catch_warnings(), _temporary(root), watch.on(root):
            warnings.simplefilter("ignore")
            if READERS[kind](root):
                verdict = "quarantined"
    except MinerError as error:
        verdict = "refused"
        _judge_message(str(error), root)
    if watch.seen:
        raise Violation(f"{kind}: {watch.seen[0]}")
    if [path.name for path in outside.iterdir()] != ["canary"] or (outside / "canary").read_bytes() != b"secret":
        raise Violation(f"{kind}: wrote outside of its folder")
    return verdict


def _judge_message(text: str, root: Path) -> None:
    if len(text.splitlines()) != 1:
        raise Violation(f"error of {len(text.splitlines())} lines: {text!r:.500}")
    if str(root) not in text and REMOTE not in text:
        raise Violation(f"error that names no file: {text!r:.500}")
    if not text.isprintable():
        raise Violation(f"error with control characters: {text!r:.500}")
    if len(text) > 2000:
        raise Violation(f"error of {len(text)} characters: {text!r:.500}")


@contextmanager
def _temporary(root: Path) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, str(root)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _limits() -> Iterator[None]:
    """A deadline, and a limit on the address space, for what runs inside."""

    def late(signum: int, frame: object) -> None:
        raise Violation(f"still reading after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
