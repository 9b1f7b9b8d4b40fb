"""The comparison's statistics against brute force, its tables against figures computed here, its page as a whole."""

import base64
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.stats import t as student

from miner.build import write_arrays_pool
from miner.errors import MinerError
from miner.images import decode
from miner.pool import Pool
from miner.run_dir import write_json
from miner.weights import ShardState, final_table, write_arrow
from pipelines.compare_cells import SCHEMA
from pipelines.compare_matrix import Mine
from pipelines.compare_page import write_page
from pipelines.compare_stats import (
    Arm,
    What,
    accuracy_of,
    better,
    difference,
    exact_bootstrap,
    figures,
    mean_std,
    paired,
    t_interval,
    win_loss_tie,
)
from pipelines.compare_tables import main_table, markdown
from pipelines.compare_text import verdicts
from pipelines.compare_transfer import kept

SETS = {"far": ("textures", "svhn"), "near": ("cifar100",), "noise": ("gaussian",)}
ORIENTED = {"auroc": 1, "aupr_ood": 1, "fpr95_ood_detected": -1}
Row = dict[str, str | float | int]
Level = Callable[[str, float, str, int], float]  # selector, gamma, method, seed -> level of natural AUROC


def cell(
    level: float, selector: str, gamma: float, method: str, seed: int, pool: str, id_: str, model: str
) -> list[Row]:
    """The rows of a cell: natural sets lie around ``level``, fpr95 around 1 - level; energy's msp is far off."""
    rng = np.random.default_rng([seed, len(selector), int(1000 * gamma), len(method)])
    where = {"pool": pool, "id": id_, "model": model, "selector": selector, "gamma": gamma, "method": method}
    where |= {"seed": seed}
    rows: list[Row] = []

    def add(score: str, group: str, set_: str, protocol: str, metric: str, value: float) -> None:
        names = ("score", "group", "set", "protocol", "metric", "value")
        rows.append(where | dict(zip(names, (score, group, set_, protocol, metric, value), strict=True)))

    for score in ("msp", "energy") if method in ("energy", "ce") else ("msp",):
        shift = {("energy", "msp"): -0.3, ("ce", "energy"): 0.04}.get((method, score), 0.0)
        for group, sets in SETS.items():
            for metric, protocol in itertools.product(ORIENTED, ("full", "1:5")):
                own = level if ORIENTED[metric] > 0 else 1 - level
                values = [own + shift * ORIENTED[metric] + x for x in (-0.02, 0.02)[: len(sets)]]
                values = [v - 0.1 * (metric == "aupr_ood") + 0.05 * (protocol == "1:5") for v in values]
                for name, value in zip((*sets, "mean"), (*values, np.mean(values)), strict=True):
                    add(score, group, name, protocol, metric, float(value))
        add(score, "id", id_, "misclassification", "aurc_x1000", 40 + float(rng.normal()))
        add(score, "id", id_, "misclassification", "fpr95_errors_accepted", 0.6)
    add("none", "id", id_, "misclassification", "accuracy", 0.83 + 0.001 * seed)
    cost = {"pool_images_scored": 60_000.0, "forward_equivalents": 450_000.0, "bytes_stored": 12_345_678.0}
    for metric, value in (cost | {"selection_seconds": 60.5, "training_images": 3e5, "outliers": 600.0}).items():
        add("none", "cost", "selection", "cost", metric, 0.0 if selector == "none" else value)
    return rows


def matrix(
    level: Level,
    selectors: tuple[str, ...] = ("none", "full", "random", "mined", "toploss"),
    gammas: tuple[float, ...] = (0.1, 0.01),
    methods: tuple[str, ...] = ("oe", "energy"),
    seeds: tuple[int, ...] = (0, 1, 2),
    where: tuple[str, str, str] = ("tiny", "cifar10", "small"),
) -> list[Row]:
    """The rows of every cell."""
    rows = []
    for selector, seed in itertools.product(selectors, seeds):
        of = {"none": (0.0,), "full": (1.0,)}.get(selector, gammas)
        for gamma, method in itertools.product(of, ("ce",) if selector == "none" else methods):
            rows += cell(level(selector, gamma, method, seed), selector, gamma, method, seed, *where)
    return rows


def levels(selector: str, gamma: float, method: str, seed: int) -> float:
    """Mining pays at 0.1, costs at 0.01 with OE, and is all noise for energy."""
    base = {"none": 0.7, "full": 0.85}.get(selector, 0.8 + 0.2 * gamma) + 0.01 * seed
    gain = 0.03 + 0.002 * seed if gamma == 0.1 else -0.04 + 0.003 * seed
    if method == "energy":
        gain = (0.02, -0.03, 0.015)[seed % 3]
    return base + (gain if selector == "mined" else 0.0)


def as_table(rows: list[Row]) -> pa.Table:
    """results.parquet."""
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.fixture(scope="module")
def results() -> pa.Table:
    """Five selectors, two gammas, two methods, three seeds."""
    return as_table(matrix(levels))


def arm(selector: str, gamma: float, method: str = "oe", model: str = "small", id_: str = "cifar10") -> Arm:
    """An arm of the synthetic matrix."""
    return Arm("tiny", id_, model, method, selector, gamma)


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_exact_bootstrap_takes_every_resample(n: int) -> None:
    """The ends are the smallest means whose share of all n^n resamples reaches 2.5 and 97.5 %."""
    values = np.random.default_rng(n).normal(size=n)
    means = sorted(np.mean(pick) for pick in itertools.product(values, repeat=n))
    low = next(m for i, m in enumerate(means, 1) if i / n**n >= 0.025 - 1e-12)
    high = next(m for i, m in enumerate(means, 1) if i / n**n >= 0.975 - 1e-12)
    assert exact_bootstrap(values.tolist()) == pytest.approx((low, high), abs=1e-12)
    assert exact_bootstrap(values.tolist(), seed=7) == exact_bootstrap(values.tolist())


def test_a_bootstrap_of_many_is_drawn_and_repeats() -> None:
    """More than six values: seeded draws near the normal interval."""
    values = np.random.default_rng(0).normal(size=60).tolist()
    low, high = exact_bootstrap(values)
    assert (low, high) == exact_bootstrap(values) != exact_bootstrap(values, seed=1)
    half = 1.96 * np.std(values) / 60**0.5
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.03)


def test_the_t_interval_is_scipys() -> None:
    """And NaN, like the bootstrap, for a single value."""
    values = [0.03, 0.01, 0.025, -0.01]
    expected = student.interval(0.9, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert t_interval(values, 0.9) == pytest.approx(expected)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
    for few in ([], [0.5]):
        assert np.isnan([*t_interval(few), *exact_bootstrap(few)]).all()


def test_arms_are_paired_over_the_seeds_of_both() -> None:
    """Seeds 1 and 2 here, 0 and 1 there: one pair is left; without a baseline there is none."""
    rows = matrix(levels, methods=("oe",), gammas=(0.1,))
    rows = [r for r in rows if not (r["selector"] == "random" and r["seed"] == 2)]
    rows = [r for r in rows if not (r["selector"] == "mined" and r["seed"] == 0)]
    rows = [r for r in rows if r["selector"] != "full"]
    found = figures(as_table(rows))
    made = paired(found, "random", What("auroc"))[arm("mined", 0.1)]
    assert (made.n, made.mean, made.shown) == (1, pytest.approx(0.032), 0)
    assert np.isnan(made.std)
    against_none = paired(found, "none", What("auroc"))
    assert against_none[arm("mined", 0.1)].n == 2
    assert against_none[arm("random", 0.1)].mean == pytest.approx(0.12)
    assert paired(found, "full", What("auroc")) == {}
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_a_nan_is_a_hole() -> None:
    """A figure that is not finite does not count."""
    rows = matrix(levels, methods=("oe",), gammas=(0.1,))
    for row in rows:
        if row["selector"] == "mined" and row["seed"] == 1:
            row["value"] = float("nan")
    found = figures(as_table(rows))
    assert found.of(arm("mined", 0.1), What("auroc")).keys() == {0, 2}


def test_wins_follow_the_orientation_of_the_metric() -> None:
    """A higher fpr95 is a loss; differences of 0.1 points are ties; groups are apart."""

    def level(selector: str, gamma: float, method: str, seed: int) -> float:
        return 0.8 + (0.05, -0.05, 0.001)[seed] * (selector == "mined")

    found = figures(as_table(matrix(level, methods=("oe",), gammas=(0.1,))))
    for metric in ORIENTED:
        assert win_loss_tie(found, "random", metric)[arm("mined", 0.1)] == (2, 2, 2)
    assert win_loss_tie(found, "random", "auroc", "noise")[arm("mined", 0.1)] == (1, 1, 1)
    one = figures(as_table(matrix(level, methods=("oe",), gammas=(0.1,), seeds=(0,))))
    assert paired(one, "random", What("fpr95_ood_detected"))[arm("mined", 0.1)].mean == pytest.approx(-0.05)
    assert win_loss_tie(one, "random", "fpr95_ood_detected")[arm("mined", 0.1)] == (2, 0, 0)
    assert better("fpr95_ood_detected", -0.05) == 0.05 == better("auroc", 0.05)
    assert better("aurc_x1000", 1.0) == -1.0


def test_energy_is_judged_by_its_own_score(results: pa.Table) -> None:
    """msp of the energy method lies 30 points lower; accuracy depends on no score."""
    found = figures(results)
    values = found.of(arm("random", 0.1, "energy"), What("auroc"))
    assert values == pytest.approx({seed: levels("random", 0.1, "energy", seed) for seed in range(3)})
    assert found.of(arm("random", 0.1, "energy"), accuracy_of("accuracy"))[2] == pytest.approx(0.832)


def test_a_method_is_held_against_no_outliers_by_its_own_score(results: pa.Table) -> None:
    """By energy cross-entropy is 4 points better: that is no merit of training with outliers."""
    found = figures(results)
    gained = paired(found, "none", What("auroc"))
    assert gained[arm("random", 0.1, "oe")].mean == pytest.approx(0.12)
    assert gained[arm("random", 0.1, "energy")].mean == pytest.approx(0.08)
    assert paired(found, "none", accuracy_of("accuracy"))[arm("random", 0.1, "energy")].n == 3
    block = arm("random", 0.1).block
    assert [a.method for a in found.of_method(block, "energy")][:2] == ["ce-energy", "energy"]
    old = results.filter(pc.or_(pc.not_equal(results["method"], "ce"), pc.not_equal(results["score"], "energy")))
    assert arm("random", 0.1, "energy") not in paired(figures(old), "none", What("auroc"))


# --- tables -------------------------------------------------------------------------------------------------------


def pipe_tables(text: str) -> dict[str, list[list[str]]]:
    """{title: rows} of the pipe tables under ### headings; asserts that they are tables."""
    tables = {}
    for part in text.split("\n### ")[1:]:
        lines = part.split("\n## ")[0].strip().split("\n")
        rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
        assert lines[2][:1] not in ("", "|")  # the line that says what it is
        assert len({len(row) for row in rows}) == 1
        assert all(set(c) <= set("-:") for c in rows[1])
        tables[lines[0]] = [rows[0], *rows[2:]]
    return tables


def test_the_markdown_holds_the_figures(results: pa.Table) -> None:
    """Table 2, a paired difference with both intervals, win/loss/tie, costs."""
    text = markdown(results, {"config": {"seeds": [0, 1, 2]}, "cells": [{}] * 99})
    assert text.startswith("# Does mining pay?\n\n- At γ = 0.1, OE on mined images beats random ones by ")
    tables = pipe_tables(text)
    title = "cifar10, small, pool tiny: OE, natural sets, protocol full"
    table = tables[title]
    assert table[0] == ["selector", "n", "FPR95 ↓", "AUROC ↑", "AUPR ↑"]
    assert [row[0] for row in table[1:4]] == ["none", "full", "random, γ = 0.1"]
    values = [levels("mined", 0.1, "oe", seed) for seed in range(3)]
    std = f"{100 * np.std(values, ddof=1):.2f}"
    means = [f"{100 * x:.2f} ± {std}" for x in (1 - np.mean(values), np.mean(values), np.mean(values) - 0.1)]
    assert table[4] == ["mined, γ = 0.1", "3", *means]
    row = next(
        row
        for row in tables["cifar10, small, pool tiny: FPR95 ↓ of natural sets against random of the same gamma"]
        if row[:2] == ["mined, γ = 0.1", "OE"]
    )
    deltas = np.array([-0.03, -0.032, -0.034])
    low, high = student.interval(0.95, 2, loc=deltas.mean(), scale=deltas.std(ddof=1) / 3**0.5)
    assert row[2:] == ["3", "-3.20", "0.20", "[-3.40, -3.00]", f"[{100 * low:.2f}, {100 * high:.2f}]", "6/0/0"]
    cost = next(row for row in tables["cifar10, small, pool tiny: selection"] if row[0] == "mined, γ = 0.1")
    assert cost[1:] == ["600", "60,000", "450,000", "60.5", "12.3"]
    assert tables["cifar10, small, pool tiny: training"][2] == ["OE", "300,000"]
    trainers = tables["cifar10, small, pool tiny: AUROC ↑ at γ = 0.1"]
    assert trainers[0] == ["method", "none", "full", "random", "mined", "toploss"]
    assert trainers[1][4].endswith("(+3.20)")
    assert [row[1].partition(" ")[0] for row in trainers[1:3]] == ["71.00", "75.00"]  # by MSP, and by energy
    assert "45 of 99 cells are done." in text
    assert "nan" not in text
    assert "Transfer" not in text


def test_the_main_table_is_short(results: pa.Table) -> None:
    """A line an arm, aligned, then the verdict."""
    lines = main_table(results).split("\n")
    assert sum(line.startswith("mined, γ = 0.1 ") for line in lines) == 2
    assert "+3.20 [+2.70, +3.70]" in next(line for line in lines if line.startswith("mined, γ = 0.1 "))
    assert lines[-1].startswith("At γ = 0.01, energy on mined images")
    assert max(map(len, lines[:-10])) < 120


def test_transfer_has_the_layouts_of_table_3() -> None:
    """Models as columns, ID sets as columns with the universal ranking, and the share that is kept."""
    gain = {"random": 0.0, "mined": 0.04, "mined@wide": 0.03, "mined@small": 0.02, "mined@svhn": 0.01}
    gain |= {"mined@cifar10": 0.01, "mined@mean-rank": 0.05}

    def level(selector: str, gamma: float, method: str, seed: int) -> float:
        return 0.8 + 0.01 * seed + gain[selector]

    plain = {"gammas": (0.1,), "methods": ("oe",)}
    small = ("random", "mined", "mined@wide", "mined@svhn", "mined@mean-rank")
    rows = matrix(level, small, **plain)
    rows += matrix(level, ("random", "mined", "mined@small"), where=("tiny", "cifar10", "wide"), **plain)
    rows += matrix(level, ("random", "mined", "mined@cifar10"), where=("tiny", "svhn", "small"), **plain)
    tables = pipe_tables(markdown(as_table(rows), {}))
    models = tables["Transfer between models: AUROC ↑ (cifar10, OE)"]
    assert models == [
        ["selector", "small", "wide"],
        ["random, γ = 0.1", "81.00 ± 1.00", "81.00 ± 1.00"],
        ["mined@small, γ = 0.1", "–", "83.00 ± 1.00"],
        ["mined@wide, γ = 0.1", "84.00 ± 1.00", "–"],
        ["mined, γ = 0.1", "85.00 ± 1.00", "85.00 ± 1.00"],
    ]
    sets = tables["Transfer between ID sets: AUPR ↑ (small, OE)"]
    assert sets[0] == ["selector", "cifar10", "svhn"]
    assert ["mined@mean-rank, γ = 0.1", "76.00 ± 1.00", "–"] in sets
    share = tables["Share of native's gain over random that transfer keeps"]
    assert ["mined@wide, γ = 0.1", "cifar10, small, OE", "3", "75.00", "75.00"] in share
    assert ["mined@mean-rank, γ = 0.1", "cifar10, small, OE", "3", "125.00", "125.00"] in share
    found = figures(as_table([r for r in rows if r["selector"] != "random"]))
    assert np.isnan(kept(found, arm("mined@wide", 0.1), What("auroc"))[0])


@pytest.mark.parametrize("missing", ["none", "full", "random", "mined", "toploss", "all but none"])
def test_nothing_breaks_on_holes(missing: str, tmp_path: Path) -> None:
    """Whatever selector is missing, tables and page are made of the rest."""
    rows = [r for r in matrix(levels, gammas=(0.1,), methods=("oe",), seeds=(0,)) if r["selector"] != missing]
    if missing == "all but none":
        rows = [r for r in rows if r["selector"] == "none"]
    table = as_table(rows)
    pq.write_table(table, tmp_path / "results.parquet")
    text = markdown(table, {}) + main_table(table)
    if missing in ("random", "all but none"):
        text += write_page(tmp_path).read_text()
    assert not re.search(r"\bnan\b", text)


# --- the verdict --------------------------------------------------------------------------------------------------


def test_the_verdict_is_made_from_the_numbers(results: pa.Table) -> None:
    """A clear win, a clear loss, and two of noise; then the whole pool."""
    found = verdicts(figures(results))
    assert found[0] == (
        "At γ = 0.1, OE on mined images beats random ones by 3.20 points of natural AUROC "
        "(95 % interval +2.70 to +3.70 over 3 seeds); ID accuracy changes by 0.00 points."
    )
    assert found[1].startswith("At γ = 0.01, OE on mined images loses to random ones by 3.70 points")
    assert found[2].startswith("At γ = 0.1, energy on mined images does not show a difference to random ones: +0.17")
    assert len(found) == 4
    full = verdicts(figures(results), "full")
    assert full[0].startswith("At γ = 0.1, OE on mined images does not show a difference to the whole pool: +0.20")
    assert full[1].startswith("At γ = 0.01, OE on mined images loses to the whole pool by 8.50")


def test_a_bootstrap_of_three_alone_convinces_nobody() -> None:
    """Three differences of one sign: the bootstrap leaves zero out, the t interval does not."""

    def level(selector: str, gamma: float, method: str, seed: int) -> float:
        return 0.8 + (0.001, 0.03, 0.002)[seed] * (selector == "mined")

    found = figures(as_table(matrix(level, gammas=(0.1,), methods=("oe",))))
    assert paired(found, "random", What("auroc"))[arm("mined", 0.1)].bootstrap[0] > 0
    assert "does not show a difference to random" in verdicts(found)[0]
    one = figures(as_table(matrix(level, gammas=(0.1,), methods=("oe",), seeds=(1,))))
    assert "in one seed, which shows nothing yet" in verdicts(one)[0]


# --- the page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects sections, tags and everything that could be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.links += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag == "section":
            self.sections.append(found["id"])
        if tag == "img":
            self.images.append(found["src"])


def make_mined(out: Path, pool: Pool, selector: str, seed: int) -> None:
    """A finished mining run, its tables as in miner.mining: later images weigh more, the first 3 are left out."""
    run = out / Mine("tiny", "cifar10", "small", selector, seed).name
    (run / "weights").mkdir(parents=True)
    weight = np.arange(1, pool.count + 1) + np.random.default_rng(seed).random(pool.count)
    for number, start in enumerate(pool.edges[:-1]):
        index = pool.shard_index(number)
        rows = slice(start, start + len(index))
        state = ShardState.fresh("paper", len(index))
        state["state"][:] = weight[rows]
        state.exclude(np.flatnonzero(np.arange(pool.count)[rows] < 3), "near-id")
        rank = np.arange(pool.count)[::-1][rows].astype(np.uint64)
        table = final_table(index, state, 0.05, rank, {})
        write_arrow(table, run / "weights" / f"shard-{number:06d}.arrow")
    write_json(run / "summary.json", {"pool_path": pool.path})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison's folder with mining runs of two selectors and two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    rows = matrix(levels, ("none", "random", "mined"), seeds=(0, 1))
    images = np.zeros((60, 8, 8, 3), np.uint8) + np.arange(60, dtype=np.uint8)[:, None, None, None]
    labels = np.arange(60) // 20
    names = ("fog", "<script>alert(1)</script>", "cat")
    pool = write_arrays_pool(str(folder / "pool"), "tiny", images, labels, names)
    for selector, seed in itertools.product(("mined", "random"), range(2)):
        make_mined(folder, pool, selector, seed)
    pq.write_table(as_table(rows), folder / "results.parquet")
    (folder / "matrix.json").write_text(json.dumps({"config": {"gamma": [0.1, 0.01]}, "cells": [{}] * 26}))
    return folder


def test_the_page_has_every_section_and_needs_no_network(out: Path) -> None:
    """Sections in order, fifteen images a selector in rank order, no script, nothing to fetch."""
    first = write_page(out).read_bytes()
    page = Page(first.decode())
    assert page.sections == (
        "verdict forest sets gamma methods images classes agreement cost tables".split()  # noqa: SIM905
    )
    assert not page.tags & {"script", "iframe", "object"}
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert len(page.images) == 30
    assert "http" not in re.sub(r"base64,[^\"]*", "", first.decode())
    assert "beats random ones by 3.10 points" in first.decode()
    assert "18 of 26 cells are done" in first.decode()
    assert "&lt;script&gt;" in first.decode()
    shades = [int(decode(base64.b64decode(s.partition(",")[2]), 8)[0, 0, 0]) for s in page.images[15:]]
    assert shades == list(range(59, 44, -1))


def test_what_is_not_there_is_absent(tmp_path: Path) -> None:
    """One gamma, one method, no mining runs: no curves over gamma, no bars by method, no images. The same bytes."""
    rows = matrix(levels, ("random", "mined"), gammas=(0.1,), methods=("oe",))
    pq.write_table(as_table(rows), tmp_path / "results.parquet")
    first = write_page(tmp_path).read_text()
    assert Page(first).sections == ["verdict", "forest", "sets", "cost", "tables"]
    assert write_page(tmp_path).read_text() == first


def test_a_pool_that_is_gone_costs_its_images_alone(out: Path, tmp_path: Path) -> None:
    """Classes go by their numbers, weights are compared all the same."""
    rows = [r for r in matrix(levels, ("mined",), gammas=(0.1,), methods=("oe",), seeds=(0, 1)) if r["group"] == "id"]
    pq.write_table(as_table(rows), tmp_path / "results.parquet")
    for run in (out / "mined").iterdir():
        (tmp_path / "mined" / run.name).mkdir(parents=True)
        (tmp_path / "mined" / run.name / "weights").symlink_to(run / "weights")
        write_json(tmp_path / "mined" / run.name / "summary.json", {"pool_path": "/nowhere"})
    sections = Page(write_page(tmp_path).read_text()).sections
    assert {"classes", "agreement"} < set(sections)
    assert "images" not in sections


def test_no_results_is_one_line(tmp_path: Path) -> None:
    """Missing and damaged results.parquet."""
    with pytest.raises(MinerError, match=r"results\.parquet: missing"):
        write_page(tmp_path)
    (tmp_path / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(MinerError, match=r"results\.parquet: cannot be read"):
        write_page(tmp_path)


def test_mean_and_spread() -> None:
    """ddof 1, NaN where there are too few."""
    assert mean_std({0: 1.0, 1: 3.0}) == (2.0, pytest.approx(2**0.5), 2)
    assert np.isnan(mean_std({})[0])
    assert np.isnan(mean_std([1.0])[1])
