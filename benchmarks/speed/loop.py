"""A mining run's rounds beside the same arithmetic in a bare torch loop over arrays in memory."""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch

from benchmarks.speed.made import classifier, pixels, pool
from benchmarks.speed.timing import table
from miner import ranking, rules
from miner.config import Config, Data, Game, Output, Selection
from miner.mining import Mining
from miner.neighbors import fit_strata
from miner.progress import Display
from miner.rays import connect
from miner.sweep import block_size
from trainers.actor import Trainer
from trainers.checkpoint import load_net
from trainers.data import load_id

IMAGES, SHARDS, ROUNDS, STEPS, STRATA = 20_480, 8, 3, 40, 100


def main(repeat: int) -> None:
    """Print the table."""
    connect(None)
    images = np.stack(pixels(IMAGES, 32))
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        config = Config(
            data=Data(pool=pool(folder, list(images), SHARDS).path, checkpoint=classifier(folder / "net.safetensors")),
            game=Game(rounds=ROUNDS, steps=STEPS, views=1),
            selection=Selection(gamma=(0.1,), exclude_near_id=0.01, strata=STRATA),
        )
        mined, bare = [], []
        for number in range(repeat + 1):
            mined.append(mining(replace(config, output=Output(out=str(folder / str(number))))))
            bare.append(by_hand(config, images))
            print(f"{number}: mining {mined[-1]:.2f} s, bare loop {bare[-1]:.2f} s", flush=True)
    ray.shutdown()
    ratios = [one / other for one, other in zip(mined[1:], bare[1:], strict=True)]  # the first one decodes
    table(
        f"{ROUNDS} rounds over {IMAGES:,} images of 32 px, {STEPS} training steps each, `small`, one thread",
        ("", "seconds"),
        [
            ("mining", statistics.median(mined[1:])),
            ("bare loop", statistics.median(bare[1:])),
            ("median ratio", statistics.median(ratios)),
        ],
    )


def mining(config: Config) -> float:
    """Seconds of a run's rounds: scoring, updates, training, commits."""
    with Display() as display:
        mined = Mining(config, display).run_all()
    return float(mined.summary["seconds"]["game"])


def by_hand(config: Config, images: np.ndarray) -> float:
    """Seconds of the same rounds in this process: no actors, no snapshots, no guard."""
    game, size = config.game, block_size(32)
    trainer = Trainer("small", load_id("demo"), config.data.seed, game)
    assert config.data.checkpoint is not None
    ready, _ = load_net(config.data.checkpoint, "small", list(trainer.id_set.classes))
    trainer.net.load_state_dict(ready.state_dict())
    trainer.net.eval()
    trainer.look_up_id()
    looks = trainer.looks(images[:6400])[1]
    trainer.set_strata(fit_strata(looks, STRATA, 0, 1))
    uid = np.random.default_rng(0).integers(0, 2**64, (len(images), 2), np.uint64)
    log_weight, scale = np.zeros(len(images)), 0.0
    started = time.perf_counter()
    for round_ in range(ROUNDS):
        blocks = [trainer.score(images[a : a + size], round_ == 0) for a in range(0, len(images), size)]
        loss = np.concatenate([block["loss"] for block in blocks]).astype(np.float64)
        sums = rules.shard_sums(np.exp(log_weight), loss)
        scale = scale or rules.loss_std(sums)
        log_weight = rules.hedge(log_weight, loss, sums, scale, game.eta)
        if round_ + 1 < ROUNDS:
            keys = ranking.draw_keys(np.exp(log_weight), ranking.uniform(uid, 0, round_))
            rows = ranking.least(keys, game.steps * game.batch)
            trainer.train(round_, 0, np.arange(len(rows)), None, images[rows])
    torch.set_num_threads(1)
    return time.perf_counter() - started
