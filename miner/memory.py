"""Resident memory of the processes of a run, in bytes.

Pages that several processes share (Ray's object store, mapped caches, libraries) are resident in each of them, so
that resident sizes do not add up. ``pss_bytes`` does: it counts a page by its share.
"""

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROC = Path("/proc")
_STATUS = {
    "VmRSS": "rss_bytes",
    "VmHWM": "peak_rss_bytes",
    "RssAnon": "anon_bytes",
    "RssFile": "file_bytes",
    "RssShmem": "shmem_bytes",
}
# What the processes of a private Ray are called in a table, by what stands in their command line. Those of its workers
# and agents begin with "ray::" and their name.
RAY = {
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "log_monitor.py": "log monitor",
    "monitor.py": "autoscaler",
    "ray_process_reaper.py": "reaper",
    "ray/": "other",
}


def usage(pid: int | None = None) -> dict[str, int]:
    """Memory of a process, by default this one; what the system does not tell is left out.

    ``rss_bytes`` and its parts ``anon_bytes``, ``file_bytes``, ``shmem_bytes``; ``peak_rss_bytes`` since the process
    started; ``pss_bytes`` with shared pages counted by share. Without /proc only the peak of this process is known,
    and given as both. Raises ProcessLookupError when there is no such process.
    """
    folder = PROC / str(pid or os.getpid())
    try:
        lines = (folder / "status").read_text().splitlines()
    except OSError:
        if pid not in (None, os.getpid()):
            raise ProcessLookupError(pid) from None
        return _own_peak()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {ours: _kilobytes(fields[name]) for name, ours in _STATUS.items() if name in fields}
    with contextlib.suppress(OSError):  # another user's, or a kernel without it
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                found["pss_bytes"] = _kilobytes(line[4:])
    return found


def resident() -> int:
    """Resident bytes of this process now, cheaply; 0 where they are not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((PROC / "self" / "statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) << 10


def _own_peak() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"rss_bytes": peak, "peak_rss_bytes": peak}


def entry(who: str, pid: int | None = None) -> dict[str, Any]:
    """One row of the table."""
    return {"who": who, "pid": pid or os.getpid(), "host": socket.gethostname(), **usage(pid)}


def below(root: int) -> Iterator[tuple[int, str]]:
    """Process number and command line of a process and of everything below it. Linux only: nothing elsewhere."""
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    queue = [root]
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        with contextlib.suppress(OSError):
            yield pid, (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()


def ray_processes(known: Sequence[int]) -> list[dict[str, Any]]:
    """Ray's own processes below this one, i.e. of a private Ray, without the ``known`` pids (actors). Linux only."""
    found = []
    for pid, command in below(os.getpid()):
        name = next((name for part, name in RAY.items() if part in command), None)
        if (name or command.startswith("ray::")) and pid not in (*known, os.getpid()):
            with contextlib.suppress(OSError):
                title = command.partition("ray::")[2].split() if command.startswith("ray::") else []
                found.append(entry(f"ray: {title[0] if title else name}", pid))
    return sorted(found, key=lambda row: (row["who"], row["pid"]))


def survey(actors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows for summary.json: the driver, ``actors`` (their own ``entry``), a private Ray's processes, the total."""
    rows = [entry("driver"), *actors]
    rows += ray_processes([row["pid"] for row in actors])
    return [*rows, {"who": "total", "pss_bytes": total(rows)}]


def total(rows: Sequence[dict[str, Any]]) -> int:
    """Bytes of all rows together, shared pages once.

    Where shares are not known everything shared through the object store counts for as much as the process that maps
    most of it; pages of files may then count more than once.
    """
    if all("pss_bytes" in row for row in rows):
        return sum(int(row["pss_bytes"]) for row in rows)
    shared = [int(row.get("shmem_bytes", 0)) for row in rows]
    return sum(int(row["rss_bytes"]) for row in rows) - sum(shared) + max(shared, default=0)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people, in MB of 10^6 bytes."""
    columns = {"rss": "rss_bytes", "peak": "peak_rss_bytes", "own": "anon_bytes", "shared": "shmem_bytes"}
    columns |= {"by share": "pss_bytes"}
    wide = max([len(str(row["who"])) for row in rows] + [len("memory in MB")])
    lines = ["  ".join([f"{'memory in MB':<{wide}}", *(f"{name:>8}" for name in columns)])]
    for row in rows:
        cells = [f"{row[name] / 1e6:>8,.0f}" if name in row else " " * 8 for name in columns.values()]
        lines.append("  ".join([f"{row['who']:<{wide}}", *cells]).rstrip())
    return "\n".join(lines)
