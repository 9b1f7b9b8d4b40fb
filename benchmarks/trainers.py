"""Which method makes the better detector, at equal forwarded images?

python -m benchmarks.trainers --data DATA --outliers runs/main/subset-0.1 --seeds 0 1 2

DATA holds cifar10/ and OOD test sets (a folder of tars each). Per seed: one classifier pre-trained by cross-entropy
(14 epochs), then every method fine-tunes that classifier until --images images went forward and back. About 5 minutes a
run on one core; runs that are finished are not trained again. Prints Markdown, and keeps all figures as JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from miner.errors import MinerError
from pipelines import cli

OOD = ("textures", "chars74k", "notmnist", "flowers5", "scene15")
NOISE = ("gaussian", "uniform", "rademacher", "blob")
OWN_SCORE = {"energy": "energy"}  # the score that a method's own paper uses, where it is not MSP
COLUMNS = {  # title -> protocol, metric, group or score-free, factor
    "accuracy": ("misclassification", "accuracy", "id", 100),
    "AURC ×1000": ("misclassification", "aurc_x1000", "id", 1),
    "natural AUROC": ("full", "auroc", "far", 100),
    "natural AUPR (OOD)": ("full", "aupr_ood", "far", 100),
    "natural fpr95_ood_detected": ("full", "fpr95_ood_detected", "far", 100),
    "near AUROC": ("full", "auroc", "near", 100),
    "noise AUROC": ("full", "auroc", "noise", 100),
}


@dataclass(frozen=True)
class Benchmark:
    """What is compared."""

    data: Path
    """Folder with the ID set and the OOD sets, each a folder of tars."""
    outliers: str
    """Background images (a gamma-subset)."""
    id: str = "cifar10"
    """Folder of the ID set under --data."""
    ood: tuple[str, ...] = OOD
    """Folders of natural OOD sets under --data."""
    near: tuple[str, ...] = ()
    """Folders of near OOD sets under --data."""
    methods: tuple[str, ...] = ("ce", "oe", "energy", "mixoe", "openmix", "logitmixoe")
    """Methods of pipelines.train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; methods are compared in pairs of equal seed."""
    images: int = 600_000
    """Images forwarded and back in each fine-tuning, ID, outliers and mixtures together."""
    epochs: int = 14
    """Epochs of pre-training."""
    out: Path = Path("runs/benchmark-trainers")
    """Where the runs go."""


def main() -> None:
    """Train and judge what is missing, then print the table."""
    import tyro

    config = tyro.cli(Benchmark, prog="python -m benchmarks.trainers", description=__doc__)
    from trainers.data import load_id
    from trainers.sets import open_images

    id_set = load_id(str(config.data / config.id))
    sets = [("far", found) for name in config.ood for found in open_images(str(config.data / name), 32)]
    sets += [("near", found) for name in config.near for found in open_images(str(config.data / name), 32)]
    sets += [("noise", found) for name in NOISE for found in open_images(name, 32)]
    results: dict[str, list[dict[str, float]]] = {}
    for seed in config.seeds:
        base = trained(config, "ce", seed, None, len(id_set.train_images))
        results.setdefault("start", []).append(figures(base, id_set, sets, "msp"))
        short = trained(config, "ce", seed, base, len(id_set.train_images), share=0.5)
        results.setdefault("ce-short", []).append(figures(short, id_set, sets, "msp"))
        for method in config.methods:
            run = trained(config, method, seed, base, len(id_set.train_images))
            results.setdefault(method, []).append(figures(run, id_set, sets, OWN_SCORE.get(method, "msp")))
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(table(results), flush=True)


def trained(config: Benchmark, method: str, seed: int, base: Path | None, id_images: int, share: float = 1.0) -> Path:
    """Directory of one training run, from scratch or from the run ``base``; trained now if it is not there.

    ``share`` of --images go forward: half of them for ``ce-short``, which sees the ID set as often as most methods.
    """
    from trainers.config import TrainConfig
    from trainers.recipes import default_recipe
    from trainers.training import train

    recipe = default_recipe(method, scratch=base is None)
    epochs = round(share * config.images / (id_images // recipe.batch * recipe.images_per_step))
    recipe = replace(recipe, epochs=max(1, epochs) if base else config.epochs)
    name = "start" if base is None else method if share == 1 else f"{method}-short"
    out = config.out / f"{name}-s{seed}"
    if (out / "summary.json").exists():
        done = json.loads((out / "summary.json").read_text())
        if done["recipe"] != json.loads(json.dumps(asdict(recipe))):
            raise MinerError(f"{out}: was trained by another recipe; choose another --out")
        return out
    settings = TrainConfig(
        method=method,  # type: ignore[arg-type]
        id=str(config.data / config.id),
        outliers=config.outliers,
        checkpoint=base / "checkpoint.safetensors" if base else None,
        seed=seed,
        threads=1,
        out=out,
        recipe=recipe,
    )
    done = train(settings)
    print(f"{out}: {done['images']:,} images in {recipe.epochs} epochs, {done['seconds']:.0f} s", flush=True)
    return out


def figures(run: Path, id_set: Any, sets: list[Any], score: str) -> dict[str, float]:
    """The table's figures of one run, judged by ``score``."""
    from pipelines.judge import judge
    from trainers.checkpoint import open_checkpoint

    net, meta = open_checkpoint(run)
    found = judge(net, meta, id_set, sets, ["msp", *({score} - {"msp"})], seed=0)
    wanted = {}
    for title, (protocol, metric, group, factor) in COLUMNS.items():
        rows = [row for row in found.rows if (row.protocol, row.metric, row.group) == (protocol, metric, group)]
        own = [row for row in rows if row.score in (score if group != "id" else "msp", "none")]
        own = [row for row in own if row.set == "mean"] or own
        if own:
            wanted[title] = own[0].value * factor
    natural = [row for row in found.rows if (row.protocol, row.metric, row.group) == ("full", "auroc", "far")]
    return wanted | {row.set: row.value * 100 for row in natural if row.score == score and row.set != "mean"}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean ± standard deviation over seeds, and the paired gain in natural AUROC over the controls."""
    titles = [title for title in COLUMNS if title in results["start"][0]]
    controls = [name for name in ("start", "ce-short", "ce") if name in results]
    heads = ["method", *titles, *(f"gain over {name}" for name in controls)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, runs in results.items():
        cells = [spread([run[title] for run in runs]) for title in titles]
        for name in controls:
            pairs = zip(runs, results[name], strict=True)
            cells.append(spread([run["natural AUROC"] - other["natural AUROC"] for run, other in pairs]))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (ddof 1); the value alone where there is one."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    cli.run(main)
