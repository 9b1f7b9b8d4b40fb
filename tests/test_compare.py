"""The runner of comparisons: selectors, the matrix, and real tiny comparisons that are killed, widened and broken."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from helpers import start_and_kill

from miner import demo
from miner.build import write_arrays_pool
from miner.config import Config, Data
from miner.errors import MinerError, UsageError
from pipelines.compare_cells import ROWS, SCHEMA, judged, scores_of
from pipelines.compare_config import Compare
from pipelines.compare_matrix import Cell, expand, forwards, plan, recipe
from pipelines.compare_run import Comparison
from pipelines.compare_selectors import mining_config, settings, slug

ROOT = Path(__file__).parent.parent
SHARED = 7  # row of the pool that is also in the OOD set "leak"


# --- selectors and the matrix ------------------------------------------------------------------------------------


def test_selectors_say_how_to_mine() -> None:
    assert settings("none") == settings("full") == settings("mined") == {}
    bare = {"rounds": 1, "strata": 0, "exclude_near_id": 0.0, "views": 1, "smooth": 0.0}
    assert settings("random") == bare | {"rule": "uniform", "draw": "random"}
    assert settings("toploss") == bare | {"rule": "toploss"}
    assert "strata" not in settings("dos")
    assert "rounds" not in settings("reference")
    found = settings("mined:strata=none,rounds=2,eta=0.5,draw=topk,rule=paper")
    assert found == {"strata": None, "rounds": 2, "eta": 0.5, "draw": "topk", "rule": "paper"}
    config = mining_config("toploss:strata=60,exclude_near_id=0.25", Data(seed=3), (0.1,))
    assert (config.game.rule, config.game.rounds, config.data.seed) == ("toploss", 1, 3)
    assert (config.selection.strata, config.selection.exclude_near_id, config.selection.gamma) == (60, 0.25, (0.1,))
    assert mining_config("mined", Data(), (0.01,)) == Config()
    assert slug("mined:strata=0,rounds=2") == "mined+strata=0+rounds=2"


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("best", "no selector is called 'best'; choose from none, full, random, mined, hedge"),
        ("full:strata=0", "full mines nothing and takes no fields"),
        ("mined:gamma=0.1", "no field 'gamma'; choose from rule, rounds"),
        ("mined:strata", "strata= is no int or none"),
        ("mined:rounds=few", "rounds=few is no int"),
        ("mined:draw=all", "draw=all is no rank or eq20 or topk or random or none"),
        ("mined:rounds=0", "--rounds 0: must be at least 1"),
        ("mined:exclude_near_id=1", "a share of the ID images"),
    ],
)
def test_wrong_selectors(selector: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--selectors {selector}: ") as error:
        expand(Compare(selectors=(selector,)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": (0.0,)}, "--gamma 0: the share"),
        ({"gamma": (1.5,)}, "--gamma 1.5: the share"),
        ({"seeds": (1, 1)}, "--seeds 1 1: give one or more different values"),
        ({"seeds": (-1,)}, "--seeds -1: must be at least 0"),
        ({"methods": ()}, "--methods : give one or more"),
        ({"methods": ("ce",)}, "it is the selector none"),
        ({"id": ("a/x", "b/x"), "ood": ("o",)}, "--id b/x: a/x has the same name"),
        ({"id": ("a",)}, "--ood: give at least one"),
        ({"noise": ("pink",)}, "--noise pink: unknown"),
        ({"images": -5}, "--images -5: must be at least 1"),
        ({"jobs": 0}, "--jobs 0: must be at least 1"),
    ],
)
def test_wrong_flags(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        expand(Compare(**changed))
    assert message in str(error.value)


def test_the_matrix_has_everything_once() -> None:
    config = Compare(selectors=("none", "full", "random", "mined"), gamma=(0.01, 0.1), methods=("oe", "energy"))
    matrix = expand(config)
    assert [theta.name for theta in matrix.thetas] == ["theta0/demo-small-s0", "theta0/demo-small-s1"]
    assert [mine.selector for mine in matrix.mines] == ["random", "mined"] * 2
    assert len(matrix.cells) == 2 * (1 + 2 + 2 * 2 * 2)
    assert len({cell.name for cell in matrix.cells}) == len(matrix.cells)
    none, full, *_, last = matrix.cells
    assert none.name == "cells/demo-demo-small-none-g0-ce-s0"
    assert full.name == "cells/demo-demo-small-full-g1-oe-s0"
    assert last.name == "cells/demo-demo-small-mined-g0.1-energy-s1"
    assert (none.subset, full.subset) == (None, None)
    assert last.subset == "mined/demo-demo-small-mined-s1/subset-0.1"
    told = plan(config, matrix, {"demo": 1000}, {"demo": 21_000})
    assert "classifiers  2, 14 epochs each: 28,000 images" in told
    assert "(ce 9,856, oe 19,712, energy 19,712 each)" in told


def test_transfer_uses_subsets_of_other_models_and_id_sets() -> None:
    config = Compare(id=("a", "b"), ood=("o",), models=("small", "resnet18"), selectors=("random", "mined"), seeds=(0,))
    assert len(expand(config).cells) == 8
    matrix = expand(replace(config, transfer=True))
    subsets = {cell.selector: cell.subset for cell in matrix.cells if (cell.id, cell.model) == ("a", "small")}
    assert subsets == {
        "random": "mined/demo-a-small-random-s0/subset-0.01",
        "mined": "mined/demo-a-small-mined-s0/subset-0.01",
        "mined@resnet18": "mined/demo-a-resnet18-mined-s0/subset-0.01",
        "mined@b": "mined/demo-b-small-mined-s0/subset-0.01",
        "mined@mean-rank": "mined/demo-all-small-mined@mean-rank-s0/subset-0.01",
        "mined@max-weight": "mined/demo-all-small-mined@max-weight-s0/subset-0.01",
    }
    assert len(matrix.cells) == 4 * 6
    assert len(matrix.mines) == 4 * 2 + 2 * 2
    assert [bool(mine.sources) for mine in matrix.mines] == [False] * 8 + [True] * 4
    assert {source.id for source in matrix.mines[-1].sources} == {"a", "b"}


def test_all_methods_forward_the_same_number_of_images() -> None:
    config = Compare(images=100_000, lr=0.01)
    for method in ("oe", "energy", "mixoe", "logitmixoe"):
        found = recipe(config, method, 5000)
        assert abs(found.epochs * (5000 // found.batch) * found.images_per_step - 100_000) < 5000 * 3
        assert found.lr == 0.01
    assert recipe(config, "ce", 5000).epochs == recipe(config, "oe", 5000).epochs
    assert 2 * forwards(config, "ce", 5000) == forwards(config, "oe", 5000)
    assert recipe(config, None, 5000).epochs == config.epochs
    assert recipe(config, None, 5000).lr != 0.01


# --- real, tiny comparisons --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compare]:
    """A pool of 400 images in two classes, one of them flagged, and an OOD set of 40; digits as ID."""
    folder = tmp_path_factory.mktemp("data")
    images, _ = demo.pool_arrays()
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(images))[:400]
    write_arrays_pool(str(folder), "tiny", images[rows], np.arange(400) % 2, ("plain", "marked"))
    manifest = json.loads((folder / "pool.json").read_text())
    manifest["class_info"] = [{"name": "plain"}, {"name": "marked", "odd": True}]
    (folder / "pool.json").write_text(json.dumps(manifest))
    np.save(folder / "squares.npy", np.tile(rng.integers(0, 256, (40, 4, 4, 3), np.uint8), (1, 8, 8, 1)))
    np.save(folder / "leak.npy", images[rows[SHARED : SHARED + 40]])
    yield Compare(
        pool=(str(folder),),
        ood=(str(folder / "squares.npy"),),
        noise=(),
        selectors=("none", "random", "toploss"),
        gamma=(0.1,),
        seeds=(0,),
        images=2560,
        epochs=1,
        flag="odd",
        jobs=1,
        out=folder / "out",
    )
    ray.shutdown()


@pytest.fixture(scope="module")
def done(base: Compare) -> Comparison:
    comparison = Comparison(base)
    comparison.run()
    comparison.complain()
    return comparison


def figures(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of its own cells but the seconds, which are never the same twice."""
    table = pq.read_table(comparison.out / "results.parquet")
    assert table.schema == SCHEMA
    rows = table.filter(pc.invert(pc.match_substring(table["metric"], "seconds"))).to_pylist()
    own = [cell.columns for cell in comparison.matrix.cells]
    mine = [row for row in rows if {name: row[name] for name in own[0]} in own]
    return [{**row, "value": repr(row["value"])} for row in mine]  # equal to the last digit; NaN is equal, too


def written(out: Path) -> dict[str, int]:
    """When each finished cell and each classifier was written."""
    paths = [*out.glob(f"cells/*/{ROWS}"), *out.glob("theta0/*/summary.json"), *out.glob("mined/*/summary.json")]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in paths}


def test_a_cell_that_lacks_a_score_is_judged_again(done: Comparison) -> None:
    none = next(cell for cell in done.matrix.cells if cell.selector == "none")
    assert scores_of(none, ("oe", "energy")) == ("msp", "energy")
    assert judged(done.out / none.name / ROWS, scores_of(none, ("oe",)))
    assert not judged(done.out / none.name / ROWS, scores_of(none, ("oe", "energy")))


def test_a_cell_is_judged_and_counted(done: Comparison) -> None:
    rows = [{**row} for row in done.results.to_pylist()]
    values = {(r["selector"], r["score"], r["group"], r["set"], r["protocol"], r["metric"]): r["value"] for r in rows}
    pool = Path(done.config.pool[0])
    assert {(r["pool"], r["id"], r["model"], r["seed"]) for r in rows} == {(pool.name, "demo", "small", 0)}
    assert {(r["selector"], r["gamma"], r["method"]) for r in rows} == {
        ("none", 0.0, "ce"),
        ("random", 0.1, "oe"),
        ("toploss", 0.1, "oe"),
    }
    for selector in done.config.selectors:
        assert 0 <= values[selector, "msp", "far", "squares", "full", "auroc"] <= 1
        assert 0 < values[selector, "none", "id", "demo", "misclassification", "accuracy"] <= 1

    def cost(selector: str, metric: str) -> float:
        return values[selector, "none", "cost", "selection", "cost", metric]

    assert [cost(s, "outliers") for s in done.config.selectors] == [0, 40, 40]
    assert [cost(s, "pool_images_scored") for s in done.config.selectors] == [0, 0, 400]
    assert [cost(s, "forward_equivalents") for s in done.config.selectors] == [0, 0, 400]
    assert cost("none", "training_images") * 2 == cost("random", "training_images") == 2560
    assert 0 < cost("random", "selection_seconds") < cost("toploss", "selection_seconds")
    tar = next(pool.glob("out/mined/*toploss*/subset-0.1/*.tar"))
    assert cost("toploss", "bytes_stored") == tar.stat().st_size
    assert 0 < values["random", "none", "subset", "subset", "subset", "flagged_share"] < 1
    assert ("none", "none", "subset", "subset", "subset", "flagged_share") not in values


def test_more_selectors_gammas_and_methods_reuse_what_is_there(done: Comparison) -> None:
    before, old = written(done.out), figures(done)
    cost = done.out / done.matrix.mines[1].name / "cost.json"
    told = cost.read_text()
    more = Comparison(
        replace(done.config, selectors=("none", "full", "toploss"), gamma=(0.1, 0.05), methods=("energy",))
    )
    more.run()
    more.complain()
    after = written(done.out)
    other = ("toploss", "mined"), ("none", "cells")  # that is ranked again, not mined; this is judged by energy, too
    same = {name for name in before if not any(all(part in name for part in parts) for parts in other)}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert cost.read_text() == told
    assert {row["selector"] for row in more.results.to_pylist()} == {"none", "random", "full", "toploss"}
    for selector in ("full", "none"):
        scores = {row["score"] for row in more.results.to_pylist() if row["selector"] == selector}
        assert scores == {"msp", "energy", "none"}
    again = Comparison(done.config)
    again.run()
    assert written(done.out) == after
    assert [row for row in figures(done) if row["score"] != "energy"] == old
    assert again.results.num_rows == more.results.num_rows


def test_other_settings_are_refused(done: Comparison) -> None:
    for changed, named in (
        ({"images": 5000}, "images: 2560 there, 5000 now"),
        ({"epochs": 2}, "epochs: 1 there, 2 now"),
        ({"noise": ("uniform",)}, "noise uniform: None there"),
    ):
        with pytest.raises(MinerError, match=named):
            Comparison(replace(done.config, **changed)).run()
    cell = next(done.out.glob("cells/*random*"))
    text = (cell / "summary.json").read_text()
    (cell / "summary.json").write_text(text.replace(json.loads(text)["outliers"]["fingerprint"], "0" * 32))
    with pytest.raises(MinerError, match=r"random.*: was trained on other outliers"):
        Comparison(done.config).run()
    (cell / "summary.json").write_text(text)


def test_killed_and_started_again_gives_the_same_rows(done: Comparison, tmp_path: Path) -> None:
    """Equal seeds, another folder, another process, and a kill between two cells."""
    config = replace(done.config, out=tmp_path / "out")
    words = [sys.executable, "-m", "pipelines.compare", "--noise", "--jobs", "1", "--flag", "odd"]
    for flag in ("pool", "ood", "selectors", "gamma", "seeds"):
        words += [f"--{flag}", *map(str, getattr(config, flag))]
    words += ["--images", str(config.images), "--epochs", str(config.epochs), "--out", str(config.out)]
    start_and_kill(words, ROOT, tmp_path / "log", lambda: list(config.out.glob(f"cells/*/{ROWS}")), 600)
    before = written(config.out)
    assert sum(name.endswith(ROWS) for name in before) < 3
    assert not (config.out / "results.parquet").exists()
    again = Comparison(config)
    again.run()
    again.complain()
    after = written(config.out)
    assert {name: after[name] for name in before} == before
    assert figures(again) == [row for row in figures(done) if row["score"] != "energy"]  # which others asked for


def test_what_fails_is_written_down_and_the_rest_goes_on(base: Compare, tmp_path: Path) -> None:
    leak = (str(Path(base.pool[0]) / "leak.npy"),)
    config = replace(base, ood=leak, selectors=("full", "none"), out=tmp_path / "out")
    broken = Comparison(config)
    broken.run()
    assert {row["selector"] for row in broken.results.to_pylist()} == {"none"}
    failed = json.loads((config.out / "failed.json").read_text())
    assert list(failed) == [broken.matrix.cells[0].name]
    assert "outliers are also in OOD set leak" in failed[broken.matrix.cells[0].name]
    with pytest.raises(MinerError, match=r"1 of 2 cells failed; .*failed\.json says why"):
        broken.complain()
    before = written(config.out)
    again = Comparison(config)
    again.run()
    assert list(again.failed) == list(failed)
    assert written(config.out) == before


def test_a_classifier_that_fails_takes_its_cells_along(base: Compare, tmp_path: Path) -> None:
    config = replace(base, selectors=("none", "random"), seeds=(0, 1), out=tmp_path / "out")
    (config.out / "theta0").mkdir(parents=True)
    (config.out / "theta0" / "demo-small-s1").write_text("in the way")
    comparison = Comparison(config)
    comparison.run()
    names = [cell.name for cell in comparison.matrix.cells if cell.seed == 1]
    assert [name for name in comparison.failed if name.startswith("cells/")] == names
    assert set(comparison.results["seed"].to_pylist()) == {0}
    assert "theta0/demo-small-s1: " in comparison.failed[names[0]]


def test_pools_and_sets_are_looked_at_first(base: Compare, tmp_path: Path) -> None:
    config = replace(base, out=tmp_path)
    for changed, named in (
        ({"gamma": (0.001,)}, "less than one image"),
        ({"flag": "even"}, "--flag even: no class of"),
        ({"near": base.ood, "ood": (*base.ood, *base.ood)}, "squares"),
        ({"near": ("nowhere",)}, "nowhere"),
    ):
        with pytest.raises(UsageError, match=named):
            Comparison(replace(config, **changed))
    assert not list(tmp_path.iterdir())


def test_a_cell_travels_without_its_matrix() -> None:
    cell = Cell("p", "i", "small", "none", 0.0, "ce", 1)
    assert cell.columns == {
        "pool": "p", "id": "i", "model": "small", "selector": "none", "gamma": 0.0, "method": "ce", "seed": 1
    }  # fmt: skip
