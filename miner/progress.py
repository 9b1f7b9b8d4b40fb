"""One progress display for a whole run: a live line on a terminal, a plain line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


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
        self.figures = ""  # the last round's L_out and effective sample size, shown all along
        self.started = self.spoke = time.monotonic()

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of ``total`` units, ``done`` of which were done before and do not count as fast work."""
        if self.bar is not None:
            self.bars.remove_task(self.bar)
        self.bar = self.bars.add_task(name, total=total, completed=done, note="")
        self.name, self.total, self.done, self.before = name, total, done, done
        self.started = self.spoke = time.monotonic()

    def advance(self, units: int, unit: str = "images", note: str = "") -> None:
        """``units`` more are done."""
        self.done = min(self.done + units, self.total)
        seconds = time.monotonic() - self.started
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
