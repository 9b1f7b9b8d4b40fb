"""What a run's own work costs here: a few seconds of it, on a few images and rows of the pool, in this process.

Nothing is written but to a temporary folder. Weights, ranking, table and subsets are those of a small run: the same
code, on the first shards' index and on made-up losses, without Ray.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import torch

from miner import cache, frozen, ranking, rules
from miner.actors import PoolShards
from miner.cluster import Crew
from miner.config import Config
from miner.costs import Rates
from miner.files import place
from miner.guard import NO_CLASS
from miner.inputs import duplicates, eligible
from miner.loop import Game
from miner.neighbors import NearestID, fit_strata
from miner.outcome import Outcome
from miner.pool import Pool
from miner.progress import Display
from miner.run_dir import RunDir
from miner.weights import ShardState
from trainers.actor import Trainer
from trainers.data import IdSet

IMAGES, LEAST = 4096, 256  # that are decoded and scored to learn what an image costs, at most and at least
PATIENCE = 0.5  # seconds that decoding, or one scoring of them, may take: large images and wide nets get fewer
ROWS = 1 << 17  # of the small run, at least, where the pool has as many
POINTS = 8192  # that strata are fitted to
EXPORTED = 512


def measured(config: Config, pool: Pool, id_set: IdSet, id_seconds: float) -> Rates:
    """Seconds of every kind of work; ``id_seconds`` is what reading the ID set took. Errors as ``Pool.read``."""
    images, decode = decoded(config, pool)
    row = rows(config, pool, id_set)
    known = np.frombuffer(np.random.default_rng(0).bytes(16 * len(id_set.train_images)), "S16")  # like the ID set's
    digest = _seconds(lambda: np.isin(cache.digests(images), known)) / len(images)
    order = np.arange(len(images), dtype=np.int32)
    gather = _seconds(lambda: cache.gather(images, order).copy()) / len(images)  # the copy: into Ray's store
    score = scoring(config, cache.gather(images, order), id_set, config.strata_for(pool.count))
    return Rates(decode=decode, digest=digest, gather=gather, imports=_imports(), id_set=id_seconds, **row, **score)  # type: ignore[arg-type]


def _seconds(work: Callable[[], object], times: int = 2) -> float:
    """The mean of some runs, after one to warm up."""
    work()
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def _imports() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import trainers.actor, miner.actors"], check=True)
    return time.perf_counter() - started


def decoded(config: Config, pool: Pool) -> tuple[np.ndarray, float]:
    """Images of the first shard as a pool actor maps them, uint8 ``[n, S, S, 3]``, and the seconds that one takes."""
    size, count = config.data.size, min(IMAGES, pool.shards[0].count)
    records = pool.records(0) if pool.shards[0].kind == "raw" else None
    parts: list[np.ndarray] = []
    cache.pixels_of(pool, 0, records, range(1), size, {})  # the shard's index is read once
    with tempfile.TemporaryFile() as sink:
        started = time.perf_counter()
        for first in range(0, count, LEAST):
            parts.append(cache.pixels_of(pool, 0, records, range(first, min(first + LEAST, count)), size, {}))
            sink.write(parts[-1].tobytes())
            if time.perf_counter() - started > PATIENCE:
                break
        decode = (time.perf_counter() - started) / sum(map(len, parts))
    there = cache.is_there(pool, 0, size)
    return cache.open_shard(pool, 0, size)[0][:count] if there else np.concatenate(parts), decode


# --- a trainer's work ------------------------------------------------------------------------------------------------


def scoring(config: Config, images: np.ndarray, id_set: IdSet, strata: int) -> dict[str, Any]:
    """``gpus``, ``forward``, ``look_up``, ``pretrain``, ``step``, ``strata`` of Rates."""
    game, data = config.game, config.data
    trainer = Trainer(data.model, id_set, data.seed, replace(game, views=1))
    few = images[:LEAST]
    affordable = int(len(few) * PATIENCE / _seconds(lambda: trainer.score(few, False)))
    images = images[: max(affordable // LEAST * LEAST, LEAST)]
    fit = _fit(trainer, images, strata)
    plain = looked = viewed = 0.0
    for _ in range(3):  # in turn: other work on this machine then slows down all alike
        trainer.views = 1
        plain += _once(lambda: trainer.score(images, False))
        looked += _once(lambda: trainer.score(images, True))
        trainer.views = game.views
        viewed += _once(lambda: trainer.score(images, False))
    scorers = 1 if trainer.device.type == "cuda" else trainer.scoring_threads
    image = scorers / (3 * len(images))
    order = np.resize(np.arange(len(images)), game.batch)
    return {
        "gpus": torch.cuda.device_count() if trainer.device.type == "cuda" else 0,
        "forward": viewed * image / game.views,
        "look_up": max(looked - plain, 0.0) * image,
        "step": _seconds(lambda: trainer.train(0, 0, order, None, images)),
        "pretrain": 0.0 if data.checkpoint else _pretrain(config, id_set),
        "strata": fit,
    }


def _once(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _fit(trainer: Trainer, images: np.ndarray, strata: int) -> float:
    """Give ``trainer`` an index and strata as large as the run's; seconds a point that the strata took."""
    features, looks = trainer.looks(images)
    rng = np.random.default_rng(0)
    like_id = features[rng.integers(0, len(features), len(trainer.id_set.train_images))]
    like_id *= rng.uniform(0.9, 1.1, like_id.shape)  # no two alike
    trainer.nearest = NearestID(like_id, trainer.scoring_threads, trainer.device)
    if strata < 2:
        return 0.0
    points = looks[rng.integers(0, len(looks), max(POINTS, strata))]
    points *= rng.uniform(0.9, 1.1, points.shape).astype(np.float32)
    started = time.perf_counter()
    trainer.set_strata(fit_strata(points, strata, 0, trainer.training_threads))
    return (time.perf_counter() - started) / len(points)


def _pretrain(config: Config, id_set: IdSet) -> float:
    """Seconds an ID image and epoch."""
    count = min(3 * config.pretrain.batch, len(id_set.train_images))
    few = replace(
        id_set,
        train_images=id_set.train_images[:count],
        train_labels=id_set.train_labels[:count],
        test_images=id_set.test_images[:1],
        test_labels=id_set.test_labels[:1],
    )
    trainer = Trainer(config.data.model, few, config.data.seed, config.game)
    settings = replace(config.pretrain, epochs=1)
    trainer.pretrain(settings)
    return _once(lambda: trainer.pretrain(settings)) / count


# --- rows of the weights ---------------------------------------------------------------------------------------------


class OneProcess:
    """A crew of one pool actor, in this process. ``seconds`` is what its calls took."""

    check_left = Crew.check_left

    def __init__(self, owner: PoolShards, shards: int, display: Display) -> None:
        self.owner, self.shards, self.display, self.seconds = owner, shards, display, 0.0

    def each(self, method: str, *args: Any, per_shard: Any = None) -> list[Any]:
        """As ``Crew.each``."""
        started = time.perf_counter()
        extra = per_shard or [()] * self.shards
        found = [getattr(self.owner, method)(shard, *own, *args) for shard, own in enumerate(extra)]
        self.seconds += time.perf_counter() - started
        return found


def rows(config: Config, pool: Pool, id_set: IdSet) -> dict[str, float]:
    """``move``, ``drive``, ``index``, ``sample``, ``rank``, ``table``, ``export`` of Rates, from the first rows."""
    few = _first(pool)
    n = few.count
    kept = min(EXPORTED, max(n // 4, 1))
    config = replace(config, selection=replace(config.selection, gamma=(kept / n,)))
    owner = PoolShards(pool.path, config.data.size, config.data.seed, config.game.rule, config.game.eta)
    crew = OneProcess(owner, len(few.shards), Display())
    crew.display.console.quiet = True
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)

        def timed(name: str, work: Callable[[], Any], calls: str | None = None) -> Any:
            """The driver's seconds a row go to ``name``, those of its calls to ``calls``."""
            before, started = crew.seconds, time.perf_counter()
            result = work()
            inside = crew.seconds - before
            found[name] = found.get(name, 0.0) + (time.perf_counter() - started - inside) / n
            if calls:
                found[calls] = found.get(calls, 0.0) + inside / n
            return result

        uid_N2, _ = timed("index", lambda: duplicates(few))
        timed("index", lambda: eligible(few))
        _set_out(owner, few)
        like_crew = cast(Crew, crew)
        timed("sample", lambda: frozen.sample(config, like_crew, few, uid_N2, n // 8))
        game = Game(config, like_crew, RunDir(place(folder)), few.shards, crew.display)
        _sweep(owner, few, folder)
        timed("drive", lambda: _update(game), "move")
        outcome = Outcome(config, game.run, few, id_set, "", n, uid_N2, crew.display)
        table = timed("rank", lambda: outcome.rank(like_crew), "table")
        found["export"] = _once(lambda: outcome.export(table)) / kept
    return found


def _first(pool: Pool) -> Pool:
    """The pool of the first shards with ROWS rows."""
    count = int(np.searchsorted(pool.edges, ROWS)) or 1
    shards = pool.shards[: min(count, len(pool.shards))]
    return replace(pool, shards=shards, count=sum(shard.count for shard in shards))


def _set_out(owner: PoolShards, pool: Pool) -> None:
    """What ``PoolShards.prepare`` does, without pixels."""
    for shard in range(len(pool.shards)):
        index = pool.shard_index(shard, ["uid", "label"])
        owner.uid[shard] = ranking.uid_words(index["uid"])
        owner.label[shard] = pc.fill_null(index["label"], NO_CLASS).to_numpy().astype(np.int32)
        owner.excluded[shard] = ShardState.fresh(owner.rule, len(index))["excluded"]
        owner.reset(shard)


def _sweep(owner: PoolShards, pool: Pool, folder: Path) -> None:
    """Scores as a sweep would leave them."""
    rng = np.random.default_rng(0)
    for shard, entry in enumerate(pool.shards):
        owner.open_sweep(shard, str(folder / "scores"), "")
        n = entry.count
        scores = {"loss": rng.gamma(2.0, 0.5, n).astype(np.float32), "stratum": rng.integers(0, 1000, n, np.int32)}
        scores |= {"nn_id_row": np.zeros(n, np.int32), "boundary": rng.random(n, np.float32)}
        scores |= dict.fromkeys(("nn_id_cosine", "nn50_id_cosine"), rng.random(n, np.float32))
        owner.take_scores(shard, np.arange(n), scores, str(folder / "scores"), "")


def _update(game: Game) -> None:
    """All that a round does to rows besides scoring."""
    each, folder = game.crew.each, game.run.round(0)
    each("class_sums")
    each("close_sweep", 0, game.config.game.smooth, np.zeros(1 << 16))
    game.guard()
    if game.config.game.rule in rules.STEPWISE:
        none, sums = (np.zeros(0, np.int64), np.zeros(0)), rules.add_sums(each("root_sums"))
        each("reference_step", 0.0, 1, 1.0, sums, per_shard=[none] * len(game.shards))
    else:
        game.update(0)
    folder.mkdir(parents=True)
    each("snapshot", str(folder))
    game.run.commit(0)
