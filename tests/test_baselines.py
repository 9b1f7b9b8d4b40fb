"""The miners of the literature: their orders by hand, POEM's posterior, real runs, and rankings pooled over runs."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from miner import baselines, demo, ranking
from miner.actors import PoolShards
from miner.baselines import Sweep
from miner.build import write_arrays_pool
from miner.cache import open_shard
from miner.config import ONE_SWEEP, Config, Data, Game, Machines, Output, Selection
from miner.errors import MinerError, UsageError
from miner.inputs import check, plan
from miner.mining import mine
from miner.pool import Pool
from miner.rays import connect
from miner.subset import load_subset
from miner.universal import pool_runs
from miner.weights import TABLE, load_weights, write_arrow
from pipelines import agree, universal
from trainers import models
from trainers.actor import Trainer
from trainers.checkpoint import load_net, save_checkpoint
from trainers.data import IdSet
from trainers.sets import open_images

quick = settings(derandomize=True, deadline=None, max_examples=60)
COUNT = 603  # images of the pool, in 3 shards
TRAIN_TWIN, TEST_TWIN, AGAIN = 5, 250, 500  # rows that show ID images; the last repeats the first's bytes
GAMMAS = (0.1, 0.02)


def sweep(loss, stratum=None, boundary=None) -> Sweep:
    """A sweep of these columns whose uids rise with the row."""
    n = len(loss)
    uid = np.stack([np.arange(n), np.zeros(n)], 1).astype(np.uint64)
    return Sweep(
        np.array(loss, np.float32),
        np.array(np.zeros(n) if stratum is None else stratum, np.int32),
        np.array(np.full(n, np.nan) if boundary is None else boundary, np.float32),
        uid,
    )


# --- orders by hand ---


def test_golden_ntom() -> None:
    """17 images, q = 1/8: the two hardest are skipped and come last, the hardest of all at the very end."""
    loss = [3, 9, 1, 7, 5, 11, 13, 2, 15, 4, 6, 8, 10, 12, 14, 16, 0]
    order = baselines.ntom(sweep(loss))
    assert [loss[row] for row in order] == [14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15, 16]
    assert baselines.ntom(sweep([1, 3, 3, 2])).tolist() == [1, 2, 3, 0]  # floor(q M) = 0; a tie goes to the lower uid


def test_golden_dos() -> None:
    """Clusters 7: rows 0, 2, 5; 0: rows 1, 4; 3: row 3, used up after the first turn."""
    order = baselines.dos(sweep([5, 1, 6, 4, 9, 2], stratum=[7, 0, 7, 3, 0, 7]))
    assert order.tolist() == [4, 2, 3, 0, 1, 5]


def test_golden_poem() -> None:
    assert baselines.poem(sweep([1, 2, 3, 4], boundary=[0.5, 0.0, 2.0, 0.0])).tolist() == [1, 3, 0, 2]


def test_golden_weights() -> None:
    weight = baselines.weights("poem", sweep([0, 0, 0, 0], boundary=[3, 1, 0, 2]))
    assert weight == pytest.approx(np.array([1, 3, 4, 2]) / 2.5)


@pytest.mark.parametrize("rule", ONE_SWEEP)
@quick
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 999))
def test_the_rank_is_the_rule_s_own_order(rule: str, n: int, clusters: int, seed: int) -> None:
    """Whatever the order of the rows; dos also after the strata take turns once more in the ranking."""
    rng = np.random.default_rng(seed)
    uid = rng.integers(0, 2**60, (n, 2)).astype(np.uint64)
    loss, boundary = (rng.integers(0, 6, n).astype(np.float32) for _ in range(2))  # many ties
    given_sweep = Sweep(loss, rng.integers(0, clusters, n).astype(np.int32), boundary, uid)
    order = getattr(baselines, rule)(given_sweep)
    assert sorted(order) == list(range(n))
    weight = baselines.weights(rule, given_sweep)
    assert weight.mean() == pytest.approx(1.0)
    assert (np.diff(weight[order]) < 0).all()
    assert weight.min() > 0
    strata = (None, given_sweep.stratum) if rule == "dos" else (None,)
    for stratum in strata:
        rows = ranking.Rows(weight, uid, np.ones(n, bool), stratum)
        assert ranking.rank_rows(rows, "topk", seed)[order].tolist() == list(range(n))
    shuffled = rng.permutation(n)
    again = baselines.weights(rule, Sweep(*(column[shuffled] for column in given_sweep)))
    assert again.tobytes() == weight[shuffled].tobytes()


@quick
@given(st.integers(1, 80), st.integers(1, 7), st.integers(0, 999))
def test_dos_takes_evenly_and_the_hardest(n: int, clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss, stratum = rng.permutation(n), rng.integers(0, clusters, n)
    order = baselines.dos(sweep(loss, stratum))
    for size in range(1, n + 1):
        chosen = np.isin(np.arange(n), order[:size])
        taken = np.bincount(stratum[chosen], minlength=clusters)
        left = np.bincount(stratum[~chosen], minlength=clusters) > 0
        assert taken.max() - (taken[left].min() if left.any() else taken.max()) <= 1
        for cluster in np.unique(stratum[chosen]):
            inside = stratum == cluster
            assert loss[inside & chosen].min() > loss[inside & ~chosen].max(initial=-1)


# --- POEM's regression ---


def test_poem_posterior_is_ridge_regression_and_its_dual() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, (40, 7)).astype(np.float32), rng.normal(-1, 2, (30, 7)).astype(np.float32)
    inside[:, 3] = outside[:, 3] = 0  # a feature that is never active keeps its prior
    mean, precision = baselines.poem_posterior(inside, outside)
    z, y = np.concatenate([inside, outside]).astype(np.float64), np.repeat([-3.0, 3.0], [40, 30])
    assert mean == pytest.approx(Ridge(alpha=0.5 / 20, fit_intercept=False).fit(z, y).coef_, abs=1e-9)
    dual = 20 * np.eye(7) - 20 * z.T @ np.linalg.inv(z @ z.T + np.eye(70) * 0.5 / 20) @ z
    assert np.linalg.inv(precision) == pytest.approx(dual, abs=1e-9)
    assert (mean[3], precision[3, 3]) == (0, pytest.approx(1 / 20))
    many = np.tile(inside, (500, 1))  # 20,000 rows go through in blocks
    assert baselines.poem_posterior(many, outside)[1] == pytest.approx(
        2 * (500 * inside.T.astype(float) @ inside + outside.T.astype(float) @ outside) + np.eye(7) / 20
    )


def test_poem_draws_follow_the_posterior_and_the_seed() -> None:
    mean, precision = np.array([1.0, -2.0, 0.5]), np.array([[4.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    draws = np.array([baselines.poem_draw(mean, precision, seed) for seed in range(20_000)])
    assert draws.mean(axis=0) == pytest.approx(mean, abs=0.03)
    assert np.cov(draws.T) == pytest.approx(np.linalg.inv(precision), abs=0.04)
    assert baselines.poem_draw(mean, precision, 7).tobytes() == draws[7].tobytes()


def test_poem_distance_of_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(1)
    features, w = rng.normal(0, 1, (100, 130)).astype(np.float32), rng.normal(0, 1, 130)
    whole = baselines.poem_distance(features, w)
    assert whole == pytest.approx(np.abs(features @ w), rel=1e-4, abs=1e-5)
    assert whole.dtype == np.float32
    assert [baselines.poem_distance(features[i : i + 1], w)[0] for i in range(100)] == whole.tolist()


# --- settings ---


def test_one_sweep_whatever_rounds_says() -> None:
    for rule in ONE_SWEEP:
        config = Config(game=Game(rule=rule, rounds=7))
        assert (config.game.effective_rounds, config.draw) == (1, "topk")
        assert config.mining() == Config(game=Game(rule=rule, rounds=1)).mining()
    assert Config(game=Game(rule="toploss", rounds=7)).game.effective_rounds == 7


def test_dos_needs_its_clusters() -> None:
    check(Config(game=Game(rule="dos")))
    check(Config(game=Game(rule="ntom"), selection=Selection(strata=0)))
    with pytest.raises(UsageError, match="--rule dos --strata 0"):
        check(Config(game=Game(rule="dos"), selection=Selection(strata=0)))


# --- real runs ---


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, digits: IdSet) -> Pool:
    """The demo's first images; a training and a test image of the ID set are among them."""
    images = demo.pool_arrays()[0][:COUNT].copy()
    images[TRAIN_TWIN] = images[AGAIN] = digits.train_images[11]
    images[TEST_TWIN] = digits.test_images[3]
    folder = str(tmp_path_factory.mktemp("pools") / "twins")
    return write_arrays_pool(folder, "twins", images, np.arange(COUNT) % 3, ("a", "b", "c"), 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, digits: IdSet) -> Path:
    """An untrained classifier: enough for orders."""
    path = tmp_path_factory.mktemp("net") / "small.safetensors"
    save_checkpoint(path, models.create("small", 10, 4), {"model": "small", "classes": list(digits.classes)})
    return path


@pytest.fixture(scope="module")
def base(pool: Pool, checkpoint: Path) -> Iterator[Config]:
    connect(None)
    yield Config(
        data=Data(pool=pool.path, checkpoint=checkpoint, seed=3),
        selection=Selection(gamma=GAMMAS, exclude_near_id=0.0, strata=0),
        machines=Machines(pool_actors=1),
    )
    ray.shutdown()


def played(base: Config, rule: str, actors: int) -> Config:
    """NTOM and POEM as published, DOS with a guard."""
    choice = {"exclude_near_id": 0.05, "guard": "image", "strata": 20} if rule == "dos" else {}
    return dataclasses.replace(
        base,
        game=Game(rule=rule, views=1, smooth=0.0),  # type: ignore[arg-type]
        selection=dataclasses.replace(base.selection, **choice),
        machines=Machines(pool_actors=actors),
    )


@pytest.fixture(scope="module")
def runs(base: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Every rule on 3 pool actors; those that look at features on 1, too."""
    home, found = tmp_path_factory.mktemp("runs"), {}
    for rule, actors in (("ntom", 3), ("dos", 1), ("dos", 3), ("poem", 1), ("poem", 3)):
        config = dataclasses.replace(played(base, rule, actors), output=Output(home / f"{rule}{actors}"))
        found[rule, actors] = mine(config).run
    return found


def eligible(table: pa.Table) -> pa.Table:
    """Eligible rows in rank order."""
    return table.filter(table["excluded_by"].is_null()).sort_by("rank")


def uid_sweep(table: pa.Table) -> Sweep:
    """The sweep that a run's table tells of, all but POEM's boundary."""
    loss, stratum = table["loss"].to_numpy(), table["stratum"].to_numpy()
    return Sweep(loss, stratum, np.full(len(loss), np.nan, np.float32), ranking.uid_words(table["uid"].to_pylist()))


@pytest.mark.parametrize("rule", ["dos", "poem"])
def test_the_number_of_actors_changes_no_byte(runs: dict[tuple[str, int], Path], rule: str) -> None:
    one, three = runs[rule, 1], runs[rule, 3]
    paths = sorted(path for top in ("weights", "subset-*") for path in one.glob(f"{top}/*"))
    assert len(paths) == 3 + 2 * 4
    for path in paths:
        assert path.read_bytes() == (three / path.relative_to(one)).read_bytes()


@pytest.mark.parametrize("rule", ONE_SWEEP)
def test_a_run_scores_once_and_its_subsets_are_nested(runs: dict[tuple[str, int], Path], rule: str) -> None:
    table, summary = load_weights(runs[rule, 3]), json.loads((runs[rule, 3] / "summary.json").read_text())
    assert (summary["rule"], summary["rounds"]) == (rule, 1)
    assert len((runs[rule, 3] / "metrics.jsonl").read_text().splitlines()) == 1
    kept = eligible(table)
    assert kept["visits"].to_pylist() == [1] * len(kept)
    weight = kept["weight"].to_numpy()
    assert (np.diff(weight) < 0).all()
    assert weight.mean() == pytest.approx(1.0, rel=1e-5)
    large, small = (load_subset(runs[rule, 3] / f"subset-{gamma:g}") for gamma in GAMMAS)
    assert (len(large), len(small)) == (60, 12)
    assert large.uids == kept["uid"].to_pylist()[:60]
    assert small.uids == large.uids[:12]
    assert large.recipe["draw"] == "topk"


@pytest.mark.parametrize("rule", ["ntom", "dos"])
def test_a_run_ranks_by_the_rule_among_eligible_images(runs: dict[tuple[str, int], Path], rule: str) -> None:
    kept = eligible(load_weights(runs[rule, 3]))
    near = json.loads((runs[rule, 3] / "summary.json").read_text())["excluded"]["near-id"]
    assert len(kept) == COUNT - 3 - near
    assert (near > 0) == (rule == "dos")
    assert getattr(baselines, rule)(uid_sweep(kept)).tolist() == list(range(len(kept)))
    if rule == "dos":
        assert len(set(kept["stratum"].to_pylist()[:20])) == len(set(kept["stratum"].to_pylist())) > 10


def test_poem_ranks_by_one_boundary(
    runs: dict[tuple[str, int], Path], pool: Pool, checkpoint: Path, digits: IdSet
) -> None:
    """The whole of it once more, plainly: sample, features, regression, draw, distances."""
    table = load_weights(runs["poem", 3])
    net, _ = load_net(checkpoint, "small", digits.classes)
    trainer = Trainer("small", digits, seed=3, game=Game(rule="poem"))
    trainer.net.load_state_dict(net.state_dict())
    images = np.concatenate([open_shard(pool, shard, 32)[0] for shard in range(3)])
    features, inside = trainer.features(images), trainer.features(digits.train_images)
    uid = ranking.uid_words(table["uid"].to_pylist())
    usable = table["excluded_by"].is_null().to_numpy()
    sample = sorted(np.flatnonzero(usable), key=lambda row: ranking.uniform(uid, 3, 2)[row])[: len(inside)]
    z = np.concatenate([inside, features[np.sort(sample)]]).astype(np.float64)
    y = np.repeat([-3.0, 3.0], [len(inside), len(sample)])
    mean = Ridge(alpha=0.5 / 20, fit_intercept=False).fit(z, y).coef_
    w = baselines.poem_draw(mean, 2 * z.T @ z + np.eye(z.shape[1]) / 20, 3)
    distance = np.abs(features.astype(np.float64) @ w)[usable]
    ranked = table["rank"].to_numpy()[usable]
    assert spearmanr(distance, ranked).statistic > 0.99999
    assert distance.std() > 1e-3


def test_a_rule_s_weights_are_taken_once_a_round(pool: Pool, digits: IdSet) -> None:
    shards = PoolShards(pool.path, 32, 5, "ntom", 1.0)
    shards.prepare(0, np.array([], np.int64), np.array([], "S16"))
    shards.reset(0)
    state = shards.state[0]
    sums, first = shards.sums(0), np.linspace(2, 0.1, int(state.eligible.sum()))
    shards.take_weights(0, first, 0)
    assert shards.update(0, 0, sums, 1.0, 0.0) == pytest.approx(first.sum())
    shards.take_weights(0, first[::-1], 0)  # a message that came twice
    assert state.weight()[state.eligible].tolist() == first.tolist()


def test_plan_knows_of_one_sweep(base: Config, pool: Pool) -> None:
    assert "ntom: 1 sweep(s) of 1 view(s), 0 training steps" in plan(played(base, "ntom", 1), pool)


# --- images of the ID set in the pool ---


def test_images_of_the_id_set_are_left_out(runs: dict[tuple[str, int], Path]) -> None:
    table, summary = load_weights(runs["ntom", 3]), json.loads((runs["ntom", 3] / "summary.json").read_text())
    reasons = {row: reason for row, reason in enumerate(table["excluded_by"].to_pylist()) if reason}
    assert reasons == {TRAIN_TWIN: "id-duplicate", TEST_TWIN: "id-duplicate", AGAIN: "duplicate"}
    assert summary["excluded"] == {
        "exclude-list": 0,
        "duplicate": 1,
        "decode": 0,
        "near-id": 0,
        "id-duplicate": 2,
    }
    assert summary["n"] == COUNT


# --- one ranking of several runs ---


@pytest.fixture(scope="module")
def two(runs: dict[tuple[str, int], Path]) -> list[Path]:
    return [runs["ntom", 3], runs["dos", 1]]


@pytest.mark.parametrize("how", ["mean-rank", "max-weight"])
def test_pooled_rankings(two: list[Path], pool: Pool, tmp_path: Path, how: str) -> None:
    summary = pool_runs(two, how, GAMMAS, tmp_path / "u")  # type: ignore[arg-type]
    tables, table = [load_weights(run) for run in two], load_weights(tmp_path / "u")
    assert table.schema.equals(TABLE)
    assert table.select(["uid", "key", "label"]).equals(tables[0].select(["uid", "key", "label"]))
    usable = np.logical_and(*(t["excluded_by"].is_null().to_numpy() for t in tables))
    assert table["excluded_by"].is_null().to_numpy().tolist() == usable.tolist()
    assert summary["excluded"]["near-id"] == COUNT - 3 - usable.sum() > 0
    assert summary["excluded"]["id-duplicate"] == 2
    if how == "mean-rank":
        score = np.mean([pc.fill_null(t["rank"], 0).to_numpy() for t in tables], axis=0)
    else:
        score = -np.max([t["weight"].to_numpy() for t in tables], axis=0)
    uid = table["uid"].to_pylist()
    by_hand = sorted(np.flatnonzero(usable), key=lambda row: (score[row], uid[row]))
    kept = eligible(table)
    assert kept["uid"].to_pylist() == [uid[row] for row in by_hand]
    weight = kept["weight"].to_numpy()
    assert (np.diff(weight) <= 0).all()
    assert weight.mean() == pytest.approx(1.0, rel=1e-5)
    assert (table["weight"].to_numpy()[~usable] == 0).all()
    large, small = (load_subset(tmp_path / "u" / f"subset-{gamma:g}") for gamma in GAMMAS)
    large.verify()
    assert (large.uids, small.uids) == (kept["uid"].to_pylist()[:60], kept["uid"].to_pylist()[:12])
    assert [run["rule"] for run in large.recipe["runs"]] == ["ntom", "dos"]
    assert all(run["run_id"] and run["id"] == "demo" and run["model"] == "small" for run in large.recipe["runs"])
    assert open_images(str(large.path), 32)[0].origin["fingerprint"] == large.recipe["fingerprint"]


def test_pooling_by_command_and_reading_it(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(main: Callable[[], None], *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        main()
        return capsys.readouterr().out

    out = tmp_path / "u"
    said = command(universal.main, *two, "--how", "max-weight", "--gamma", 0.1, "--out", out)
    assert "subset-0.1: 60 images" in said
    assert said.splitlines()[-1] == str(out / "weights")
    assert "Spearman" in command(agree.main, two[0], out)
    with pytest.raises(UsageError, match="two or more"):
        command(universal.main, two[0], "--out", out)


def test_what_cannot_be_pooled(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "u"
    with pytest.raises(UsageError, match=r"--how best: choose one of mean-rank, max-weight"):
        pool_runs(two, "best", (0.1,), out)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--gamma 1 of 603 images cannot be had"):
        pool_runs(two, "mean-rank", (1.0,), out)
    with pytest.raises(UsageError, match="less than one image"):
        pool_runs(two, "mean-rank", (0.001,), out)
    with pytest.raises(UsageError, match="different values"):
        pool_runs(two, "mean-rank", (0.1, 0.1), out)
    with pytest.raises(MinerError, match=r"nowhere/summary\.json: missing"):
        pool_runs([two[0], tmp_path / "nowhere"], "mean-rank", (0.1,), out)
    shutil.copytree(two[1], tmp_path / "other")
    table = load_weights(tmp_path / "other")
    changed = table.unify_dictionaries().replace_schema_metadata(
        {**table.schema.metadata, b"pool_fingerprint": b"0" * 32}
    )
    write_arrow(changed, tmp_path / "other" / "weights" / "shard-000000.arrow")
    for path in sorted((tmp_path / "other" / "weights").glob("*"))[1:]:
        path.unlink()
    with pytest.raises(UsageError, match="mined from different pools"):
        pool_runs([two[0], tmp_path / "other"], "mean-rank", (0.1,), out)
    assert not out.exists()


def test_a_pooled_ranking_is_kept(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "u"
    pool_runs(two, "mean-rank", (0.1,), out)
    before = (out / "subset-0.1" / "subset.json").read_bytes()
    pool_runs(two, "mean-rank", (0.1, 0.05), out)  # another share may be added
    assert (out / "subset-0.1" / "subset.json").read_bytes() == before
    assert (out / "subset-0.05" / "subset.json").exists()
    with pytest.raises(MinerError, match="how: mean-rank there, max-weight now"):
        pool_runs(two, "max-weight", (0.1,), out)
    with pytest.raises(MinerError, match="belongs to another command"):
        pool_runs(two, "mean-rank", (0.1,), two[0])
