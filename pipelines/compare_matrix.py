"""The matrix of a comparison: which classifiers, mining runs and cells it takes, and what they cost.

Pure functions and names; nothing is read, nothing is run. Paths are relative to the comparison's --out.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from miner.config import Data
from miner.errors import UsageError
from pipelines.compare_config import Compare
from pipelines.compare_selectors import FULL, MINED, NONE, mining_config, slug
from trainers.noise import NOISE
from trainers.recipes import Recipe, default_recipe

CE = "ce"
ALL = "all"  # in the place of the ID set's name in the folder of a ranking pooled over all of them
UNIVERSAL: tuple[Literal["mean-rank", "max-weight"], ...] = ("mean-rank", "max-weight")


@dataclass(frozen=True)
class Theta0:
    """A classifier that mining and fine-tuning start from."""

    id: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        """Its run directory."""
        return f"theta0/{self.id}-{self.model}-s{self.seed}"


@dataclass(frozen=True)
class Mine:
    """A mining run; with ``sources``, a ranking pooled over those runs."""

    pool: str
    id: str
    model: str
    selector: str
    seed: int
    sources: tuple["Mine", ...] = ()

    @property
    def name(self) -> str:
        """Its run directory."""
        return f"mined/{self.pool}-{self.id}-{self.model}-{slug(self.selector)}-s{self.seed}"

    @property
    def theta0(self) -> Theta0:
        """The classifier that it mines for."""
        return Theta0(self.id, self.model, self.seed)

    def subset(self, gamma: float) -> str:
        """The folder of its subset."""
        return f"{self.name}/subset-{gamma:g}"


@dataclass(frozen=True)
class Cell:
    """One fine-tuned and judged classifier. ``mine`` says where its outliers come from (none and full: nowhere)."""

    pool: str
    id: str
    model: str
    selector: str
    gamma: float
    method: str
    seed: int
    mine: Mine | None = None

    @property
    def name(self) -> str:
        """Its run directory."""
        where = f"{self.pool}-{self.id}-{self.model}-{slug(self.selector)}"
        return f"cells/{where}-g{self.gamma:g}-{self.method}-s{self.seed}"

    @property
    def theta0(self) -> Theta0:
        """The classifier that it fine-tunes."""
        return Theta0(self.id, self.model, self.seed)

    @property
    def subset(self) -> str | None:
        """The folder of its outliers; None for none and full."""
        return self.mine.subset(self.gamma) if self.mine else None

    @property
    def columns(self) -> dict[str, Any]:
        """The cell's columns of results.parquet."""
        names = ("pool", "id", "model", "selector", "gamma", "method", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Matrix:
    """Everything there is to do, each thing once, in the order in which it is done."""

    thetas: tuple[Theta0, ...]
    mines: tuple[Mine, ...]
    cells: tuple[Cell, ...]


# --- the matrix --------------------------------------------------------------------------------------------------


def named(flag: str, specs: tuple[str, ...]) -> dict[str, str]:
    """{short name: specification}. Raises UsageError for two of one name: their folders would be one."""
    found: dict[str, str] = {}
    for spec in specs:
        name = Path(spec.rstrip("/")).name
        if found.setdefault(name, spec) != spec:
            raise UsageError(f"{flag} {spec}: {found[name]} has the same name; rename one")
    return found


def expand(config: Compare) -> Matrix:
    """All cells of ``config`` and what they need. Raises UsageError for values that make no sense."""
    _check(config)
    cells: dict[Cell, None] = {}
    ids = tuple(named("--id", config.id))
    for seed in config.seeds:
        for pool in named("--pool", config.pool):
            for id_ in ids:
                for model in config.models:
                    for selector in config.selectors:
                        cells |= dict.fromkeys(_cells(config, pool, id_, model, selector, seed, ids))
    thetas = dict.fromkeys(cell.theta0 for cell in cells)
    mines = dict.fromkeys(cell.mine for cell in cells if cell.mine)
    last = sorted(mines, key=lambda mine: bool(mine.sources))  # pooled rankings, after what they are pooled from
    return Matrix(tuple(thetas), tuple(last), tuple(cells))


def _cells(
    config: Compare, pool: str, id_: str, model: str, selector: str, seed: int, ids: tuple[str, ...]
) -> list[Cell]:
    """The cells of one selector for one classifier."""
    if selector == NONE:
        return [Cell(pool, id_, model, selector, 0.0, CE, seed)]
    if selector == FULL:
        return [Cell(pool, id_, model, selector, 1.0, method, seed) for method in config.methods]
    found = {selector: Mine(pool, id_, model, selector, seed)}
    if config.transfer and selector.partition(":")[0] == MINED:
        found |= {f"{selector}@{m}": Mine(pool, id_, m, selector, seed) for m in config.models if m != model}
        natives = tuple(Mine(pool, i, model, selector, seed) for i in ids)
        found |= {f"{selector}@{native.id}": native for native in natives if native.id != id_}
        for how in UNIVERSAL if len(ids) > 1 else ():
            found[f"{selector}@{how}"] = Mine(pool, ALL, model, f"{selector}@{how}", seed, natives)
    return [
        Cell(pool, id_, model, text, gamma, method, seed, mine)
        for text, mine in found.items()
        for gamma in config.gamma
        for method in config.methods
    ]


def _check(config: Compare) -> None:
    for flag, values in (
        ("--pool", config.pool),
        ("--id", config.id),
        ("--selectors", config.selectors),
        ("--gamma", config.gamma),
        ("--methods", config.methods),
        ("--models", config.models),
        ("--seeds", config.seeds),
    ):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{flag} {' '.join(map(str, values))}: give one or more different values")
    if CE in config.methods:
        raise UsageError("--methods ce: uses no outliers; it is the selector none")
    for flag, number, least in (
        ("--images", config.budget, 1),
        ("--epochs", config.epochs, 1),
        ("--jobs", 1 if config.jobs is None else config.jobs, 1),
        ("--seeds", min(config.seeds), 0),
    ):
        if number < least:
            raise UsageError(f"{flag} {number}: must be at least {least}")
    if config.lr is not None and not 0 < config.lr < float("inf"):
        raise UsageError(f"--lr {config.lr:g}: must be a positive number")
    for noise in config.noise:
        if noise not in NOISE:
            raise UsageError(f"--noise {noise}: unknown; choose from {', '.join(NOISE)}")
    if not config.far:
        raise UsageError("--ood: give at least one far OOD test set")
    for selector in config.selectors:
        if selector in (NONE, FULL):
            continue
        mining_config(selector, Data(), config.gamma)


# --- schedules ---------------------------------------------------------------------------------------------------


def recipe(config: Compare, method: str | None, id_images: int) -> Recipe:
    """The fine-tuning of ``method`` on so many ID images, --images forwarded and back; None: theta_0's training.

    Cross-entropy forwards ID alone; it makes as many passes over ID as a method that sees one outlier an ID image.
    """
    found = default_recipe(method or CE, scratch=method is None).fitted(id_images)
    if method is None:
        return replace(found, epochs=config.epochs)
    step = 2 * found.batch if method == CE else found.images_per_step
    epochs = max(1, round(config.budget / (id_images // found.batch * step)))
    return replace(found, epochs=epochs, lr=found.lr if config.lr is None else config.lr)


def forwards(config: Compare, method: str, id_images: int) -> int:
    """Images that a fine-tuning by ``method`` forwards and back."""
    found = recipe(config, method, id_images)
    return found.epochs * (id_images // found.batch) * (found.batch if method == CE else found.images_per_step)


# --- the plan ----------------------------------------------------------------------------------------------------

IMAGES_PER_S = 2_000  # forward and back, net small, one core


def plan(config: Compare, matrix: Matrix, id_images: dict[str, int], pool_images: dict[str, int]) -> str:
    """How much there is to do, if nothing is there yet, from the numbers of images in ID sets and pools alone."""
    start = sum(id_images[theta.id] * config.epochs for theta in matrix.thetas)
    forwarded = [(cell.method, forwards(config, cell.method, id_images[cell.id])) for cell in matrix.cells]
    tuning, jobs = sum(count for _, count in forwarded), config.jobs or os.cpu_count() or 1
    each = ", ".join(f"{method} {count:,}" for method, count in dict.fromkeys(forwarded))
    minutes = (start + tuning) / IMAGES_PER_S / jobs / 60
    mined = [mine for mine in matrix.mines if not mine.sources]
    lines = [
        f"classifiers  {len(matrix.thetas):,}, {config.epochs} epochs each: {start:,} images forwarded and back",
        f"minings      {len(mined):,}, on {', '.join(f'{name} ({n:,} images)' for name, n in pool_images.items())}",
        f"cells        {len(matrix.cells):,}: {tuning:,} images forwarded and back ({each} each)",
        f"time         {minutes:,.0f} minutes of training (net small, {jobs} core(s)), beside mining and judging",
        f"out          {config.out}",
    ]
    return "\n".join(lines)
