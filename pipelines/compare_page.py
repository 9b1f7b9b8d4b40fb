"""OUT/compare.html: the verdict of a comparison, its plots, what was mined, and every table.

One self-contained file, like that of ``pipelines.report``, made from OUT alone and the pools that it names.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miner.errors import MinerError
from miner.run_dir import write_file
from pipelines import compare_found as found
from pipelines import compare_plots as plots
from pipelines import page as paper
from pipelines.compare_plots import Series
from pipelines.compare_stats import (
    FULL_POOL,
    GROUPS,
    NONE,
    RANDOM,
    Arm,
    Block,
    Difference,
    Results,
    What,
    accuracy_of,
    figures,
    mean_std,
    paired,
)
from pipelines.compare_tables import COST, all_tables, progress
from pipelines.compare_text import NAMES, Told, arrowed, main_group, main_selector, method_name, title_of, verdicts

FILE = "compare.html"


def write_page(out: Path) -> Path:
    """Write ``out``/compare.html, atomically, and return its path.

    Reads results.parquet, matrix.json and mined/ there. Raises MinerError when results.parquet is missing or cannot
    be read. The same files give the same bytes.
    """
    try:
        table = pq.read_table(out / "results.parquet")
    except FileNotFoundError:
        raise MinerError(f"{out}/results.parquet: missing; run pipelines.compare with this --out first") from None
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise MinerError(f"{out}/results.parquet: cannot be read ({reason}); run pipelines.compare again") from None
    matrix = out / "matrix.json"
    config: dict[str, Any] = json.loads(matrix.read_text(encoding="utf-8")) if matrix.is_file() else {}
    results = figures(table)
    runs = found.mined(out, results)
    body = header(results, progress(table, config)) + forests(results) + by_set(results)
    body += over_gamma(results) + by_method(results)
    body += found.sheets(runs, results) + found.classes(runs, results) + found.agreement(runs, results)
    write_file(out / FILE, paper.page("Does mining pay?", body + tables(results)).encode())
    return out / FILE


# --- header and tables ------------------------------------------------------------------------------------------


def header(results: Results, done: str) -> str:
    """The verdict and what was compared."""
    verdict = _sentences(verdicts(results))
    if full := verdicts(results, FULL_POOL):
        verdict += paper.folded("Against the whole pool", _sentences(full), open_=not verdict)
    verdict = f'<section id="verdict">{verdict}</section>' if verdict else ""
    seeds = {seed for of in results.values.values() for by in of.values() for seed in by}
    methods = dict.fromkeys(arm.method for arm in results.arms if arm.selector != NONE)
    cards = [
        ("pool", _joined(arm.pool for arm in results.arms)),
        ("ID set", _joined(arm.id for arm in results.arms)),
        ("model", _joined(arm.model for arm in results.arms)),
        ("trained by", _joined(map(method_name, methods))),
        ("γ", _joined(f"{gamma:g}" for gamma in _gammas(results.arms))),
        ("training seeds", ", ".join(map(str, sorted(seeds)))),
        *((f"{name} OOD sets", ", ".join(results.sets(group))) for group, name in GROUPS.items()),
    ]
    intro = (
        f"{done} Differences are paired over seeds; each seed is a classifier, mining and training of its own. One is "
        "called shown when neither the 95 % t interval (given here) nor the exact bootstrap interval holds zero."
    )
    facts = paper.facts([(term, value) for term, value in cards if value])
    return f"<h1>Does mining pay?</h1>{verdict}<p>{paper.escape(intro)}</p>{facts}"


def _sentences(told: Sequence[str]) -> str:
    items = "".join(f"<li>{paper.escape(text)}</li>" for text in told)
    return f'<ul style="margin: 12px 0; padding-left: 1.2em; max-width: 80ch">{items}</ul>' if told else ""


def tables(results: Results) -> str:
    """Costs, then every other table folded."""
    every = all_tables(results)
    body = ""
    if costs := every.pop(COST, []):
        intro = "What a subset costs to find and to store, and what training costs with it. Means over seeds."
        body += paper.section("cost", COST, intro, "".join(map(_table, costs)))
    parts = ""
    for heading, told in every.items():
        boxes, about = "", ""
        for one in told:
            boxes += f"<p>{paper.escape(one.about)}</p>" if one.about != about else ""
            boxes, about = boxes + _table(one), one.about
        parts += paper.folded(heading, boxes)
    intro = "Arrows say which way is better. ± is the standard deviation over training seeds, never over draws."
    return body + (paper.section("tables", "Every table", intro, parts) if parts else "")


def _table(told: Told) -> str:
    rows = [[cell.replace("γ = ", "γ\u00a0=\u00a0") for cell in row] for row in told.rows]
    return f'<div style="margin-bottom: 12px">{paper.table(told.title, told.head, rows)}</div>'


def _joined(names: Any) -> str:
    return ", ".join(dict.fromkeys(names))


# --- plots --------------------------------------------------------------------------------------------------------


def forests(results: Results) -> str:
    """Paired differences to random, by selector and gamma."""
    group = main_group(results)
    places = [What(metric, group) for metric in ("auroc", "aupr_ood", "fpr95_ood_detected")] if group else []
    every = [(what, paired(results, RANDOM, what)) for what in (*places, accuracy_of("accuracy"))]

    def draw(block: Block, method: str) -> Iterator[str]:
        for what, differences in every:
            rows: dict[str, dict[str, Difference]] = {}
            for arm, made in differences.items():
                if (arm.block, arm.method) == (block, method):
                    rows.setdefault(arm.selector, {})[f"γ = {arm.gamma:g}"] = made
            if rows:
                title = f"{NAMES[what.metric]} of {GROUPS.get(what.group, 'ID')} sets less that of random"
                title = title.replace("accuracy of ID sets", "ID accuracy")
                yield plots.forest(title, f"{arrowed(what.metric)}, points", rows, 100.0)

    intro = (
        "Each selector less a random subset of the same γ, paired over seeds. Thick lines: exact bootstrap interval, "
        "thin ones: t interval, both 95 %; the axis may cut a t interval off. A dot is filled where neither holds zero."
    )
    return _section("forest", "Mined against random", intro, results, draw)


def by_set(results: Results) -> str:
    """The layout of the paper's Figure 4: AUPR of each OOD set, a bar a selector; and a bar a pool, of several."""
    sets = [(group, name) for group in GROUPS for name in results.sets(group)]
    names = [name if group == "far" else f"{name} ({group})" for group, name in sets]
    places = [What("aupr_ood", group, name) for group, name in sets]
    xlabel = arrowed("aupr_ood") + ", %"

    def draw(block: Block, method: str) -> Iterator[str]:
        for gamma in _gammas(results.arms):
            arms = _shown(results, block, method, gamma)
            if len(arms) > 1 and any(arm.gamma == gamma for arm in arms):
                title = f"AUPR by OOD set, γ = {gamma:g}"
                series = [_series(results, arm.selector, [(arm, what) for what in places]) for arm in arms]
                yield plots.bars(title, xlabel, names, series, _colours(results))
            pools = [arm for arm in _over_pools(results, block, method) if arm.gamma == gamma]
            if len(pools) > 1 and block.pool == pools[0].pool:
                series = [_series(results, arm.pool, [(arm, what) for what in places]) for arm in pools]
                colour = dict(zip([arm.pool for arm in pools], plots.COLOURS, strict=False))
                yield plots.bars(
                    f"AUPR by OOD set and pool, {pools[0].selector}, γ = {gamma:g}", xlabel, names, series, colour
                )

    intro = "Means over seeds; whiskers are standard deviations. All images of both sides (protocol full)."
    return _section("sets", "By OOD set (the paper's Figure 4)", intro, results, draw) if sets else ""


def over_gamma(results: Results) -> str:
    """The layout of the paper's Figure 7a; nothing with one gamma."""
    gammas, group = sorted(_gammas(results.arms)), main_group(results)

    def draw(block: Block, method: str) -> Iterator[str]:
        for metric in ("aupr_ood", "auroc"):
            what = What(metric, group or "far")
            series = []
            names = dict.fromkeys(arm.selector for arm in _shown(results, block, method) if arm.selector != NONE)
            for name in names:
                ends = [Arm(*block, method, name, gamma) for gamma in (*gammas, 1.0)]
                series.append(_series(results, name, [(arm, what) for arm in ends]))
            none = results.without(block, method)
            level = 100 * mean_std(results.of(none, what))[0] if none else float("nan")
            if series:
                ticks = [*gammas, *([1.0] if FULL_POOL in names else [])]
                shown = [one._replace(mean=one.mean[: len(ticks)], std=one.std[: len(ticks)]) for one in series]
                title = f"{NAMES[metric]} of {GROUPS[what.group]} sets over γ"
                yield plots.over_gamma(title, f"{arrowed(metric)}, %", ticks, shown, _colours(results), level)

    intro = "Means over seeds; whiskers are standard deviations. Full is the whole pool, γ = 1."
    shown = len(gammas) > 1 and group is not None
    return (
        _section("gamma", "How small may a subset be? (the paper's Figure 7a)", intro, results, draw) if shown else ""
    )


def by_method(results: Results) -> str:
    """The layout of the paper's Figure 7b; nothing with one method."""
    group, drawn = main_group(results), []
    for block in results.blocks:
        methods = results.methods(block)
        for gamma in _gammas(results.arms) if len(methods) > 1 and group else ():
            names = dict.fromkeys(arm.selector for method in methods for arm in _shown(results, block, method, gamma))
            for metric, low in (("auroc", 50.0), ("aupr_ood", 0.0)):
                series = []
                for name in names:
                    arms = [
                        Arm(*block, method, name, {NONE: 0.0, FULL_POOL: 1.0}.get(name, gamma)) for method in methods
                    ]
                    arms = [results.baseline(arm, NONE) or arm if name == NONE else arm for arm in arms]
                    series.append(_series(results, name, [(arm, What(metric, group or "far")) for arm in arms]))
                where = f" ({title_of(block)})" if len(results.blocks) > 1 else ""
                title = f"{NAMES[metric]} of {GROUPS[group or 'far']} sets, γ = {gamma:g}{where}"
                labels = [method_name(method) for method in methods]
                drawn.append(plots.bars(title, f"{arrowed(metric)}, %", labels, series, _colours(results), low))
    intro = "Which trainer gains from mining. None is cross-entropy alone, by each method's own score."
    return paper.section("methods", "By trainer (the paper's Figure 7b)", intro, paper.grid(drawn)) if drawn else ""


def _section(name: str, title: str, intro: str, results: Results, draw: Callable[[Block, str], Iterator[str]]) -> str:
    """A section of plots: those of the first block and method in sight, of others folded."""
    drawn = [
        (block, method, list(draw(block, method))) for block in results.blocks for method in results.methods(block)
    ]
    drawn = [item for item in drawn if item[2]]
    body = ""
    for block, method, plotted in drawn:
        where = f"{title_of(block)}: " if len(results.blocks) > 1 else ""
        body += (
            paper.folded(f"{where}{method_name(method)}", paper.grid(plotted), open_=not body) if len(drawn) > 1 else ""
        )
    return paper.section(name, title, intro, body or paper.grid(drawn[0][2])) if drawn else ""


def _gammas(arms: Sequence[Arm]) -> list[float]:
    """The gammas of subsets, falling."""
    return sorted({arm.gamma for arm in arms if arm.selector not in (NONE, FULL_POOL)}, reverse=True)


def _shown(results: Results, block: Block, method: str, gamma: float | None = None) -> list[Arm]:
    """None, full and the native selectors at gamma (or at all)."""
    arms = [arm for arm in results.of_method(block, method) if "@" not in arm.selector]
    return [arm for arm in arms if gamma is None or arm.selector in (NONE, FULL_POOL) or arm.gamma == gamma]


def _over_pools(results: Results, block: Block, method: str) -> list[Arm]:
    """The main selector's arms that differ from each other in pool and gamma alone."""
    same = (block.id, block.model, method, main_selector(results))
    return [arm for arm in results.arms if (arm.id, arm.model, arm.method, arm.selector) == same]


def _series(results: Results, name: str, places: Sequence[tuple[Arm, What]]) -> Series:
    found = [mean_std(results.of(arm, what)) for arm, what in places]
    return Series(name, [100 * mean for mean, _, _ in found], [100 * std for _, std, _ in found])


def _colours(results: Results) -> dict[str, str]:
    return plots.colours(list(dict.fromkeys(arm.selector for arm in results.arms if "@" not in arm.selector)))
