"""The commands of the experiment in their order: what each one runs, leaves and costs. Imports no torch.

Schedules and figures are those of Li & Vasconcelos, "Background Data Resampling for Outlier-Aware Classification"
(CVPR 2020, sections 4 and 5), and of the authors' code where the paper is silent.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from miner import inputs
from miner.config import Config as Mining
from miner.errors import UsageError
from miner.pool import Pool, resolve
from trainers.config import Model
from trainers.read import TORCHVISION, datasets_folder

Id = Literal["cifar10", "cifar100"]
Selector = Literal["none", "full", "random", "reference", "paper", "mined"]

BATCH = 128  # ID images a step, and as many background images
PER_EPOCH = 50_000 // BATCH  # steps in one pass over either CIFAR
ILSVRC = 1_281_167  # training images
OOD = {"textures": 5_640, "lsun": 10_000, "svhn": 26_032, "places365": 328_500}  # images of the paper's test sets
NOISE = ("gaussian", "uniform")
TORCHVISION_NAME = {"textures": "dtd"}  # where it is not the name used here
# The paper leaves out nothing near ID, has no strata, and looks at an image once and by itself.
PLAIN = ("--exclude-near-id", "0", "--strata", "0", "--views", "1", "--smooth", "0")


@dataclass(frozen=True)
class Scale:
    """What is run by default, and for how long: epochs of stage 1, of weight learning and of fine-tuning."""

    ids: tuple[Id, ...]
    models: tuple[Model, ...]
    gammas: tuple[float, ...]
    ood: tuple[str, ...]
    pretrain: int
    rounds: int
    tune: int


SCALES = {
    "paper": Scale(("cifar10", "cifar100"), ("wrn-40-4", "wrn-40-2"), (0.1, 0.01), tuple(OOD), 100, 50, 50),
    "small": Scale(("cifar10",), ("small",), (0.1,), ("textures", "svhn"), 10, 5, 5),
}


@dataclass(frozen=True)
class Paper:
    """The experiment of Background Data Resampling, end to end."""

    data: Path = Path("data")
    """Folder with the ID and OOD sets, a folder each: cifar10, cifar100, textures, lsun, svhn, places365. Without
    its folder a set is taken from torchvision (which has fewer Textures and Places365 images), LSUN from
    $OUTLIER_DATASETS/lsun."""
    ilsvrc: Path | None = None
    """ImageNet's training folder, one sub-folder a class; it becomes the pool."""
    pool: str | None = None
    """A pool that is there already (folder, URL or name), in the place of --ilsvrc."""
    scale: Literal["paper", "small"] = "paper"
    """small: a tenth of every schedule, the small net, CIFAR-10 and gamma 0.1 alone: NOT the paper's experiment."""
    ids: tuple[Id, ...] = ()
    """ID sets. Default: those of --scale (cifar10 cifar100)."""
    models: tuple[Model, ...] = ()
    """Classifiers. Default: those of --scale (wrn-40-4, which is the paper's, and wrn-40-2)."""
    gammas: tuple[float, ...] = ()
    """Shares of the pool to keep. Default: those of --scale (0.1 0.01)."""
    selectors: tuple[Selector, ...] = ("none", "full", "random", "reference", "paper", "mined")
    """Which background images: none (stage 1 alone), full (the pool), random, reference (the released update), paper
    (Algorithm 1 as printed), mined (pipelines.resample's own defaults)."""
    ood: tuple[str, ...] = ()
    """OOD test sets. Default: those of --scale (textures lsun svhn places365); gaussian and uniform noise always."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of everything: stage 1, mining, fine-tuning."""
    out: Path = Path("runs/paper")
    """Where everything goes."""
    dry_run: bool = False
    """Print the commands and what they cost, and stop."""

    @property
    def plan(self) -> Scale:
        """The scale, with what other flags replace of it."""
        base = SCALES[self.scale]
        lists = (self.ids or base.ids, self.models or base.models, self.gammas or base.gammas, self.ood or base.ood)
        return Scale(*lists, base.pretrain, base.rounds, base.tune)


@dataclass(frozen=True)
class Step:
    """One command: ``words`` follow ``python -m``. It is done when the files ``leaves`` are there."""

    name: str
    words: tuple[str, ...]
    leaves: tuple[Path, ...]
    forwards: int
    """Forward passes of one image; a backward pass counts as two."""


@dataclass(frozen=True)
class Result:
    """A judged classifier: where its figures lie, and what it is."""

    path: Path
    id: str
    model: str
    selector: str
    gamma: float
    seed: int


def steps(config: Paper) -> list[Step]:
    """Every command, in an order in which each finds what it needs. Raises UsageError for flags that cannot work.

    MinerError when --pool is no sound pool: before hours of training, not after.
    """
    found = []
    if (config.ilsvrc is None) == (config.pool is None):
        raise UsageError("--ilsvrc, --pool: give one of them; --ilsvrc imagenet/train makes the pool")
    for name in (*config.plan.ids, *config.plan.ood):
        source(config, name)
    pool, count = config.pool, ILSVRC
    if config.ilsvrc:
        if not config.ilsvrc.is_dir():
            raise UsageError(f"--ilsvrc {config.ilsvrc}: no such folder; it has one sub-folder a class")
        pool = str(config.out / "pool")
        made_of = ("--source", "folder", "--input", str(config.ilsvrc))
        words = ("pipelines.shard", *made_of, "--name", "ilsvrc", "--out", pool)
        found.append(Step("pool", words, (config.out / "pool" / "pool.json",), 0))
    else:
        count = Pool.open(resolve(str(pool))).count
    for id_name in config.plan.ids:
        for model in config.plan.models:
            for seed in config.seeds:
                found += _of_one(config, str(pool), count, id_name, model, seed)
    return found


def results(config: Paper) -> Iterator[Result]:
    """Every classifier that ``steps`` judges, in their order."""
    plan = config.plan
    for id_name in plan.ids:
        for model in plan.models:
            for seed in config.seeds:
                for selector in config.selectors:
                    for gamma in {"none": (0.0,), "full": (1.0,)}.get(selector, plan.gammas):
                        path = _run(config, id_name, model, selector, gamma, seed)
                        yield Result(path, id_name, model, selector, gamma, seed)


def source(config: Paper, name: str) -> str:
    """Where a set is read from. Raises UsageError when it is nowhere."""
    folder, known = config.data / name, TORCHVISION_NAME.get(name, name)
    if folder.is_dir():
        return str(folder)
    if known in TORCHVISION or (known == "lsun" and os.path.isdir(os.path.join(datasets_folder(), "lsun"))):
        return known
    raise UsageError(f"{folder}: missing, and torchvision has no {name}; put its images there or name others by --ood")


def _run(config: Paper, id_name: str, model: str, selector: str, gamma: float, seed: int) -> Path:
    """Run directory of a classifier."""
    if selector == "none":
        return config.out / "theta0" / f"{id_name}-{model}-s{seed}"
    share = "" if selector == "full" else f"-g{gamma:g}"
    return config.out / "tuned" / f"{id_name}-{model}-{selector}{share}-s{seed}"


def _of_one(config: Paper, pool: str, count: int, id_name: Id, model: Model, seed: int) -> Iterator[Step]:
    """All three stages for one ID set, model and seed."""
    plan = config.plan
    base = ("--id", source(config, id_name), "--model", model, "--seed", str(seed))
    theta = _run(config, id_name, model, "none", 0, seed)
    cost = 3 * plan.pretrain * PER_EPOCH * BATCH
    yield _train(config, "msp-resample", plan.pretrain, (30, 60, 90), (*base, "--out", str(theta)), cost)
    start = (*base, "--checkpoint", str(theta / "checkpoint.safetensors"))
    for selector in config.selectors:
        outliers = {"full": {1.0: pool}, "none": {}}.get(selector)
        if outliers is None:
            mined = config.out / "mined" / f"{id_name}-{model}-{selector}-s{seed}"
            outliers = {gamma: str(mined / f"subset-{gamma:g}") for gamma in plan.gammas}
            yield _mine(config, selector, pool, count, mined, start)
        for gamma, images in outliers.items():
            run = _run(config, id_name, model, selector, gamma, seed)
            words = (*start, "--outliers", images, "--out", str(run))
            yield _train(config, "oe-resample", plan.tune, (30,), words, 6 * plan.tune * PER_EPOCH * BATCH)
            yield _evaluate(config, run)
        if selector == "none":
            yield _evaluate(config, theta)


def _train(
    config: Paper, preset: str, epochs: int, milestones: tuple[int, ...], words: tuple[str, ...], cost: int
) -> Step:
    """One training by a preset, its epochs and milestones shortened at --scale small."""
    run = Path(words[-1])
    command = ("pipelines.train", "--preset", preset, *words)
    if config.scale != "paper":
        shorter = (str(milestone // 10) for milestone in milestones)
        command += ("--epochs", str(epochs), "--milestones", *shorter)
    return Step(f"train-{run.name}-{preset}", command, (run / "checkpoint.safetensors", run / "summary.json"), cost)


def _mine(config: Paper, selector: Selector, pool: str, count: int, run: Path, base: tuple[str, ...]) -> Step:
    """Stage 2: weights, and a subset for every gamma."""
    plan = config.plan
    gammas = tuple(f"{gamma:g}" for gamma in plan.gammas)
    words: tuple[str, ...] = ("pipelines.resample", "--pool", pool, *base, "--gamma", *gammas, "--out", str(run))
    game = ("--batch", str(BATCH), "--alpha", "0.5", "--lr", "0.001", "--draw", "eq20", *PLAIN)
    length = ("--rounds", str(plan.rounds), "--steps", str(PER_EPOCH))
    words += {
        "random": ("--rule", "uniform", "--rounds", "1", "--draw", "random", *PLAIN),
        "reference": ("--rule", "reference", *length, *game),
        "paper": ("--rule", "paper", *length, "--eta", "1", *game),
    }.get(selector, ())  # mined: the defaults of pipelines.resample
    leaves = (run / "report.html", *(run / f"subset-{gamma}" / "subset.json" for gamma in gammas))
    forwards = inputs.work(tyro.cli(Mining, args=words[1:]), count)[2]
    return Step(f"mine-{run.name}", words, leaves, forwards)


def _evaluate(config: Paper, run: Path) -> Step:
    """OOD detection by MSP, five draws of a fifth as many OOD as ID images."""
    names = config.plan.ood
    words = ("pipelines.evaluate", str(run), "--ood", *(source(config, name) for name in names))
    words += ("--noise", *NOISE, "--scores", "msp", "--repeats", "5")
    images = 10_000 + sum(OOD.get(name, 0) for name in names) + 2_000 * len(NOISE)
    return Step(f"evaluate-{run.name}", words, (run / "results.parquet", run / "results.html"), images)
