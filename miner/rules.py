"""Reweighting rules: pure functions from losses and global sums to weights. float64 throughout, no state, no Ray.

Notation: l_i >= 0 is the uniformity loss of image i (paper Eq. 5), w_i >= 0 its weight,
L_out = sum w_i l_i / sum w_i (paper Eq. 14). Only ratios of weights matter to L_out.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LARGEST = 1e300  # factor of weights: times zero it is still zero
STEPWISE = ("reference",)  # these move the weights inside the training steps, not in a sweep
REFERENCE_LR = 100.0  # the released code's SGD on the weight parameters: constant rate, momentum 0.9
REFERENCE_MOMENTUM = 0.9
EQUILIBRIUM_CAP = 100.0  # (2 - l/L)^-2 has a pole at l = 2L: this many times the weight at l = L


class Sums(NamedTuple):
    """What one shard contributes to a round; shards are added in shard order, in float64."""

    rows: float  # eligible ones
    weight: float  # sum w
    weight_loss: float  # sum w l
    loss: float  # sum l
    loss_squared: float  # sum l^2
    weight_squared: float  # sum w^2


class RootSums(NamedTuple):
    """Global terms of the released update: eligible rows, sum w and sum sqrt(w)."""

    rows: float
    weight: float
    root: float


SomeSums = TypeVar("SomeSums", Sums, RootSums)


def shard_sums(weight_N: Floats, loss_N: Floats) -> Sums:
    """Sums over one shard's eligible rows (float64 ``[N]`` each)."""
    return Sums(
        float(len(loss_N)),
        float(weight_N.sum()),
        float((weight_N * loss_N).sum()),
        float(loss_N.sum()),
        float((loss_N * loss_N).sum()),
        float((weight_N * weight_N).sum()),
    )


def add_sums(parts: list[SomeSums]) -> SomeSums:
    """Add up per-shard sums in the order given. The caller gives shard order: float addition does not commute."""
    total = np.zeros(len(parts[0]))
    for part in parts:
        total = total + np.asarray(part, dtype=np.float64)
    return type(parts[0])(*(float(x) for x in total))


def l_out(sums: Sums) -> float:
    """L_out = sum w l / sum w (paper Eq. 14)."""
    return sums.weight_loss / sums.weight


def loss_std(sums: Sums) -> float:
    """Standard deviation of the losses over the pool; 1 where they are all equal, so that it may divide."""
    mean = sums.loss / sums.rows
    variance = max(sums.loss_squared / sums.rows - mean * mean, 0.0)
    return float(np.sqrt(variance)) if variance > 1e-24 else 1.0


def effective_sample_size(sums: Sums) -> float:
    """(sum w)^2 / sum w^2: how many equally weighted images the weights are worth."""
    return sums.weight * sums.weight / sums.weight_squared


def hedge(log_weight_N: Floats, loss_N: Floats, sums: Sums, scale: float, eta: float) -> Floats:
    """Multiplicative weights: ``log w += eta (l - L_out) / scale``; returns the new log-weights ``[N]``.

    ``scale`` is the losses' standard deviation in the *first* sweep. Training flattens almost all losses, so
    that one stubborn image would be dozens of the current deviations out and take all the weight in a round.

    The caller averages the normalised weights over rounds: the average, not the last iterate, approximates
    the least favourable distribution of the game (Freund & Schapire 1999).
    """
    return log_weight_N + eta * (loss_N - l_out(sums)) / scale


def water_level(capped: Callable[[float], tuple[float, float]], rows: float, total: float, cap: float) -> float:
    """The factor c with mean min(cap, c w) = 1: the KL projection of weights onto those of at most ``cap``.

    ``capped(c)``: how many weights have c w >= cap, and the sum of all others; one message to each pool actor.
    ``total`` = sum w. Weights of mean 1 and at most ``cap`` are what a subset of N / cap images can be, so the
    adversary cannot come to rest on a handful. Newton's steps on a sum that is concave and piecewise linear in c: from
    below they never overshoot, and end where the set of capped weights stays the same, after a handful of them. When
    fewer than rows / cap images have any weight, all of these are at the cap.
    """
    level = rows / total
    while True:
        full, free = capped(level)
        wanted = min((rows - cap * full) / free, LARGEST) if free > 0 else level
        if not wanted > level * (1.0 + 1e-12):
            return level
        level = wanted


def paper(weight_N: Floats, loss_N: Floats, sums: Sums, eta: float) -> Floats:
    """Algorithm 1 of the paper: a step along dL_out/dw_i = (l_i - L_out) / sum w, projected to w >= 0.

    ``eta`` is in units that do not change with the pool's size: at w = 1 it moves a weight by
    ``eta * (l_i - L_out)``.
    """
    return np.maximum(weight_N + eta * sums.rows * (loss_N - l_out(sums)) / sums.weight, 0.0)


def equilibrium(loss_N: Floats, level: float, cap: float = EQUILIBRIUM_CAP) -> Floats:
    """Where the released update comes to rest at fixed losses: ``w ~ (2 - l/L)^-2`` with L = ``level``, capped."""
    gap = np.maximum(2.0 - loss_N / level, cap**-0.5)
    return gap**-2.0


def equilibrium_level(out_loss: Callable[[float], float], low: float, high: float) -> float:
    """Solve L = L_out(w(L)) by bisection on [mean loss, largest loss].

    ``out_loss(L)`` is one all-reduce: L_out of the weights that ``equilibrium`` gives at level L.
    Weights that favour hard images put L_out above the mean and never above the largest loss.
    """
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if out_loss(middle) > middle else (low, middle)
    return 0.5 * (low + high)


# The released update (``reference``), dense and exact. v is the raw parameter, w = softplus(v).


def softplus(v_N: Floats) -> Floats:
    """w = ln(1 + e^v)."""
    return np.logaddexp(0.0, v_N)


def reference_factors(weight_B: Floats, sums: RootSums) -> Floats:
    """Importance factor of each drawn row: (m / wbar) sqrt(w), m = mean sqrt(w), wbar = mean w.

    With draws ~ sqrt(w), the mean of factor x loss is an unbiased estimate of L_out.
    """
    return (sums.root / sums.weight) * np.sqrt(weight_B)


def reference_gradient(
    v_N: Floats,
    drawn_D: NDArray[np.int64],
    loss_D: Floats,
    root_loss: float,
    batch: int,
    alpha: float,
    sums: RootSums,
) -> Floats:
    """d Lhat / d v for every row of a shard, in closed form; Lhat = alpha mean_b factor_b loss_b.

    ``drawn_D`` are this shard's rows in the batch (repeats add up), ``loss_D`` their losses and ``root_loss``
    = (1/B) sum_b sqrt(w_b) l_b over the *whole* batch. Equals autograd through the released code's dense
    normalisers to rounding; it needs no second backward pass of the network.
    """
    weight_N = softplus(v_N)
    root_N = np.sqrt(weight_N)
    mean_weight, mean_root = sums.weight / sums.rows, sums.root / sums.rows
    drift_N = root_loss * (
        1.0 / (2.0 * sums.rows * root_N * mean_weight) - mean_root / (sums.rows * mean_weight * mean_weight)
    )
    np.add.at(drift_N, drawn_D, (mean_root / mean_weight) * loss_D / (2.0 * batch * root_N[drawn_D]))
    return alpha * drift_N / (1.0 + np.exp(-v_N))  # d softplus / d v is the logistic function


def reference_step(v_N: Floats, momentum_N: Floats, gradient_N: Floats) -> tuple[Floats, Floats]:
    """Gradient *ascent* with the released optimiser's rate and momentum; returns the new (v, momentum)."""
    momentum_N = REFERENCE_MOMENTUM * momentum_N - gradient_N
    return v_N - REFERENCE_LR * momentum_N, momentum_N
