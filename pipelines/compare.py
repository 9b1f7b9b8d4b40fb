"""Does mining pay? Train classifiers on differently selected outliers, judge all, and tabulate with spread.

python -m pipelines.compare --pool POOL --id cifar10 --ood textures svhn --selectors none full random mined toploss \\
    --gamma 0.01 0.1 --methods oe energy --seeds 0 1 2 --out runs/verdict

Per seed: a classifier trained on ID; outliers selected for it in every way; the classifier fine-tuned with each and
judged. Without flags it compares on the embedded demo. Leaves results.parquet, compare.md and compare.html in --out,
and the run directory of everything it did. Stopped? The same command goes on with what is missing.
"""

import json
import sys
from typing import TYPE_CHECKING

from pipelines import cli

if TYPE_CHECKING:
    from pipelines.compare_run import Comparison


def main() -> None:
    """Parse, then plan, or do what is missing and tabulate."""
    import tyro

    from pipelines.compare_config import Compare

    config = tyro.cli(Compare, prog="python -m pipelines.compare", description=__doc__)
    from pipelines.compare_run import Comparison

    comparison = Comparison(config)
    if config.dry_run:
        print(comparison.plan())
        return
    comparison.run()
    if comparison.results.num_rows:
        publish(comparison)
    comparison.complain()


def publish(comparison: "Comparison") -> None:
    """Write compare.md and compare.html, print the main table and where everything is."""
    from miner.run_dir import write_file
    from pipelines.compare_page import write_page
    from pipelines.compare_tables import main_table, markdown

    matrix = json.loads((comparison.out / "matrix.json").read_text())
    write_file(comparison.out / "compare.md", markdown(comparison.results, matrix).encode())
    page = write_page(comparison.out)
    print(main_table(comparison.results))
    for path in (comparison.out / "results.parquet", comparison.out / "compare.md", page):
        print(path)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.run(main)
