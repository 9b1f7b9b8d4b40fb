"""Mine a gamma-subset of background images for a classifier.

    python -m pipelines.resample                                  # the embedded demo, about three minutes
    python -m pipelines.resample --pool imagenet --id cifar10 --gamma 0.1 0.01 --out runs/imagenet

Leaves RUN/weights/ (one row an image), RUN/subset-<gamma>/ (tars, manifest) and RUN/report.html.
"""

import sys

from pipelines import cli


def main() -> None:
    """Parse, plan, mine, report."""
    import tyro

    from miner.config import Config

    config = tyro.cli(Config, prog="python -m pipelines.resample", description=__doc__)
    from miner.mine import Mining, mine
    from miner.progress import Display

    if config.output.dry_run:
        with Display() as display:
            print(Mining(config, display).plan())
        return
    mined = mine(config)
    for subset in mined.subsets:
        print(subset)


if __name__ == "__main__":
    cli.run(main)
