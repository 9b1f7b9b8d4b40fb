"""How long a run will take here: a few seconds of its own work, measured, times how often it is done.

Only what grows with pool, ID set and settings is counted. Actors that start take some ten seconds besides.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from miner import cache, inputs
from miner.config import Config
from miner.neighbors import POINTS_PER_STRATUM, WHITENED, NearestID, fit_strata
from miner.pool import Pool
from trainers.actor import Trainer
from trainers.data import IdSet

IMAGES, LEAST = 4096, 256  # that are decoded and scored to learn what an image costs, at most and at least
PATIENCE = 1.0  # seconds that one scoring of them may take: wide nets get fewer
RANK, TABLE, SUBSET = 3.5e-7, 1.5e-6, 2e-4  # seconds an image: ranked, written to the weights table, exported
KMEANS = 20 * 2 * WHITENED / 1.5e10  # seconds a point and centroid: iterations, products, a core's products a second
ROW_BYTES, BASE_BYTES, WORKER_BYTES = 160, 2.2e9, 0.25e9  # of the processes: an image; driver and trainer; pool actor


@dataclass(frozen=True)
class Rates:
    """Seconds of one machine of this kind."""

    decode: float  # an image, one core
    forward: float  # an image, one view, one trainer
    look_up: float  # an image: neighbours, stratum, and the maps that it is found in
    step: float  # a training step of the game


def measured(config: Config, pool: Pool, id_set: IdSet) -> Rates:
    """Work of a run on up to ``IMAGES`` images of the pool's first shard, by a trainer with the machine's threads.

    Raises MinerError as ``Pool.read`` does.
    """
    rows = range(min(IMAGES, pool.shards[0].count))
    records = pool.records(0) if pool.shards[0].kind == "raw" else None
    started = time.perf_counter()
    images = cache.pixels_of(pool, 0, records, rows, config.data.size, {})
    per_image = (time.perf_counter() - started) / len(images)
    game = replace(config.game, views=1)
    trainer = Trainer(config.data.model, id_set, config.data.seed, game)
    few = images[:LEAST]
    images = images[: max(int(LEAST * PATIENCE / _seconds(lambda: trainer.score(few, False))), LEAST)]
    some = id_set.train_images[:: max(len(id_set.train_images) // len(images), 1)][: len(images)]
    features = trainer.features(some)
    rng = np.random.default_rng(0)
    like_all = features[rng.integers(0, len(features), len(id_set.train_images))]
    like_all *= rng.uniform(0.9, 1.1, like_all.shape)  # no two alike: search among equals is slower
    trainer.nearest = NearestID(like_all, trainer.scoring_threads)
    trainer.set_strata(fit_strata(trainer.looks(images)[1], min(64, len(images)), 0, 1))
    forward = _seconds(lambda: trainer.score(images, False)) / len(images)
    both = _seconds(lambda: trainer.score(images, True)) / len(images)
    order = np.resize(np.arange(len(images)), game.batch)
    step = _seconds(lambda: trainer.train(0, 0, order, None, images))
    return Rates(per_image, forward, max(both - forward, 0.0), step)


def _seconds(work: Callable[[], object]) -> float:
    """The mean of two runs."""
    started = time.perf_counter()
    work()
    work()
    return (time.perf_counter() - started) / 2


def predicted(config: Config, pool: Pool, id_set: IdSet, rates: Rates) -> dict[str, float]:
    """Seconds of each part of a run, named as in ``summary.json``."""
    n, game, strata = pool.count, config.game, config.strata_for(pool.count)
    sweeps, steps, _ = inputs.work(config, n)
    at_once = min(_actors(config, pool), os.cpu_count() or 1)
    trainers = config.machines.trainers if torch.cuda.is_available() else 1  # on CPUs they share the same cores
    sample = min(strata * POINTS_PER_STRATUM, n) if strata > 1 else 0
    fit = sample * (rates.forward + rates.look_up) + sample * strata * KMEANS
    epochs = 0 if config.data.checkpoint else config.pretrain.epochs
    kept = sum(config.selection.gamma) * n
    return {
        "classifier": epochs * len(id_set.train_images) * rates.step / (2 * game.batch),
        "decode": n * rates.decode / at_once,
        "restore": len(id_set.train_images) * rates.forward + fit,
        "game": n * (sweeps * game.views * rates.forward + rates.look_up) / trainers + steps * rates.step,
        "rank": n * (RANK + TABLE),
        "export": kept * SUBSET,
    }


def _actors(config: Config, pool: Pool) -> int:
    """Pool actors that a run here starts."""
    return min(config.machines.pool_actors or min(os.cpu_count() or 1, 16), len(pool.shards))


def told(config: Config, pool: Pool, id_set: IdSet) -> str:
    """The prediction in lines for people."""
    rates = measured(config, pool, id_set)
    seconds = predicted(config, pool, id_set, rates)
    workers = WORKER_BYTES * _actors(config, pool)
    memory = ROW_BYTES * pool.count + BASE_BYTES * config.machines.trainers + workers
    parts = ", ".join(f"{name} {value:,.0f} s" for name, value in seconds.items())
    bottleneck = max(seconds, key=lambda name: seconds[name])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (
        f"time        {sum(seconds.values()):,.0f} s on a machine like this one ({device}), most of it {bottleneck}\n"
        f"            {parts}; Ray and the actors take some ten seconds more to start\n"
        f"            an image: {rates.decode * 1e6:,.0f} us to decode, {rates.forward * 1e6:,.0f} us a view, "
        f"{rates.look_up * 1e6:,.0f} us to look up; {rates.step * 1e3:,.0f} ms a training step\n"
        f"memory      some {memory / 2**30:.1f} GiB in all processes"
    )
