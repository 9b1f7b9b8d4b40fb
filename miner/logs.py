"""A structured log a process: lines of JSON in RUN/logs/, e.g. pool-0-4711.jsonl (pool actor 0, process 4711).

Anything may log: ``log.info("shard decoded", extra={"shard": 3, "seconds": 1.5})``. Each line has time (UTC), level,
process, pid, host, message, what ``extra`` brings, and traceback when there is one. Files are bounded (CAP bytes and
one predecessor a process, KEPT files a run), and a disk that is full loses lines, never a run.

A run directory at a URL gets no log files: objects cannot be appended to. Ray keeps what its workers print on each
node, in /tmp/ray/session_latest/logs.
"""

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from miner.files import Place

CAP = 8 << 20  # bytes of a file before it becomes NAME.old.jsonl
KEPT = 200  # files a run: one that is started again and again does not fill the disk with old logs
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_hooks: list[Callable[[threading.ExceptHookArgs], Any]] = []  # what dead threads were told to before

log = logging.getLogger("outlier_miner")
log.addHandler(logging.NullHandler())  # before ``start``, and without a run, nothing is printed


class JsonLines(logging.Handler):
    """Appends records as lines of JSON; swallows every error and counts what was lost."""

    def __init__(self, path: Path, process: str, cap: int = CAP) -> None:
        super().__init__()
        self.path, self.cap, self.lost, self.torn = path, cap, 0, False
        self.facts = {"process": process, "pid": os.getpid(), "host": socket.gethostname()}
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.size = os.fstat(self.file).st_size

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, whole or not at all as far as anyone reads it."""
        try:
            data = self._line(record)
            if self.size + len(data) > self.cap and self.size:
                self._turn_over()
            if self.torn:  # what a full disk cut off ends here, so that it spoils no other line
                data = b"\n" + data
            written = os.write(self.file, data)
            self.size += written
            self.torn = written < len(data)
            self.lost = self.lost + 1 if self.torn else 0
        except Exception:  # a log must not end what it tells about
            self.lost += 1

    def _line(self, record: logging.LogRecord) -> bytes:
        facts: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self.facts,
            "message": record.getMessage(),
        }
        facts |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            facts["traceback"] = logging.Formatter().formatException(record.exc_info)
        if self.lost:
            facts["lines_lost_before"] = self.lost
        return (json.dumps(facts, ensure_ascii=False, default=_plain) + "\n").encode(errors="replace")

    def _turn_over(self) -> None:
        os.close(self.file)
        os.replace(self.path, self.path.with_suffix(".old.jsonl"))
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.size, self.torn = 0, False

    def close(self) -> None:
        """Give the file back."""
        with contextlib.suppress(OSError):
            os.close(self.file)
        super().close()


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's; anything else as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else str(value)


def start(run: Place | str, process: str) -> JsonLines | None:
    """Log this process's records to RUN/logs from now on, instead of wherever they went before.

    Returns None, and keeps no log, where the run directory is a URL, is not there, or cannot be written.
    """
    stop()
    if "://" in str(run):
        return None
    try:
        folder = Path(str(run)) / "logs"
        folder.mkdir(exist_ok=True)  # never RUN itself: on a node that does not see it, it would be another folder
        _prune(folder)
        handler = JsonLines(folder / f"{process}-{os.getpid()}.jsonl", process)
    except OSError:
        return None
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    _hooks.append(threading.excepthook)
    threading.excepthook = _thread_died
    log.info("log begins")
    return handler


def stop() -> None:
    """End this process's log."""
    for handler in [h for h in log.handlers if isinstance(h, JsonLines)]:
        log.removeHandler(handler)
        handler.close()
        threading.excepthook = _hooks.pop()


def _thread_died(args: threading.ExceptHookArgs) -> None:
    """Keep the traceback of a thread, too; it is printed as ever."""
    if args.exc_value is not None:
        log.error("a thread died", exc_info=args.exc_value)
    _hooks[-1](args)


def _prune(folder: Path) -> None:
    """Leave at most KEPT files; the oldest go. Several processes may do this at once."""
    found = []
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[: -KEPT + 1]:
        path.unlink(missing_ok=True)
