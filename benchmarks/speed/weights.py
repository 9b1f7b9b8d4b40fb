"""Weights: what one round costs a row, at pools of 1 to 80 million rows, beside the released learner's dense step."""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.timing import table
from miner import ranking, rules
from miner.ranking import Rows
from miner.rules import Sums, add_sums
from miner.weights import ShardState

SHARD = 100_000  # rows
FEW = 10  # shards that are timed of a large pool: all are alike, and each belongs to one actor


def state(rng: np.random.Generator, rows: int) -> ShardState:
    """A shard in mid-game."""
    found = ShardState.fresh("hedge", rows)
    found["state"][:] = rng.normal(0, 1, rows)
    found["loss"][:] = rng.gamma(2.0, 0.5, rows)
    found["visits"][:] = 1
    return found


def seconds(work: Callable[[], object], repeat: int) -> float:
    """The median of ``repeat`` runs."""
    found = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return float(np.median(found))


def updated(shards: list[ShardState], total: Sums) -> None:
    """What a round does to every row after scoring: the rule, and the average of its weights."""
    for shard in shards:
        loss = np.where(shard.eligible, shard["loss"], 0.0).astype(np.float64)
        shard["state"][:] = rules.hedge(shard["state"], loss, total, 0.5, 0.01)
        shard["state"][:] = np.minimum(shard["state"], np.log(100.0))
        shard["average"][:] += np.exp(shard["state"])


def drawn(shards: list[ShardState], uids: list[np.ndarray], most: int) -> None:
    """The candidates of each shard for a round's batches."""
    for shard, uid in zip(shards, uids, strict=True):
        ranking.least(ranking.draw_keys(shard.weight(), ranking.uniform(uid, 0, 1)), most)


def dense_step(rows: int, repeat: int) -> float:
    """One step of the released learner's kind: softplus, normalisers over all rows, backward, SGD with momentum."""
    v = torch.zeros(rows, requires_grad=True)
    optimizer = torch.optim.SGD([v], lr=100.0, momentum=0.9)
    drawn, loss = torch.randint(rows, (128,)), torch.rand(128)

    def step() -> None:
        optimizer.zero_grad()
        weight = torch.nn.functional.softplus(v)
        root = weight.sqrt()
        (-(root.mean() / weight.mean() * root[drawn] * loss).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    return seconds(step, repeat)


def main(repeat: int, sizes: tuple[int, ...] = (1_000_000, 10_000_000, 80_000_000)) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    head = ("rows", "update", "sums", "draw of a round", "dense reference step", "torch.multinomial of 8,192")
    table("nanoseconds a row, one core", head, [costs(n, repeat) for n in sizes])
    files(repeat)
    for n in sizes:  # each in a process of its own, whose peak is then that of the ranking
        subprocess.run([sys.executable, "-c", f"from {__name__} import cut; cut({n})"], check=True)


def costs(n: int, repeat: int) -> tuple[object, ...]:
    """A row of the table."""
    rng = np.random.default_rng(0)
    shards = [state(rng, SHARD) for _ in range(min(n // SHARD, FEW))]
    uids = [rng.integers(0, 2**64, (SHARD, 2), np.uint64) for _ in shards]
    rows = SHARD * len(shards)  # the others are other actors' or this one's, shard by shard alike
    total = add_sums([shard.sums() for shard in shards])
    ours = [
        seconds(lambda: updated(shards, total), repeat) / rows,
        seconds(lambda: add_sums([shard.sums() for shard in shards]), repeat) / rows,
        seconds(lambda: drawn(shards, uids, 8192), repeat) / rows,
    ]
    return n, *(cost * 1e9 for cost in ours), dense_step(n, repeat) * 1e9 / n, multinomial(n, repeat)


def multinomial(n: int, repeat: int) -> object:
    """Nanoseconds a row of one draw of 8,192, or why there are none."""
    chance = torch.rand(n)
    try:
        return seconds(lambda: torch.multinomial(chance, 8192, replacement=True), repeat) * 1e9 / n
    except RuntimeError as error:
        return str(error).splitlines()[0]


def files(repeat: int) -> None:
    """Snapshot and restore of shards, beside writing and reading the same bytes plainly."""
    rng = np.random.default_rng(0)
    shards = [state(rng, SHARD) for _ in range(FEW)]
    with tempfile.TemporaryDirectory(dir=".") as where:
        folder = Path(where)
        paths = [folder / f"{i}.arrow" for i in range(FEW)]

        def write() -> None:
            for shard, path in zip(shards, paths, strict=True):
                shard.write(path)

        def plain() -> None:
            for i in range(FEW):
                with open(folder / f"{i}.bin", "wb") as file:
                    file.write(data)
                    file.flush()

        write()
        data = paths[0].read_bytes()
        size = len(data) * FEW / 1e9
        rows = [
            ("snapshot", size / seconds(write, repeat)),
            ("plain write", size / seconds(plain, repeat)),
            ("restore", size / seconds(lambda: [ShardState.read(path) for path in paths], repeat)),
            ("plain read", size / seconds(lambda: [path.read_bytes() for path in paths], repeat)),
        ]
    table(f"snapshots of {FEW * SHARD:,} rows, {size / FEW / SHARD * 1e9:.0f} bytes a row", ("", "GB/s"), rows)


def cut(n: int) -> None:
    """Ranking of ``n`` rows in strata, and the cut of gamma = 1 %."""
    rng = np.random.default_rng(0)
    columns = Rows(
        rng.gamma(1.0, 1.0, n),
        rng.integers(0, 2**64, (n, 2), np.uint64),
        np.ones(n, bool),
        rng.integers(0, 1000, n, np.int32),
    )
    started = time.perf_counter()
    rank = ranking.rank_rows(columns, "rank", 0)
    size = ranking.subset_size(columns, 0.01, n, "rank", 0)
    chosen = np.flatnonzero(rank < size)
    taken = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\nrank {n:,} rows, cut {len(chosen):,}: {taken:.1f} s, peak {peak / 2**20:.2f} GiB of the process")
