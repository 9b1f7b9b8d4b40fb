"""A run's heartbeat: status.json in its directory, which says to anyone who can read it how the run is doing.

It must never end or hold up a run: a thread of its own writes it, and what cannot be written is skipped.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from miner.files import Place
from miner.run_dir import write_json

FILE = "status.json"
INTERVAL = 2.0  # seconds between two heartbeats
LAST_WORD = 5.0  # seconds that the end of a run waits for its last heartbeat


class Heartbeat:
    """Writes ``facts()``, and what identifies this process, to ``path`` every ``interval`` seconds until ``close``.

    ``facts`` is called in another thread. The file is complete or absent; ``skipped`` counts what was not written.
    """

    def __init__(self, path: Place, facts: Callable[[], dict[str, Any]], interval: float = INTERVAL) -> None:
        self.path, self.facts, self.interval = path, facts, interval
        self.began, self.started = time.monotonic(), utc_now()
        self.beats = self.skipped = 0
        self._identity = identity()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._wake.set()
        self._thread.start()

    def beat(self) -> None:
        """Write soon: something happened that should not wait for the next beat. Returns at once."""
        self._wake.set()

    def close(self) -> None:
        """Write the last facts and end; a store that hangs is not waited for."""
        self._closing.set()
        self._wake.set()
        self._thread.join(LAST_WORD)

    def _run(self) -> None:
        last = False
        while not last:
            self._wake.wait(self.interval)
            self._wake.clear()
            last = self._closing.is_set()  # asked before the facts are: those written now are the last ones
            self._write()

    def _write(self) -> None:
        self.beats += 1
        now = time.monotonic()
        # ``updated`` is for show; ages are taken from ``monotonic`` where the reader shares this machine's clock.
        clock = {"started": self.started, "updated": utc_now(), "seconds": round(now - self.began, 1), "monotonic": now}
        try:
            write_json(self.path, self.facts() | self._identity | clock | {"beat": self.beats, "skipped": self.skipped})
        except Exception:  # whatever a store may raise: a run does not end because nobody can watch it
            self.skipped += 1


def utc_now() -> str:
    """The time of day, for people: UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def identity() -> dict[str, Any]:
    """Which process this is: pid and when it started, and the machine whose processes and clock these are."""
    pid = os.getpid()
    return {"pid": pid, "pid_started": pid_started(pid), **machine()}


def machine() -> dict[str, Any]:
    """Host name, and on Linux the kernel's start and the name space of process numbers (containers have their own)."""
    boot = pids = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "pids": pids}


def pid_started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None if there is none, or no /proc. A zombie is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after_name[0] in "ZX" else int(after_name[19])
    return None


def age(status: dict[str, Any]) -> float:
    """Seconds since a heartbeat; by the clock on the wall, and possibly negative, if another machine wrote it."""
    if status.get("boot") and status["boot"] == machine()["boot"]:
        return time.monotonic() - float(status["monotonic"])
    return (datetime.now(UTC) - datetime.fromisoformat(status["updated"])).total_seconds()


def process_exists(status: dict[str, Any]) -> bool | None:
    """Whether the process that wrote a heartbeat runs; None when it is none of this machine's to know."""
    if {name: status.get(name) for name in ("host", "boot", "pids")} != machine():
        return None
    if status.get("pid_started") is not None:  # a number may have been given to another process since
        return pid_started(status["pid"]) == status["pid_started"]
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
