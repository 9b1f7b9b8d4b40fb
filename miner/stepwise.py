"""The released update (rule ``reference``) as rounds of the game: the weights move inside the training steps."""

from typing import TYPE_CHECKING, Any

import numpy as np

from miner import rules

if TYPE_CHECKING:
    from miner.loop import Game

_REFERENCE_SALT = 0x5EED


def stepwise_round(run: "Game", round_: int) -> dict[str, Any]:
    """One epoch of ``reference``: draws ~ sqrt(w) frozen at its start, a dense weight step after each batch."""
    if round_ == 0 and run.config.guarded:
        run.sweep(0)  # for the guard and the strata only; the rule does not use its losses
    game, each = run.config.game, run.crew.each
    sums = rules.add_sums(each("root_sums"))
    places = reference_draw(run, round_)
    run.phase(round_, game.rule, len(places))
    shards = range(len(run.shards))
    estimates, entropies = [], []
    for step in range(game.steps):
        batch = places[step * game.batch : (step + 1) * game.batch]
        inside = [np.flatnonzero(batch[:, 0] == s) for s in shards]
        rows = [batch[members, 1] for members in inside]
        factor = np.empty(len(batch))
        for members, part in zip(inside, each("factors", sums, per_shard=[(r,) for r in rows]), strict=True):
            factor[members] = part
        entropy, loss = run.crew.get(run.submit(round_, step, batch, factor))[0]
        loss = loss.astype(np.float64)
        root = factor * sums.weight / sums.root  # the factor is (m / wbar) sqrt(w)
        root_loss = float((root * loss).mean())
        per_shard = [(r, loss[members]) for r, members in zip(rows, inside, strict=True)]
        sums = rules.add_sums(each("reference_step", root_loss, game.batch, game.alpha, sums, per_shard=per_shard))
        estimates.append(float((factor * loss).mean()))
        entropies += entropy
        run.display.advance(len(batch), note=f"L_out {estimates[-1]:.4f}")
    run.share_theta()
    ess = rules.effective_sample_size(rules.add_sums(each("sums")))
    return {
        "l_out": float(np.mean(estimates)),
        "effective_sample_size": ess,
        "train_steps": game.steps,
        "train_cross_entropy": float(np.mean(entropies)),
    }


def reference_draw(run: "Game", round_: int) -> np.ndarray:
    """(shard, row) of the epoch's draws ~ sqrt(w), with replacement, int64 ``[steps * batch, 2]``."""
    game = run.config.game
    rng = np.random.Generator(np.random.Philox(key=[run.config.data.seed, _REFERENCE_SALT + round_]))
    masses = np.array([part.root for part in run.crew.each("root_sums")])
    edges = np.concatenate([[0.0], np.cumsum(masses)])
    targets = rng.random(game.steps * game.batch) * edges[-1]
    shard = np.minimum(np.searchsorted(edges, targets, side="right") - 1, len(masses) - 1)
    places = np.stack([shard, np.zeros_like(shard)], 1)
    wanted = [(targets[shard == s] - edges[s],) for s in range(len(masses))]
    for s, rows in enumerate(run.crew.each("locate", per_shard=wanted)):
        places[shard == s, 1] = rows
    return places
