"""Figures of a comparison in words: cells of tables, and the verdict, one sentence a method and gamma."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.compare_stats import (
    FULL_POOL,
    GROUPS,
    MINED,
    NONE,
    RANDOM,
    Arm,
    Block,
    Difference,
    Results,
    What,
    accuracy_of,
    better,
    mean_std,
    paired,
)
from trainers.metrics import UP

DASH = "–"
TRIPLE = ("fpr95_ood_detected", "auroc", "aupr_ood")  # as in the paper's Table 2
ERRORS = ("accuracy", "aurc_x1000", "fpr95_errors_accepted")
NAMES = {
    "auroc": "AUROC",
    "aupr_ood": "AUPR",
    "fpr95_ood_detected": "FPR95",
    "accuracy": "accuracy",
    "aurc_x1000": "AURC × 1,000",
    "fpr95_errors_accepted": "FPR95 of errors",
}
METHODS = {"oe": "OE", "mixoe": "MixOE", "openmix": "OpenMix", "logitmixoe": "LogitMixOE", "ce": "cross-entropy"}
METHODS |= {"ce-energy": "CE, by energy"}
HOW = "Percent, mean ± standard deviation over n training seeds."


@dataclass(frozen=True)
class Told:
    """A table of text, the first cell of a row its name, and one line on what it is and where its figures are from."""

    title: str
    about: str
    head: list[str]
    rows: list[list[str]]


def scaled(metric: str, value: float) -> float:
    """In the unit that tables show: percent, but what ends in _x1000 as it is."""
    return value if metric.endswith("_x1000") else 100 * value


def arrowed(metric: str) -> str:
    """The metric's short name and which way is better."""
    return f"{NAMES[metric]} {'↑' if UP[metric] else '↓'}"


def spread(values: Mapping[int, float], metric: str) -> str:
    """Mean ± std over seeds; the mean alone of one seed; a dash of none."""
    mean, std, n = mean_std(values)
    text = number(scaled(metric, mean))
    return f"{text} ± {number(scaled(metric, std))}" if n > 1 else text


def number(value: float) -> str:
    """Two decimals."""
    return DASH if math.isnan(value) else f"{value:.2f}"


def signed(value: float) -> str:
    """Two decimals with a sign, none for zero."""
    return DASH if math.isnan(value) else f"{value + 0.0:+.2f}".replace("+0.00", "0.00").replace("-0.00", "0.00")


def interval(ends: tuple[float, float], metric: str) -> str:
    """[low, high] in the table's unit."""
    low, high = (signed(scaled(metric, end)) for end in ends)
    return f"[{low}, {high}]" if low != DASH else DASH


def method_name(method: str) -> str:
    """As papers write it."""
    return METHODS.get(method, method)


def title_of(block: Block) -> str:
    """ID set, model and pool."""
    return f"{block.id}, {block.model}, pool {block.pool}"


def arm_name(arm: Arm) -> str:
    """Selector and gamma."""
    return arm.selector if arm.selector in (NONE, FULL_POOL) else f"{arm.selector}, γ = {arm.gamma:g}"


def main_selector(results: Results) -> str | None:
    """The selector that the verdict is about: mined, else the first that is mined for the classifier at hand."""
    names = dict.fromkeys(arm.selector for arm in results.arms)
    own = [name for name in names if name not in (NONE, FULL_POOL, RANDOM) and "@" not in name]
    return MINED if MINED in own else next(iter(own), None)


def main_group(results: Results) -> str | None:
    """The group that the verdict is about: natural sets, else what there is."""
    return next((group for group in GROUPS if results.sets(group)), None)


# --- the verdict ----------------------------------------------------------------------------------------------


def verdicts(results: Results, baseline: str = RANDOM) -> list[str]:
    """One sentence a gamma and method: the main selector against random of the same gamma, or against full.

    A difference counts as shown when neither the t interval nor the exact bootstrap interval holds zero; the
    sentence gives the t interval.
    """
    selector, group = main_selector(results), main_group(results)
    if selector is None or group is None:
        return []
    sentences, what, whom = [], What("auroc", group), {RANDOM: "random ones", FULL_POOL: "the whole pool"}[baseline]
    cost = paired(results, baseline, accuracy_of("accuracy"))
    for arm, found in paired(results, baseline, what).items():
        if arm.selector == selector:
            where = f" ({title_of(arm.block)})" if len(results.blocks) > 1 else ""
            head = f"At γ = {arm.gamma:g}, {method_name(arm.method)} on {selector} images{where}"
            sentences.append(f"{head} {_claim(found, what, whom)}{_accuracy(cost.get(arm))}.")
    return sentences


def _claim(found: Difference, what: What, whom: str) -> str:
    points = scaled(what.metric, found.mean)
    unit = f"points of {GROUPS[what.group]} {NAMES[what.metric]}"
    if found.n < 2:
        return f"stands {signed(points)} {unit} from {whom} in one seed, which shows nothing yet"
    low, high = (scaled(what.metric, end) for end in found.t)
    over = f"(95 % interval {signed(low)} to {signed(high)} over {found.n} seeds)"
    if not found.shown:
        return f"does not show a difference to {whom}: {signed(points)} {unit} {over}"
    verb = "beats" if better(what.metric, found.shown) > 0 else "loses to"
    return f"{verb} {whom} by {number(abs(points))} {unit} {over}"


def _accuracy(found: Difference | None) -> str:
    return f"; ID accuracy changes by {signed(scaled('accuracy', found.mean))} points" if found else ""
