"""What a run starts from: settings that make sense, the pool, its duplicates, and the plan in words."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pyarrow.compute as pc

from miner import ranking, rules
from miner.buckets import BucketPath, check_writable
from miner.build import write_arrays_pool
from miner.config import MOST_VIEWS, Config
from miner.errors import MinerError, UsageError
from miner.pool import Pool, resolve
from miner.tars import PLAIN_KEY, why_no_key

AT_ONCE = 1 << 16  # rows compared at once


def check(config: Config) -> None:
    """Raise UsageError for values that make no sense, before anything is read or computed."""
    ranking.check_gammas(config.selection.gamma)
    if isinstance(config.run_dir, BucketPath):
        check_writable(config.run_dir.url)
    guard = config.selection.exclude_near_id
    if not 0.0 <= guard < 1.0:
        raise UsageError(f"--exclude-near-id {guard:g}: a share of the ID images, must lie in [0, 1)")
    for flag, value, least in (
        ("--rounds", config.game.effective_rounds, 1),
        ("--views", config.game.views, 1),
        ("--steps", config.game.steps, 1),
        ("--batch", config.game.batch, 1),
        ("--trainers", config.machines.trainers, 1),
        ("--pool-actors", config.machines.pool_actors or 1, 1),
        ("--strata", config.selection.strata or 0, 0),
        ("--cap", config.game.cap, 1),
        ("--seed", config.data.seed, 0),
        ("--size", config.data.size, 8),
        ("--threads", config.game.threads, 1),
        ("--parts", config.game.parts, 1),
    ):
        if not least <= value < float("inf"):
            raise UsageError(f"{flag} {value}: must be at least {least}")
    wanted = config.game.converged
    if wanted is not None and (config.game.rule in rules.STEPWISE or not 0 < wanted <= 1):
        raise UsageError(f"--converged {wanted:g}: must lie in (0, 1], and does not work with --rule reference")
    if wanted is not None and config.game.effective_rounds < 2:
        raise UsageError(f"--converged {wanted:g}: compares rounds, and this plays one; give --rounds, 20 for instance")
    if config.game.rule == "dos" and config.selection.strata == 0:
        raise UsageError("--rule dos --strata 0: strata are the clusters that dos takes turns over; leave --strata out")
    machines = config.machines
    if machines.autoscale and not (machines.address and machines.pool_actors):
        raise UsageError("--autoscale: needs --address, and --pool-actors, of which machines are asked for")
    if config.game.parts > config.game.batch:
        raise UsageError(f"--parts {config.game.parts}: a batch has {config.game.batch} images (--batch)")
    if config.game.views > MOST_VIEWS:
        raise UsageError(f"--views {config.game.views}: there are at most {MOST_VIEWS}")
    if not 0.0 <= config.game.smooth <= 1.0:
        raise UsageError(f"--smooth {config.game.smooth:g}: must lie in [0, 1]")
    for flag, number in (("--eta", config.game.eta), ("--lr", config.game.lr), ("--alpha", config.game.alpha)):
        if not 0 < number < float("inf"):
            raise UsageError(f"{flag} {number}: must be a positive number")


def open_pool(config: Config) -> Pool:
    """The pool of ``--pool``, fit to be mined; the demo's is drawn into the run directory the first time."""
    if config.data.pool != "demo":
        pool = Pool.open(resolve(config.data.pool))
        check_keys(pool)
        return pool
    folder = config.run_dir / "demo-pool"
    if not (folder / "pool.json").exists():
        from miner import demo

        images, labels = demo.pool_arrays()
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays_pool(str(folder), "demo", images, labels, demo.FAMILIES)
    return Pool.open(str(folder))


def check_keys(pool: Pool) -> None:
    """MinerError for a pool with keys that no subset could hold, before hours are spent on one."""
    if all(entry.kind == "raw" for entry in pool.shards):
        return  # their keys are numbers, perhaps 80 million of them
    for entry, part in zip(pool.shards, pool.index_parts(["key"]), strict=True):
        doubtful = pc.invert(pc.match_substring_regex(part["key"], PLAIN_KEY))
        for key in part["key"].filter(doubtful).to_pylist():
            if (why := why_no_key(key)) is not None:
                raise MinerError(f"{entry.path}: key {key!r}: {why}; make the pool {pool.path} again")


def duplicates(pool: Pool) -> tuple[np.ndarray, list[np.ndarray]]:
    """uids as uint64 ``[N, 2]`` and, per shard, the rows whose bytes an earlier (shard, row) already has."""
    uid_N2 = np.empty((pool.count, 2), np.uint64)
    for (a, b), part in zip(pairwise(pool.edges), pool.index_parts(["uid"]), strict=True):
        uid_N2[a:b] = ranking.uid_words(part["uid"])
    order = np.lexsort((uid_N2[:, 1], uid_N2[:, 0]))  # stable: equal uids stay in (shard, row) order
    again = np.zeros(len(uid_N2), bool)
    for start in range(0, len(order) - 1, AT_ONCE):
        rows = order[start : start + AT_ONCE + 1]
        again[rows[1:]] = (uid_N2[rows[1:]] == uid_N2[rows[:-1]]).all(axis=1)
    return uid_N2, [np.flatnonzero(again[a:b]) for a, b in pairwise(pool.edges)]


def eligible(pool: Pool) -> int:
    """N of gamma N: all rows but those on an exclusion list, which were never meant to be in the pool."""
    return sum(int(part["excluded_by"].null_count) for part in pool.index_parts(["excluded_by"]))


def check_sizes(config: Config, n: int) -> None:
    """Raise UsageError when a gamma of a pool of ``n`` images is less than one image."""
    for gamma in config.selection.gamma:
        ranking.check_size(gamma, n)


def work(config: Config, n: int) -> tuple[int, int, int]:
    """(sweeps, training steps, forward-equivalents) of mining a pool of ``n`` images."""
    game = config.game
    stepwise = game.rule in rules.STEPWISE
    sweeps = (0 if stepwise else game.effective_rounds) or int(config.guarded)
    steps = game.steps * (game.effective_rounds - (not stepwise))
    # A step: forward and backward (two forwards) on 2 x batch. Neighbours take a forward of the ID set: not counted.
    return sweeps, steps, sweeps * game.views * n + 6 * game.batch * steps


def plan(config: Config, pool: Pool) -> str:
    """What a run would do and cost, in words. Raises UsageError for a gamma of less than one image."""
    game, n = config.game, eligible(pool)
    check_sizes(config, n)
    sweeps, steps, forwards = work(config, n)
    cache = pool.count * config.data.size**2 * 3
    source = f"checkpoint {config.data.checkpoint}" if config.data.checkpoint else "pre-trained on the ID set first"
    guard = config.selection.exclude_near_id
    spared = f"leaves out what is nearer to ID than {guard:.0%} of the ID images" if guard else "off"
    lines = [
        f"pool        {pool.name}: {n:,} images in {len(pool.shards):,} shards ({pool.path})",
        f"ID          {config.data.id}; classifier {config.data.model}, {source}",
        f"game        {game.rule}: {sweeps} sweep(s) of {game.views} view(s), {steps:,} training steps",
        f"cost        {forwards:,} forward-equivalents + pre-training; the released recipe: {10 * 50 * 49_920:,}",
        f"cache       {cache:,} bytes of decoded pixels, unless they are there already",
        f"leak guard  {spared}; strata {config.strata_for(pool.count):,}",
    ]
    for gamma in config.selection.gamma:
        size = int(Fraction(repr(gamma)) * n)
        lines.append(f"subset      gamma {gamma:g}: {size:,} images -> {config.run_dir / f'subset-{gamma:g}'}")
    return "\n".join(lines)
