"""Permanent random numbers, the order of the pool and the size of a subset."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from miner.errors import MinerError, UsageError
from miner.pool import uid_of
from miner.ranking import (
    NO_RANK,
    Rows,
    check_gamma,
    clipped_share,
    draw_keys,
    least,
    rank_rows,
    subset_size,
    uid_words,
    uniform,
)

quick = settings(derandomize=True, deadline=None, max_examples=50)
weights = st.lists(st.floats(0.0, 50.0), min_size=1, max_size=60).filter(lambda w: sum(w) > 0.1)


def words(count: int, salt: str = "") -> np.ndarray:
    """uids as the pool makes them, of ``count`` different byte strings."""
    return uid_words([uid_of(f"{salt}{i}".encode()) for i in range(count)])


def rows(weight: list[float] | np.ndarray, eligible=None, stratum=None, salt: str = "") -> Rows:
    n = len(weight)
    keep = np.ones(n, bool) if eligible is None else np.asarray(eligible, bool)
    strata = None if stratum is None else np.asarray(stratum, np.int32)
    return Rows(np.where(keep, np.asarray(weight, np.float64), 0.0), words(n, salt), keep, strata)


def first(rank: np.ndarray, size: int) -> np.ndarray:
    """The rows of a subset, best first."""
    order = np.argsort(rank, kind="stable")[:size]
    assert rank[order].tolist() == list(range(size))
    return order


# --- permanent random numbers ---


def test_uids_become_words_high_half_first() -> None:
    assert uid_words(["0123456789abcdef" + "fedcba9876543210"]).tolist() == [[0x0123456789ABCDEF, 0xFEDCBA9876543210]]


@pytest.mark.parametrize(("seed", "salt"), [(0, 0), (1, 0), (0, 1), (7, 2**32), (2**64 - 1, 3)])
def test_permanent_numbers_are_uniform(seed: int, salt: int) -> None:
    u = uniform(words(20_000), seed, salt)
    assert u.dtype == np.float64
    assert 0 < u.min() < u.max() < 1
    assert len(np.unique(u)) == len(u)
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert abs(stats.spearmanr(u[:-1], u[1:]).statistic) < 5 / np.sqrt(len(u))
    digits = np.bincount((u * 1024).astype(int) % 16, minlength=16)  # finer bits are even too
    assert stats.chisquare(digits).pvalue > 1e-4


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (1, 1), (2**32, 0), (0, 2**32)])
def test_seed_and_salt_give_unrelated_numbers(other: tuple[int, int]) -> None:
    uid = words(10_000)
    one, two = uniform(uid, 0, 0), uniform(uid, *other)
    assert (one != two).all()
    assert abs(stats.spearmanr(one, two).statistic) < 5 / np.sqrt(len(uid))
    swapped = uniform(uid, other[1], other[0])
    assert other[0] == other[1] or abs(stats.spearmanr(two, swapped).statistic) < 5 / np.sqrt(len(uid))


def test_sequential_uids_are_mixed_in_both_halves() -> None:
    count = np.arange(10_000, dtype=np.uint64)
    for low, high in ((count, 0 * count), (0 * count, count)):
        u = uniform(np.stack([high, low], axis=1), 0)
        assert stats.kstest(u, "uniform").pvalue > 1e-4


@quick
@given(st.integers(1, 80), st.integers(0, 2**64 - 1), st.integers(0, 2**33), st.integers(0, 99))
def test_a_number_belongs_to_its_image(count: int, seed: int, salt: int, shuffle: int) -> None:
    uid = words(count)
    order = np.random.default_rng(shuffle).permutation(count)
    u = uniform(uid, seed, salt)
    np.testing.assert_array_equal(uniform(uid[order], seed, salt), u[order])
    parts = [uniform(part, seed, salt) for part in np.array_split(uid, 3) if len(part)]
    np.testing.assert_array_equal(np.concatenate(parts), u)


MASK = 2**64 - 1


def mix(x: int) -> int:
    """splitmix64's finaliser on one Python int."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def unmix(x: int) -> int:
    """Inverse of ``mix``."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        y = x
        while y ^ (y >> shift) != x:
            y = x ^ (y >> shift)
        x = y * pow(factor, -1, 2**64) & MASK
    return x


def test_no_image_has_the_number_0_or_1() -> None:
    seed_key, salt_key = mix(5 + 0x9E37), mix(0 + 0x9E37)
    tail = mix((salt_key + seed_key) & MASK)
    crafted = []
    for word in (0, MASK, MASK - 1, 1 << 63):
        before = unmix(word) ^ tail  # uid's low half is 0
        crafted.append([(unmix(before) - seed_key) & MASK, 0])
        assert mix(mix((crafted[-1][0] + seed_key) & MASK) ^ tail) == word
    u = uniform(np.array(crafted, dtype=np.uint64), 5)
    assert u == pytest.approx([0, 1, 1, 0.5], abs=1e-15)  # so these are the extremes
    assert u.min() > 0
    assert u.max() < 1


# --- batches ---


def test_race_keys_draw_in_proportion_to_weight() -> None:
    weight = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    uid, trials = words(5), 4000
    winner = [int(np.argmin(draw_keys(weight, uniform(uid, 0, 2**32 + t)))) for t in range(trials)]
    share = np.bincount(winner, minlength=5) / trials
    assert share[0] == 0
    sigma = np.sqrt(weight / 10 * (1 - weight / 10) / trials)
    assert (np.abs(share - weight / 10) <= 5 * sigma).all()
    assert np.isinf(draw_keys(weight, uniform(uid, 0))[0])


def test_merged_shards_give_the_same_draw_as_the_whole() -> None:
    uid = words(900)
    weight = np.random.default_rng(0).exponential(1.0, 900)
    whole = np.sort(draw_keys(weight, uniform(uid, 1)))[:50]
    parts = zip(np.array_split(weight, 7), np.array_split(uid, 7), strict=True)
    offers = [np.sort(draw_keys(w, uniform(u, 1)))[:50] for w, u in parts]
    np.testing.assert_array_equal(np.sort(np.concatenate(offers))[:50], whole)


# --- the order ---


@quick
@given(
    weights,
    st.sampled_from(["rank", "eq20", "topk", "random"]),
    st.integers(0, 2**32),
    st.integers(0, 5),
    st.floats(1e-6, 1e6),
)
def test_rank_is_a_permutation_and_ignores_scale_and_order(
    weight: list[float], draw: str, seed: int, strata: int, scale: float
) -> None:
    n = len(weight)
    rng = np.random.default_rng(seed)
    eligible = rng.random(n) < 0.8
    table = rows(weight, eligible, rng.integers(0, strata, n) if strata else None)
    rank = rank_rows(table, draw, seed)
    assert rank.dtype == np.uint64
    assert sorted(rank[eligible].tolist()) == list(range(int(eligible.sum())))
    assert (rank[~eligible] == NO_RANK).all()
    scaled = rank_rows(table._replace(weight=table.weight * 2.0 ** round(np.log2(scale))), draw, seed)
    np.testing.assert_array_equal(scaled, rank)  # powers of two: no rounding stands in the way
    order = rng.permutation(n)
    shuffled = Rows(
        table.weight[order],
        table.uid[order],
        eligible[order],
        None if table.stratum is None else table.stratum[order],
    )
    np.testing.assert_array_equal(rank_rows(shuffled, draw, seed), rank[order])


@pytest.mark.parametrize("scale", [1e-30, 0.37, 3.0, 1e30])
@pytest.mark.parametrize("draw", ["rank", "eq20", "topk"])
def test_any_scale_of_the_weights_gives_the_same_subset(draw: str, scale: float) -> None:
    table = rows(np.random.default_rng(0).exponential(1.0, 2000))
    scaled = table._replace(weight=table.weight * scale)
    np.testing.assert_array_equal(rank_rows(scaled, draw, 3), rank_rows(table, draw, 3))
    assert subset_size(scaled, 0.2, 2000, draw, 3) == subset_size(table, 0.2, 2000, draw, 3)
    assert clipped_share(scaled, 0.2, 2000) == clipped_share(table, 0.2, 2000)


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("draw", ["rank", "eq20", "topk", "random"])
def test_the_cut_into_shards_does_not_matter(draw: str, shards: int) -> None:
    """Deal the images to shards and join them again, as a pool of that many shards would."""
    weight = np.random.default_rng(1).exponential(1.0, 997)
    table = rows(weight, stratum=np.arange(997) % 5)
    deal = np.concatenate([np.flatnonzero(np.arange(997) % shards == s) for s in range(shards)])
    dealt = Rows(table.weight[deal], table.uid[deal], table.eligible[deal], table.stratum[deal])
    rank = rank_rows(dealt, draw, 11)
    size = subset_size(dealt, 0.13, 997, draw, 11)
    assert size == subset_size(table, 0.13, 997, draw, 11)
    chosen = {tuple(dealt.uid[i]) for i in first(rank, size)}
    assert chosen == {tuple(table.uid[i]) for i in first(rank_rows(table, draw, 11), size)}


def test_seeds_differ() -> None:
    table = rows(np.ones(1000))
    one, two = (set(first(rank_rows(table, "rank", seed), 100).tolist()) for seed in (0, 1))
    assert len(one & two) < 35  # chance: 10 of 100


def test_topk_takes_the_heaviest_and_random_ignores_weights() -> None:
    weight = np.random.default_rng(2).permutation(500).astype(float)
    table = rows(weight)
    assert weight[first(rank_rows(table, "topk", 0), 500)].tolist() == list(range(499, -1, -1))
    np.testing.assert_array_equal(rank_rows(table, "topk", 0), rank_rows(table, "topk", 9))
    even = rows(np.ones(500), stratum=np.arange(500) % 7)
    u = uniform(table.uid, 4)
    for other in (table, even):
        np.testing.assert_array_equal(first(rank_rows(other, "random", 4), 500), np.argsort(u))
    np.testing.assert_array_equal(rank_rows(rows(np.ones(500)), "rank", 4), rank_rows(even, "random", 4))


def test_ties_go_to_the_smaller_uid() -> None:
    table = rows(np.ones(200))
    expected = sorted(range(200), key=lambda i: tuple(table.uid[i]))
    assert first(rank_rows(table, "topk", 0), 200).tolist() == expected
    nothing = rows(np.concatenate([[5.0], np.zeros(199)]))
    behind = [i for i in expected if i != 0]
    for draw in ("rank", "eq20"):
        assert first(rank_rows(nothing, draw, 0), 200).tolist() == [0, *behind]
    low = Rows(
        np.ones(3),
        np.array([[1, 9], [1, 2], [0, 10]], np.uint64),
        np.ones(3, bool),
        None,
    )
    assert first(rank_rows(low, "topk", 0), 3).tolist() == [2, 1, 0]


@quick
@given(st.lists(st.integers(-3, 6), min_size=1, max_size=80), st.integers(0, 1000))
@pytest.mark.parametrize("draw", ["rank", "topk"])
def test_strata_take_turns_in_every_prefix(draw: str, stratum: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rows(rng.exponential(1.0, len(stratum)), rng.random(len(stratum)) < 0.9, stratum)
    kinds = np.asarray(stratum)
    order = first(rank_rows(table, draw, seed), int(table.eligible.sum()))
    present = sorted(set(kinds[table.eligible].tolist()))
    total = {s: int((kinds[table.eligible] == s).sum()) for s in present}
    for stop in range(1, len(order) + 1):
        count = {s: int((kinds[order[:stop]] == s).sum()) for s in present}
        live = [count[s] for s in present if count[s] < total[s]]
        assert not live or max(live) - min(live) <= 1
        assert not live or max(count.values()) <= min(live) + 1
    flat = first(rank_rows(table._replace(stratum=None), draw, seed), len(order))
    for s in present:  # inside a stratum the order is the one without strata
        assert order[kinds[order] == s].tolist() == flat[kinds[flat] == s].tolist()


def test_vanishing_weights_come_last_without_complaint() -> None:
    table = rows([1.0, 1e-310, 5e-324, 0.0])
    for draw in ("rank", "eq20", "topk"):
        assert first(rank_rows(table, draw, 0), 4)[0] == 0
    assert np.isfinite(draw_keys(table.weight, uniform(table.uid, 0))).tolist() == [True, False, False, False]


def test_eq20_ignores_strata() -> None:
    weight = np.random.default_rng(3).exponential(1.0, 300)
    with_strata = rows(weight, stratum=np.arange(300) % 4)
    np.testing.assert_array_equal(rank_rows(with_strata, "eq20", 0), rank_rows(rows(weight), "eq20", 0))


def test_nothing_eligible_gives_an_empty_ranking() -> None:
    for draw in ("rank", "eq20", "topk", "random"):
        assert (rank_rows(rows(np.ones(4), [False] * 4, np.zeros(4)), draw, 0) == NO_RANK).all()


def test_unknown_draw() -> None:
    with pytest.raises(UsageError, match="--draw best: choose one of rank, eq20, topk, random"):
        rank_rows(rows(np.ones(3)), "best", 0)


# --- sizes ---


@pytest.mark.parametrize(
    ("gamma", "n", "size"),
    [
        (0.29, 100, 29),
        (0.07, 100, 7),
        (0.57, 100, 57),
        (1.1e-1, 100, 11),
        (0.1, 59994, 5999),
        (0.01, 59994, 599),
        (1e-05, 300_000, 3),
        (1.0, 17, 17),
        (1, 17, 17),
        (0.999, 10, 9),
        (1 / 3, 3, 0),
    ],
)
def test_size_is_the_floor_of_gamma_as_written(gamma: float, n: int, size: int) -> None:
    for draw in ("rank", "topk", "random"):
        keep = Rows(np.ones(n), np.zeros((n, 2), np.uint64), np.ones(n, bool), None)
        assert subset_size(keep, gamma, n, draw, 0) == size


@quick
@given(st.integers(1, 999), st.integers(1, 3000))
def test_size_never_exceeds_gamma_n(thousandths: int, n: int) -> None:
    table = Rows(np.ones(n), np.zeros((n, 2), np.uint64), np.ones(n, bool), None)
    assert subset_size(table, thousandths / 1000, n, "rank", 0) == int(Fraction(thousandths, 1000) * n)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.0000001, 2.0, float("nan"), float("inf")])
def test_gamma_must_lie_in_0_1(gamma: float) -> None:
    for call in (lambda: check_gamma(gamma), lambda: subset_size(rows(np.ones(9)), gamma, 9, "eq20", 0)):
        with pytest.raises(UsageError, match="must lie in"):
            call()


def test_too_many_exclusions_for_gamma() -> None:
    table = rows(np.ones(100), np.arange(100) < 49)
    assert subset_size(table, 0.49, 100, "rank", 0) == 49
    with pytest.raises(MinerError, match="asks for 50 of 100 images but only 49 are left") as caught:
        subset_size(table, 0.5, 100, "rank", 0)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert subset_size(table, 0.5, 100, "eq20", 0) == 49  # each chance is 1: nothing more can be had


@quick
@given(weights, st.sampled_from(["rank", "eq20", "topk", "random"]), st.integers(0, 2**32))
def test_subsets_are_nested_in_gamma(weight: list[float], draw: str, seed: int) -> None:
    table, n = rows(weight), len(weight)
    sizes = [subset_size(table, gamma, n, draw, seed) for gamma in (0.01, 0.1, 0.25, 0.26, 0.9, 1.0)]
    assert sizes == sorted(sizes)  # and all are prefixes of one ranking
    assert draw == "eq20" or sizes[-1] == n


# --- inclusion ---

TRIALS = 2000


def included(weight: np.ndarray, gamma: float, draw: str) -> tuple[np.ndarray, np.ndarray]:
    """How often each row is in a subset over ``TRIALS`` seeds, and the subsets' sizes."""
    table = rows(weight)
    hits, sizes = np.zeros(len(weight)), []
    for seed in range(TRIALS):
        size = subset_size(table, gamma, len(weight), draw, seed)
        hits[rank_rows(table, draw, seed) < size] += 1
        sizes.append(size)
    return hits / TRIALS, np.array(sizes)


def test_inclusion_is_proportional_to_weight() -> None:
    weight = np.linspace(0.5, 1.5, 80)
    share, sizes = included(weight, 0.25, "rank")
    assert set(sizes.tolist()) == {20}
    chance = 20 * weight / weight.sum()
    # sequential Poisson sampling meets the chances up to O(1/size): allow that bias beside the noise
    assert (np.abs(share - chance) < 5 * np.sqrt(chance * (1 - chance) / TRIALS) + 0.01).all()
    slope = np.polyfit(weight, share, 1)[0]
    assert slope == pytest.approx(20 / weight.sum(), rel=0.1)


def test_eq20_inclusion_is_the_papers() -> None:
    weight = np.array([30.0, 10.0, *np.linspace(0.2, 2.0, 38)])
    gamma, n = 0.3, 40
    chance = np.minimum(1.0, gamma * n * weight / weight.sum())
    assert (chance == 1).sum() == 2
    share, sizes = included(weight, gamma, "eq20")
    assert (share[:2] == 1).all()
    sigma = np.sqrt(chance * (1 - chance) / TRIALS)
    assert (np.abs(share - chance) <= 5 * sigma).all()
    spread = np.sqrt((chance * (1 - chance)).sum())
    assert abs(sizes.mean() - chance.sum()) < 5 * spread / np.sqrt(TRIALS)
    assert chance.sum() < gamma * n - 5 * spread / np.sqrt(TRIALS)  # clipped mass is lost
    assert sizes.std() == pytest.approx(spread, rel=0.1)  # draws are independent


def test_random_inclusion_is_even() -> None:
    share, sizes = included(np.linspace(0.0, 5.0, 40), 0.25, "random")
    assert set(sizes.tolist()) == {10}
    assert (np.abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / TRIALS)).all()


def test_golden_clipping() -> None:
    weight = np.array([10.0, 1, 1, 1, 1])
    table = rows(weight)
    assert clipped_share(table, 0.4, 5) == 0.2
    assert clipped_share(table, 0.2, 5) == 0.0
    share, sizes = included(weight, 0.4, "eq20")
    assert share[0] == 1
    assert (np.abs(share[1:] - 1 / 7) < 5 * np.sqrt(1 / 7 * 6 / 7 / TRIALS)).all()
    spread = np.sqrt(4 * 1 / 7 * 6 / 7 / TRIALS)
    assert abs(sizes.mean() - 1.571) < 5 * spread
    out = rows([10.0, 1, 1, 1, 1, 99.0], [True] * 5 + [False])
    assert clipped_share(out, 0.4, 5) == 0.2  # what is excluded has no share


@pytest.mark.parametrize("count", [0, 1, 7, 499, 500, 501])
def test_the_least_keys_are_what_a_stable_sort_puts_first(count: int) -> None:
    keys = np.random.default_rng(0).integers(0, 60, 500) / 7
    keys[::9] = np.inf
    np.testing.assert_array_equal(least(keys, count), np.argsort(keys, kind="stable")[:count])
