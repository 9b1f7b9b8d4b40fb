"""Lost processes, interrupted drivers, damaged files: one result, byte for byte, or one line that says what to do."""

import dataclasses
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import exceptions

from benchmarks.chaos import half_written, processes, result
from benchmarks.slow import Slow
from miner import cluster, demo, loop, rays, sweep
from miner.build import write_arrays_pool
from miner.cluster import Crew
from miner.config import Config, Data, Game, Machines, Output, Selection
from miner.errors import MinerError
from miner.mining import Mined, mine
from miner.progress import Display
from miner.rays import LostError, connect
from miner.run_dir import RunDir
from miner.scores import Scores
from trainers.actor import Trainer
from trainers.checkpoint import save_checkpoint
from trainers.config import PretrainConfig
from trainers.data import IdSet

SHARDS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, digits: IdSet) -> Iterator[Config]:
    """Two short rounds on a pool of 1,200 images in four shards."""
    folder = tmp_path_factory.mktemp("recovery")
    images, labels = demo.pool_arrays()
    (folder / "pool").mkdir()
    write_arrays_pool(str(folder / "pool"), "some", images[:1200], labels[:1200], demo.FAMILIES, shard_count=SHARDS)
    trainer = Trainer("small", digits, seed=0, game=Game())
    trainer.pretrain(PretrainConfig(epochs=1, batch=64, lr=0.1))
    save_checkpoint(folder / "net.safetensors", trainer.net, {"model": "small", "classes": list(digits.classes)})
    connect(None)
    yield Config(
        data=Data(pool=str(folder / "pool"), checkpoint=str(folder / "net.safetensors"), seed=5),
        game=Game(rounds=2, steps=3, batch=32, views=1),
        selection=Selection(gamma=(0.1,), exclude_near_id=0.01),
        machines=Machines(pool_actors=2),
    )
    ray.shutdown()


def run(config: Config, out: Path, **machines: Any) -> Mined:
    """Mine into ``out``."""
    where = dataclasses.replace(config.machines, **machines)
    return mine(dataclasses.replace(config, machines=where, output=Output(out=str(out))))


@pytest.fixture(scope="module")
def peace(base: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of what an undisturbed run leaves."""
    return result(run(base, tmp_path_factory.mktemp("peace") / "run").run)  # type: ignore[arg-type]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a shard: what they hold does not change a loss, as every forward pass is cut alike."""
    monkeypatch.setattr(loop, "block_size", lambda size: 64)


# --- one hash ---


class Stop(Exception):
    """The driver ends here."""


@pytest.fixture(scope="module")
def interrupted(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in its first sweep, with three actors: some shards are scored, nothing is committed."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    whole, taken = Crew.kept, itertools.count()

    def stop(self: Crew) -> None:
        whole(self)
        if next(taken) == SHARDS + 2:  # the classifier is there, all shards are decoded, two are scored
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Crew, "kept", stop)
        with pytest.raises(Stop):
            run(base, out, pool_actors=3)
    assert 1 <= len(list(out.glob("scores/*.arrow"))) < SHARDS
    assert not list(out.glob("rounds/*/COMMITTED"))
    return out


@pytest.mark.parametrize("actors", [1, 2, 4])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_actors_order_of_blocks_and_interruptions_change_no_byte(
    base: Config,
    peace: dict[str, str],
    interrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    actors: int,
    shuffled: bool,
    resumed: bool,
) -> None:
    if resumed:
        shutil.copytree(interrupted, tmp_path / "run")
    if shuffled:
        cut = sweep.cut

        def in_disorder(*args: Any) -> Iterator[sweep.Block]:
            blocks = list(cut(*args))
            random.Random(actors).shuffle(blocks)
            return iter(blocks)

        monkeypatch.setattr(loop, "cut", in_disorder)
    mined = run(base, tmp_path / "run", pool_actors=actors)
    assert mined.summary["pool_actors"] == actors
    assert result(mined.run) == peace  # type: ignore[arg-type]
    assert half_written(mined.run) == []  # type: ignore[arg-type]


def test_scores_that_were_kept_are_not_learned_again(
    base: Config, peace: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged one is; so are those of another classifier."""

    def stop(*args: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(loop.Game, "update", stop)
        with pytest.raises(Stop):
            run(base, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "scores").iterdir())
    assert len(kept) == SHARDS
    data = bytearray(kept[1].read_bytes())
    data[len(data) // 2] ^= 1
    kept[1].write_bytes(data)
    os.truncate(kept[3], 100)
    scored: list[int] = []
    taken = sweep.Sweep._taken
    monkeypatch.setattr(sweep.Sweep, "_taken", lambda s, b, ref: (scored.append(b.shard), taken(s, b, ref))[1])
    mined = run(base, tmp_path / "run")
    assert sorted(scored[:2]) == [1, 3]
    assert sorted(scored[2:]) == [0, 1, 2, 3]
    assert result(mined.run) == peace  # type: ignore[arg-type]


def test_kept_scores_belong_to_one_sweep(tmp_path: Path) -> None:
    eligible = np.array([True, False, True])
    scores = Scores.fresh(eligible)
    scores.take(np.array([0, 2]), {"loss": np.array([1.0, 2.0], np.float32)})
    scores.write(tmp_path / "s.arrow", "round 0 theta aa")
    found = Scores.read(tmp_path / "s.arrow", "round 0 theta aa", eligible)
    assert found is not None
    np.testing.assert_array_equal(found["loss"], [1.0, np.nan, 2.0])
    assert Scores.read(tmp_path / "s.arrow", "round 1 theta aa", eligible) is None
    assert Scores.read(tmp_path / "s.arrow", "round 0 theta aa", np.ones(3, bool)) is None  # one row is not scored
    assert Scores.read(tmp_path / "s.arrow", "round 0 theta aa", np.ones(4, bool)) is None
    assert Scores.read(tmp_path / "none.arrow", "round 0 theta aa", eligible) is None


# --- processes that are lost, hang, or are slow ---


def pids(title: bytes) -> list[int]:
    """Worker processes of this test's Ray."""
    return sorted(pid for pid, line in processes(os.getpid()).items() if line.startswith(title))


def when(display_phase: str, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do something once, when a phase begins; the list then holds the phase."""
    done: list[str] = []
    phase = Display.phase

    def watched(self: Display, name: str, total: int, first: int = 0) -> None:
        phase(self, name, total, first)
        if name.endswith(display_phase) and not done:
            done.append(name)
            action()

    monkeypatch.setattr(Display, "phase", watched)
    return done


POOL, TRAINER = b"ray::PoolShards", b"ray::Trainer"


@pytest.mark.parametrize(
    ("title", "phase"),
    [
        *((POOL, phase) for phase in ("decode", "2/2 score", "2/2 update", "1/2 commit", "rank")),
        *((TRAINER, phase) for phase in ("strata", "2/2 score", "1/2 train", "rank")),
    ],
)
def test_a_killed_actor_is_replaced(
    base: Config, peace: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: bytes, phase: str
) -> None:
    done = when(phase, lambda: os.kill(pids(title)[-1], signal.SIGKILL), monkeypatch)
    mined = run(base, tmp_path / "run")
    assert len(done) == 1
    assert result(mined.run) == peace  # type: ignore[arg-type]
    (death,) = mined.summary["deaths"]
    assert death["who"] in (("pool-0", "pool-1") if title == POOL else ("trainer-0",))
    assert 0 < death["seconds_lost"] < 60
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["death_count"] == 1
    assert status["deaths"][0]["who"] == death["who"]


def test_an_actor_that_hangs_is_replaced(
    base: Config, peace: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miner.cluster.PATIENCE", 4.0)
    when("1/2 score", lambda: os.kill(pids(b"ray::PoolShards")[0], signal.SIGSTOP), monkeypatch)
    mined = run(base, tmp_path / "run")
    assert result(mined.run) == peace  # type: ignore[arg-type]
    assert len(mined.summary["deaths"]) == 1
    assert "no answer" in mined.summary["deaths"][0]["why"]


def test_losses_without_end_are_an_error(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miner.cluster.MOST_LOSSES", 2)
    phase = Display.phase

    def deadly(self: Display, name: str, total: int, first: int = 0) -> None:
        phase(self, name, total, first)
        if name.endswith("update"):
            os.kill(pids(b"ray::PoolShards")[0], signal.SIGKILL)

    monkeypatch.setattr(Display, "phase", deadly)
    with pytest.raises(MinerError, match="2 times in a row without progress") as failure:
        run(base, tmp_path / "run")
    assert not isinstance(failure.value, LostError)


def test_a_slow_actor_does_not_hold_the_round(
    base: Config, peace: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    slow: list[Slow] = []
    when("1/2 score", lambda: slow.append(Slow(pids(b"ray::PoolShards")[0])), monkeypatch)
    started = time.monotonic()
    try:
        mined = run(base, tmp_path / "run")
    finally:
        slow[0].end()
    assert time.monotonic() - started < 120
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["blocks_lent"] > 0
    assert mined.summary["deaths"] == []
    assert result(mined.run) == peace  # type: ignore[arg-type]


def of_a_task(error: Exception) -> Exception:
    """As Ray brings a worker's error."""
    told = exceptions.RayTaskError("score", "traceback", error)
    return pickle.loads(pickle.dumps(told)).as_instanceof_cause()


LOW = exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node ...")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (LOW, LostError, "a worker process died (Task was killed due to the node running low on memory.)"),
        (exceptions.OutOfDiskError("The object"), MinerError, "make space"),
        (exceptions.ObjectStoreFullError("Failed to put"), MinerError, "docker run --shm-size"),
        (exceptions.RuntimeEnvSetupError("no agent"), MinerError, "runtime_env_agent.log"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), MinerError, "a smaller --batch"),
    ],
)
def test_what_ray_runs_out_of_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, said: str, nested: bool
) -> None:
    told = of_a_task(error) if nested or not isinstance(error, exceptions.RayError) else error

    def fail(*args: Any, **kwargs: Any) -> None:
        raise told

    monkeypatch.setattr(ray, "get", fail)
    monkeypatch.setattr(ray, "put", fail)
    with pytest.raises(MinerError) as caught:
        rays.get([])
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert cluster._trouble(None)
    if isinstance(error, tuple(rays.FULL)) and not nested:
        with pytest.raises(MinerError, match=re.escape(said)):
            rays.put(0)


def test_a_bug_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(refs: Any) -> None:
        raise of_a_task(ZeroDivisionError("division by zero"))

    monkeypatch.setattr(ray, "get", fail)
    with pytest.raises(ZeroDivisionError):
        rays.get([])


# --- what lies in the run directory is damaged ---


@pytest.fixture(scope="module")
def finished(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("finished") / "run").run  # type: ignore[return-value]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: flip(r / "rounds/000001/shard-000002.arrow"), "shard-000002.arrow: changed since it was committed"),
        (lambda r: os.truncate(r / "rounds/000001/COMMITTED", 40), "COMMITTED: cut off or damaged"),
        (lambda r: (r / "rounds/000001/trainer.safetensors").unlink(), "trainer.safetensors: changed since"),
    ],
)
def test_a_damaged_commit_is_gone_back_behind(
    base: Config,
    peace: dict[str, str],
    finished: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run")
    mined = run(base, tmp_path / "run")
    told = capfd.readouterr().err
    assert said in told
    assert "going back behind round 2" in told
    assert "after 1 committed rounds" in told
    assert result(mined.run) == peace  # type: ignore[arg-type]
    assert [record["round"] for record in RunDir(tmp_path / "run").metrics()] == [0, 1]


def test_all_commits_damaged_is_a_new_beginning(
    base: Config, peace: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for folder in (tmp_path / "run" / "rounds").iterdir():
        flip(folder / "shard-000000.arrow")
    assert result(run(base, tmp_path / "run").run) == peace  # type: ignore[arg-type]


def test_a_whole_subset_is_left_alone_and_a_damaged_one_is_written_again(
    base: Config, peace: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    tar = tmp_path / "run" / "subset-0.1" / "outliers-000000.tar"
    before = tar.stat().st_mtime_ns
    run(base, tmp_path / "run")
    assert tar.stat().st_mtime_ns == before
    flip(tar)
    run(base, tmp_path / "run")
    assert tar.stat().st_mtime_ns > before
    assert result(tmp_path / "run") == peace


def test_a_shard_that_is_gone_is_named(base: Config, tmp_path: Path) -> None:
    shutil.copytree(base.data.pool, tmp_path / "pool")
    gone = sorted((tmp_path / "pool").glob("*.tar"))[2]
    gone.unlink()
    with pytest.raises(MinerError, match=gone.name):
        run(dataclasses.replace(base, data=dataclasses.replace(base.data, pool=str(tmp_path / "pool"))), tmp_path / "r")


def test_one_run_directory_has_one_driver(base: Config, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run").locked(), pytest.raises(MinerError, match="another process is at work here"):
        run(base, tmp_path / "run")


def test_a_read_only_disk_is_one_line(base: Config, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "outlier-miner-test", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    words = ["-m", "pipelines.resample", "--pool", base.data.pool, "--out", str(disk / "run"), "--gamma", "0.1"]
    try:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {disk / 'run'}: Read-only file system"


def test_a_clock_that_jumps_changes_nothing(
    base: Config, peace: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rng = time.time, random.Random(1)
    monkeypatch.setattr(time, "time", lambda: now() + rng.choice((-86_400.0, 0.0, 86_400.0)))
    mined = run(base, tmp_path / "run")
    assert result(mined.run) == peace  # type: ignore[arg-type]
    assert all(seconds >= 0 for seconds in mined.summary["seconds"].values())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["seconds"] >= 0 for record in records)


def test_what_killed_processes_left_is_cleared_away(
    base: Config, peace: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    left = [tmp_path / "run" / name for name in ("subset-0.1/.a.tar.1-ab.tmp", "weights/.b.arrow.2-cd.tmp")]
    for path in left:
        path.write_bytes(b"half")
    run(base, tmp_path / "run")
    assert not any(path.exists() for path in left)
    assert result(tmp_path / "run") == peace
