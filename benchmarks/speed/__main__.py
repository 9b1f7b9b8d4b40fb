"""Measure what the parts of a mining cost, in turn with other ways of doing the same.

    python -m benchmarks.speed decode weights neighbours loop start costs sweep
    python -m benchmarks.speed export --pool POOL
    pip install mosaicml-streaming litdata && python -m benchmarks.speed feed

Prints Markdown tables: medians over --repeat repetitions, in which all ways take turns. Run it on a quiet machine.
"""

import argparse
from collections.abc import Callable

from benchmarks.speed import costs, decode, export, loop, neighbours, start, sweep, timing, weights

PARTS: dict[str, Callable[[int], None]] = {
    "decode": decode.main,
    "weights": weights.main,
    "neighbours": neighbours.main,
    "loop": loop.main,
    "start": start.main,
    "costs": costs.main,
    "sweep": sweep.main,
}


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "export", "feed"], help="what to measure")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions")
    parser.add_argument("--pool", help="folder of a pool of tars (export)")
    asked = parser.parse_args()
    print(timing.machine())
    for part in asked.parts:
        if part == "export":
            if not asked.pool:
                parser.error("export needs --pool")
            export.main(asked.repeat, asked.pool)
        elif part == "feed":
            from benchmarks.speed import feed  # needs what nothing else does

            feed.main(asked.repeat)
        else:
            PARTS[part](asked.repeat)


if __name__ == "__main__":
    main()
