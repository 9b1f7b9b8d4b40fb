"""The run directory is the database: settings, committed rounds, metrics. Resume, status and report read only it."""

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from miner.buckets import BucketPath, check_writable
from miner.errors import MinerError, StoreError, disk_full
from miner.files import Place, atomic, parse_json, read_json, read_whole, remove_folder, sha256

KEPT_ROUNDS = 2
CLASSIFIER_FREE = re.compile(r"(game\.(?!threads)|guard\.|pool:|data\.pool:)")  # settings that it does not depend on
FILE_NAME = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # of what a round holds


def write_file(path: Place, data: bytes) -> None:
    """Write a file, and the folders above it; a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as sink:
        sink.write(data)


def write_json(path: Place, value: Any) -> None:
    """Write a JSON file atomically, readable, keys in the order given. MinerError for a string that is no Unicode."""
    try:
        data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 40, 0) : error.end + 40]
        raise MinerError(f"{path}: cannot hold a name that is not UTF-8: {near!r}; rename it") from None
    write_file(path, data)


class RunDir:
    """Paths and commit protocol of one run, in a local folder or at the URL of an object store."""

    def __init__(self, path: Place, unit: str = "round") -> None:
        self.path, self.unit = path, unit  # what is committed one by one: rounds of mining, epochs of training
        self.notes: list[str] = []  # what ``begin`` found damaged and went back behind

    def begin(self, settings: dict[str, Any], resume: bool) -> int:
        """Open or continue a run under ``settings``; returns the first round that is not committed yet.

        Raises MinerError naming the settings that differ from those the folder was made with, and for a folder
        that another command, or another program, keeps its config.json in. UsageError for a URL that cannot be
        written to.
        """
        if isinstance(self.path, BucketPath):
            check_writable(self.path.url)
        config = self.path / "config.json"
        settings = {"unit": self.unit, **settings}
        if config.exists():
            old = self._old(config)
            differing = sorted(_differences(old, json.loads(json.dumps(settings))))
            if differing and not self.committed() and not resume:  # stopped before its first round: a typo, say
                if self.unit == "round":
                    self._drop(differing)
                write_json(config, settings)
            elif differing:
                raise MinerError(
                    f"{self.path}: holds a run with other settings ({'; '.join(differing)}); "
                    "give the same ones to continue it, or choose another --out"
                )
        elif resume:
            raise MinerError(f"{self.path}: no run to resume here (no config.json); check --out or drop --resume")
        else:
            write_json(config, settings)
        return self.rewind()

    def _drop(self, differing: list[str]) -> None:
        """Remove what settings that changed decide; the classifier, which may be hours of work, only if they do."""
        (self.path / "frozen.safetensors").unlink(missing_ok=True)
        remove_folder(self.kept_scores)
        if all(CLASSIFIER_FREE.match(one) for one in differing):
            return
        if (self.path / "classifier.safetensors").exists() or self.pretraining.committed():
            self.notes.append(f"other settings ({'; '.join(differing)}): its classifier is trained anew")
        (self.path / "classifier.safetensors").unlink(missing_ok=True)
        self.pretraining.forget()

    def rewind(self) -> int:
        """The first round that is not committed, soundly; what was logged of it before is dropped."""
        first = self.last_sound() + 1
        self._forget_metrics(first)
        return first

    @contextlib.contextmanager
    def locked(self, wait: float = 0.0) -> Iterator[None]:
        """Keep every other process out of a local run directory; the system lets go when this one ends, however.

        Raises MinerError when another process is at work in it, and still is after ``wait`` seconds. Object stores have
        no such lock.
        """
        if not isinstance(self.path, Path):
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "ab") as file:
            end = time.monotonic() + wait
            with contextlib.suppress(OSError):  # a network disk without locks
                while not _taken(file):
                    if time.monotonic() >= end:
                        raise MinerError(f"{self.path}: another process is at work here; wait for it, or end it")
                    time.sleep(0.2)
            yield

    def last_sound(self) -> int:
        """The last round whose files are as they were committed, -1 for none; later ones are taken back."""
        for round_ in reversed(self.committed()):
            try:
                self.verified(round_)
            except StoreError:
                raise  # what cannot be read now is not damaged
            except MinerError as error:
                _take_back(self.round(round_) / "COMMITTED")
                self.notes.append(f"{error}; going back behind {self.unit} {round_ + 1}")
            else:
                return round_
        return -1

    @property
    def pretraining(self) -> "RunDir":
        """Where epochs of the classifier's own training are committed until it is done."""
        return RunDir(self.path / "pretrain", "epoch")

    def forget(self) -> None:
        """Remove everything that was committed."""
        for round_ in self.committed():
            (self.round(round_) / "COMMITTED").unlink()
            remove_folder(self.round(round_))

    @property
    def kept_scores(self) -> Place:
        """Where a sweep that is going on keeps what it found, shard by shard."""
        return self.path / "scores"

    def _old(self, config: Place) -> dict[str, Any]:
        try:
            old = read_json(config)
        except MinerError as error:
            raise MinerError(f"{config}: damaged ({error}); choose another --out") from None
        if not isinstance(old, dict) or old.get("unit") != self.unit:
            raise MinerError(f"{config}: belongs to another command; choose another --out")
        return old

    def round(self, round_: int) -> Place:
        """Folder of a round."""
        return self.path / f"{self.unit}s" / f"{round_:06d}"

    def committed(self) -> list[int]:
        """Rounds that are complete."""
        names = [path.parent.name for path in self.path.glob(f"{self.unit}s/*/COMMITTED")]
        return sorted(int(name) for name in names if re.fullmatch("[0-9]{6,9}", name))

    def commit(self, round_: int) -> None:
        """Declare a round's files complete, with their SHA-256; what was there before may now be deleted."""
        folder = self.round(round_)
        files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        write_json(folder / "COMMITTED", {name: sha256(folder / name) for name in files if name != "COMMITTED"})
        kept = self.committed()[-KEPT_ROUNDS:]
        folders: list[Place] = list((self.path / f"{self.unit}s").iterdir())
        for folder in folders:
            if folder.name.isdigit() and int(folder.name) not in kept:
                (folder / "COMMITTED").unlink(missing_ok=True)  # first: a half-deleted round is never taken for whole
                remove_folder(folder)
        remove_folder(self.kept_scores)

    def verified(self, round_: int) -> Place:
        """Folder of a committed round. Raises MinerError naming a file that is not what was committed."""
        folder = self.round(round_)
        note = _noted(folder / "COMMITTED")
        for name, digest in note.items():
            path = folder / name
            there = path.is_file() if isinstance(path, Path) else path.exists()  # no folder, no pipe
            if not there or sha256(path) != digest:
                raise MinerError(f"{path}: changed since it was committed")
        return folder

    def tidy(self) -> None:
        """Remove what killed processes left half-written in a local run directory; its driver alone may."""
        if isinstance(self.path, Path):
            for path in self.path.rglob(".*.tmp"):
                path.unlink(missing_ok=True)

    def bytes_used(self) -> int:
        """Bytes of all files in a local run directory; 0 at a URL."""
        if not isinstance(self.path, Path):
            return 0
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        if isinstance(path, BucketPath):  # no appending there; a line a round or epoch makes a small file
            old = path.read_bytes() if path.exists() else b""
            write_file(path, old + f"{json.dumps(record)}\n".encode())
            return
        try:
            with open(path, "a") as sink:
                sink.write(json.dumps(record) + "\n")
        except OSError as error:
            raise disk_full(error, path) or error from None

    def metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl, oldest first; a line cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        records = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def _forget_metrics(self, first: int) -> None:
        """Drop records of rounds that will be played again."""
        records = [r for r in self.metrics() if isinstance(at := r.get(self.unit, -1), int) and at < first]
        write_file(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())


def _noted(path: Place) -> dict[str, Any]:
    """What a round's COMMITTED says: the SHA-256 of each of its files."""
    data = read_whole(path)
    try:
        note = parse_json(data, path)
    except MinerError:
        raise MinerError(f"{path}: cut off or damaged") from None
    if not isinstance(note, dict) or not all(map(FILE_NAME.fullmatch, note)):
        raise MinerError(f"{path}: damaged")
    return note


def _take_back(path: Place) -> None:
    if isinstance(path, Path) and path.is_dir():  # not ours, but in the way
        remove_folder(path)
    else:
        path.unlink()


def _taken(file: IO[bytes]) -> bool:
    """Whether the lock on an open file is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    return [] if old == new else [f"{name}: {old} there, {new} now"]
