"""Random numbers that belong to an image, batch draws, and the order that answers every gamma at once.

Every random number here is a pure function of (uid, seed, salt): it does not matter which actor computes it,
in which order, or how the pool is cut into shards.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from miner.errors import MinerError, UsageError

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]

DRAWS = ("rank", "eq20", "topk", "random")
_AT_ONCE = 1 << 16  # rows worked at at once, where temporary arrays would otherwise be as long as the pool
_PART, _NO_PART = 1 << 20, 255  # rows sorted at once; the part of rows that are not eligible
NO_RANK = np.iinfo(np.uint64).max  # excluded rows stand after all others, whatever gamma


def uid_words(uids: pa.Array | pa.ChunkedArray | Sequence[str]) -> Words:
    """32-hex-character uids as uint64 ``[N, 2]``, high word first; a column of a table without a Python object a row.

    Raises MinerError for a uid of another length or with other characters.
    """
    array = pa.array(uids, pa.string()) if not isinstance(uids, pa.Array | pa.ChunkedArray) else uids
    word_N2, done = np.empty((len(array), 2), np.uint64), 0
    for chunk in getattr(array, "chunks", [array]):
        for start in range(0, len(chunk), _AT_ONCE):
            part = chunk.slice(start, _AT_ONCE)
            text = b"".join(part.cast(pa.binary()).to_pylist())
            raw = np.frombuffer(_unhex(text, len(part)), dtype=">u8").reshape(-1, 2)
            word_N2[done : done + len(raw)] = raw
            done += len(raw)
    return word_N2


def _unhex(text: bytes, count: int) -> bytes:
    try:
        found = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        found = b""
    if len(found) != 16 * count:
        raise MinerError("a uid that is not 32 hexadecimal digits; make the pool again")
    return found


def _mix(x_N: Words) -> Words:
    """The splitmix64 finaliser: a bijection of 64-bit words whose output bits all depend on all input bits."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def uniform(uid_N2: Words, seed: int, salt: int = 0) -> Floats:
    """One number in (0, 1) an image, ``[N]`` float64: its *permanent* random number under (seed, salt).

    The uid is a cryptographic hash already, so keying and mixing it in 64-bit integer arithmetic is enough,
    and 80 M of them take seconds. Never exactly 0 or 1.
    """
    keys = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF, salt & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + np.uint64(0x9E37))
    uniform_N = np.empty(len(uid_N2))
    for start in range(0, len(uid_N2), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        with np.errstate(over="ignore"):
            word = _mix(_mix(uid_N2[part, 0] + keys[0]) ^ (uid_N2[part, 1] + _mix(keys[1:] + keys[:1])[0]))
        uniform_N[part] = ((word >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # one bit more: up to 1
    return uniform_N


def draw_keys(weight_N: Floats, uniform_N: Floats) -> Floats:
    """Exponential races: taking the K smallest of ``-log(u)/w`` draws K rows without replacement, chance ~ w.

    Rows of weight 0 get infinity. Shards can each give their K smallest and the merge is the draw.
    """
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(weight_N > 0, -np.log(uniform_N) / weight_N, np.inf)


def least(key_N: Floats, count: int) -> NDArray[np.int64]:
    """Rows of the ``count`` smallest keys, in order; the first row first where keys are equal."""
    if count >= len(key_N):
        return np.argsort(key_N, kind="stable")
    rows = np.flatnonzero(key_N <= np.partition(key_N, count)[count])
    return rows[np.argsort(key_N[rows], kind="stable")][:count]


class Rows(NamedTuple):
    """The whole pool's columns that decide the ranking, rows in (shard, row) order."""

    weight: Floats  # [N]
    uid: Words  # [N, 2]
    eligible: NDArray[np.bool_]  # [N]
    stratum: NDArray[np.int32] | None  # [N]


def rank_rows(rows: Rows, draw: str, seed: int) -> NDArray[np.uint64]:
    """Rank of every row, 0 first; a gamma-subset is a prefix of it. Excluded rows get ``NO_RANK``.

    ``rank``: ascending u/w (sequential Poisson sampling, Ohlsson 1998): inclusion ~ w up to saturation.
    ``eq20``: the same order; the cut differs (see ``subset_size``). ``topk``: heaviest first.
    ``random``: by u alone, weights and strata ignored. Ties are broken by uid. With strata, the order inside
    a stratum is kept and the strata take turns: position p of every stratum comes before position p + 1.
    """
    if draw not in DRAWS:
        raise UsageError(f"--draw {draw}: choose one of {', '.join(DRAWS)}")
    order = _ordered(_keys(rows, draw, seed), rows)
    rank = np.full(len(rows.weight), NO_RANK, dtype=np.uint64)
    if rows.stratum is None or draw in ("random", "eq20"):
        for start in range(0, len(order), _AT_ONCE):
            part = order[start : start + _AT_ONCE]
            rank[part] = np.arange(start, start + len(part), dtype=np.uint64)
    else:
        _take_turns(rank, order, rows.stratum)
    return rank


def _keys(rows: Rows, draw: str, seed: int) -> Floats:
    """What rows are ordered by, ``[N]``, excluded ones too."""
    if draw == "random":
        return uniform(rows.uid, seed)
    if draw == "topk":
        return -rows.weight
    key_N = uniform(rows.uid, seed)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        np.divide(key_N, rows.weight, out=key_N)
    key_N[~(rows.weight > 0)] = np.inf
    return key_N


def _ordered(key_N: Floats, rows: Rows) -> NDArray[np.int64] | NDArray[np.uint32]:
    """Eligible rows by (key, uid), ``[M]``.

    Sorted in parts that lie between quantiles of the keys: caches hold a part, every core takes one, and no array of
    64-bit places is as long as the pool.
    """
    edges = _quantiles(key_N)
    part_N = np.empty(len(key_N), np.uint8)
    for start in range(0, len(key_N), _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        part_N[here] = np.where(rows.eligible[here], np.searchsorted(edges, key_N[here], side="right"), _NO_PART)
    counts = np.bincount(part_N, minlength=256)[: len(edges) + 1]
    ends = np.cumsum(counts)
    order = np.empty(ends[-1], np.uint32 if len(key_N) < 1 << 32 else np.int64)

    def sort(part: int) -> None:
        members = np.flatnonzero(part_N == part)
        keys = key_N[members]
        places = np.argsort(keys, kind="stable")
        _settle_ties(places, keys, rows.uid, members)
        order[ends[part] - counts[part] : ends[part]] = members[places]

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as cores:
        list(cores.map(sort, range(len(counts))))
    return order


def _quantiles(key_N: Floats) -> Floats:
    """Edges between parts of about a million keys, estimated from every so-manieth; fewer where keys repeat."""
    parts = min(len(key_N) // _PART + 1, _NO_PART - 1)
    sample = np.sort(key_N[:: max(len(key_N) // 100_000, 1)])
    return np.unique(sample[np.arange(1, parts) * len(sample) // parts])


def _settle_ties(order: NDArray[np.int64], key_M: Floats, uid_N2: Words, members: NDArray[np.int64]) -> None:
    """Bring rows of equal keys in ``order`` (sorted by key) into the order of their uids, in place."""
    key = key_M[order]
    same = key[1:] == key[:-1]
    tied = np.zeros(len(order), bool)
    tied[:-1] |= same
    tied[1:] |= same
    places = np.flatnonzero(tied)  # few: the keys are random numbers, as a rule
    rows = order[places]
    uid = uid_N2[members[rows]]
    order[places] = rows[np.lexsort((uid[:, 1], uid[:, 0], key_M[rows]))]


def _take_turns(rank: NDArray[np.uint64], order: NDArray[Any], stratum_N: NDArray[np.int32]) -> None:
    """Write ranks of rows that are in ranked ``order`` when the strata take turns, each in its own order."""
    parts = [slice(start, start + _AT_ONCE) for start in range(0, len(order), _AT_ONCE)]
    turn_M = np.empty_like(order)  # of each row in its stratum
    lowest, highest = int(stratum_N.min(initial=0)), int(stratum_N.max(initial=0))
    sizes = np.zeros(highest - lowest + 1, order.dtype)
    for part in parts:
        turn_M[part] = _numbers(stratum_N[order[part]] - lowest, sizes)
    taking_turn = len(sizes) - np.cumsum(np.bincount(sizes))  # strata that have more than t rows, for every t
    upcoming = np.concatenate([[0], np.cumsum(taking_turn)]).astype(np.uint64)  # turn t begins after all before it
    for part in parts:
        rank[order[part]] = _numbers(turn_M[part], upcoming)


def _numbers(values: NDArray[Any], upcoming: NDArray[Any]) -> NDArray[Any]:
    """Every value's next number: that of ``values[i]`` is ``upcoming[values[i]]``, which then grows by one."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    lengths = np.diff(np.append(starts, len(values)))
    within = np.arange(len(values)) - np.repeat(starts, lengths)
    found = np.empty(len(values), upcoming.dtype)
    found[order] = upcoming[ordered] + within.astype(upcoming.dtype)
    upcoming[ordered[starts]] += lengths.astype(upcoming.dtype)
    return found


def check_gamma(gamma: float) -> None:
    """Raise UsageError unless 0 < gamma <= 1."""
    if not 0.0 < gamma <= 1.0:
        raise UsageError(f"--gamma {gamma:g}: the share of the pool to keep must lie in (0, 1]")


def check_gammas(gammas: Sequence[float]) -> None:
    """Raise UsageError unless there are gammas, all different as written in folder names, each in (0, 1]."""
    if not gammas or len({f"{gamma:g}" for gamma in gammas}) < len(gammas):
        raise UsageError(f"--gamma {' '.join(map(str, gammas))}: give one or more different values")
    for gamma in gammas:
        check_gamma(gamma)


def check_size(gamma: float, n: int) -> None:
    """Raise UsageError when gamma of ``n`` images is less than one image."""
    if Fraction(repr(gamma)) * n < 1:
        raise UsageError(f"--gamma {gamma:g} of {n:,} images is less than one image; raise it")


def subset_size(rows: Rows, gamma: float, n: int, draw: str, seed: int) -> int:
    """How long a prefix of the ranking gamma asks for: floor(gamma n) (paper Eq. 9: never more than gamma n).

    ``eq20`` is the paper's Bernoulli draw (Eq. 20): image i is in iff u_i <= gamma n w_i / sum w, so its size
    is random; because both sides order by u/w, the result is a prefix of the same ranking.
    """
    check_gamma(gamma)
    available = int(rows.eligible.sum())
    if draw == "eq20":
        weight_M = rows.weight[rows.eligible]
        chance_M = np.minimum(1.0, gamma * n * weight_M / weight_M.sum())
        return int((uniform(rows.uid[rows.eligible], seed) <= chance_M).sum())
    size = int(Fraction(repr(gamma)) * n)  # as written: in binary floats 0.29 * 100 is 28.999999999999996
    if size > available:
        raise MinerError(
            f"--gamma {gamma:g} asks for {size:,} of {n:,} images but only {available:,} are left after exclusions; "
            "lower --gamma, or spare more of the pool: raise --exclude-near-id, or 0 for no leak guard"
        )
    return size


def clipped_share(rows: Rows, gamma: float, n: int) -> float:
    """Share of eligible rows whose Eq. 20 chance gamma n w_i / sum w exceeds 1 (their weight cannot count fully)."""
    weight_M = rows.weight[rows.eligible]
    return float((gamma * n * weight_M > weight_M.sum()).mean())


def effective_sample_size(rows: Rows) -> float:
    """(sum w)^2 / sum w^2 of the eligible rows: how many equally weighted images the weights are worth."""
    weight_M = rows.weight[rows.eligible]
    return float(weight_M.sum() ** 2 / (weight_M**2).sum())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two float arrays ``[n]``, ties at their mean; 1 if they are equal, NaN if one is constant."""
    if len(a) and np.array_equal(a, b):
        return 1.0
    ranks = []
    for values in (a, b):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[where])
    if not len(a) or min(rank.std() for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
