"""Train a classifier with background images: OE, MixOE, OpenMix, LogitMixOE, energy and their controls.

python -m pipelines.train --method openmix --outliers runs/demo/subset-0.01 --id demo

Without flags it trains OE on the embedded demo. `--help` shows the recipe of the `--method` or `--preset` beside it:
`--preset oe-cifar-tune --help`. Leaves checkpoint.safetensors, summary.json, metrics.jsonl and tensorboard/ in the run
directory; judge it with `python -m pipelines.evaluate RUN`. Stopped? The same command goes on after the last epoch.
"""

import argparse
import sys
from typing import Any

from pipelines import cli


def main() -> None:
    """Parse, train, say what came out."""
    import tyro

    from trainers.config import TrainConfig

    config = tyro.cli(
        TrainConfig, prog="python -m pipelines.train", description=__doc__, default=defaults(sys.argv[1:])
    )
    from trainers.training import train

    print(closing(train(config)))
    print(f"judge it: python -m pipelines.evaluate {config.run_dir}")
    print(config.run_dir / "checkpoint.safetensors")


def defaults(arguments: list[str]) -> Any:
    """The settings that method, preset and checkpoint imply; the other flags change them."""
    from trainers.config import TrainConfig
    from trainers.recipes import METHODS

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--method", "--preset", "--checkpoint"):
        early.add_argument(flag, default=None)
    known, _ = early.parse_known_args(arguments)
    method = known.method if known.method in METHODS else None  # a wrong name is tyro's to explain
    return TrainConfig.default(method, known.preset, scratch=known.checkpoint is None)


def closing(summary: dict[str, Any]) -> str:
    """What happened, in a few lines."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in summary["terms"].items() if name not in ("epoch", "lr"))
    outliers = f", {summary['outliers_seen']:,} different outliers" if summary["outliers_seen"] else ""
    return (
        f"accuracy on the ID test set {summary['accuracy']:.2%}; last epoch: {terms}\n"
        f"{summary['images']:,} images forwarded{outliers}, {summary['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.run(main)
