"""Pool the rankings of several runs over one pool: one subset for several classifiers or ID sets.

python -m pipelines.universal runs/a runs/b --how mean-rank --gamma 0.1 0.01 --out runs/u

Leaves weights/ (a table as every run's, one row an image), subset-<gamma>/ and summary.json in --out. What any of the
runs excludes is excluded. Train on it: python -m pipelines.train --outliers runs/u/subset-0.01
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from pipelines import cli


@dataclass(frozen=True)
class Config:
    """Pool finished runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories of pipelines.resample or their URLs, two or more, all over one pool."""
    out: str
    """Where the pooled ranking and its subsets go."""
    how: Literal["mean-rank", "max-weight"] = "mean-rank"
    """`mean-rank`: images that stand high in all runs. `max-weight`: images that weigh much in any run."""
    gamma: tuple[float, ...] = (0.01,)
    """Share(s) of the pool to keep, each in (0, 1]; several are nested."""


def main() -> None:
    """Parse, pool, say what came out."""
    config = tyro.cli(Config, prog="python -m pipelines.universal", description=__doc__)
    from miner.files import place
    from miner.progress import Display
    from miner.universal import pool_runs

    out = place(config.out)
    with Display() as display:
        summary = pool_runs(config.runs, config.how, config.gamma, out, display)
    print(closing(summary))
    for path in [*(out / name for name in summary["subsets"]), out / "weights"]:
        print(path)


def closing(summary: dict[str, Any]) -> str:
    """What happened, in a few lines."""
    excluded = ", ".join(f"{count:,} {reason}" for reason, count in summary["excluded"].items() if count) or "none"
    lines = [f"{len(summary['runs'])} runs over {summary['pool']} by {summary['rule']}; excluded: {excluded}"]
    lines += [f"{name}: {subset['count']:,} images" for name, subset in summary["subsets"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
