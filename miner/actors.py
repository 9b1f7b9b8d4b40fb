"""PoolActor: owns shards of the pool; serves blocks of images, keeps weights, applies rules, snapshots.

Everything global (sums, thresholds, orders) comes from the driver, which adds up per-shard parts in shard
order. So the result does not depend on which actor owns which shard. Methods that apply a round name it, and are
no-ops when it was already applied; a step of the released update is sent once and never repeated. After a loss every
shard starts again from a snapshot (``restore``) or from nothing (``reset``), and from the scores that were kept.
"""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray

from miner import cache, ranking, rules, telemetry
from miner.baselines import Sweep
from miner.errors import MinerError
from miner.files import place
from miner.guard import NO_CLASS, ClassSums, class_sums
from miner.observed import observed
from miner.pool import Pool
from miner.rules import RootSums, Sums
from miner.scores import Scores, scores_file
from miner.weights import REASONS, ShardState, final_table, write_arrow

_DRAW_SALT = 1 << 32  # training draws of round r use salt _DRAW_SALT + r; the permanent number uses salt 0


class PoolShards:
    """The work of a pool actor, as a plain class: tests use it without Ray."""

    def __init__(self, pool: str, size: int, seed: int, rule: str, eta: float) -> None:
        self.pool = Pool.open(pool)
        self.size, self.seed, self.rule, self.eta = size, seed, rule, eta
        self.state: dict[int, ShardState] = {}
        self.images: dict[int, np.ndarray] = {}
        self.lender = cache.Lender()
        self.uid: dict[int, np.ndarray] = {}
        self.label: dict[int, np.ndarray] = {}
        self.excluded: dict[int, np.ndarray] = {}  # what is out before the game begins
        self.bad: dict[int, np.ndarray] = {}  # rows that do not decode, and their names
        self.undecodable: dict[int, list[str]] = {}
        self.scores: dict[int, Scores] = {}  # of the sweep going on

    @ray.method(concurrency_group="tell")
    def ping(self) -> bool:
        """That this process lives; answered while it works."""
        return True

    def each(self, method: str, shards: list[int], extra: list[tuple[Any, ...]], args: tuple[Any, ...]) -> list[Any]:
        """``method(shard, *extra, *args)`` for several shards in one message."""
        return [getattr(self, method)(s, *own, *args) for s, own in zip(shards, extra, strict=True)]

    # --- pixels ----------------------------------------------------------------------------------------------

    def pixels(self, shard: int) -> np.ndarray:
        """All images of any shard, its owner's or not, uint8 ``[n, size, size, 3]``; decoded on the first call."""
        if shard not in self.images:
            self.images[shard], bad = cache.open_shard(self.pool, shard, self.size)
            keys = self.pool.shard_index(shard, ["key"])["key"]
            self.undecodable[shard] = [f"{keys[row]} ({reason})" for row, reason in sorted(bad.items())]
            self.bad[shard] = np.array(sorted(bad), dtype=np.int64)
        return self.images[shard]

    def decode(self, shard: int) -> None:
        """Decode one shard into the cache, for whoever owns it."""
        self.pixels(shard)

    def prepare(self, shard: int, duplicates: np.ndarray, id_digests: np.ndarray) -> list[str]:
        """Get one shard ready, once; returns the keys that do not decode.

        ``duplicates`` are rows that repeat an earlier image's bytes, ``id_digests`` ("S16", ``ImageSet.digests``)
        stand for the pixels of the ID set's images: rows that show one of them are left out.
        """
        images = self.pixels(shard)
        if shard not in self.uid:
            index = self.pool.shard_index(shard, ["uid", "label", "excluded_by"])
            start = ShardState.fresh(self.rule, len(index))
            start.exclude(index["excluded_by"].is_valid().to_numpy(), "exclude-list")
            start.exclude(duplicates, "duplicate")
            start.exclude(self.bad[shard], "decode")
            start.exclude(np.isin(cache.digests(images), id_digests), "id-duplicate")
            self.excluded[shard] = start["excluded"]
            self.label[shard] = pc.fill_null(index["label"], NO_CLASS).to_numpy().astype(np.int32)
            self.uid[shard] = ranking.uid_words(index["uid"])
        return self.undecodable[shard]

    def reset(self, shard: int) -> None:
        """Set out fresh weights."""
        state = ShardState.fresh(self.rule, len(self.uid[shard]))
        state["excluded"][:] = self.excluded[shard]
        self.state[shard] = state

    def restore(self, shard: int, path: str) -> None:
        """Take one shard's live columns from a committed snapshot."""
        state = ShardState.read(place(path))
        if len(state["excluded"]) != len(self.uid[shard]):
            raise MinerError(f"{path}: {len(state['excluded'])} rows, but the pool's shard has {len(self.uid[shard])}")
        self.state[shard] = state

    def rows_of(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Images of the given rows, uint8 ``[n, size, size, 3]``; Ray copies them out of the file."""
        return self.lender.lend(self.pixels(shard), rows)

    # --- score -----------------------------------------------------------------------------------------------

    def open_sweep(self, shard: int, folder: str, stamp: str) -> tuple[int, np.ndarray]:
        """How many eligible rows a sweep has, and which of them are still to be scored (``np.packbits``).

        Scores of the same sweep, ``stamp``, that were kept in ``folder`` before are not learned again.
        """
        eligible = self.state[shard].eligible
        kept = Scores.read(place(folder) / scores_file(shard), stamp, eligible)
        self.scores[shard] = kept or Scores.fresh(eligible)
        return int(eligible.sum()), np.packbits(self.scores[shard].missing)

    def take_scores(self, shard: int, rows: np.ndarray, found: dict[str, np.ndarray], folder: str, stamp: str) -> bool:
        """Take in one block's losses and look-ups, once; with the last block keep the shard's in ``folder``.

        Returns whether that was the last. Raises MinerError naming keys when a loss is not finite.
        """
        broken = rows[~np.isfinite(found["loss"])]
        if len(broken):
            keys = self.pool.shard_index(shard, ["key"])["key"].to_pylist()
            some = ", ".join(keys[row] for row in broken[:5])
            raise MinerError(
                f"{self.pool.shards[shard].name}: {len(broken)} of {len(rows)} losses are not finite in the block of "
                f"rows {rows[0]}-{rows[-1]} (keys {some}{', ...' if len(broken) > 5 else ''}); the classifier has "
                "diverged: start anew with a lower --lr or another --checkpoint in another --out"
            )
        scores = self.scores[shard]
        if not scores.missing[rows].any():
            return False  # somebody else was quicker
        scores.take(rows, found)
        if scores.missing.any():
            return False
        scores.write(place(folder) / scores_file(shard), stamp)
        return True

    def class_sums(self, shard: int) -> ClassSums:
        """Sum and number of the sweep's losses by class of the pool."""
        eligible = self.state[shard].eligible
        return class_sums(self.scores[shard]["loss"][eligible], self.label[shard][eligible])

    def close_sweep(self, shard: int, round_: int, smooth: float, means: np.ndarray) -> None:
        """Apply the sweep's scores, once a round: ``smooth`` of each image's loss is the mean of its class."""
        state, scores = self.state[shard], self.scores.pop(shard)
        rows, loss = state.eligible, scores["loss"]
        for name in scores.columns.keys() - {"loss"}:
            state[name][rows] = scores[name][rows]
        if smooth:
            rows = rows & (self.label[shard] != NO_CLASS)
            loss[rows] = (1.0 - smooth) * loss[rows] + smooth * means[self.label[shard][rows]]
        state.apply_losses(round_, loss)

    def guard_columns(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """What the leak guard judges eligible rows by: cosine to the 50th nearest ID image float32, class int32."""
        state = self.state[shard]
        return state["nn50_id_cosine"][state.eligible], self.label[shard][state.eligible]

    def guard(self, shard: int, near: np.ndarray) -> None:
        """Exclude those of the eligible rows that are ``near``, a mask."""
        state = self.state[shard]
        state.exclude(np.flatnonzero(state.eligible)[near], "near-id")

    def places(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows are eligible, and their classes."""
        return self.state[shard].eligible, self.label[shard]

    def reasons(self, shard: int) -> np.ndarray:
        """How many rows each of REASONS has taken out, int64; first those that are left."""
        return np.bincount(self.state[shard]["excluded"], minlength=len(REASONS))

    # --- update ----------------------------------------------------------------------------------------------

    def sums(self, shard: int) -> Sums:
        """This shard's part of the global sums at the current weights and losses."""
        return self.state[shard].sums()

    def equilibrium_sums(self, shard: int, level: float) -> tuple[float, float]:
        """(sum w l, sum w) of the weights that ``equilibrium`` gives at ``level``."""
        state = self.state[shard]
        loss = state.loss_mean()[state.eligible]
        weight = rules.equilibrium(loss, level)
        return float((weight * loss).sum()), float(weight.sum())

    def loss_range(self, shard: int) -> tuple[float, float, float]:
        """(count, sum, largest) of the mean losses of eligible rows."""
        loss = self.state[shard].loss_mean()[self.state[shard].eligible]
        return float(len(loss)), float(loss.sum()), float(loss.max(initial=0.0))

    def sweep_columns(self, shard: int) -> Sweep:
        """What ``ntom``, ``dos`` and ``poem`` order by, of the eligible rows."""
        state, keep = self.state[shard], self.state[shard].eligible
        return Sweep(state["loss"][keep], state["stratum"][keep], state["boundary"][keep], self.uid[shard][keep])

    def take_weights(self, shard: int, weight_M: np.ndarray, round_: int) -> None:
        """Weights of the eligible rows from an order of the whole pool, once a round; ``update`` then ends it."""
        state = self.state[shard]
        if state.updated < round_:
            state["state"][state.eligible] = weight_M

    def update(self, shard: int, round_: int, total: Sums, scale: float, level: float) -> float:
        """Apply the rule to every row of a shard, once a round; returns the new sum of weights."""
        state = self.state[shard]
        if state.updated < round_:
            loss = np.where(state.eligible, state["loss"], 0.0).astype(np.float64)
            if self.rule == "hedge":
                state["state"][:] = rules.hedge(state["state"], loss, total, scale, self.eta)
            elif self.rule == "paper":
                state["state"][:] = rules.paper(state["state"], loss, total, self.eta)
            elif self.rule == "equilibrium":
                state["state"][:] = rules.equilibrium(np.nan_to_num(state.loss_mean()), level)
            elif self.rule == "toploss":
                state["state"][:] = np.nan_to_num(state.loss_mean())
            state.updated = round_
        return float(state.weight().sum())

    def capped(self, shard: int, factor: float, cap: float) -> tuple[float, float]:
        """How many of a shard's weights have factor w >= cap, and the sum of all others."""
        weight = self.state[shard].weight()
        full = factor * weight >= cap
        return float(full.sum()), float(weight[~full].sum())

    def normalise(self, shard: int, round_: int, factor: float, cap: float) -> None:
        """Bring hedge's weights to mean 1 and at most ``cap``, and add them to their average, once a round."""
        state = self.state[shard]
        if self.rule == "hedge" and state.averaged < round_:
            state["state"][:] = np.minimum(state["state"] + np.log(factor), np.log(cap))
            state["average"][:] += np.exp(state["state"])
        state.averaged = round_

    # --- draw and train --------------------------------------------------------------------------------------

    def draw(self, shard: int, round_: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``most`` smallest race keys of the shard and their rows: its candidates for the round's batches."""
        u = ranking.uniform(self.uid[shard], self.seed, _DRAW_SALT + round_)
        keys = ranking.draw_keys(self.state[shard].weight(), u)
        rows = ranking.least(keys, most)
        rows = rows[np.isfinite(keys[rows])]
        return keys[rows], rows

    def root_sums(self, shard: int) -> RootSums:
        """This shard's part of the released update's global terms."""
        weight = rules.softplus(self.state[shard]["state"][self.state[shard].eligible])
        return RootSums(float(len(weight)), float(weight.sum()), float(np.sqrt(weight).sum()))

    def locate(self, shard: int, targets: np.ndarray) -> np.ndarray:
        """Rows at which the running sum of sqrt(w) passes each target: draws ~ sqrt(w), with replacement."""
        running = np.cumsum(np.sqrt(self.state[shard].weight()))
        rows = np.searchsorted(running, targets, side="right")
        return np.minimum(rows, np.searchsorted(running, running[-1], side="left"))

    def factors(self, shard: int, rows: np.ndarray, sums: RootSums) -> np.ndarray:
        """Importance factors of drawn rows, float64."""
        return rules.reference_factors(rules.softplus(self.state[shard]["state"][rows]), sums)

    def reference_step(
        self, shard: int, rows: np.ndarray, loss: np.ndarray, root_loss: float, batch: int, alpha: float, sums: RootSums
    ) -> RootSums:
        """One dense step of the released update on every row of the shard; returns the shard's new sums."""
        state = self.state[shard]
        keep = state.eligible
        gradient = rules.reference_gradient(state["state"], rows, loss, root_loss, batch, alpha, sums)
        moved, momentum = rules.reference_step(state["state"], state["momentum"], gradient)
        state["state"][keep], state["momentum"][keep] = moved[keep], momentum[keep]
        state["loss"][rows] = loss
        np.add.at(state["loss_sum"], rows, loss)
        np.add.at(state["visits"], rows, np.uint32(1))
        return self.root_sums(shard)

    # --- commit and finish -----------------------------------------------------------------------------------

    def snapshot(self, shard: int, folder: str) -> None:
        """Write one shard's live columns under ``folder``."""
        self.state[shard].write(place(folder) / f"shard-{shard:06d}.arrow")

    def ranking_columns(self, shard: int) -> dict[str, np.ndarray]:
        """What the driver ranks by: outcome weights, eligibility and strata."""
        state = self.state[shard]
        return {"weight": state.outcome(), "eligible": state.eligible, "stratum": state["stratum"]}

    def sample(self, shard: int, share: float) -> np.ndarray:
        """Outcome weights of the eligible rows whose permanent random number is below ``share``, float64."""
        state = self.state[shard]
        return state.outcome()[state.eligible & (ranking.uniform(self.uid[shard], self.seed) < share)]

    def write_table(self, shard: int, folder: str, scale: float, rank: np.ndarray, metadata: dict[str, str]) -> None:
        """Write one shard of the final weights table under ``folder``."""
        index = self.pool.shard_index(shard, ["uid", "key", "shard", "row", "label"])
        table = final_table(index, self.state[shard], scale, rank, metadata)
        write_arrow(table, place(folder) / f"shard-{shard:06d}.arrow")


# Ray must neither restart a process nor repeat a call by itself: its retries come late, out of order and without an
# exception. The crew does it. One thread works, in the order of the calls; the other answers ``ping``.
_OPTIONS: Any = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {"tell": 1}}
PoolActor = ray.remote(**_OPTIONS)(observed(PoolShards, rows_of=telemetry.served))
