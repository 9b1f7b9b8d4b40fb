"""The game in rounds: score -> update -> train -> commit. The driver's side; pool and trainers are Ray actors.

A round scores every eligible image at one theta, applies the rule to all rows from global sums reduced in
shard order, trains the classifier on batches drawn from the new weights, and commits. Blocks, sums, draws and
random numbers depend on (seed, round, shard, uid), never on how many actors there are.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miner import baselines, ranking, rules
from miner.cluster import Crew
from miner.config import ONE_SWEEP, Config
from miner.errors import MinerError
from miner.guard import NO_CLASS, class_means, near_id
from miner.pool import Shard
from miner.progress import Display
from miner.rays import put
from miner.rules import Sums
from miner.run_dir import RunDir, write_file, write_json
from miner.stepwise import stepwise_round
from miner.sweep import Sweep, block_size, cut
from trainers.together import own_positions

CHUNK_STEPS = 16  # training steps a message
SAMPLE = 100_000  # images whose weights tell whether the ranking still changes: their rho is good to 0.001


@dataclass
class Game:
    """One run's rounds."""

    config: Config
    crew: Crew
    run: RunDir
    shards: Sequence[Shard]
    display: Display
    theta: str = ""  # hash of the classifier that the round begins with
    near: float = np.inf  # cosine to the ID set above which the leak guard leaves out; needed in the first round only
    scale: float = 0.0  # spread of the first sweep's losses; 0: not known yet
    converged: bool = False  # the last round changed the ranking no more: it was the last one

    def play(self, first: int, on_round: Callable[[dict[str, Any]], None]) -> None:
        """Rounds ``first`` to the last one; ``on_round`` gets each finished round's record."""
        for round_ in range(first, self.config.game.effective_rounds):
            if self.converged:
                return
            started = time.monotonic()
            self.display.begin_round(round_)
            stepwise = self.config.game.rule in rules.STEPWISE
            record = stepwise_round(self, round_) if stepwise else self.sweep_round(round_)
            record = {"round": round_} | record | {"seconds": round(time.monotonic() - started, 3)}
            self.run.log(record)  # first: records of rounds that were not committed are dropped on resume
            self.commit(round_)
            on_round(record)

    def phase(self, round_: int, name: str, total: int, done: int = 0) -> None:
        """Say what the round is at."""
        self.display.phase(f"round {round_ + 1}/{self.config.game.effective_rounds} {name}", total, done)

    def sweep_round(self, round_: int) -> dict[str, Any]:
        """Score the whole pool once, update every weight, train unless it is the last round."""
        record, wanted = self.sweep(round_), self.config.game.converged
        before = self.sample() if wanted and round_ else None
        record |= self.update(round_)
        if wanted and before is not None:
            record["agreement"] = ranking.spearman(before, self.sample())
            self.converged = record["agreement"] >= wanted
        if round_ + 1 < self.config.game.effective_rounds and not self.converged:
            record |= self.train(round_, self.draw(round_))
        return record

    def sample(self) -> np.ndarray:
        """Weights by which rounds are compared, float64: those of the same ``SAMPLE`` images or so of the pool."""
        return np.concatenate(self.crew.each("sample", SAMPLE / sum(shard.count for shard in self.shards)))

    # --- score -------------------------------------------------------------------------------------------------

    def sweep(self, round_: int) -> dict[str, Any]:
        """One forward pass over every eligible image; round 0 also looks up neighbours and strata, and guards."""
        crew, started = self.crew, time.monotonic()
        folder, stamp = str(self.run.kept_scores.resolve()), f"round {round_} theta {self.theta}"
        opened = crew.each("open_sweep", folder, stamp)
        total, left = sum(count for count, _ in opened), [mask for _, mask in opened]
        todo = sum(int(np.unpackbits(mask).sum()) for mask in left)
        self.phase(round_, "score", total, total - todo)
        # What the guard leaves out is not kept: it judges in the first sweep, after which blocks stay the same.
        keep = round_ + 1 < self.config.game.effective_rounds and (round_ > 0 or not self.config.guarded)
        sweep = Sweep(crew, self.display, round_ == 0, keep, folder, stamp)
        sweep.run(cut(left, [shard.count for shard in self.shards], block_size(self.config.data.size)))
        smooth = self.config.game.smooth
        means = class_means(crew.each("class_sums")) if smooth else np.zeros(0)
        crew.each("close_sweep", round_, smooth, means)
        record = {
            "scored": total,
            "score_images_per_s": round(todo / (time.monotonic() - started), 1),
            "blocks_lent": sweep.lent,
            "blocks_held": sweep.held,
        }
        if round_ == 0:
            record |= self.guard()
        return record

    def guard(self) -> dict[str, Any]:
        """Leave out what is too near the ID set (DESIGN: the leak guard is part of the method)."""
        if self.config.selection.exclude_near_id <= 0:
            return {}
        parts = self.crew.each("guard_columns")
        cosine, label = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        if self.config.selection.guard == "image":
            label = np.full_like(label, NO_CLASS)
        near = near_id(cosine, label, self.near)
        ends = np.cumsum([len(column) for column, _ in parts])[:-1]
        self.crew.each("guard", per_shard=[(mask,) for mask in np.split(near, ends)])
        self.crew.check_left()
        classes = len(np.setdiff1d(label[near], [NO_CLASS]))
        self.display.say(
            f"leak guard: {near.sum():,} of {len(near):,} images left out as near ID"
            + (f", {classes:,} whole classes" if classes else "")
            + f" (cosine of the 50th ID neighbour above {self.near:.4f})"
        )
        return {"near_id_cosine": self.near, "near_id_excluded": int(near.sum())}

    # --- update ------------------------------------------------------------------------------------------------

    def update(self, round_: int) -> dict[str, Any]:
        """Reduce the global sums in shard order, apply the rule to every row, and report the new L_out."""
        self.phase(round_, "update", 1)
        before = rules.add_sums(self.crew.each("sums"))
        self.scale = self.scale or rules.loss_std(before)
        level = self.equilibrium_level() if self.config.game.rule == "equilibrium" else 0.0
        if self.config.game.rule in ONE_SWEEP:
            self.order(round_)
        new_weight = sum(self.crew.each("update", round_, before, self.scale, level))
        if not np.isfinite(new_weight) or new_weight <= 0:
            raise MinerError(
                f"round {round_}: the weights add up to {new_weight}; start anew with a lower --eta in another --out"
            )
        factor, cap = before.rows / new_weight, self.config.game.cap
        if self.config.game.rule == "hedge":
            factor = rules.water_level(lambda c: self._capped(c, cap), before.rows, new_weight, cap)
        self.crew.each("normalise", round_, factor, cap)
        after = rules.add_sums(self.crew.each("sums"))
        return describe(before, after)

    def _capped(self, factor: float, cap: float) -> tuple[float, float]:
        parts = self.crew.each("capped", factor, cap)
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    def order(self, round_: int) -> None:
        """Weights by the place in one order of the whole pool: ``ntom``, ``dos`` and ``poem``."""
        parts = self.crew.each("sweep_columns")
        sweep = baselines.Sweep(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        weights = baselines.weights(self.config.game.rule, sweep)
        shares = np.split(weights, np.cumsum([len(part.loss) for part in parts])[:-1])
        self.crew.each("take_weights", round_, per_shard=[(share,) for share in shares])

    def equilibrium_level(self) -> float:
        """The L at which L_out of the equilibrium weights is L itself."""
        parts = self.crew.each("loss_range")
        count, total, largest = (sum(p[0] for p in parts), sum(p[1] for p in parts), max(p[2] for p in parts))

        def out_loss(level: float) -> float:
            pairs = self.crew.each("equilibrium_sums", level)
            return sum(p[0] for p in pairs) / sum(p[1] for p in pairs)

        return rules.equilibrium_level(out_loss, total / count, largest)

    # --- train -------------------------------------------------------------------------------------------------

    def draw(self, round_: int) -> np.ndarray:
        """The round's batches: int64 ``[steps * batch, 2]`` of (shard, row), drawn without replacement, chance ~ w.

        The chance saturates: a weight counts for no more than one place in a round.
        Each shard offers its smallest race keys; the merge of all shards is the draw. A pool smaller than the
        round is gone through again in the same order.
        """
        wanted = self.config.game.steps * self.config.game.batch
        offers = self.crew.each("draw", round_, wanted)
        keys = np.concatenate([keys for keys, _ in offers])
        places = np.concatenate([np.stack([np.full(len(r), s), r], 1) for s, (_, r) in enumerate(offers)])
        order = np.argsort(keys, kind="stable")[:wanted]
        if not len(order):
            raise MinerError(
                "no image has any weight left to draw; start anew, with a higher --exclude-near-id, in another --out"
            )
        return np.resize(places[order], (wanted, 2))

    def train(self, round_: int, places: np.ndarray) -> dict[str, Any]:
        """Training steps on the drawn background images, in chunks; the last theta goes to every trainer."""
        game = self.config.game
        self.phase(round_, "train", len(places))
        entropies: list[float] = []
        losses: list[np.ndarray] = []
        for result in self._chunks(round_, places):
            entropy, loss = self.crew.get(result)[0]  # members of a group all know the same
            entropies += entropy
            losses.append(loss)
            self.display.advance(len(loss), note=f"L_out {loss.mean():.4f}")
        self.share_theta()
        return {
            "train_steps": game.steps,
            "train_cross_entropy": float(np.mean(entropies)),
            "train_uniformity_loss": float(np.concatenate(losses).mean()),
        }

    def _chunks(self, round_: int, places: np.ndarray) -> Iterable[Any]:
        """Submit chunk after chunk, one ahead of the one being waited for."""
        size = self.config.game.batch
        waiting = None
        for first in range(0, self.config.game.steps, CHUNK_STEPS):
            chunk = places[first * size : (first + CHUNK_STEPS) * size]
            submitted = self.submit(round_, first, chunk, None)
            if waiting is not None:
                yield waiting
            waiting = submitted
        yield waiting

    def submit(self, round_: int, first: int, places: np.ndarray, factors: np.ndarray | None) -> list[Any]:
        """Have the images of (shard, row) places gathered by their owners and trained on by those who train.

        Each of these gets its own part of every batch; all give the same answer.
        """
        batch, parts, members = self.config.game.batch, self.config.game.parts, self.crew.members
        answers = []
        for rank, trainer in enumerate(members):
            own = own_positions(batch, len(places) // batch, parts, rank, len(members))
            order, images = self._gather(places[own])
            answers.append(
                trainer.train.remote(round_, first, order, None if factors is None else factors[own], *images)
            )
        return answers

    def _gather(self, places: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        """References to the images of ``places``, shard by shard, and the order that brings them back into place."""
        by_shard = np.argsort(places[:, 0], kind="stable")
        back = np.empty(len(places), np.int64)
        back[by_shard] = np.arange(len(places))
        owner = self.crew.owner
        shards = np.unique(places[:, 0])
        return back, [owner[s].rows_of.remote(int(s), places[places[:, 0] == s, 1]) for s in shards]

    def share_theta(self) -> None:
        """Bring every trainer to the theta of the first, which trains."""
        if len(self.crew.trainers) > 1:
            state = self.crew.trainers[0].state.remote()
            self.crew.get([trainer.set_state.remote(state) for trainer in self.crew.trainers[1:]])

    # --- commit --------------------------------------------------------------------------------------------------

    def commit(self, round_: int) -> None:
        """Snapshot weights and classifier, then declare the round complete."""
        self.phase(round_, "commit", 1)
        folder = self.run.round(round_)
        folder.mkdir(parents=True, exist_ok=True)
        self.crew.each("snapshot", str(folder.resolve()))
        state = self.crew.get(self.crew.trainers[0].state.remote())
        write_file(folder / "trainer.safetensors", state)
        write_json(folder / "round.json", {"round": round_, "loss_scale": self.scale, "converged": self.converged})
        self.run.commit(round_)
        self.theta = theta_of(state)
        self.crew.kept()

    def restore(self, round_: int) -> None:
        """Bring all actors to the state of a committed round."""
        folder = self.run.round(round_).resolve()
        paths = [(str(folder / f"shard-{shard:06d}.arrow"),) for shard in range(len(self.shards))]
        self.crew.each("restore", per_shard=paths)
        known = json.loads((folder / "round.json").read_text())
        self.scale, self.converged = known["loss_scale"], known["converged"]
        state = (folder / "trainer.safetensors").read_bytes()
        self.theta = theta_of(state)
        blob = put(state)
        self.crew.get([trainer.set_state.remote(blob) for trainer in self.crew.trainers])


def theta_of(state: bytes) -> str:
    """Short hash of a classifier's bytes: scores that were kept count only for the very net that gave them."""
    return hashlib.blake2b(state, digest_size=8).hexdigest()


def describe(before: Sums, after: Sums) -> dict[str, Any]:
    """The round's figures: mean loss of the pool, L_out under old and new weights, effective sample size."""
    return {
        "eligible": int(before.rows),
        "mean_loss": before.loss / before.rows,
        "l_out_before": rules.l_out(before),
        "l_out": rules.l_out(after),
        "effective_sample_size": rules.effective_sample_size(after),
    }
