"""What the mining runs of a comparison found: favoured classes, agreement between runs, the images themselves."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from miner.errors import MinerError
from miner.images import decode, dimensions, png
from miner.pool import Pool
from miner.ranking import spearman
from miner.weights import load_weights
from pipelines import compare_plots as plots
from pipelines import page as paper
from pipelines.compare_matrix import Mine
from pipelines.compare_stats import FULL_POOL, NONE, RANDOM, Block, Results
from pipelines.compare_text import main_selector, title_of

TILES, TILE = 15, 64  # images of a selector, and the most pixels a side
CLASSES = 15
SAMPLE = 1_000_000  # rows that a rank correlation looks at, at most
SHARES = np.logspace(-3, 0, 25)
PARTS = {"seed": "other seed", "model": "other model", "id": "other ID set"}


@dataclass(frozen=True)
class Mined:
    """A finished mining run of a comparison; its tables are read when they are asked for."""

    mine: Mine
    path: Path

    @cached_property
    def pool(self) -> Pool | None:
        """The pool, None where it is no longer there."""
        try:
            return Pool.open(json.loads((self.path / "summary.json").read_text())["pool_path"])
        except (MinerError, OSError, KeyError, ValueError):
            return None

    @cached_property
    def weight(self) -> np.ndarray:
        """Weights float32 [N], NaN where excluded."""
        table = load_weights(self.path).select(["weight", "excluded_by"])
        return np.where(table["excluded_by"].is_null().to_numpy(), table["weight"].to_numpy(), np.float32("nan"))

    @cached_property
    def label(self) -> np.ndarray:
        """The pool's classes int32 [N], -1 for none."""
        return pc.fill_null(load_weights(self.path)["label"], -1).to_numpy()

    def class_name(self, label: int) -> str:
        """The pool's name of a class; its number where it has none."""
        names = self.pool.classes if self.pool else ()
        return (names[label] if label < len(names) else str(label)) if label >= 0 else "unlabelled"


def mined(out: Path, results: Results) -> list[Mined]:
    """The finished mining runs behind the cells, by selector and seed."""
    found: dict[Mine, None] = {}
    for arm in results.arms:
        if arm.selector not in (NONE, FULL_POOL) and "@" not in arm.selector:
            for seed in sorted({seed for of in results.values[arm].values() for seed in of}):
                found.setdefault(Mine(arm.pool, arm.id, arm.model, arm.selector, seed))
    runs = [Mined(mine, out / mine.name) for mine in found]
    return [run for run in runs if (run.path / "summary.json").is_file() and any(run.path.glob("weights/*.arrow"))]


# --- classes: Figure 5 -------------------------------------------------------------------------------------------


def classes(runs: Sequence[Mined], results: Results) -> str:
    """Bars of the classes with the largest mean weight, a plot each ID set, model and pool."""
    selector, bars = main_selector(results), []
    for block in results.blocks:
        mine = [run for run in runs if run.mine.selector == selector and _block(run) == block]
        means = [_class_means(run) for run in mine]
        size = max((len(mean) for mean in means), default=0)
        if size:
            padded = [np.pad(mean, (0, size - len(mean)), constant_values=np.nan) for mean in means]
            known = np.isfinite(padded).all(axis=0)
            mean = np.where(known, np.mean(padded, axis=0), -1.0)
            order = [int(c) for c in np.argsort(-mean, kind="stable")[:CLASSES] if mean[c] >= 0]
            names = [mine[0].class_name(c) for c in order]
            title = f"{title_of(block)}: mean weight, {len(means)} seed{'s' * (len(means) > 1)}"
            bars += [paper.ratio_bars(names, mean[order], title)] if order else []
    intro = f"The pool classes that {selector} favours most, by the mean weight of their eligible images."
    body = f'<div class="plots">{"".join(bars)}</div>'
    return paper.section("classes", "Favoured classes (the paper's Figure 5)", intro, body) if bars else ""


def _class_means(run: Mined) -> np.ndarray:
    """Mean weight of the eligible images of each class, float64 [classes]; NaN where there are none."""
    keep = np.isfinite(run.weight) & (run.label >= 0)
    count = np.bincount(run.label[keep])
    total = np.bincount(run.label[keep], run.weight[keep])
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _block(run: Mined) -> Block:
    return Block(run.mine.pool, run.mine.id, run.mine.model)


# --- agreement: Figure 6 -----------------------------------------------------------------------------------------


def agreement(runs: Sequence[Mined], results: Results) -> str:
    """Rank correlations of the weights of runs that differ in one thing, and the overlap of their heaviest images."""
    selector = main_selector(results)
    rows, curves = [], {}
    for kind, name in PARTS.items():
        found = [(a, b, *_agreement(a, b)) for a, b in _pairs(runs, selector, kind)]
        for a, b, rho, tau, overlap in found:
            ends = f"{getattr(a.mine, kind)} and {getattr(b.mine, kind)}"
            same = [str(getattr(a.mine, part)) for part in ("id", "model") if part != kind]
            same += [] if kind == "seed" else [f"seed {a.mine.seed}"]
            at_ten = overlap[int(np.abs(SHARES - 0.1).argmin())]
            rows.append([f"{name}: {ends}", ", ".join(same), *(f"{x:.3f}" for x in (rho, tau, at_ten))])
        if found:
            curves[f"{name} ({len(found)})"] = np.mean([overlap for *_, overlap in found], axis=0)
    if not rows:
        return ""
    intro = (
        f"Weights of two runs of {selector} over one pool, over images that neither excludes. Overlap: intersection "
        "over union of the heaviest share γ of them; curves are means over the pairs, whose number is in brackets."
    )
    head = ["pair", "of", "Spearman", "Kendall", "overlap at 0.1"]
    drawn = plots.overlaps("Overlap of the heaviest images", SHARES.tolist(), curves)
    table = paper.table("", head, rows)
    body = f'<div class="boxes"><div class="plots" style="flex: 1 1 420px">{drawn}</div>{table}</div>'
    return paper.section("agreement", "Do runs agree? (the paper's Figure 6)", intro, body)


def _pairs(runs: Sequence[Mined], selector: str | None, kind: str) -> Iterator[tuple[Mined, Mined]]:
    """Runs of ``selector`` over one pool that differ in ``kind`` alone."""
    for a, b in combinations([run for run in runs if run.mine.selector == selector], 2):
        differ = [part for part in ("pool", *PARTS) if getattr(a.mine, part) != getattr(b.mine, part)]
        if differ == [kind] and len(a.weight) == len(b.weight):
            yield a, b


def _agreement(one: Mined, other: Mined) -> tuple[float, float, list[float]]:
    """Spearman's rho, Kendall's tau (b), and the overlap of the heaviest at each of SHARES."""
    from scipy.stats import kendalltau  # type: ignore[import-untyped]

    keep = np.flatnonzero(np.isfinite(one.weight) & np.isfinite(other.weight))
    a, b = one.weight[keep], other.weight[keep]
    thin = slice(None, None, 1 + len(keep) // SAMPLE)
    ranks = np.empty((2, len(keep)), np.int64)
    for rank, weight in zip(ranks, (a, b), strict=True):
        rank[np.argsort(-weight, kind="stable")] = np.arange(len(keep))
    sizes = np.maximum((SHARES * len(keep)).astype(int), 1)
    both = np.searchsorted(np.sort(ranks.max(axis=0)), sizes)  # images among the first k of either
    overlap = (both / (2 * sizes - both)).tolist()
    return spearman(a[thin], b[thin]), float(kendalltau(a[thin], b[thin]).statistic), overlap


# --- images ------------------------------------------------------------------------------------------------------


def sheets(runs: Sequence[Mined], results: Results) -> str:
    """A row of the highest-ranked images each selector, of one classifier and seed."""
    chosen = _one_seed([run for run in runs if run.pool is not None])
    if not chosen:
        return ""
    order = list(dict.fromkeys(arm.selector for arm in results.arms))
    body = ""
    for run in sorted(chosen, key=lambda run: (run.mine.selector != RANDOM, order.index(run.mine.selector))):
        tiles = "".join(_tiles(run))
        style = "grid-template-columns: repeat(auto-fill, minmax(58px, 1fr)); margin-bottom: 12px"
        title = f'<p style="margin: 8px 0 4px"><b>{paper.escape(run.mine.selector)}</b></p>'
        body += f'{title}<div class="sheet" style="{style}">{tiles}</div>' if tiles else ""
    where = f"{title_of(_block(chosen[0]))}, seed {chosen[0].mine.seed}"
    intro = f"The first {TILES} images of each selector's ranking: {where}. Below each its class in the pool."
    return paper.section("images", "What each selector takes first", intro, body) if body else ""


def _one_seed(runs: Sequence[Mined]) -> list[Mined]:
    """The runs of the block and seed for which most selectors ran, the earliest of equals."""
    groups: dict[tuple[Block, int], list[Mined]] = {}
    for run in runs:
        groups.setdefault((_block(run), run.mine.seed), []).append(run)
    return max(groups.values(), key=len, default=[])


def _tiles(run: Mined) -> Iterator[str]:
    assert run.pool is not None
    table = load_weights(run.path)
    first = table.filter(pc.fill_null(pc.less(table["rank"], TILES), False)).sort_by("rank")
    for record in first.select(["shard", "row", "label", "key", "weight"]).to_pylist():
        try:
            data = run.pool.read(record["shard"], [record["row"]])[0]
            side = max(1, min(TILE, *dimensions(data)))
            image = png(decode(data, side))
        except (MinerError, ValueError, OSError):
            continue  # a pool may lose a file; the page goes on without
        name = run.class_name(-1 if record["label"] is None else record["label"])
        hover = f"{record['key']} · shard {record['shard']} row {record['row']} · weight {record['weight']:.3g}"
        yield paper.tile(image, (side, side), name, hover, [name])
