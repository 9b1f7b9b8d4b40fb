"""The run directory is the database: settings, committed rounds, metrics. Resume, status and report read only it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from miner.errors import MinerError, disk_full
from miner.files import atomic, read_json, sha256

KEPT_ROUNDS = 2
FILE_NAME = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # of what a round holds


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and the folders above it; a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(str(path)) as sink:
        sink.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable, keys in the order given."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


class RunDir:
    """Paths and commit protocol of one run."""

    def __init__(self, path: Path, unit: str = "round") -> None:
        self.path, self.unit = path, unit  # what is committed one by one: rounds of mining, epochs of training

    def begin(self, settings: dict[str, Any], resume: bool) -> int:
        """Open or continue a run under ``settings``; returns the first round that is not committed yet.

        Raises MinerError naming the settings that differ from those the folder was made with, and for a folder
        that another command, or another program, keeps its config.json in.
        """
        config = self.path / "config.json"
        settings = {"unit": self.unit, **settings}
        if config.exists():
            old = self._old(config)
            differing = sorted(_differences(old, json.loads(json.dumps(settings))))
            if differing and not self.committed():  # stopped before it had anything to lose: a typo in a flag, say
                if self.unit == "round":
                    (self.path / "classifier.safetensors").unlink(missing_ok=True)
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
        first = max(self.committed(), default=-1) + 1
        self._forget_metrics(first)
        return first

    def _old(self, config: Path) -> dict[str, Any]:
        old = read_json(str(config))
        if not isinstance(old, dict) or old.get("unit") != self.unit:
            raise MinerError(f"{config}: belongs to another command; choose another --out")
        return old

    def round(self, round_: int) -> Path:
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
        write_json(folder / "COMMITTED", {name: sha256(str(folder / name)) for name in files if name != "COMMITTED"})
        for old in self.committed()[:-KEPT_ROUNDS]:
            folder = self.round(old)
            (folder / "COMMITTED").unlink()  # first, so that a half-deleted round is never taken for whole
            shutil.rmtree(folder, ignore_errors=True)

    def verified(self, round_: int) -> Path:
        """Folder of a committed round. Raises MinerError naming a file that is not what was committed."""
        folder = self.round(round_)
        note = read_json(str(folder / "COMMITTED"))
        if not isinstance(note, dict) or not all(map(FILE_NAME.fullmatch, note)):
            raise MinerError(f"{folder / 'COMMITTED'}: damaged; remove {folder} to go on before it")
        for name, digest in note.items():
            if not (folder / name).exists() or sha256(str(folder / name)) != digest:
                raise MinerError(f"{folder / name}: changed since it was committed; remove {folder} to go on before it")
        return folder

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
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


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    return [] if old == new else [f"{name}: {old} there, {new} now"]
