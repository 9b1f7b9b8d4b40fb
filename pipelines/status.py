"""How is a run doing? Reads its directory only: no Ray, from any machine that sees it, during a run and after it.

python -m pipelines.status runs/demo

Says what it does, how fast and how long yet, whether its driver is alive, which workers died and how many images were
quarantined. Exit code: 0 finished, 3 running, 4 stopped before its end (the same command again goes on), 1 no run that
can be read, 2 usage.
"""

import json
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from miner import heartbeat
from miner.errors import MinerError, UsageError
from miner.files import Place, place
from pipelines import cli

FRESH = 30.0  # seconds: a heartbeat comes every two, but a slow disk may hold up some
AHEAD = 5.0  # seconds that clocks of two machines may differ without being worth a word
PATIENCE = 3 * heartbeat.INTERVAL  # seconds to watch a heartbeat whose age says nothing
PRIVATE = ("boot", "pids", "pid_started", "monotonic", "beat")  # of a heartbeat: for this command, not its readers
EXIT = {"finished": 0, "running": 3, "stopped": 4, "interrupted": 4, "failed": 4}


@dataclass(frozen=True)
class Config:
    """See how a run is doing."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory, or its URL."""
    json: bool = False
    """One line of JSON instead of text."""
    watch: float | None = None
    """Look again every so many seconds, until the run ends."""


def look(run: Place, patience: float = PATIENCE) -> dict[str, Any]:
    """Everything there is to say about a run, as ``--json`` prints it. Raises MinerError when no run can be read.

    ``patience``: seconds to watch for a new heartbeat when neither process nor clock tells whether the driver lives.
    """
    config = _json(run / "config.json")
    if config is None:
        raise MinerError(f"{run}: no run here (no config.json); check the path")
    unit = config.get("unit", "round")
    status, summary = _json(run / heartbeat.FILE), _json(run / "summary.json")
    metrics = _last_line(run / "metrics.jsonl")
    rounds = [int(path.parent.name) for path in run.glob(f"{unit}s/*/COMMITTED") if path.parent.name.isdigit()]
    found: dict[str, Any] = {
        "run": str(run),
        "state": "stopped" if summary is None else "finished",  # for runs that have no heartbeat
        "why": "no heartbeat" if summary is None else None,
        "unit": unit,
        "committed": max(rounds, default=-1) + 1,
        "rounds": _planned(config, unit),
        "last": metrics,
    }
    if status is None:
        return found
    found |= {"why": None} | {name: value for name, value in status.items() if name not in PRIVATE}
    try:
        found["age_seconds"] = round(heartbeat.age(status), 1)
        if status["state"] == "running":
            found |= _driver(run, status, patience)
        EXIT[found["state"]], found["pid"], found["host"], found["started"][:19]
    except (KeyError, TypeError, ValueError) as error:
        raise MinerError(f"{run / heartbeat.FILE}: damaged ({error!r}); it is written anew by the next run") from None
    if found["state"] == "stopped" and summary is not None and _newer(run / "summary.json", run / heartbeat.FILE):
        found |= {"state": "finished", "why": None}  # only the last heartbeat did not come through
    return found


def _driver(run: Place, status: dict[str, Any], patience: float) -> dict[str, Any]:
    """Is the driver that says it runs alive? By its process where that can be seen, else by its heartbeats."""
    age = heartbeat.age(status)
    exists = heartbeat.process_exists(status)
    fresh = -AHEAD <= age <= FRESH
    if exists is False:
        return {"state": "stopped", "why": f"its process {status['pid']} is gone"}
    if fresh:
        return {"state": "running", "why": None}
    if exists and status.get("pid_started") is not None:
        why = f"its process {status['pid']} lives, but without a heartbeat: stopped by a signal, or its disk is full?"
        return {"state": "running", "why": why}
    # Another machine's clock may be wrong by any amount. A heartbeat that changes is the only proof of life.
    end = time.monotonic() + patience
    clock = f"the clock of {status['host']} differs from this one's"
    while time.monotonic() < end:
        time.sleep(min(0.25, patience))
        if (_json(run / heartbeat.FILE) or status)["beat"] != status["beat"]:
            return {"state": "running", "why": clock}
    return {"state": "stopped", "why": f"no heartbeat, and {clock}" if age < 0 else "no heartbeat"}


def _json(path: Place) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file. Raises MinerError when it is none or cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise MinerError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise MinerError(f"{path}: not a JSON object")
    return value


def _last_line(path: Place) -> dict[str, Any] | None:
    """The last whole record of metrics.jsonl."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):  # being written
            continue
    return None


def _planned(config: dict[str, Any], unit: str) -> int | None:
    """How many rounds or epochs the settings ask for."""
    part = config.get("game" if unit == "round" else "recipe")
    value = part.get(f"{unit}s") if isinstance(part, dict) else None
    return value if isinstance(value, int) else None


def _newer(path: Place, other: Place) -> bool:
    try:
        return isinstance(path, Path) and isinstance(other, Path) and path.stat().st_mtime >= other.stat().st_mtime
    except OSError:
        return False


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    state, unit = found["state"], found["unit"]
    where = f" in {found['phase']}" if EXIT[state] == 4 and found.get("phase") else ""
    why = f" ({found['why']})" if found.get("why") else ""
    again = "; run the same command again to go on" if EXIT[state] == 4 else ""
    lines = [f"{found['run']}: {state}{where}{why}{again}"]
    if "age_seconds" in found:
        age = found["age_seconds"]
        when = f"{duration(age)} ago" if age >= -AHEAD else f"{duration(-age)} in the future"
        begun = f"began {found['started'][:19]} UTC, last heartbeat {when}"
        lines.append(f"driver: process {found['pid']} on {found['host']}, {begun}")
        if state != "finished" and found.get("phase"):
            lines.append(progress(found, state == "running"))
    of = f" of {found['rounds']}" if found.get("rounds") else ""
    if of and unit == "round" and state == "finished" and found["committed"] < found["rounds"]:
        of += ": the ranking had converged"
    committed = f"{unit}s committed: {found['committed']}{of}"
    figures = {"l_out": "L_out {:.4f}", "effective_sample_size": "effective sample size {:,.0f}", "loss": "loss {:.4f}"}
    last = found.get("last") or {}
    shown = [form.format(last[name]) for name, form in figures.items() if isinstance(last.get(name), int | float)]
    lines.append(", ".join([committed, *shown]))
    if found.get("quarantined"):
        lines.append(f"quarantined: {found['quarantined']:,} images do not decode")
    if found.get("death_count"):
        lines.append(f"workers that died: {found['death_count']}")
        lines += [f"  {d['when'][:19]} {d['who']}: {d['why']}, {d['seconds_lost']:.1f} s lost" for d in found["deaths"]]
    if found.get("error"):
        lines.append(f"error: {found['error']}")
    if state == "running" and found.get("metrics"):
        lines.append(f"metrics: {found['metrics']}")
    return "\n".join(lines)


def progress(found: dict[str, Any], alive: bool) -> str:
    """Phase, how far, how fast, how long yet."""
    line = f"{found['phase']}"
    if found.get("total"):
        line += f": {found['done']:,} of {found['total']:,} ({found['done'] / found['total']:.0%})"
    if alive and found.get("rate"):
        line += f", {found['rate']:,.1f} {found.get('progress_unit', '')}/s"
        line += f", {duration(found['seconds_left'])} left" if found.get("seconds_left") is not None else ""
    if alive and found.get("quiet_seconds", 0) > FRESH:
        line += f", nothing new for {duration(found['quiet_seconds'])}"
    return line


def duration(seconds: float) -> str:
    """For people: 48 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Print, perhaps again and again, and exit with the code of the run's state."""
    config = tyro.cli(Config, prog="python -m pipelines.status", description=__doc__)
    if config.watch is not None and not config.watch > 0:
        raise UsageError(f"--watch {config.watch:g}: seconds, more than 0")
    while True:
        found = look(place(config.run))
        if config.watch is not None and sys.stdout.isatty() and not config.json:
            print("\x1b[H\x1b[J" + f"{datetime.now(UTC):%H:%M:%S} UTC")  # the screen shows the latest look only
        print(json.dumps(found) if config.json else text(found), flush=True)
        if config.watch is None or found["state"] != "running":
            sys.exit(EXIT[found["state"]])
        time.sleep(config.watch)


if __name__ == "__main__":
    cli.run(main)
