"""Tables of transfer: weights learned for one model or ID set, used for another (the paper's Tables 3a and 3b)."""

from collections.abc import Iterator
from typing import NamedTuple

from pipelines.compare_matrix import UNIVERSAL
from pipelines.compare_stats import RANDOM, Arm, Results, What, mean_std
from pipelines.compare_text import DASH, HOW, NAMES, Told, arm_name, arrowed, main_group, method_name, number, spread


class Family(NamedTuple):
    """One table: arms that differ in ``column`` ("model" or "id") alone, at all gammas."""

    column: str
    pool: str
    other: str  # the id or model that they share
    method: str


def transfer(results: Results) -> list[Told]:
    """Tables 3a, 3b and the share of native's gain that is kept; nothing when nothing was transferred."""
    group = main_group(results)
    families = dict.fromkeys(_family(results, arm) for arm in results.arms if "@" in arm.selector)
    if group is None or not families:
        return []
    tables = [_table(results, family, What(metric, group)) for family in families for metric in ("aupr_ood", "auroc")]
    return [*tables, _kept_table(results, group)]


def source(arm: Arm) -> str:
    """The model or ID set that a transferred arm's images were mined for, or the universal ranking's name."""
    return arm.selector.rpartition("@")[2]


def native(arm: Arm) -> Arm:
    """The arm with images mined for its own model and ID set, by the same rule."""
    return arm._replace(selector=arm.selector.rpartition("@")[0])


def _at(arm: Arm, column: str, name: str) -> Arm:
    """The arm of another model or ID set."""
    return arm._replace(model=name) if column == "model" else arm._replace(id=name)


def _family(results: Results, arm: Arm) -> Family:
    models = {other.model for other in results.arms}
    if source(arm) in models and source(arm) not in UNIVERSAL:
        return Family("model", arm.pool, arm.id, arm.method)
    return Family("id", arm.pool, arm.model, arm.method)


def _table(results: Results, family: Family, what: What) -> Told:
    """One of the two layouts: columns are models (3a) or ID sets (3b)."""
    moved = [arm for arm in results.arms if "@" in arm.selector and _family(results, arm) == family]
    rows: dict[Arm, None] = {}  # their columns blank
    for arm in sorted(moved, key=lambda arm: -arm.gamma):  # stable
        for one in (arm._replace(selector=RANDOM), arm, native(arm)):
            rows.setdefault(_at(one, family.column, ""))
    shared = {"model": "id", "id": "model"}[family.column]
    names = {
        getattr(arm, family.column)
        for arm in results.arms
        if (arm.pool, getattr(arm, shared), arm.method) == (family.pool, family.other, family.method)
    }
    columns = sorted(names, key=lambda name: (name not in {source(arm) for arm in moved}, name))  # sources first
    ordered = sorted(rows, key=lambda arm: (-arm.gamma, arm.selector != RANDOM, "@" not in arm.selector, arm.selector))
    body = [
        [arm_name(arm), *(spread(results.of(_at(arm, family.column, c), what), what.metric) for c in columns)]
        for arm in ordered
    ]
    number_, kind = {"model": ("3a", "models"), "id": ("3b", "ID sets")}[family.column]
    title = f"Transfer between {kind}: {arrowed(what.metric)} ({family.other}, {method_name(family.method)})"
    about = (
        f"Layout of the paper's Table {number_}, {family.pool}: rule@source was mined for that source, rule alone for "
        f"the column's own. Metric {what.metric} of {what.group} sets, protocol {what.protocol}. {HOW}"
    )
    return Told(title, about, ["selector", *columns], body)


def kept(results: Results, arm: Arm, what: What) -> tuple[float, int]:
    """(share of native's gain over random that a transferred arm keeps, seeds): NaN where native gains nothing.

    (transferred - random) / (native - random) of means over the seeds that all three have.
    """
    of = [results.of(one, what) for one in (arm, native(arm), arm._replace(selector=RANDOM))]
    seeds = sorted(of[0].keys() & of[1].keys() & of[2].keys())
    moved, own, random = (mean_std([values[seed] for seed in seeds])[0] for values in of)
    gains = own - random > 0 and bool(seeds)
    return ((moved - random) / (own - random) if gains else float("nan")), len(seeds)


def _kept_table(results: Results, group: str) -> Told:
    rows = []
    for arm in _moved(results):
        shares = [kept(results, arm, What(metric, group)) for metric in ("auroc", "aupr_ood")]
        name = f"{arm.id}, {arm.model}, {method_name(arm.method)}"
        cells = [number(100 * share) for share, _ in shares]
        rows.append([arm_name(arm), name, str(shares[0][1]), *cells])
    about = (
        "100 × (transferred - random) / (native - random) of means over the seeds that all three have, in percent, of "
        f"auroc and aupr_ood of {group} sets; {DASH} where native does not gain over random."
    )
    head = ["selector", "used for", "n", *(NAMES[metric] for metric in ("auroc", "aupr_ood"))]
    return Told("Share of native's gain over random that transfer keeps", about, head, rows)


def _moved(results: Results) -> Iterator[Arm]:
    return (arm for arm in results.arms if "@" in arm.selector)
