"""Do runs agree, and what did they find?

python -m pipelines.agree runs/seed0 runs/seed1 --flag cifar10_strict

For each pair of runs over one pool: Spearman's rho of the weights and IoU of the heaviest images, beside what chance
gives. With --flag, for each run: how much of its heaviest images and of its subsets belongs to classes that carry
this entry in the pool's class_info, beside their share of the pool.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from miner.errors import UsageError
from miner.files import Place, place
from miner.pool import Pool
from miner.ranking import spearman
from miner.weights import load_weights
from pipelines import cli


@dataclass(frozen=True)
class Config:
    """Compare runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories, or their URLs."""
    top: float = 0.1
    """Share of the pool that counts as the heaviest images."""
    flag: str | None = None
    """Entry of class_info in pool.json that marks a class, e.g. `cifar10_strict`: it shows an ID class."""


def heaviest(weight_N: np.ndarray, top: float) -> np.ndarray:
    """Mask bool ``[N]`` of the floor(top N) largest weights; ties go to the earlier row. UsageError as ``checked``."""
    chosen = np.zeros(len(weight_N), bool)
    chosen[np.argsort(-weight_N, kind="stable")[: int(checked(top, len(weight_N)) * len(weight_N))]] = True
    return chosen


def checked(top: float, count: int) -> float:
    """``top``, or UsageError when it is no share of ``count`` images, or none of them."""
    if not 0 < top <= 1:
        raise UsageError(f"--top {top:g}: a share, must lie in (0, 1]")
    if int(top * count) < 1:
        raise UsageError(f"--top {top:g}: of {count:,} images this is none")
    return top


def eligible(table: pa.Table) -> np.ndarray:
    """Mask bool ``[N]`` of the rows that are not excluded."""
    return table["excluded_by"].is_null().to_numpy()


def agreement(weight_N: np.ndarray, other_N: np.ndarray, top: float) -> tuple[float, float]:
    """(Spearman's rho, IoU of the heaviest) of two runs' weights."""
    a, b = heaviest(weight_N, top), heaviest(other_N, top)
    return spearman(weight_N, other_N), float((a & b).sum() / (a | b).sum())


def shares(run: Place, table: pa.Table, top: float, flag: str) -> str:
    """Share of the flagged classes in the pool, the heaviest images and each subset."""
    from miner.exclude import summary_of
    from miner.subset import load_subset  # brings torch along, for which --help should not wait

    pool = Pool.open(summary_of(run)["pool_path"])
    info = pool.class_info if isinstance(pool.class_info, list) else []
    marked = np.array([isinstance(entry, dict) and bool(entry.get(flag)) for entry in info], bool)
    if not marked.any():
        raise UsageError(f"--flag {flag}: no class of {pool.path}/pool.json carries it")
    classes = pa.array(np.flatnonzero(marked), pa.int32())
    inside, keep = pc.is_in(table["label"], classes).to_numpy(), eligible(table)
    top_share = inside[keep][heaviest(table["weight"].to_numpy()[keep], top)].mean()
    text = f"{inside.mean():.1%} of the pool, {top_share:.1%} of the heaviest {top:.0%}"
    subsets: list[Place] = sorted(run.glob("subset-*"), key=str)
    for subset in subsets:
        label = load_subset(subset).manifest["label"]
        text += f", {pc.is_in(label, classes).to_numpy().mean():.1%} of {subset.name}"
    return f"{run}: {flag}: {text}"


def main() -> None:
    """Print shares and agreements."""
    config = tyro.cli(Config, prog="python -m pipelines.agree", description=__doc__)
    if len(config.runs) < 2 and not (config.runs and config.flag):
        raise UsageError("nothing to compare: give two runs, or one and --flag")
    tables = {run: load_weights(run) for run in config.runs}
    for run, table in tables.items() if config.flag else ():
        print(shares(place(run), table, config.top, str(config.flag)))
    for one, other in combinations(config.runs, 2):
        if tables[one]["uid"] != tables[other]["uid"]:
            raise UsageError(f"{one} and {other}: mined from different pools, their weights cannot be compared")
        keep = eligible(tables[one]) & eligible(tables[other])
        first, second = (tables[run]["weight"].to_numpy()[keep] for run in (one, other))
        rho, iou = agreement(first, second, config.top)
        chance = config.top / (2 - config.top)
        text = f"Spearman {rho:.3f}, IoU of the heaviest {config.top:.0%} {iou:.3f} (chance {chance:.3f})"
        print(f"{one} and {other}: {text}, over {keep.sum():,} images that neither excludes")


if __name__ == "__main__":
    cli.run(main)
