"""What the embedded demo found: which families were picked, and what a classifier tuned with them learned.

    python -m pipelines.demo runs/demo

Tunes the run's classifier by outlier exposure with the mined subset, and with a random one of the same size,
and scores both on families of images that the pool does not contain.
"""

import json
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from miner.files import Place, place
from pipelines import cli

SEEDS = 3


def random_subset(table: pa.Table, size: int, seed: int) -> np.ndarray:
    """Row numbers of a uniform draw from the pool, duplicates left out."""
    from miner import ranking

    excluded = table["excluded_by"].cast(pa.string()).to_pylist()
    eligible = np.array([reason not in ("duplicate", "decode") for reason in excluded])
    uid = ranking.uid_words(table["uid"])
    rows = ranking.Rows(np.ones(len(table)), uid, eligible, None)
    return np.flatnonzero(ranking.rank_rows(rows, "random", seed) < np.uint64(size))


def tune_and_score(run: str, model: str, rows: np.ndarray, seed: int) -> dict[str, float]:
    """AUROC of MSP (OOD positive) per held-out family, and ID accuracy, after outlier exposure with ``rows``."""
    import torch
    from sklearn.metrics import roc_auc_score

    from miner import demo
    from miner.cache import open_shard
    from miner.pool import Pool
    from trainers.checkpoint import load_net
    from trainers.data import load_id
    from trainers.fit import fit
    from trainers.image_set import ImageSet
    from trainers.recipes import default_recipe
    from trainers.train import predict

    torch.set_num_threads(1)
    id_set = load_id("demo")
    pool = Pool.open(f"{run}/demo-pool")
    images = np.concatenate([open_shard(pool, shard, 32)[0] for shard in range(len(pool.shards))])[rows]
    net, _ = load_net(f"{run}/classifier.safetensors", model, id_set.classes)
    recipe, outliers = default_recipe("oe", scratch=False), ImageSet("outliers", (images,))
    report = fit(net, id_set, outliers, recipe, seed, torch.device("cpu"), lambda _: None)

    def unsure(pixels: np.ndarray) -> np.ndarray:
        return 1.0 - predict(net, torch.from_numpy(pixels)).softmax(dim=1).amax(dim=1).numpy()

    inside = unsure(id_set.test_images)
    found = {"ID accuracy": report["accuracy"]}
    for family, pixels in demo.held_out().items():
        outside = unsure(pixels)
        truth = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
        found[family] = float(roc_auc_score(truth, np.concatenate([inside, outside])))
    return found


def verdict(run: Place) -> dict[str, Any]:
    """Families found, and held-out AUROC of mined against random, mean over ``SEEDS`` tuning seeds."""
    from miner import demo
    from miner.subset import load_subset
    from miner.weights import load_weights

    table = load_weights(run)
    summary = json.loads((run / "summary.json").read_text())
    subset = load_subset(run / min(summary["subsets"], key=lambda name: summary["subsets"][name]["count"]))
    place = {uid: row for row, uid in enumerate(table["uid"].to_pylist())}
    mined = np.array(sorted(place[uid] for uid in subset.uids))
    label, weight = table["label"].to_numpy(), table["weight"].to_numpy()
    families = [
        {
            "family": name,
            "kind": "near" if name in demo.NEAR else "far" if name in demo.FAR else "middle",
            "pool_share": float((label == i).mean()),
            "mined_share": float((label[mined] == i).mean()),
            "mean_weight": float(weight[label == i].mean()),
        }
        for i, name in enumerate(demo.FAMILIES)
    ]
    jobs = [(str(run.resolve()), summary["model"], mined, seed) for seed in range(SEEDS)]
    jobs += [
        (str(run.resolve()), summary["model"], random_subset(table, len(mined), seed), seed) for seed in range(SEEDS)
    ]
    results: dict[int, dict[str, float]] = dict(cli.each(tune_and_score, jobs, limit=len(jobs)))
    mean = [
        {name: float(np.mean([results[i][name] for i in part])) for name in results[0]}
        for part in (range(SEEDS), range(SEEDS, 2 * SEEDS))
    ]
    return {"size": len(mined), "families": families, "mined": mean[0], "random": mean[1]}


def show(found: dict[str, Any]) -> None:
    """Print the verdict as two tables and a sentence."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    picked = Table("family", "", "share of pool", f"share of the {found['size']} mined", "mean weight")
    for f in found["families"]:
        cells = f"{f['pool_share']:.1%}", f"{f['mined_share']:.1%}", f"{f['mean_weight']:.2f}"
        picked.add_row(f["family"], f["kind"], *cells)
    console.print(picked)
    tuned = Table("held-out family", "AUROC, random", "AUROC, mined")
    families = [name for name in found["mined"] if name != "ID accuracy"]
    for name in families:
        tuned.add_row(name, f"{found['random'][name]:.3f}", f"{found['mined'][name]:.3f}")
    console.print(tuned)
    mined, random = (np.mean([found[arm][name] for name in families]) for arm in ("mined", "random"))
    near = sum(f["mined_share"] for f in found["families"] if f["kind"] == "near")
    pool = sum(f["pool_share"] for f in found["families"] if f["kind"] == "near")
    accuracy = [f"{found[arm]['ID accuracy']:.1%}" for arm in ("mined", "random")]
    console.print(
        f"Near families are {pool:.0%} of the pool and {near:.0%} of the mined subset. Tuned on {found['size']} mined "
        f"images, the classifier detects what it never saw with a mean AUROC of {mined:.3f}; with as many random "
        f"ones, {random:.3f} (mean of {SEEDS} seeds; ID accuracy {accuracy[0]} against {accuracy[1]})."
    )


def main() -> None:
    """Judge a finished demo run."""
    import tyro

    directory = tyro.conf.arg(metavar="RUN", help="Run directory of a mined demo pool.")

    def demo(run: Annotated[str, tyro.conf.Positional, directory]) -> None:
        from miner.rays import connect

        connect(None)
        show(verdict(place(run)))

    tyro.cli(demo, prog="python -m pipelines.demo", description=__doc__)


if __name__ == "__main__":
    cli.run(main)
