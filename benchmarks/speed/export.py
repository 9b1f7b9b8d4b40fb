"""Export: gamma = 1 % by byte ranges, beside reading the whole pool and keeping what is wanted."""

import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.speed.timing import Way, rates, table
from miner.pool import Pool
from miner.subset import write_subset
from miner.tars import TarWriter
from miner.weights import ShardState, final_table


def read_bytes() -> int:
    """Bytes that this process asked the system for so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def main(repeat: int, pool_path: str, gamma: float = 0.01) -> None:
    """Print the table for the pool at ``pool_path``, whose shards are tars."""
    pool = Pool.open(pool_path)
    keep = max(int(pool.count * gamma), 1)
    rank = np.random.default_rng(0).permutation(pool.count).astype(np.uint64)
    whole = final_table(pool.index(), ShardState.fresh("hedge", pool.count), 1.0, rank, {})
    chosen = whole.filter(pa.array(rank < keep)).sort_by("rank")
    wanted = set(chosen["key"].to_pylist())
    size = sum(shard.bytes for shard in pool.shards)
    asked: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as where:

        def ranges() -> int:
            before = read_bytes()
            recipe = {
                "gamma": gamma,
                "draw": "rank",
                "pool": {"name": pool.name},
                "settings": {"game": {"rule": "hedge"}},
            }
            write_subset(pool, chosen, Path(where) / "ranges", recipe, lambda count: None)
            asked["by byte ranges"] = read_bytes() - before
            return keep

        def stream() -> int:
            before = read_bytes()
            _filter([shard.path for shard in pool.shards], wanted, Path(where) / "stream.tar")
            asked["whole tars, filtered"] = read_bytes() - before
            return keep

        ways: dict[str, Way] = {"by byte ranges": ranges, "whole tars, filtered": stream}
        speed = rates(ways, repeat)
    first = next(iter(speed.values()))
    rows = [(name, keep / rate, asked[name] / 1e6, asked[name] / size, rate / first) for name, rate in speed.items()]
    table(
        f"{keep:,} of {pool.count:,} images, a pool of {size / 1e6:,.0f} MB",
        ("", "seconds", "MB read", "of the pool", "speed of the first"),
        rows,
    )


def _filter(paths: list[str], wanted: set[str], out: Path) -> None:
    """Every member of every tar is read; those of wanted keys are written."""
    with TarWriter(out) as sink:
        for path in paths:
            with tarfile.open(path, "r|") as source:
                for member in source:
                    file = source.extractfile(member)
                    data = file.read() if file is not None else b""
                    if os.path.splitext(os.path.basename(member.name))[0] in wanted:
                        sink.write(os.path.basename(member.name), data)
