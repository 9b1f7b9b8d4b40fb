"""The reweighting rules against closed forms, autograd and a dense rewrite of the released learner."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miner import demo, rules
from miner.actors import PoolShards
from miner.build import write_arrays_pool
from miner.config import Game
from miner.guard import NO_CLASS, class_means
from miner.rules import RootSums, Sums, shard_sums
from trainers.actor import Trainer
from trainers.data import load_id

quick = settings(derandomize=True, deadline=None, max_examples=60)
losses = st.lists(st.floats(0.0, 20.0), min_size=2, max_size=40)
SIZES = (71, 70, 70)


def root_sums(v: np.ndarray) -> RootSums:
    weight = rules.softplus(v)
    return RootSums(float(len(v)), float(weight.sum()), float(np.sqrt(weight).sum()))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("rules") / "pool")
    images = demo.digits()[0][: sum(SIZES)]
    return write_arrays_pool(folder, "digits", images, None, (), shard_count=3).path


def open_shards(pool: str, rule: str, eta: float = 1.0) -> PoolShards:
    """Three real shards; two rows of each but the second are left out of the game."""
    shards = PoolShards(pool, 32, 5, rule, eta)
    for shard in range(3):
        repeated = np.array([3, 40] if shard != 1 else [], dtype=np.int64)
        assert shards.prepare(shard, repeated, np.array([], "S16")) == []
        shards.reset(shard)
    return shards


# --- golden numbers ---


def test_golden_reference_step() -> None:
    v, drawn, loss = np.array([0.0, 1.0, -1.0, 2.0]), np.array([0, 3, 3]), np.array([1.0, 2.0, 0.5])
    weight, sums = rules.softplus(v), root_sums(v)
    assert weight == pytest.approx([0.693147, 1.313262, 0.313262, 2.126928], abs=5e-7)
    factors = rules.reference_factors(weight[drawn], sums)
    assert factors == pytest.approx([0.748305, 1.310817, 1.310817], abs=5e-7)
    assert (factors * loss).mean() == pytest.approx(1.341783, abs=5e-7)
    root_loss = float((np.sqrt(weight[drawn]) * loss).mean())
    gradient = rules.reference_gradient(v, drawn, loss, root_loss, 3, 1.0, sums)
    assert gradient == pytest.approx([0.039900, -0.113514, -0.000494, 0.061776], abs=5e-7)


def test_golden_l_out_and_its_gradient() -> None:
    v, loss = np.array([0.0, 1.0, -1.0, 2.0]), np.array([1.0, 0.2, 0.1, 1.25])
    weight = rules.softplus(v)
    sums = shard_sums(weight, loss)
    assert rules.l_out(sums) == pytest.approx(0.819904, abs=5e-7)
    # one step of `paper` without its projection is eta N dL/dw
    slope = (rules.paper(weight, loss, sums, 1e-3) - weight) / (1e-3 * sums.rows)
    slope_v = slope / (1 + np.exp(-v))
    assert slope_v == pytest.approx([0.020251, -0.101918, -0.043542, 0.085195], abs=5e-7)
    assert (weight * slope).sum() == pytest.approx(0.0, abs=1e-12)


# --- where the released update comes to rest ---


def test_expected_reference_flow_rests_at_the_equilibrium() -> None:
    loss = np.random.default_rng(0).uniform(0.6, 1.4, 40)
    loss[:3] = 0.0, 0.1, 1.8
    v = np.random.default_rng(1).normal(0, 1, len(loss))
    everyone = np.arange(len(loss))
    for _ in range(20_000):
        root, sums = np.sqrt(rules.softplus(v)), root_sums(v)
        chance = root / root.sum()
        # every row "drawn" with loss N q l stands for the mean over batches drawn ~ sqrt(w)
        v = v + 20.0 * rules.reference_gradient(
            v, everyone, len(v) * chance * loss, float((chance * root * loss).sum()), len(v), 1.0, sums
        )
    weight = rules.softplus(v)
    level = rules.l_out(shard_sums(weight, loss))
    assert loss.max() < 2 * level
    closed = (2 - loss / level) ** -2
    assert weight / weight.sum() == pytest.approx(closed / closed.sum(), rel=1e-8)

    def out_loss(guess: float) -> float:
        return rules.l_out(shard_sums(rules.equilibrium(loss, guess), loss))

    solved = rules.equilibrium_level(out_loss, float(loss.mean()), float(loss.max()))
    assert solved == pytest.approx(level, rel=1e-8)
    at_rest = rules.equilibrium(loss, solved)
    assert weight / weight.sum() == pytest.approx(at_rest / at_rest.sum(), rel=1e-7)


@quick
@given(losses)
def test_equilibrium_level_is_a_fixed_point_and_weights_are_capped(loss: list[float]) -> None:
    loss_N = np.array(loss) + 0.01

    def out_loss(level: float) -> float:
        return rules.l_out(shard_sums(rules.equilibrium(loss_N, level), loss_N))

    level = rules.equilibrium_level(out_loss, float(loss_N.mean()), float(loss_N.max()))
    assert loss_N.mean() * (1 - 1e-12) <= level <= loss_N.max() * (1 + 1e-12)
    assert out_loss(level) == pytest.approx(level, rel=1e-6)
    weight = rules.equilibrium(loss_N, level)
    assert weight.min() >= 0.25 - 1e-12  # the easiest image keeps a quarter of the weight at l = L
    assert weight.max() <= rules.EQUILIBRIUM_CAP * (1 + 1e-12)
    order = np.argsort(loss_N)
    assert (np.diff(weight[order]) >= 0).all()


# --- the released learner ---


def test_lhat_is_unbiased_under_draws_by_the_root_of_the_weights(pool: str) -> None:
    shards = open_shards(pool, "reference")
    rng = np.random.default_rng(2)
    loss = [rng.exponential(1.0, n) for n in SIZES]
    for shard in range(3):
        shards.state[shard]["state"][:] = rng.normal(0, 2, SIZES[shard])
    parts = [shards.root_sums(shard) for shard in range(3)]
    sums = RootSums(*np.sum(parts, axis=0))
    estimates, batch = [], 16
    edges = np.cumsum([0.0] + [part.root for part in parts])
    targets = rng.random(4000 * batch) * edges[-1]
    owner = np.searchsorted(edges, targets, side="right") - 1
    value = np.empty(len(targets))
    for shard in range(3):
        mine = owner == shard
        rows = shards.locate(shard, targets[mine] - edges[shard])
        assert shards.state[shard].eligible[rows].all()
        value[mine] = shards.factors(shard, rows, sums) * loss[shard][rows]
    estimates = value.reshape(-1, batch).mean(axis=1)
    weight = np.concatenate([shards.state[shard].weight() for shard in range(3)])
    truth = (weight * np.concatenate(loss)).sum() / weight.sum()
    assert abs(estimates.mean() - truth) < 5 * estimates.std() / np.sqrt(len(estimates))
    # and the test could tell: without the factors the mean is far off
    assert abs(value.mean() - np.concatenate(loss).mean()) > 5 * estimates.std() / np.sqrt(len(estimates))


def dense_learner(
    start: np.ndarray, draws: list[np.ndarray], losses: list[np.ndarray], alpha: float
) -> tuple[list[np.ndarray], list[float]]:
    """The released learner written down plainly: dense float64 parameter, autograd, torch's own SGD."""
    v = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([v], lr=100.0, momentum=0.9)
    path, estimates = [], []
    for drawn, loss in zip(draws, losses, strict=True):
        weight = torch.logaddexp(torch.zeros_like(v), v)
        mean, mean_root = weight.mean(), weight.sqrt().mean()
        factor = (mean_root / mean.sqrt()) * (weight[torch.from_numpy(drawn)] / mean).sqrt()
        estimate = alpha * (factor * torch.from_numpy(loss)).mean()
        optimizer.zero_grad()
        (-estimate).backward()
        optimizer.step()
        path.append(v.detach().numpy().copy())
        estimates.append(estimate.item() / alpha)
    return path, estimates


def test_reference_equals_a_dense_autograd_learner_step_by_step(pool: str) -> None:
    shards, alpha, batch = open_shards(pool, "reference"), 0.5, 24
    rng = np.random.default_rng(3)
    places = [(s, row) for s in range(3) for row in np.flatnonzero(shards.state[s].eligible)]
    draws = [rng.integers(0, len(places), batch) for _ in range(50)]  # repeats inside a batch do occur
    assert any(len(set(drawn.tolist())) < batch for drawn in draws)
    loss = [rng.exponential(1.0, batch) for _ in draws]
    path, estimates = dense_learner(np.zeros(len(places)), draws, loss, alpha)
    sums = RootSums(*np.sum([shards.root_sums(s) for s in range(3)], axis=0))
    for step, drawn in enumerate(draws):
        where = np.array([places[i] for i in drawn])
        inside = [np.flatnonzero(where[:, 0] == s) for s in range(3)]
        factor = np.empty(batch)
        for s in range(3):
            factor[inside[s]] = shards.factors(s, where[inside[s], 1], sums)
        assert (factor * loss[step]).mean() == pytest.approx(estimates[step], rel=1e-9)
        root_loss = float((factor * sums.weight / sums.root * loss[step]).mean())
        parts = [
            shards.reference_step(s, where[inside[s], 1], loss[step][inside[s]], root_loss, batch, alpha, sums)
            for s in range(3)
        ]
        sums = RootSums(*np.sum(parts, axis=0))
        moved = np.array([shards.state[s]["state"][row] for s, row in places])
        np.testing.assert_allclose(moved, path[step], rtol=1e-9, atol=1e-9)
    assert np.ptp(path[-1]) > 5  # the weights have moved a long way
    visits = np.concatenate([shards.state[s]["visits"] for s in range(3)])
    assert visits.sum() == 50 * batch
    left_out = [(s, row) for s in range(3) for row in np.flatnonzero(~shards.state[s].eligible)]
    assert len(left_out) == 4
    assert all(shards.state[s]["state"][row] == 0 == shards.state[s].weight()[row] for s, row in left_out)


# --- hedge ---


@quick
@given(losses, st.floats(0.01, 3.0), st.floats(0.1, 5.0), st.floats(-10.0, 10.0), st.integers(0, 99))
def test_hedge_moves_by_losses_in_units_of_scale_and_ignores_constants(
    loss: list[float], eta: float, scale: float, shift: float, seed: int
) -> None:
    loss_N = np.array(loss)
    log_N = np.random.default_rng(seed).normal(0, 1, len(loss))

    def step(log: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return rules.hedge(log, losses, shard_sums(np.exp(log), losses), scale, eta) - log

    moved = step(log_N, loss_N)
    out = np.average(loss_N, weights=np.exp(log_N))
    close = {"atol": 1e-11 * eta / scale * (20 + abs(shift))}
    np.testing.assert_allclose(moved, eta * (loss_N - out) / scale, **close)
    assert np.average(moved, weights=np.exp(log_N)) == pytest.approx(0, abs=close["atol"])
    np.testing.assert_allclose(step(log_N, loss_N + shift), moved, **close)  # a constant on every loss
    np.testing.assert_allclose(step(log_N + 3, loss_N), moved, **close)  # a factor on every weight


def test_hedge_does_nothing_when_all_losses_are_equal() -> None:
    loss = np.full(1000, 2.3)
    log = np.random.default_rng(0).normal(0, 1, 1000)
    sums = shard_sums(np.exp(log), loss)
    assert rules.hedge(log, loss, sums, rules.loss_std(sums), 1.0) == pytest.approx(log, abs=1e-6)


def score(shards: PoolShards, s: int, loss: np.ndarray) -> np.ndarray:
    """One sweep over a shard, as a single block; its rows."""
    folder = os.path.join(shards.pool.path, "scores")
    count, mask = shards.open_sweep(s, folder, "a sweep")
    rows = np.flatnonzero(np.unpackbits(mask, count=len(loss)))
    assert len(rows) == count
    taken = shards.take_scores(s, rows, {"loss": loss[rows].astype(np.float32)}, folder, "kept under another name")
    assert taken
    assert not shards.take_scores(s, rows, {"loss": np.zeros(len(rows), np.float32)}, folder, "twice")
    return rows


def play_round(
    shards: PoolShards,
    round_: int,
    loss: list[np.ndarray],
    scale: float = 1.0,
    level: float = 0.0,
    cap: float = 1e9,
) -> Sums:
    """What loop.Game.update does, without Ray."""
    for s in range(3):
        score(shards, s, loss[s])
        shards.close_sweep(s, round_, 0.0, np.zeros(0))
    before = rules.add_sums([shards.sums(s) for s in range(3)])
    total = sum(shards.update(s, round_, before, scale, level) for s in range(3))

    def capped(factor: float) -> tuple[float, float]:
        parts = [shards.capped(s, factor, cap) for s in range(3)]
        return sum(full for full, _ in parts), sum(free for _, free in parts)

    factor = rules.water_level(capped, before.rows, total, cap) if shards.rule == "hedge" else before.rows / total
    for s in range(3):
        shards.normalise(s, round_, factor, cap)
    return rules.add_sums([shards.sums(s) for s in range(3)])


def water_level(weight_N: np.ndarray, cap: float) -> tuple[float, int]:
    """The factor, and how often the weights were asked."""
    asked = []

    def capped(factor: float) -> tuple[float, float]:
        asked.append(factor)
        full = factor * weight_N >= cap
        return float(full.sum()), float(weight_N[~full].sum())

    return rules.water_level(capped, float(len(weight_N)), float(weight_N.sum()), cap), len(asked)


@quick
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60), st.floats(1.0, 30.0))
def test_water_level_brings_the_mean_to_1_under_the_cap(weight: list[float], cap: float) -> None:
    weight_N = np.array(weight)
    factor, asked = water_level(weight_N, cap)
    assert asked <= 12
    found = np.minimum(cap, factor * weight_N)
    assert found.mean() == pytest.approx(1.0, rel=1e-6)
    if weight_N.max() / weight_N.mean() <= cap:
        assert factor == pytest.approx(1 / weight_N.mean(), rel=1e-6)


def test_golden_water_level() -> None:
    """[10, 1, 1, 1, 1] at gamma = 0.4: chances [1, .25, .25, .25, .25], which are the capped weights times gamma."""
    weight = np.array([10.0, 1, 1, 1, 1])
    factor, asked = water_level(weight, 2.5)
    assert asked == 2
    assert 0.4 * np.minimum(2.5, factor * weight) == pytest.approx([1, 0.25, 0.25, 0.25, 0.25], rel=1e-9)


def test_water_level_when_few_images_have_any_weight() -> None:
    """Two images cannot make a mean of 1 over ten at a cap of 3: both are at the cap."""
    weight = np.array([1.0, 2.0] + [0.0] * 8)
    factor, _ = water_level(weight, 3.0)
    assert np.minimum(3.0, factor * weight)[:2] == pytest.approx([3.0, 3.0])


def test_water_level_of_a_million_uneven_weights_takes_a_handful_of_messages() -> None:
    weight = np.exp(np.random.default_rng(0).normal(size=1_000_000) * 4)
    factor, asked = water_level(weight, 20.0)
    assert np.minimum(20.0, factor * weight).mean() == pytest.approx(1.0, rel=1e-9)
    assert asked <= 12


def test_hedge_caps_the_weights_it_plays_and_averages(pool: str) -> None:
    shards = open_shards(pool, "hedge", eta=2.0)
    rng = np.random.default_rng(7)
    loss = [rng.exponential(1.0, n).astype(np.float32) for n in SIZES]
    for round_ in range(3):
        after = play_round(shards, round_, loss, scale=0.5, cap=5.0)
        assert after.weight == pytest.approx(after.rows, rel=1e-6)
    live = np.concatenate([shards.state[s].weight() for s in range(3)])
    outcome = np.concatenate([shards.state[s].outcome() for s in range(3)])
    assert live.max() == pytest.approx(5.0)
    assert (live > 4.999).sum() > 3
    assert outcome.max() <= 15.0 * (1 + 1e-9)


def test_hedge_selects_by_the_average_of_the_normalised_rounds(pool: str) -> None:
    shards = open_shards(pool, "hedge", eta=0.7)
    rng = np.random.default_rng(4)
    keep = np.concatenate([shards.state[s].eligible for s in range(3)])
    log, average = np.zeros(keep.sum()), np.zeros(keep.sum())
    for round_ in range(4):
        loss = [rng.exponential(1.0, n).astype(np.float32) for n in SIZES]
        after = play_round(shards, round_, loss, scale=0.9)
        flat = np.concatenate(loss).astype(np.float64)[keep]
        weight = np.exp(log)
        log = log + 0.7 * (flat - (weight * flat).sum() / weight.sum()) / 0.9
        log -= np.log(np.exp(log).mean())
        average += np.exp(log)
        assert after.weight == pytest.approx(after.rows) == pytest.approx(keep.sum())
    outcome = np.concatenate([shards.state[s].outcome() for s in range(3)])
    np.testing.assert_allclose(outcome[keep], average, rtol=1e-9)
    assert (outcome[~keep] == 0).all()
    live = np.concatenate([shards.state[s].weight() for s in range(3)])
    np.testing.assert_allclose(live[keep], np.exp(log), rtol=1e-9)
    assert np.abs(live[keep] - average / 4).max() > 0.1  # average and last iterate are not the same thing


@pytest.mark.parametrize("rule", ["hedge", "paper", "equilibrium", "uniform", "toploss"])
def test_excluded_rows_never_count(pool: str, rule: str) -> None:
    rng = np.random.default_rng(5)
    loss = [rng.exponential(1.0, n).astype(np.float32) for n in SIZES]
    absurd = [part.copy() for part in loss]
    for s in (0, 2):
        absurd[s][[3, 40]] = 1e6
    outcomes = []
    for given_losses in (loss, absurd):
        shards = open_shards(pool, rule, eta=0.5)
        for round_ in range(3):
            sums = play_round(shards, round_, given_losses, level=0.9)
            assert sums.rows == sum(SIZES) - 4
        outcomes.append(np.concatenate([shards.state[s].outcome() for s in range(3)]))
        for s in (0, 2):
            assert (shards.state[s]["visits"][[3, 40]] == 0).all()
    np.testing.assert_array_equal(outcomes[0], outcomes[1])
    assert (outcomes[0] == 0).sum() >= 4


def test_smoothing_moves_losses_towards_the_mean_of_their_class(pool: str) -> None:
    shards = open_shards(pool, "hedge")
    rng = np.random.default_rng(8)
    loss = [rng.exponential(1.0, n).astype(np.float32) for n in SIZES]
    rows_of: list[np.ndarray] = []
    for s in range(3):
        shards.label[s] = rng.integers(NO_CLASS, 3, SIZES[s]).astype(np.int32)
        shards.label[s][~shards.state[s].eligible] = 7  # a class that no scored image has
        rows_of.append(score(shards, s, loss[s]))
    means = class_means([shards.class_sums(s) for s in range(3)])
    scored = np.concatenate([loss[s][rows_of[s]] for s in range(3)]).astype(np.float64)
    label = np.concatenate([shards.label[s][rows_of[s]] for s in range(3)])
    for family in range(3):
        np.testing.assert_allclose(means[family], scored[label == family].mean(), rtol=1e-9)
    for s in range(3):
        rows = rows_of[s]
        shards.close_sweep(s, 0, 0.25, means)
        mean = np.where(shards.label[s][rows] < 0, loss[s][rows], means[shards.label[s][rows]])
        expected = 0.75 * loss[s][rows] + 0.25 * mean
        np.testing.assert_allclose(shards.state[s]["loss"][rows], expected, rtol=1e-6)


def test_rows_the_guard_takes_out_stop_counting(pool: str) -> None:
    shards = open_shards(pool, "hedge")
    rng = np.random.default_rng(6)
    loss = [rng.exponential(1.0, n).astype(np.float32) for n in SIZES]
    play_round(shards, 0, loss)
    cosine = [rng.random(n).astype(np.float32) for n in SIZES]
    for s in range(3):
        shards.state[s]["nn50_id_cosine"][:] = cosine[s]
    gone = 0
    for s in range(3):
        found, _ = shards.guard_columns(s)
        assert len(found) == shards.state[s].eligible.sum()
        shards.guard(s, found > 0.75)
        gone += int((found > 0.75).sum())
    assert gone > 0
    assert all(not (shards.guard_columns(s)[0] > 0.75).any() for s in range(3))
    after = play_round(shards, 1, loss)
    assert after.rows == sum(SIZES) - 4 - gone
    for s in range(3):
        near = cosine[s] > 0.75
        assert (shards.state[s].outcome()[near] == 0).all()
        assert (shards.state[s]["visits"][near] <= 1).all()


# --- paper ---


@quick
@given(losses, st.randoms(use_true_random=False))
def test_paper_follows_the_gradient_of_l_out(loss, random) -> None:
    loss_N = np.array(loss)
    weight_N = np.array([random.uniform(0.05, 3.0) for _ in loss])
    sums = shard_sums(weight_N, loss_N)
    leaf = torch.tensor(weight_N, requires_grad=True)
    ((leaf * torch.from_numpy(loss_N)).sum() / leaf.sum()).backward()
    gradient = leaf.grad.numpy()
    np.testing.assert_allclose((loss_N - rules.l_out(sums)) / sums.weight, gradient, atol=1e-12)
    eta = 0.3
    moved = rules.paper(weight_N, loss_N, sums, eta)
    np.testing.assert_allclose(moved, np.maximum(weight_N + eta * len(loss) * gradient, 0), atol=1e-10)
    assert (moved >= 0).all()


def test_paper_projects_to_zero_and_a_row_may_come_back() -> None:
    weight, loss = np.ones(4), np.array([0.0, 1.0, 2.0, 9.0])
    weight = rules.paper(weight, loss, shard_sums(weight, loss), 1.0)
    assert weight.tolist() == [0.0, 0.0, 0.0, 7.0]  # 1 + (l - 3), never below 0
    loss = np.array([10.0, 1.0, 2.0, 9.0])
    weight = rules.paper(weight, loss, shard_sums(weight, loss), 1.0)
    assert weight[0] == pytest.approx(4 * (10.0 - 9.0) / 7.0)


# --- sums ---


@quick
@given(losses, st.floats(1e-6, 1e6), st.randoms(use_true_random=False), st.integers(1, 6))
def test_l_out_and_effective_size_ignore_the_scale_of_weights(loss, scale, random, parts) -> None:
    loss_N = np.array(loss)
    weight_N = np.array([random.uniform(0.01, 5.0) for _ in loss])
    sums = shard_sums(weight_N, loss_N)
    scaled = shard_sums(weight_N * scale, loss_N)
    assert rules.l_out(scaled) == pytest.approx(rules.l_out(sums), rel=1e-12, abs=1e-300)
    assert rules.l_out(sums) == pytest.approx(np.average(loss_N, weights=weight_N), rel=1e-12, abs=1e-300)
    assert rules.effective_sample_size(scaled) == pytest.approx(rules.effective_sample_size(sums), rel=1e-12)
    assert 1 - 1e-9 <= rules.effective_sample_size(sums) <= len(loss) * (1 + 1e-9)
    pieces = zip(np.array_split(weight_N, parts), np.array_split(loss_N, parts), strict=True)
    assert rules.add_sums([shard_sums(w, x) for w, x in pieces]) == pytest.approx(sums, rel=1e-12, abs=1e-300)


def test_effective_sample_size() -> None:
    assert rules.effective_sample_size(shard_sums(np.full(7, 3.0), np.zeros(7))) == pytest.approx(7)
    assert rules.effective_sample_size(shard_sums(np.array([5.0, 0, 0]), np.zeros(3))) == 1.0
    assert rules.effective_sample_size(shard_sums(np.array([1.0, 3.0]), np.zeros(2))) == pytest.approx(1.6)


@quick
@given(losses)
def test_loss_std(loss: list[float]) -> None:
    spread = float(np.std(loss))
    found = rules.loss_std(shard_sums(np.ones(len(loss)), np.array(loss)))
    if spread > 1e-3:
        assert found == pytest.approx(spread, rel=1e-5)
    elif spread == 0 and loss[0] == 0:
        assert found == 1.0
    assert found > 0


# --- frozen BatchNorm ---


def test_the_loss_of_an_image_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    trainer = Trainer("small", load_id("demo"), seed=0, game=Game(lr=0.1, batch=32))
    images = demo.pool_arrays()[0][:300]
    # a few joint steps, so that this is the net of the game
    trainer.train(0, 0, np.arange(96), None, images[:96])
    together = trainer.score(images, False)["loss"]
    alone = np.concatenate([trainer.score(images[i : i + 1], False)["loss"] for i in range(0, 300, 25)])
    shuffled = np.random.default_rng(0).permutation(300)
    mixed = trainer.score(images[shuffled], False)["loss"]
    assert np.ptp(together) > 1e-3
    np.testing.assert_allclose(alone, together[::25], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(mixed, together[shuffled], rtol=1e-4, atol=2e-6)
