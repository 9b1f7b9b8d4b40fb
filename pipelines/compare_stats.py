"""Figures of a comparison by arm and seed: means over seeds, paired differences with intervals, wins and losses.

An arm is everything of a cell but its seed. Only cells that are there count: arms are paired over the seeds that both
have. Loads no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.compare_selectors import FULL as FULL_POOL
from pipelines.compare_selectors import MINED, NONE, RANDOM
from trainers.metrics import UP

LEVEL = 0.95
TIE = 0.001 + 1e-12  # differences up to 0.1 points are none; the rest is for rounding
EXACT = 6  # seeds up to which all n^n resamples are taken
DRAWS = 10_000
OWN_SCORE = {"energy": "energy"}  # of a method whose paper does not use MSP
# The arm without outliers, "ce", as a method's own score sees it: an arm beside it.
CE = {method: f"ce-{method}" for method in OWN_SCORE}
_FIRST = (NONE, FULL_POOL, RANDOM, MINED)  # in tables they come in this order, the others by name
GROUPS = {"far": "natural", "near": "near", "noise": "noise"}  # never averaged together
# Names of pipelines.judge, which would load torch.
MEAN, FULL, REPEATED, MISCLASSIFICATION, ID = "mean", "full", "1:5", "misclassification", "id"

COLUMNS = ("pool", "id", "model", "selector", "gamma", "method", "seed", "score", "group", "set", "protocol", "metric")


class Block(NamedTuple):
    """What two arms must share to be compared."""

    pool: str
    id: str
    model: str


class Arm(NamedTuple):
    """A cell without its seed."""

    pool: str
    id: str
    model: str
    method: str
    selector: str
    gamma: float

    @property
    def block(self) -> Block:
        """Pool, ID set and model."""
        return Block(self.pool, self.id, self.model)


class What(NamedTuple):
    """Which figure: the metric of an OOD set, or of a group's mean, by a protocol. Group id has one set, ""."""

    metric: str
    group: str = "far"
    set: str = MEAN
    protocol: str = FULL


class Difference(NamedTuple):
    """An arm less its baseline over the seeds that both have: mean, std (ddof 1), intervals, number of seeds."""

    mean: float
    std: float
    bootstrap: tuple[float, float]
    t: tuple[float, float]
    n: int

    @property
    def shown(self) -> int:
        """1 or -1 where both intervals lie on that side of zero, else 0: no difference is shown."""
        (low, high), (below, above) = self.bootstrap, self.t
        return int(low > 0 and below > 0) - int(high < 0 and above < 0)


def accuracy_of(metric: str) -> What:
    """``metric`` of the ID test set: accuracy, aurc_x1000, fpr95_errors_accepted."""
    return What(metric, ID, "", MISCLASSIFICATION)


def cost_of(metric: str) -> What:
    """``metric`` of the cost rows, or flagged_share."""
    group = "subset" if metric == "flagged_share" else "cost"
    return What(metric, group, {"cost": "selection"}.get(group, group), group)


def better(metric: str, difference: float) -> float:
    """``difference`` with the sign that makes more better: a higher fpr95 is a loss."""
    return difference if UP.get(metric) is not False else -difference


@dataclass(frozen=True)
class Results:
    """Every figure: ``values[arm][what][seed]``. A method's figures are by its own score, and so are those of the arm
    without outliers that it is held against."""

    values: Mapping[Arm, Mapping[What, Mapping[int, float]]]

    @cached_property
    def arms(self) -> list[Arm]:
        """All arms by block and method, none before all; within a method as ``selector_order`` has them."""
        return sorted(
            self.values, key=lambda a: (a.block, a.selector != NONE, a.method != "oe", a.method, *selector_order(a))
        )

    @cached_property
    def blocks(self) -> list[Block]:
        """Pool, ID set and model of the arms."""
        return list(dict.fromkeys(arm.block for arm in self.arms))

    def methods(self, block: Block) -> list[str]:
        """The methods trained on outliers, in order; ce alone where there are no others."""
        found = dict.fromkeys(arm.method for arm in self.arms if arm.block == block and arm.selector != NONE)
        return list(found) or ["ce"]

    def of_method(self, block: Block, method: str) -> list[Arm]:
        """The arms of a method, after that without outliers."""
        own = (method, CE.get(method, "ce"))
        return sorted((arm for arm in self.arms if arm.block == block and arm.method in own), key=selector_order)

    def without(self, block: Block, method: str) -> Arm | None:
        """The arm without outliers, by the score of ``method``; None where it was not judged by that."""
        found = Arm(*block, CE.get(method, "ce"), NONE, 0.0)
        return found if found in self.values else None

    def of(self, arm: Arm, what: What) -> dict[int, float]:
        """A figure by seed; empty where there is none."""
        return dict(self.values.get(arm, {}).get(what, {}))

    def sets(self, group: str) -> list[str]:
        """The OOD sets of a group."""
        places = dict.fromkeys(what for of in self.values.values() for what in of)
        return sorted({w.set for w in places if w.group == group and w.set != MEAN and w.protocol == FULL})

    def baseline(self, arm: Arm, selector: str) -> Arm | None:
        """The arm that ``arm`` is held against; None where it is missing, or is itself."""
        found: Arm | None
        if selector == NONE:
            found = None if arm.method in ("ce", *CE.values()) else self.without(arm.block, arm.method)
        else:
            found = arm._replace(selector=selector, gamma=1.0 if selector == FULL_POOL else arm.gamma)
        return found if found in self.values and found != arm else None


def selector_order(arm: Arm) -> tuple[float, int, str, bool, str]:
    """Sorts none and full first, then by gamma falling: random, mined, others; transferred after native."""
    base, _, _ = arm.selector.partition("@")
    place = next((i for i, name in enumerate(_FIRST) if base.partition(":")[0] == name), len(_FIRST))
    ends = {NONE: -3.0, FULL_POOL: -2.0}
    return ends.get(arm.selector, -arm.gamma), place, base, "@" in arm.selector, arm.selector


def figures(results: pa.Table) -> Results:
    """The figures of results.parquet (``COLUMNS`` and value). NaN counts as missing."""
    bare = pc.and_(pc.equal(results["selector"], NONE), pc.equal(results["score"], "energy"))
    method = pc.if_else(bare, CE["energy"], results["method"])
    results = results.set_column(results.schema.get_field_index("method"), "method", method)
    own = pc.if_else(pc.is_in(method, pa.array(["energy", CE["energy"]])), "energy", "msp")
    keep = pc.or_(pc.equal(results["score"], own), pc.equal(results["score"], NONE))
    keep = pc.and_(keep, pc.is_in(results["protocol"], pa.array([FULL, REPEATED, MISCLASSIFICATION, "cost", "subset"])))
    keep = pc.and_(keep, pc.is_finite(results["value"]))
    table = results.filter(keep)
    values: dict[Arm, dict[What, dict[int, float]]] = {}
    for pool, id_, model, selector, gamma, method, seed, _, group, set_, protocol, metric, value in zip(
        *(table[name].to_pylist() for name in (*COLUMNS, "value")), strict=True
    ):
        what = What(metric, group, "" if group == ID else set_, protocol)
        values.setdefault(Arm(pool, id_, model, method, selector, gamma), {}).setdefault(what, {})[seed] = value
    for arm in [arm for arm in values if arm.method == CE["energy"]]:  # accuracy is of no score
        seen = values.get(arm._replace(method="ce"), {})
        values[arm] = {what: seen[what] for what in seen if what.group == ID} | values[arm]
    return Results(values)


def mean_std(values: Mapping[int, float] | Sequence[float]) -> tuple[float, float, int]:
    """(mean, std with ddof 1, n) over seeds; NaN where there are too few."""
    found = np.array(list(values.values()) if isinstance(values, Mapping) else list(values), np.float64)
    return (
        float(found.mean()) if len(found) else float("nan"),
        float(found.std(ddof=1)) if len(found) > 1 else float("nan"),
        len(found),
    )


def exact_bootstrap(values: Sequence[float], level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` (one a seed): (low, high).

    All n^n resamples for n <= 6, 10,000 drawn from ``seed`` for more. Quantiles are those of the discrete
    distribution (no interpolation, which would narrow the interval). With 3 values it spans the smallest to the
    largest: three of one sign leave zero out in a quarter of all cases where there is no difference, so read it
    beside ``t_interval``. Fewer than two values say nothing of spread: NaN.
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    if n < 2:
        return float("nan"), float("nan")
    if n <= EXACT:
        picks = np.array(list(product(range(n), repeat=n)))
    else:
        picks = np.random.default_rng(seed).integers(0, n, (DRAWS, n))
    tail = (1 - level) / 2
    low, high = np.quantile(x[picks].mean(axis=1), [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of ``values``: (low, high); NaN for fewer than two."""
    from scipy.stats import t  # type: ignore[import-untyped]

    mean, std, n = mean_std(values)
    if n < 2:
        return float("nan"), float("nan")
    half = float(t.ppf((1 + level) / 2, n - 1)) * std / n**0.5
    return mean - half, mean + half


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """``one`` less ``other``, figures by seed, over the seeds of both; None where there are none."""
    values = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not values:
        return None
    mean, std, n = mean_std(values)
    return Difference(mean, std, exact_bootstrap(values), t_interval(values), n)


def paired(results: Results, baseline: str, what: What) -> dict[Arm, Difference]:
    """Every arm less the selector ``baseline`` of the same block, method and gamma.

    "none" is one arm a block (cross-entropy, gamma 0), "full" one a method (gamma 1). The sign is the metric's own:
    of fpr95_ood_detected, less is better.
    """
    found = {}
    for arm in results.arms:
        base = results.baseline(arm, baseline)
        made = difference(results.of(arm, what), results.of(base, what)) if base else None
        if made is not None:
            found[arm] = made
    return found


def win_loss_tie(
    results: Results, baseline: str, metric: str = "auroc", group: str = "far"
) -> dict[Arm, tuple[int, int, int]]:
    """(wins, losses, ties) of every arm against ``baseline`` over seeds and OOD sets of a group.

    A tie is a difference of at most TIE; a win is what is better by the metric's orientation.
    """
    found = {}
    places = [What(metric, group, name) for name in results.sets(group)]
    for arm in results.arms:
        base = results.baseline(arm, baseline)
        gains = []
        for place in places if base else ():
            one, other = results.of(arm, place), results.of(base, place) if base else {}
            gains += [better(metric, one[seed] - other[seed]) for seed in one.keys() & other.keys()]
        if gains:
            wins, losses = sum(gain > TIE for gain in gains), sum(gain < -TIE for gain in gains)
            found[arm] = (wins, losses, len(gains) - wins - losses)
    return found
