"""Tables of paired differences: every selector against random, the main one against each, trainers side by side."""

from collections.abc import Iterator

from pipelines.compare_stats import (
    FULL,
    FULL_POOL,
    GROUPS,
    ID,
    NONE,
    RANDOM,
    Arm,
    Block,
    Difference,
    Results,
    What,
    accuracy_of,
    difference,
    paired,
    win_loss_tie,
)
from pipelines.compare_text import (
    DASH,
    ERRORS,
    HOW,
    TRIPLE,
    Told,
    arm_name,
    arrowed,
    interval,
    main_group,
    main_selector,
    method_name,
    number,
    scaled,
    signed,
    spread,
    title_of,
)


def _compared(results: Results) -> list[What]:
    """The figures that differences are shown of."""
    detection = [What(metric, group) for group in GROUPS if results.sets(group) for metric in reversed(TRIPLE)]
    return [*detection, *map(accuracy_of, ERRORS)]


def differences(results: Results) -> Iterator[Told]:
    """Every selector against random of the same gamma: a table each block and figure."""
    for what in _compared(results):
        found = paired(results, RANDOM, what)
        counts = win_loss_tie(results, RANDOM, what.metric, what.group) if what.group != ID else {}
        for block in results.blocks:
            rows = [
                [arm_name(arm), method_name(arm.method), *_difference(made, what.metric), _count(counts.get(arm))]
                for arm, made in found.items()
                if arm.block == block
            ]
            if rows:
                yield Told(*_about(block, what, "random of the same gamma"), _head("selector", what), rows)


def against(results: Results) -> Iterator[Told]:
    """The main selector against each other one: a table each block and metric of the main group."""
    selector, group = main_selector(results), main_group(results)
    others = dict.fromkeys(arm.selector for arm in results.arms if arm.selector != selector)
    for what in [What(metric, group) for metric in reversed(TRIPLE)] if selector and group else ():
        rows: dict[Block, list[list[str]]] = {}
        for baseline in others:
            counts = win_loss_tie(results, baseline, what.metric, what.group)
            for arm, made in paired(results, baseline, what).items():
                if arm.selector == selector:
                    name = baseline if baseline in (NONE, FULL_POOL) else arm_name(arm._replace(selector=baseline))
                    label = f"{arm_name(arm)} against {name}"
                    cells = [label, method_name(arm.method), *_difference(made, what.metric), _count(counts.get(arm))]
                    rows.setdefault(arm.block, []).append(cells)
        for block, found in rows.items():
            yield Told(*_about(block, what, "the other selector"), _head("pair", what), found)


def _about(block: Block, what: What, whom: str) -> tuple[str, str]:
    where = "the ID test set" if what.group == ID else f"{GROUPS[what.group]} sets"
    unit = "" if what.metric.endswith("_x1000") else " in points"
    about = (
        f"Difference{unit} of metric {what.metric}, {where}, protocol {what.protocol}, to {whom}, paired over n seeds: "
        "mean, standard deviation, 95 % intervals of the mean (exact bootstrap over seeds, and Student's t)"
    )
    counts = "" if what.group == ID else "; wins/losses/ties over (seed, OOD set), a tie is at most 0.1 points"
    return f"{title_of(block)}: {arrowed(what.metric)} of {where} against {whom}", f"{about}{counts}."


def _head(first: str, what: What) -> list[str]:
    return [first, "method", "n", f"Δ {arrowed(what.metric)}", "std", "bootstrap", "t interval", "win/loss/tie"]


def _difference(found: Difference, metric: str) -> list[str]:
    ends = [interval(found.bootstrap, metric), interval(found.t, metric)]
    return [str(found.n), signed(scaled(metric, found.mean)), number(scaled(metric, found.std)), *ends]


def _count(counts: tuple[int, int, int] | None) -> str:
    return "/".join(map(str, counts)) if counts else DASH


def trainers(results: Results) -> Iterator[Told]:
    """Which trainer gains from mining: rows methods, columns selectors, at each gamma."""
    what = What("auroc", main_group(results) or "far")
    for block in results.blocks:
        arms = [arm for arm in results.arms if arm.block == block and "@" not in arm.selector]
        ends = [arm.selector for arm in arms if arm.selector in (NONE, FULL_POOL)]
        for gamma in sorted({arm.gamma for arm in arms if arm.selector not in (NONE, FULL_POOL)}, reverse=True):
            columns = list(dict.fromkeys([*ends, *(arm.selector for arm in arms if arm.gamma == gamma)]))
            columns = [name for name in columns if name in ends or name not in (NONE, FULL_POOL)]
            rows = [
                [method_name(method), *(_gain(results, Arm(*block, method, name, gamma), what) for name in columns)]
                for method in results.methods(block)
            ]
            about = (
                f"Metric auroc of {what.group} sets, protocol {FULL}; in brackets the paired difference to random of "
                f"this gamma. {HOW}"
            )
            yield Told(f"{title_of(block)}: {arrowed('auroc')} at γ = {gamma:g}", about, ["method", *columns], rows)


def _gain(results: Results, arm: Arm, what: What) -> str:
    """A cell of the trainers' table; ``arm`` has the gamma of its random baseline."""
    random, own = arm._replace(selector=RANDOM), arm
    if arm.selector in (NONE, FULL_POOL):
        own = results.baseline(arm, arm.selector) or arm
    text = spread(results.of(own, what), what.metric)
    found = difference(results.of(own, what), results.of(random, what)) if own != random else None
    return f"{text} ({signed(scaled(what.metric, found.mean))})" if found else text
