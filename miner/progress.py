"""One progress display for a whole run: a live line on a terminal, a plain line now and then in a log.

With ``follow`` it also keeps the run's heartbeat (status.json), its log and its metrics.
"""

import sys
import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from miner import logs, telemetry
from miner.files import Place
from miner.heartbeat import FILE, Heartbeat, utc_now

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal
DEATHS_TOLD = 50  # the latest ones; all are counted


class Display:
    """``phase`` starts a bar, ``advance`` moves it, ``say`` prints above it. A context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = sys.stderr.isatty()
        self.bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.bar: TaskID | None = None
        self.name, self.total, self.done, self.before = "", 0, 0, 0
        self.unit = "images"
        self.figures = ""  # the last round's L_out and effective sample size, shown all along
        self.started = self.spoke = self.moved = time.monotonic()
        self.lock = threading.Lock()  # the heartbeat's thread reads what this one writes
        self.heartbeat: Heartbeat | None = None
        self.run: Place | None = None
        self.told: dict[str, Any] = {}  # what the heartbeat says besides the phase

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()
        if self.heartbeat is None:
            return
        state = (
            "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed" if error else "finished"
        )
        line = " ".join(str(error).split()) or type(error).__name__ if state == "failed" else None
        self._tell(state=state, error=line)
        if error is None:
            logs.log.info(state)
        else:
            logs.log.error(state, exc_info=error)
        self.heartbeat.close()
        self.heartbeat = None
        telemetry.stop()
        logs.stop()

    # --- what others watch: heartbeat, log, metrics --------------------------------------------------------------

    def follow(self, run: Place, rounds: int, unit: str = "round") -> None:
        """Begin the heartbeat, the log and the metrics of ``run``, whose directory now belongs to this process."""
        if self.heartbeat is not None:
            self.heartbeat.close()
        self.run, self.name, self.moved = run, self.name or "start", time.monotonic()
        self.told = {
            "state": "running",
            "unit": unit,
            "round": None,  # counts from 0, as in metrics.jsonl; None before the first
            "rounds": rounds,
            "deaths": [],
            "death_count": 0,
            "quarantined": None,  # not known before the pool was decoded
            "metrics": None,
            "error": None,
        }
        logs.start(run, "driver")
        telemetry.start(run.name, "driver")
        self.heartbeat = Heartbeat(run / FILE, self.facts)

    def facts(self) -> dict[str, Any]:
        """What the heartbeat says now; durations come from the monotonic clock."""
        with self.lock:
            now = time.monotonic()
            rate = (self.done - self.before) / max(now - self.started, 1e-9)
            left = round((self.total - self.done) / rate, 1) if rate > 0 else None
            phase = {"phase": self.name, "done": self.done, "total": self.total, "progress_unit": self.unit}
            pace = {"rate": round(rate, 3), "seconds_left": left, "quiet_seconds": round(now - self.moved, 1)}
            return self.told | phase | pace

    def _tell(self, **facts: Any) -> None:
        with self.lock:
            self.told = self.told | facts
        if self.heartbeat is not None:
            self.heartbeat.beat()

    def joined_ray(self) -> None:
        """Ray runs now: say where it serves the run's metrics."""
        if self.run is not None:
            self._tell(metrics=telemetry.publish(self.run))

    def begin_round(self, round_: int) -> None:
        """Round ``round_``, counted from 0, begins."""
        self._tell(round=round_)

    def committed(self, record: dict[str, Any]) -> None:
        """A round is committed; ``record`` is its line in metrics.jsonl."""
        telemetry.count("rounds_committed")
        logs.log.info("%s committed", self.told.get("unit", "round"), extra=record)

    def quarantined(self, rows: int) -> None:
        """So many rows of the pool do not decode."""
        self._tell(quarantined=rows)
        telemetry.gauge("quarantined_rows", rows)

    def death(self, who: str, why: str, seconds_lost: float) -> None:
        """A pool actor or trainer died; the work of ``seconds_lost`` has to be done again."""
        one = {"who": who, "when": utc_now(), "why": why, "seconds_lost": round(seconds_lost, 3)}
        deaths = [*self.told.get("deaths", []), one][-DEATHS_TOLD:]
        self._tell(deaths=deaths, death_count=self.told.get("death_count", 0) + 1)
        telemetry.count("worker_deaths")
        logs.log.warning("%s died: %s", who, why, extra={"who": who, "seconds_lost": seconds_lost})
        self.say(f"{who} died: {why} ({seconds_lost:.1f} s of work lost)")

    # --- what is shown here --------------------------------------------------------------------------------------

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of ``total`` units, ``done`` of which were done before and do not count as fast work."""
        if self.bar is not None:
            self.bars.remove_task(self.bar)
        self.bar = self.bars.add_task(name, total=total, completed=done, note="")
        with self.lock:
            self.name, self.total, self.done, self.before = name, total, done, done
            self.started = self.spoke = self.moved = time.monotonic()
        if self.heartbeat is not None:
            self.heartbeat.beat()
            logs.log.info("phase %s", name, extra={"total": total, "done": done})

    def advance(self, units: int, unit: str = "images", note: str = "") -> None:
        """``units`` more are done."""
        with self.lock:
            self.done, self.unit, self.moved = min(self.done + units, self.total), unit, time.monotonic()
        seconds = self.moved - self.started
        rate = (self.done - self.before) / max(seconds, 1e-9)
        text = "  ".join(part for part in (f"{rate:,.0f} {unit}/s", note, self.figures) if part)
        if self.bar is not None:
            self.bars.update(self.bar, completed=self.done, note=text)
        if not self.live and time.monotonic() - self.spoke > PLAIN_SECONDS:
            self.spoke = time.monotonic()
            left = (self.total - self.done) / max(rate, 1e-9)
            self.console.print(f"{self.name}: {self.done:,} of {self.total:,}, {text}, {left:,.0f} s left")

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text)
        if self.heartbeat is not None:
            logs.log.info(text)


class Steps:
    """Turns the reports of a training loop (phase, step, steps, epoch, epochs, loss) into a bar of ``display``."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.phase, self.step = "", 0

    def __call__(self, told: dict[str, Any]) -> None:
        if told["phase"] != self.phase:
            self.phase, self.step = told["phase"], told["first"]
            self.display.phase(self.phase, told["steps"], self.step)
        note = f"epoch {told['epoch']}/{told['epochs']}, loss {told['loss']:.3f}"
        self.display.advance(told["step"] - self.step, "steps", note)
        self.step = told["step"]
