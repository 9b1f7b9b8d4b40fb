"""How long a round takes when one pool actor is slow, against the same round when none is.

    python -m benchmarks.slow --repeat 5
    python -m benchmarks.slow --repeat 5 --share 0.0025 --period 2

Mines two rounds of the demo's pool again and again, with and without a pool actor that runs for a small share of the
time only while the pool is scored (stopped and let go once a period, from outside). Prints the scoring time of each
pair, the median ratio, and how many blocks others served. Ends with an error unless every run has the same weights.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import ray

from benchmarks.chaos import processes
from benchmarks.speed.made import classifier
from miner import demo
from miner.build import write_arrays_pool
from miner.config import Config, Data, Game, Output
from miner.files import sha256
from miner.mining import Mining
from miner.progress import Display
from miner.rays import connect

POOL_ACTOR = b"ray::PoolShards"
SHARDS = 12


class Slow:
    """A process that runs for ``share`` of each ``period`` (seconds) only, until ``end``."""

    def __init__(self, pid: int, share: float = 0.05, period: float = 0.1) -> None:
        self.pid, self.over = pid, threading.Event()
        self.runs, self.stops = share * period, (1 - share) * period
        self.thread = threading.Thread(target=self._hold)
        self.thread.start()

    def _hold(self) -> None:
        while not self.over.is_set():
            os.kill(self.pid, signal.SIGSTOP)
            self.over.wait(self.stops)
            os.kill(self.pid, signal.SIGCONT)
            self.over.wait(self.runs)

    def end(self) -> None:
        """Full speed again."""
        self.over.set()
        self.thread.join()


class Watch(Display):
    """Slows a pool actor down while the second round scores, if told how; the first round is for warming up."""

    def __init__(self, how: tuple[float, float] | None) -> None:
        super().__init__()
        self.how = how  # share and period
        self.slow: Slow | None = None

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A phase begins, and the one before has ended."""
        if self.slow is not None:
            self.slow.end()
            self.slow = None
        super().phase(name, total, done)
        if self.how and name == "round 2/2 score":
            pids = [pid for pid, line in processes(os.getpid()).items() if line.startswith(POOL_ACTOR)]
            self.slow = Slow(min(pids), *self.how)


def prepare(folder: Path) -> Config:
    """The demo's pool in many shards and a short-trained classifier."""
    images, labels = demo.pool_arrays()
    (folder / "pool").mkdir(parents=True)
    write_arrays_pool(str(folder / "pool"), "slow", images, labels, demo.FAMILIES, shard_count=SHARDS)
    net = classifier(folder / "net.safetensors")
    return Config(data=Data(pool=str(folder / "pool"), checkpoint=net), game=Game(rounds=2, steps=1))


def once(config: Config, out: Path, how: tuple[float, float] | None = None) -> tuple[float, int, str]:
    """Seconds that the second round scored, blocks that others served, SHA-256 of the weights."""
    with Watch(how) as display:
        Mining(replace(config, output=Output(out=str(out))), display).run_all()
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[1])
    seconds = record["scored"] / record["score_images_per_s"]
    return seconds, record["blocks_lent"], " ".join(map(sha256, sorted((out / "weights").iterdir())))


def main() -> None:
    """Pairs of runs, in turn."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs")
    parser.add_argument("--share", type=float, default=0.05, help="of the time that the slow actor runs")
    parser.add_argument("--period", type=float, default=0.1, help="seconds in which it is stopped and let go once")
    asked = parser.parse_args()
    connect(None)
    with tempfile.TemporaryDirectory(prefix="slow-") as temporary:
        folder = Path(temporary)
        config = prepare(folder)
        found = set()
        ratios = []
        for number in range(asked.repeat):
            even, _, expected = once(config, folder / f"even-{number}")
            slow, lent, digest = once(config, folder / f"slow-{number}", (asked.share, asked.period))
            found |= {expected, digest}
            ratios.append(slow / even)
            print(f"{number + 1}. even {even:.2f} s, one slow {slow:.2f} s ({lent} blocks lent)", flush=True)
    ray.shutdown()
    print(f"median ratio {statistics.median(ratios):.2f} over {asked.repeat} pairs; {len(found)} different result(s)")
    if len(found) != 1:
        sys.exit("error: the results differ")


if __name__ == "__main__":
    main()
