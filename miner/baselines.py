"""Miners of the literature as orders of the pool: pure functions from one scoring sweep to weights. No Ray, no torch.

The originals choose anew every epoch (NTOM, POEM) or every step (DOS) and need the whole pool beside the training.
Here each looks once, at theta_0, so that all rules cost the same sweep and leave one subset that can be kept. Their
reject-class probability of an image, which a classifier without that class does not have, is replaced by the
uniformity loss l of the same sweep (paper Eq. 5): hard is a high l.

A rule is its order. The weight of an image falls with its place in it, so that draw ``topk`` without strata gives
back the order itself, and subsets of several gammas are nested.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from miner.ranking import Words
from miner.rules import Floats

NTOM_QUANTILE = 0.125  # q, the default of the released code
POEM_PRIOR_VARIANCE = 20.0
POEM_NOISE_VARIANCE = 0.5
POEM_TARGET = 3.0  # -3 for ID, +3 for outliers
_POEM_SALT = 0x90E4
_BLOCK = 8192  # rows in float64 at once


class Sweep(NamedTuple):
    """What a sweep left of the M eligible images, in (shard, row) order."""

    loss: NDArray[np.float32]  # [M] uniformity loss
    stratum: NDArray[np.int32]  # [M] k-means cluster of the features
    boundary: NDArray[np.float32]  # [M] |w'z| (``poem_distance``); NaN unless the rule is poem
    uid: Words  # [M, 2] settles ties


def weights(rule: str, sweep: Sweep) -> Floats:
    """Weights float64 ``[M]``, mean 1, of ``ntom``, ``dos`` or ``poem``: 2 (M - place) / (M + 1)."""
    order = {"ntom": ntom, "dos": dos, "poem": poem}[rule](sweep)
    return place_weights(order)


def place_weights(order_M: NDArray[np.int64]) -> Floats:
    """Weights of mean 1 that fall evenly along ``order_M`` (rows, first place first): float64 ``[M]``."""
    count = len(order_M)
    weight_M = np.empty(count)
    weight_M[order_M] = np.arange(count, 0, -1) * (2.0 / (count + 1))
    return weight_M


def ntom(sweep: Sweep) -> NDArray[np.int64]:
    """Order of NTOM (Chen et al., ECML PKDD 2021): from the quantile q of hardness on to easier images.

    Places: ranks floor(q M), floor(q M) + 1, ... of the images by falling loss. The hardest floor(q M), which the
    rule skips, come last, the hardest of all at the very end. Rows int64 ``[M]``.

    Deviations: one choice at theta_0 from the whole pool; the original takes 400,000 consecutive images each epoch,
    ordered by its reject-class probability.
    """
    hardest = np.lexsort((*_uid(sweep), -_exact(sweep.loss)))
    skipped = int(NTOM_QUANTILE * len(hardest))
    return np.concatenate([hardest[skipped:], hardest[:skipped][::-1]])


def dos(sweep: Sweep) -> NDArray[np.int64]:
    """Order of DOS (Jiang et al., ICLR 2024): diverse and hard. Rows int64 ``[M]``.

    The hardest image of every cluster, then the second hardest of every cluster, and so on; within such a turn the
    harder first. A cluster that is used up drops out.

    Deviations: the clusters are the sweep's strata, k-means over a sample of the pool's unit features; the original
    clusters 384 candidates into 64 at every step, and fills what empty clusters leave at random.
    """
    hardness = -_exact(sweep.loss)
    by_cluster = np.lexsort((*_uid(sweep), hardness, sweep.stratum))
    _, first, count = np.unique(sweep.stratum[by_cluster], return_index=True, return_counts=True)
    turn = np.empty(len(by_cluster), np.int64)
    turn[by_cluster] = np.arange(len(by_cluster)) - np.repeat(first, count)
    return np.lexsort((*_uid(sweep), hardness, turn))


def poem(sweep: Sweep) -> NDArray[np.int64]:
    """Order of POEM (Ming et al., ICML 2022): nearest to the sampled ID boundary first.

    The boundary score is -|w'z| with w one draw from the posterior of ``poem_posterior``. Rows int64 ``[M]``.

    Deviations: one draw of w at theta_0 orders the whole pool; the original draws anew each epoch, orders 400,000
    images by it, and trains on its choice in between.
    """
    return np.lexsort((*_uid(sweep), _exact(sweep.boundary)))


def poem_posterior(id_ND: NDArray[np.float32], outlier_MD: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Posterior of Bayesian linear regression on features: mean ``[D]`` and *precision* ``[D, D]``, float64.

    z'w + noise = -3 for ID features, +3 for outliers, no intercept, features as they are (not scaled to length 1);
    prior w ~ N(0, 20 I), noise variance 0.5. Precision A = Z'Z / 0.5 + I / 20, mean A^-1 Z'y / 0.5.

    Deviations: fitted once, on the ID training set and as large a sample of the pool; the original's outliers are
    what it chose in the last four epochs. Its code draws from 20 times the covariance A^-1 that the paper gives,
    and moves all targets by one random number; we follow the paper.
    """
    dimensions = id_ND.shape[1]
    gram, moment = np.zeros((dimensions, dimensions)), np.zeros(dimensions)
    for features, target in ((id_ND, -POEM_TARGET), (outlier_MD, POEM_TARGET)):
        for start in range(0, len(features), _BLOCK):
            block = features[start : start + _BLOCK].astype(np.float64)
            gram += block.T @ block
            moment += target * block.sum(axis=0)
    precision = gram / POEM_NOISE_VARIANCE + np.eye(dimensions) / POEM_PRIOR_VARIANCE
    return np.asarray(np.linalg.solve(precision, moment / POEM_NOISE_VARIANCE), np.float64), precision


def poem_draw(mean_D: Floats, precision_DD: Floats, seed: int) -> Floats:
    """One w ~ N(mean, precision^-1), float64 ``[D]``: the same for the same seed."""
    noise = np.random.Generator(np.random.Philox(key=[seed, _POEM_SALT])).standard_normal(len(mean_D))
    return mean_D + np.linalg.solve(np.linalg.cholesky(precision_DD).T, noise)


def poem_distance(features_BD: NDArray[np.float32], w_D: Floats) -> NDArray[np.float32]:
    """|w'z| of each row, float32 ``[B]``; in float64 and row by row: a row's value does not depend on its batch."""
    return np.abs((features_BD.astype(np.float64) * w_D).sum(axis=1)).astype(np.float32)


def _exact(values: NDArray[np.float32]) -> Floats:
    return values.astype(np.float64)


def _uid(sweep: Sweep) -> tuple[Words, Words]:
    """Keys for ``np.lexsort``, least significant first."""
    return sweep.uid[:, 1], sweep.uid[:, 0]
