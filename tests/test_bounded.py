"""Memory that does not grow with the pool, or by no more bytes an image than stated. Counts, not seconds."""

import gc
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from miner import cache, files, frozen, inputs, ranking, store, subset, sweep
from miner.build import finish, prepare, run_job, write_arrays_pool
from miner.cluster import Crew
from miner.config import Config, Data, Game, Machines
from miner.pool import Pool
from miner.progress import Display
from miner.recipe import Recipe
from miner.subset import write_subset
from miner.tars import TarWriter
from trainers.data import IdSet, load_id

SIZE, ROWS, PER_SHARD = 8, 24_000, 5_000
# Bytes of numpy arrays an image that the driver holds at once, besides what it is given.
RANK, DUPLICATES = 25, 26
SUBSET = 900  # of a subset's image: its row of the manifest, in Arrow, twice; as Python objects it is some 2,000


# --- a sweep: actors that answer when they are told to ---------------------------------------------------------------


class Ref:
    """A result on its way; the images or scores themselves once it has come."""

    def __init__(self, log: "Log", what: str, value: Any) -> None:
        self.log, self.what, self.value = log, what, value
        log.count(what, +1)

    def __del__(self) -> None:
        self.log.count(self.what, -1)


class Log:
    """How many results of each kind exist now, and the most that ever did."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def count(self, what: str, by: int) -> None:
        self.now[what] = self.now.get(what, 0) + by
        self.most[what] = max(self.most.get(what, 0), self.now[what])


class Method:
    def __init__(self, call: Callable[..., Ref]) -> None:
        self.remote = call


class FakePool:
    def __init__(self, log: Log, counts: list[int]) -> None:
        self.missing = [np.ones(count, bool) for count in counts]
        self.rows_of = Method(lambda shard, rows: Ref(log, "images", len(rows)))
        self.take_scores = Method(lambda *args: Ref(log, "taken", self.take(*args)))

    def take(self, shard: int, rows: np.ndarray, scores: Ref, folder: str, stamp: str) -> bool:
        assert scores.value == len(rows)
        self.missing[shard][rows] = False
        return not self.missing[shard].any()


class FakeTrainer:
    def __init__(self, log: Log) -> None:
        self.kept: dict[bytes, int] = {}
        self.score = Method(lambda images, look_up, key: Ref(log, "scores", self.scored(images, key)))

    def scored(self, images: Ref | None, key: bytes) -> int:
        count = self.kept[key] if images is None else images.value
        if key:
            self.kept[key] = count
        return count


class FakeCrew:
    """Answers one request at a time: the newest one of the pool actors first, so that trainers are always behind."""

    def __init__(self, counts: list[int], pools: int, trainers: int) -> None:
        self.log, self.shards_kept, self.most_open = Log(), 0, 0
        self.watched: Any = None
        self.pools = [FakePool(self.log, counts) for _ in range(pools)]
        self.trainers = [FakeTrainer(self.log) for _ in range(trainers)]
        self.owner = [self.pools[shard % pools] for shard in range(len(counts))]
        self.config = Config()
        self.holders: dict[bytes, Any] = {}
        self.room: dict[Any, int] = {}

    hold = Crew.hold

    def wait(self, refs: list[Ref], count: int = 1, seconds: float = 1.0) -> tuple[list[Ref], list[Ref]]:
        self.most_open = max(self.most_open, len(self.watched.open))
        first = min(refs, key=lambda ref: ("images", "taken", "scores").index(ref.what))
        return [first], [ref for ref in refs if ref is not first]

    def get(self, ref: Ref) -> Any:
        return ref.value

    def kept(self) -> None:
        self.shards_kept += 1


@pytest.mark.parametrize(("pools", "trainers"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("late", [False, True])
def test_blocks_in_flight_are_bounded_however_slow_the_trainers(
    pools: int, trainers: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:  # everything counts as late at once, so that each block is asked of two actors
        monkeypatch.setattr(sweep, "LATE_SECONDS", -1.0)
        monkeypatch.setattr(sweep, "LATE", -1.0)
    counts = [20 * 256, 300, 7 * 256, 31 * 256]
    crew = FakeCrew(counts, pools, trainers)
    masks = [np.packbits(np.ones(count, bool)) for count in counts]
    blocks = list(sweep.cut(masks, counts, 256))
    asked: list[int] = []

    def lazily() -> Iterator[sweep.Block]:
        for number, block in enumerate(blocks):
            asked.append(number)
            yield block

    going = sweep.Sweep(crew, Display(), False, False, "nowhere", "stamp")  # type: ignore[arg-type]
    crew.watched = going
    going.run(lazily())
    room = sweep.IN_FLIGHT * trainers
    assert crew.most_open == room  # it is used, and kept to
    assert crew.log.most["images"] <= room * (store.COPIES if late else 1) + bool(late)
    assert asked == list(range(len(blocks)))
    assert not any(mask.any() for shard, pool in enumerate(crew.owner) for mask in [pool.missing[shard]])
    assert crew.shards_kept >= len(counts)
    del going, crew.watched
    gc.collect()
    assert crew.log.now["images"] == 0  # nothing holds on to pixels


@pytest.mark.parametrize("trainers", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_trainers_have_kept_does_not_travel_again(trainers: int, share: float) -> None:
    """Each has room for ``share`` of what would be its part; what does not fit is served as ever."""
    counts = [20 * 256, 300, 7 * 256, 31 * 256]
    crew = FakeCrew(counts, 2, trainers)
    crew.room = {trainer: int(share * sum(counts) * 3 * 32 * 32) for trainer in crew.trainers}
    held = []
    for last in (False, False, True):
        masks = [np.packbits(np.ones(count, bool)) for count in counts]
        for pool in crew.pools:
            pool.missing = [np.ones(count, bool) for count in counts]
        going = sweep.Sweep(crew, Display(), False, not last, "nowhere", "stamp")  # type: ignore[arg-type]
        crew.watched = going
        going.run(sweep.cut(masks, counts, 256))
        assert not any(mask.any() for shard, pool in enumerate(crew.owner) for mask in [pool.missing[shard]])
        held.append(going.held)
    blocks = 20 + 2 + 7 + 31
    assert held[0] == 0
    assert held[1] == held[2] == sum(len(trainer.kept) for trainer in crew.trainers)
    assert held[1] == {0.0: 0, 1.0: blocks}.get(share, held[1])
    assert share * blocks - 1 <= held[1] <= blocks  # one has its room at least
    assert all(room >= 0 for room in crew.room.values())


def test_a_slow_trainer_does_not_hold_the_blocks_that_it_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LATE_SECONDS", -1.0)  # everything is late at once
    monkeypatch.setattr(sweep, "LATE", -1.0)
    counts = [40 * 256]
    crew = FakeCrew(counts, 1, 2)
    slow = crew.trainers[0]
    answer, answered = crew.wait, []

    def wait(refs: list[Ref], count: int = 1, seconds: float = 1.0) -> tuple[list[Ref], list[Ref]]:
        late = [ref for ref, (_, trainer) in going.scoring.items() if trainer is slow]
        first = answer([ref for ref in refs if ref not in late] or late)[0][0]
        answered.append(first in late)
        return [first], [ref for ref in refs if ref is not first]

    crew.wait = wait  # type: ignore[method-assign]
    masks = [np.packbits(np.ones(count, bool)) for count in counts]
    blocks = list(sweep.cut(masks, counts, 256))
    for number, block in enumerate(blocks):
        crew.holders[block.key] = crew.trainers[number % 2]
        crew.trainers[number % 2].kept[block.key] = len(block.rows)
    going = sweep.Sweep(crew, Display(), False, False, "nowhere", "stamp")  # type: ignore[arg-type]
    crew.watched = going
    going.run(iter(blocks))
    assert not crew.pools[0].missing[0].any()
    assert sum(answered) == 0  # the slow one has answered nothing yet
    assert going.held < len(blocks) / 2 + sweep.IN_FLIGHT


# --- the driver ------------------------------------------------------------------------------------------------------


def peak(work: Callable[[], object]) -> int:
    """The most bytes that ``work`` had allocated through Python and numpy at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def rows(n: int) -> ranking.Rows:
    rng = np.random.default_rng(n)
    uid = rng.integers(0, 2**63, (n, 2), np.uint64)
    return ranking.Rows(rng.random(n), uid, rng.random(n) < 0.9, rng.integers(0, 50, n, np.int32))


@pytest.mark.parametrize("draw", ranking.DRAWS)
def test_ranking_takes_a_few_columns(monkeypatch: pytest.MonkeyPatch, draw: str) -> None:
    monkeypatch.setattr(ranking, "_PART", 20_000)
    few, many = (rows(n) for n in (200_000, 600_000))
    grown = peak(lambda: ranking.rank_rows(many, draw, 0)) - peak(lambda: ranking.rank_rows(few, draw, 0))
    assert grown / 400_000 < RANK


def test_ties_are_settled_by_uid_across_the_edges_of_what_is_worked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_AT_ONCE", 7)
    monkeypatch.setattr(ranking, "_PART", 100)
    drawn = rows(1000)
    tied = drawn._replace(weight=np.round(drawn.weight * 3), stratum=None)
    members = np.flatnonzero(tied.eligible)
    uid, weight = tied.uid[members], tied.weight[members]
    for draw, key in (
        ("topk", -weight),
        ("rank", np.where(weight > 0, ranking.uniform(uid, 5) / np.maximum(weight, 1e-9), np.inf)),
    ):
        expected = members[np.lexsort((uid[:, 1], uid[:, 0], key))]
        np.testing.assert_array_equal(
            np.argsort(ranking.rank_rows(tied, draw, 5), kind="stable")[: len(members)], expected
        )


@pytest.mark.parametrize("draw", ranking.DRAWS)
@pytest.mark.parametrize("part", [1 << 20, 60])
def test_ranks_are_those_of_plain_sorts(monkeypatch: pytest.MonkeyPatch, draw: str, part: int) -> None:
    monkeypatch.setattr(ranking, "_PART", part)
    monkeypatch.setattr(ranking, "_AT_ONCE", part // 3)
    drawn = rows(2000)
    drawn.weight[::5] = np.round(drawn.weight[::5] * 3)  # ties, and weights of 0
    u = ranking.uniform(drawn.uid, 3)
    with np.errstate(divide="ignore"):
        key = {"topk": -drawn.weight, "random": u}.get(draw, np.where(drawn.weight > 0, u / drawn.weight, np.inf))
    order = [i for i in np.lexsort((drawn.uid[:, 1], drawn.uid[:, 0], key)) if drawn.eligible[i]]
    if draw in ("rank", "topk"):
        assert drawn.stratum is not None
        seen: Counter[int] = Counter()
        turns = []
        for i in order:
            turns.append(seen[drawn.stratum[i]])
            seen[drawn.stratum[i]] += 1
        order = [i for _, i in sorted(zip(turns, order, strict=True), key=lambda pair: pair[0])]
    expected = np.full(2000, ranking.NO_RANK)
    expected[order] = np.arange(len(order))
    np.testing.assert_array_equal(ranking.rank_rows(drawn, draw, 3), expected)


def test_a_sample_is_what_a_stable_sort_would_put_first() -> None:
    rng = np.random.default_rng(0)
    value, eligible = rng.integers(0, 40, 500) / 40, rng.random(500) < 0.8
    order = np.argsort(np.where(eligible, value, np.inf), kind="stable")[: eligible.sum()]
    for count in (1, 17, 200, int(eligible.sum()), 1000):
        np.testing.assert_array_equal(frozen.smallest(value, eligible, count), np.sort(order[:count]))


def npy_pool(folder: Path, count: int) -> Pool:
    folder.mkdir()
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8))
    recipe = Recipe("npy", (str(folder / "images.npy"),), per_shard=PER_SHARD)
    plan = prepare(recipe, str(folder / "pool"))
    for job in plan.jobs:
        run_job(str(folder / "pool"), job)
    return finish(recipe, str(folder / "pool"), "noise", plan)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return npy_pool(tmp_path_factory.mktemp("bounded") / "large", ROWS)


def test_duplicates_are_found_without_the_whole_index(pool: Pool, tmp_path: Path) -> None:
    small = npy_pool(tmp_path / "small", ROWS // 4)
    grown = peak(lambda: inputs.duplicates(pool)) - peak(lambda: inputs.duplicates(small))
    assert grown / (ROWS - ROWS // 4) < DUPLICATES
    uid_N2, again = inputs.duplicates(pool)
    np.testing.assert_array_equal(uid_N2, ranking.uid_words(pool.index(["uid"])["uid"]))
    assert [len(found) for found in again] == [0] * len(pool.shards)
    assert inputs.eligible(pool) == ROWS


def ranked(pool: Pool) -> pa.Table:
    """All rows of a pool, as a weights table has them."""
    table = pool.index(["uid", "key", "shard", "row", "label"])
    table = table.append_column("weight", pa.array(np.ones(len(table), np.float32)))
    table = table.append_column("rank", pa.array(np.arange(len(table), dtype=np.uint64)))
    table = table.append_column("nn_id_row", pa.nulls(len(table), pa.int32()))
    return table.append_column("nn_id_cosine", pa.nulls(len(table), pa.float32()))


def test_a_subsets_images_are_not_held_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TarWriter(tmp_path / "large.tar") as tar:
        for i in range(20):
            tar.write(f"{i}.jpg", np.random.default_rng(i).bytes(1 << 20))
    plan = prepare(Recipe("tars", (str(tmp_path / "large.tar"),)), str(tmp_path / "pool"))
    run_job(str(tmp_path / "pool"), plan.jobs[0])
    pool = finish(Recipe("tars", (str(tmp_path / "large.tar"),)), str(tmp_path / "pool"), "large", plan)
    chosen = ranked(pool).take(np.random.default_rng(0).permutation(20))

    def write(name: str) -> dict[str, bytes]:
        write_subset(pool, chosen, tmp_path / name, {}, lambda images: None)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    whole = write("whole")
    monkeypatch.setattr(files, "PORTION", 4 << 20)
    assert peak(lambda: write_subset(pool, chosen, tmp_path / "parts", {}, lambda images: None)) < 10 << 20
    assert write("parts") == whole


def test_a_subsets_manifest_is_no_list_of_python_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subset, "PER_TAR", 200)
    images = np.random.default_rng(0).integers(0, 256, (2600, SIZE, SIZE, 3), np.uint8)
    pool = write_arrays_pool(str(tmp_path / "pool"), "noise", images, None, ())
    table = ranked(pool)

    def write(count: int) -> dict[str, Any]:
        return write_subset(pool, table.slice(0, count), tmp_path / f"of-{count}", {}, lambda images: None)

    write(200)  # what is imported and cached on the way
    grown = peak(lambda: write(2600)) - peak(lambda: write(600))
    assert grown / 2000 < SUBSET
    written = subset.load_subset(tmp_path / "of-2600")
    assert written.uids == table["uid"].to_pylist()
    assert len(written.recipe["tars"]) == 13
    written.verify()


def test_a_pool_actor_does_not_keep_the_pages_that_it_has_read(pool: Pool) -> None:
    images, _ = cache.open_shard(pool, 1, SIZE)
    rows = np.array([7, 3, PER_SHARD - 1])
    expected = np.array(images[rows])

    def resident() -> int:
        found, here = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(" ")[0]:
                start, end = (int(address, 16) for address in line.split(" ")[0].split("-"))
                here = start <= images.ctypes.data < end
            elif here and line.startswith("Rss:"):
                found += int(line.split()[1]) << 10
        return found

    assert int(images.sum()) > 0
    assert resident() > images.nbytes // 2
    np.testing.assert_array_equal(cache.gather(images, rows), expected)
    assert resident() == 0
    assert int(images.sum()) > 0
    assert len(np.unique(cache.digests(images))) == PER_SHARD
    assert resident() == 0


# --- Ray's object store ----------------------------------------------------------------------------------------------


def config(**machines: Any) -> Config:
    return Config(data=Data(size=SIZE), game=Game(views=1), machines=Machines(**machines))


def test_the_store_grows_by_columns_only(digits: IdSet) -> None:
    least, many, more = (store.needed(config(), n, digits) for n in (1_000, 10_000_000, 20_000_000))
    assert least == store.LEAST
    assert more - many == 10_000_000 * store.COLUMNS
    assert many < 400 << 20
    large = replace(config(), data=Data(size=64, model="wrn-40-2"))
    one, four = (store.needed(replace(large, machines=Machines(trainers=n)), 1_000, digits) for n in (1, 4))
    block = sweep.block_size(64) * 64 * 64 * 3
    assert 4 * sweep.IN_FLIGHT * block < four < one + 4 * sweep.IN_FLIGHT * block * store.COPIES


def test_too_little_shared_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", raising=False)
    monkeypatch.setattr(store, "SHM", tmp_path)
    assert store.complaint(1) is None
    line = store.complaint(1 << 60)
    assert line is not None
    assert len(line.splitlines()) == 1
    assert "shm-size" in line
    monkeypatch.setattr(store, "SHM", tmp_path / "none")
    assert store.complaint(1 << 60) is None


SPILLS = """
import sys
import numpy as np, ray
from miner.rays import connect, store_use
connect(None, 1, int(sys.argv[1]))
print(store_use())
kept = [ray.put(np.zeros(20 << 20, np.uint8)) for _ in range(8)]
print(store_use())
"""


def test_spilling_is_seen_and_a_store_that_cannot_be_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", SPILLS, str(store.LEAST)], capture_output=True, text=True, check=True)
    before, after = (json.loads(line.replace("'", '"')) for line in done.stdout.splitlines())
    assert before["capacity"] == after["capacity"] == store.LEAST
    assert before["spilled"] == 0
    assert after["spilled"] >= 60 << 20
    done = subprocess.run([sys.executable, "-c", SPILLS, str(1 << 50)], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("miner.errors.MinerError: Ray has no room for 1,125,899,906,842,624 bytes")


def test_a_default_run_spills_nothing(pool: Pool, tmp_path: Path) -> None:
    flags = f"--size {SIZE} --views 1 --gamma 0.01 --pretrain.epochs 1 --pool-actors 2".split()
    words = ["--pool", pool.path, "--out", str(tmp_path / "run"), *flags]
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "pipelines.resample", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    told = summary["object_store"]
    assert told["spilled"] == 0
    assert told["used"] <= told["capacity"] == store.needed(config(), ROWS, load_id("demo", SIZE))
    assert summary["subsets"]["subset-0.01"]["count"] == ROWS // 100
    assert {row["who"] for row in summary["memory"]} >= {"driver", "pool-0", "pool-1", "trainer-0", "total"}
