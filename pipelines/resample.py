"""Mine a gamma-subset of background images for a classifier.

python -m pipelines.resample --pool imagenet --id cifar10 --gamma 0.1 0.01

Without flags it mines the embedded demo pool. Leaves in the run directory: weights/ (an Arrow table, one row
an image), subset-<gamma>/ (tars of original bytes and their manifest) and report.html. Stopped? The same
command goes on after the last finished round.
"""

import os
import sys
import time
from typing import Any

from miner import memory
from pipelines import cli


def main() -> None:
    """Parse, then plan or mine."""
    import tyro

    from miner.config import Config

    config = tyro.cli(Config, prog="python -m pipelines.resample", description=__doc__)
    if config.output.dry_run:
        like_a_worker()
    from miner.inputs import check

    check(config)
    if config.output.dry_run:
        dry_run(config)
        return
    from miner.mining import mine

    mined = mine(config)
    from pipelines.report import write_report

    report = write_report(mined.run)
    if (config.data.pool, config.data.id, config.data.size) == ("demo", "demo", 32):
        from pipelines import demo

        demo.show(demo.verdict(mined.run))
    print(closing(mined.summary))
    for path in [*mined.subsets, mined.run / "weights", report]:
        print(path)


def like_a_worker() -> None:
    """Be what Ray makes of its workers, before numpy is imported: what is measured here is then what they take."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    os.nice(int(os.environ.get("RAY_worker_niceness", 15)))  # noqa: SIM112 - Ray spells it so


def dry_run(config: Any) -> None:
    """Print the plan and what it takes."""
    import torch

    from miner import forecast, rates
    from miner.inputs import open_pool, plan
    from trainers.data import load_id

    forecast.check(config.fleet, torch.cuda.device_count())
    pool = open_pool(config)
    print(plan(config, pool))
    started = time.perf_counter()
    id_set = load_id(config.data.id, config.data.size)
    found = rates.measured(config, pool, id_set, time.perf_counter() - started)
    print(forecast.told(config, pool, id_set, found))


def closing(summary: dict[str, Any]) -> str:
    """What happened, in a few lines."""
    excluded = ", ".join(f"{count:,} {reason}" for reason, count in summary["excluded"].items() if count) or "none"
    lines = [f"mined {summary['pool']} ({summary['images']:,} images) for {summary['id']}; excluded: {excluded}"]
    for name, subset in summary["subsets"].items():
        lines.append(
            f"{name}: {subset['count']:,} images; effective sample size of the weights "
            f"{subset['effective_sample_size']:,.0f}, {subset['clipped_share']:.1%} of weights clipped at this gamma"
        )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"time: {seconds}", memory.table(summary["memory"])])


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.run(main)
