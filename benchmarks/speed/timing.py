"""Ways of doing one thing, timed in turn, and a table of them."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

LEAST = 1.0  # second
Way = Callable[[], int]  # does the work, returns how many items it did


def rates(ways: dict[str, Way], repeat: int) -> dict[str, float]:
    """Median items a second of each way; every repetition runs all of them in turn, after one to warm up.

    A way that is done in less than LEAST seconds is run again until these are over: shorter times say little.
    """
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat):
        for name, way in ways.items():
            gc.collect()
            started, items = time.perf_counter(), 0
            while not items or time.perf_counter() - started < LEAST:
                items += way()
            found[name].append(items / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def table(title: str, head: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print a Markdown table."""
    print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(number(cell) for cell in row)} |", flush=True)


def number(value: object) -> str:
    """A figure with three digits that count."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def compare(title: str, ways: dict[str, Way], repeat: int, unit: str = "images/s") -> dict[str, float]:
    """Time ``ways`` and print their rates beside the first one's; the rates."""
    found = rates(ways, repeat)
    first = next(iter(found.values()))
    table(title, ("", unit, "of the first"), [(name, rate, rate / first) for name, rate in found.items()])
    return found


def machine() -> str:
    """The machine in one line."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    model = names[0] if names else platform.processor()
    return f"{os.cpu_count()} CPU cores ({model}), {memory:.0f} GiB, Python {platform.python_version()}"
