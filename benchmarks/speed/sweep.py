"""A sweep by many trainers, simulated: real driver and pool actors, trainers that only take as long as GPUs would.

Compares the seconds with those that ``miner.costs`` predicts, and gives the driver's seconds a block, which no number
of GPUs makes fewer. Images are 8 px wide: what a block costs the driver does not depend on its pixels.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.speed.made import adopted
from benchmarks.speed.timing import table
from miner import costs
from miner.cluster import Crew
from miner.config import Config, Data, Machines
from miner.pool import Pool
from miner.progress import Display
from miner.rays import connect
from miner.recipe import Recipe
from miner.sweep import Sweep, block_size, cut
from trainers.data import load_id

IMAGES, SIDE, TRAINERS, POOL_ACTORS = 1 << 20, 8, (1, 8, 64), 2
SECONDS = {1: 0.02, 8: 0.2, 64: 2.0}  # that a block takes: so slow that the cores here can serve so many


class Pretender:
    """Gives scores of nothing, late."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ping(self) -> bool:
        """That this process lives."""
        return True

    def score(self, images: np.ndarray, look_up: bool, key: bytes) -> dict[str, np.ndarray]:
        """All columns of a first sweep."""
        time.sleep(self.seconds * len(images) / block_size(SIDE))
        row = np.zeros(len(images), np.int32)
        cosine = np.zeros(len(images), np.float32)
        columns = {"nn_id_row": row, "stratum": row}
        return columns | dict.fromkeys(("loss", "nn_id_cosine", "nn50_id_cosine"), cosine)


class Simulated(Crew):
    """A crew with such trainers."""

    seconds = 0.0

    def _trainer(self, number: int) -> Any:
        actor = ray.remote(Pretender).options(num_cpus=0).remote(self.seconds)
        self.names[actor] = f"trainer-{number}"
        return actor


def main(repeat: int) -> None:
    """Print the table."""
    connect(None, num_cpus=POOL_ACTORS, object_store_bytes=1 << 30)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        drawn = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8)
        np.save(folder / "drawn.npy", drawn)
        pool = adopted(folder, Recipe("npy", (str(folder / "drawn.npy"),)))
        rows = [_told(pool, trainers, folder, repeat) for trainers in TRAINERS]
    ray.shutdown()
    head = ("trainers", "seconds a block", "predicted s", "took s", "error", "driver's ms a block")
    table(f"a sweep over {IMAGES:,} images, trainers simulated", head, rows)


def _told(pool: Pool, trainers: int, folder: Path, repeat: int) -> tuple[object, ...]:
    """A row of the table: medians."""
    Simulated.seconds = SECONDS[trainers]
    machines = Machines(trainers=trainers, pool_actors=POOL_ACTORS, autoscale=True)  # wait until all are there
    config = Config(data=Data(size=SIDE), machines=machines)
    with Display() as display:
        display.console.quiet = True
        crew = Simulated(config, pool.path, len(pool.shards), load_id("demo", SIDE), display)
        crew.each("prepare", np.empty(0, "S16"), per_shard=[(np.empty(0, np.int64),)] * len(pool.shards))
        crew.each("reset")
        runs = [_run(crew, pool, display, str(folder / "scores"), f"{trainers}-{number}") for number in range(repeat)]
        crew.dismiss()
    took, driver = (statistics.median(values) for values in zip(*runs, strict=True))
    told = _predicted(trainers, len(pool.shards))
    return trainers, SECONDS[trainers], told, took, f"{told / took - 1:+.0%}", driver * 1e3


def _run(crew: Crew, pool: Pool, display: Display, folder: str, stamp: str) -> tuple[float, float]:
    """Seconds of a sweep, and those that the driver's thread worked a block."""
    masks = [mask for _, mask in crew.each("open_sweep", folder, stamp)]
    began, started = time.thread_time(), time.perf_counter()
    Sweep(crew, display, True, False, folder, stamp).run(
        cut(masks, [shard.count for shard in pool.shards], block_size(SIDE))
    )
    blocks = IMAGES / block_size(SIDE)
    return time.perf_counter() - started, (time.thread_time() - began) / blocks


def _predicted(trainers: int, shards: int) -> float:
    """What the model says."""
    nothing = dict.fromkeys(costs.Rates.__dataclass_fields__, 0.0)
    rates = costs.Rates(**nothing | {"gpus": trainers, "forward": SECONDS[trainers] / block_size(SIDE)})  # type: ignore[arg-type]
    site = costs.Site(1, trainers, POOL_ACTORS, trainers, 1, POOL_ACTORS, np.inf)
    none = dict.fromkeys(costs.Work.__dataclass_fields__, 0)
    known = {"images": IMAGES, "shards": shards, "size": SIDE, "views": 1, "block": block_size(SIDE)}
    return max(costs.sweep(rates, site, costs.Work(**none | known), False).values())  # type: ignore[arg-type]
