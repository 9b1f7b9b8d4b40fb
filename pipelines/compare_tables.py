"""The tables of a comparison: the layouts of the paper's Tables 2 and 3, differences, errors, trainers, costs.

Detection figures are means over the OOD sets of a group, mean ± standard deviation over training seeds.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.compare_gains import against, differences, trainers
from pipelines.compare_stats import (
    CE,
    FULL,
    FULL_POOL,
    GROUPS,
    RANDOM,
    REPEATED,
    Arm,
    Block,
    Results,
    What,
    accuracy_of,
    cost_of,
    figures,
    paired,
    selector_order,
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
    method_name,
    signed,
    spread,
    title_of,
    verdicts,
)
from pipelines.compare_transfer import transfer

SELECTION = (  # metric, header, divisor, decimals
    ("outliers", "outliers", 1, 0),
    ("pool_images_scored", "pool images scored", 1, 0),
    ("forward_equivalents", "forward-equivalents", 1, 0),
    ("selection_seconds", "seconds", 1, 1),
    ("bytes_stored", "stored, MB", 1e6, 1),
    ("flagged_share", "flagged, %", 0.01, 2),
)
TRAINING = (("training_images", "images forwarded", 1, 0), ("training_seconds", "seconds", 1, 1))
ABOUT_COST = {
    "selection": "A forward-equivalent is one image forward; a training step counts three an image. Pre-training is "
    "not counted.",
    "training": "Cross-entropy is trained without outliers.",
}
COST = "Cost"
PROTOCOLS = {
    FULL: "all images of both sides",
    REPEATED: "the paper's protocol, a fifth as many OOD images as ID ones (chance AUPR 16.7)",
}


def all_tables(results: Results) -> dict[str, list[Told]]:
    """Every table, by the heading it stands under; headings without tables are left out."""
    parts = {
        "Table 2: what outliers are worth": [*_detection(results, FULL), *_detection(results, REPEATED)],
        "Paired differences to random": list(differences(results)),
        "Paired differences to every other selector": list(against(results)),
        "Trainers side by side": list(trainers(results)),
        "Transfer: Table 3": transfer(results),
        "Set by set: Figure 4": list(_set_by_set(results)),
        "ID accuracy and misclassification": list(_errors(results)),
        COST: list(_costs(results)),
    }
    return {heading: tables for heading, tables in parts.items() if tables}


def _methods(results: Results) -> Iterator[tuple[Block, str, list[Arm]]]:
    """Block, method and its arms, native ones: transferred ones have their own tables."""
    for block in results.blocks:
        for method in results.methods(block):
            yield block, method, [arm for arm in results.of_method(block, method) if "@" not in arm.selector]


def _seeds(results: Results, arm: Arm) -> str:
    """How many seeds an arm has."""
    return str(len({seed for of in results.values[arm].values() for seed in of}))


# --- detection, sets, errors, costs -------------------------------------------------------------------------------


def _detection(results: Results, protocol: str) -> Iterator[Told]:
    """Table 2: a table each ID set, model, method and group."""
    for block, method, arms in _methods(results):
        for group, name in GROUPS.items():
            places = [What(metric, group, protocol=protocol) for metric in TRIPLE]
            rows = [
                [arm_name(arm), _seeds(results, arm), *(spread(results.of(arm, at), at.metric) for at in places)]
                for arm in arms
            ]
            if any(cell != DASH for row in rows for cell in row[2:]):
                about = (
                    f"Mean of the {name} sets (group {group}); metrics {', '.join(TRIPLE)}, protocol {protocol} "
                    f"({PROTOCOLS[protocol]}). {HOW}"
                )
                head = ["selector", "n", *map(arrowed, TRIPLE)]
                title = f"{title_of(block)}: {method_name(method)}, {name} sets, protocol {protocol}"
                yield Told(title, about, head, rows)


def _set_by_set(results: Results) -> Iterator[Told]:
    for block, method, arms in _methods(results):
        for metric in ("aupr_ood", "auroc"):
            places = [What(metric, group, name) for group in GROUPS for name in results.sets(group)]
            rows = [[arm_name(arm), *(spread(results.of(arm, at), metric) for at in places)] for arm in arms]
            if places:
                title = f"{title_of(block)}: {method_name(method)}, {arrowed(metric)} by OOD set"
                about = f"Metric {metric} of each set, protocol {FULL}. {HOW}"
                yield Told(title, about, ["selector", *(f"{at.set} ({GROUPS[at.group]})" for at in places)], rows)


def _errors(results: Results) -> Iterator[Told]:
    for block, method, arms in _methods(results):
        rows = [
            [arm_name(arm), _seeds(results, arm), *(spread(results.of(arm, accuracy_of(m)), m) for m in ERRORS)]
            for arm in arms
        ]
        about = (
            f"ID test set; metrics {', '.join(ERRORS)} (errors accepted where 95 % of the correct are; by the method's "
            f"own score). {HOW} AURC is no percentage."
        )
        yield Told(f"{title_of(block)}: {method_name(method)}", about, ["selector", "n", *map(arrowed, ERRORS)], rows)


def _costs(results: Results) -> Iterator[Told]:
    """Per block: what a selection costs, by selector and gamma, and what a training costs, by method."""
    for block in results.blocks:
        arms = [arm for arm in results.arms if arm.block == block and arm.method not in CE.values()]
        for what, costs, name in (("selection", SELECTION, arm_name), ("training", TRAINING, _trained)):
            known = [cost for cost in costs if any(results.of(arm, cost_of(cost[0])) for arm in arms)]
            rows = {
                name(arm): [arm2 for arm2 in arms if name(arm2) == name(arm)] for arm in sorted(arms, key=_by(what))
            }
            body = [[label, *(_cost(results, of, *cost) for cost in known)] for label, of in rows.items()]
            about = (
                f"Cost of {what}: metrics {', '.join(metric for metric, *_ in known)}, means over seeds and "
                f"{'methods' if what == 'selection' else 'selectors'}. {ABOUT_COST[what]}"
            )
            if known:
                yield Told(f"{title_of(block)}: {what}", about, [what, *(header for _, header, *_ in known)], body)


def _trained(arm: Arm) -> str:
    return method_name(arm.method)


def _by(what: str) -> Callable[[Arm], Any]:
    return selector_order if what == "selection" else lambda arm: 0


def _cost(results: Results, arms: Sequence[Arm], metric: str, _: str, divisor: float, digits: int) -> str:
    values = [value for arm in arms for value in results.of(arm, cost_of(metric)).values()]
    return f"{np.mean(values) / divisor:,.{digits}f}" if values else DASH


# --- as text --------------------------------------------------------------------------------------------------------


def main_table(results: pa.Table) -> str:
    """What a terminal shows: natural sets and ID accuracy a selector and method, and the verdict.

    ``results`` is the table of results.parquet.
    """
    found = figures(results)
    group = main_group(found) or "far"
    places = [*(What(metric, group) for metric in TRIPLE), accuracy_of("accuracy")]
    gains = paired(found, RANDOM, What("auroc", group))
    parts = []
    for block in found.blocks:
        rows = [["selector", "method", "n", *(arrowed(at.metric) for at in places), "Δ AUROC to random"]]
        for arm in (arm for arm in found.arms if arm.block == block):
            cells = [spread(found.of(arm, at), at.metric) for at in places]
            gain = gains.get(arm)
            more = f"{signed(100 * gain.mean)} {interval(gain.t, 'auroc')}".removesuffix(f" {DASH}") if gain else ""
            rows.append([arm_name(arm), method_name(arm.method), _seeds(found, arm), *cells, more])
        title = f"{title_of(block)}; {GROUPS[group]} sets, in %, Δ in points with 95 % t interval"
        parts.append("\n".join([title, *_aligned(rows)]))
    parts += ["\n".join(told) for baseline in (RANDOM, FULL_POOL) if (told := verdicts(found, baseline))]
    return "\n\n".join(parts)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other, names left and figures right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(results: pa.Table, config_json: Mapping[str, Any]) -> str:
    """compare.md: the verdict, every table, the settings. ``config_json`` is the content of matrix.json."""
    found = figures(results)
    told = [text for baseline in (RANDOM, FULL_POOL) for text in verdicts(found, baseline)]
    parts = ["# Does mining pay?", *(["\n".join(f"- {text}" for text in told)] if told else [])]
    for heading, tables in all_tables(found).items():
        parts += [f"## {heading}", *map(_pipes, tables)]
    settings = json.dumps(config_json.get("config", {}), indent=2, ensure_ascii=False)
    parts += ["## Settings", f"{progress(results, config_json)}", f"```json\n{settings}\n```"]
    return "\n\n".join(parts) + "\n"


def progress(results: pa.Table, config_json: Mapping[str, Any]) -> str:
    """How many cells of how many are in the figures."""
    keys = ("pool", "id", "model", "selector", "gamma", "method", "seed")
    done = len(results.select(list(keys)).group_by(list(keys)).aggregate([]))
    planned = len(config_json.get("cells", ()))
    return f"{done:,} of {planned:,} cells are done." if planned >= done else f"{done:,} cells are done."


def _pipes(table: Told) -> str:
    lines = [table.head, ["---", *("---:" for _ in table.head[1:])], *table.rows]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    body = "\n".join(f"| {line} |" for line in cells)
    return f"### {table.title}\n\n{table.about}\n\n{body}"
