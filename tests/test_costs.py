"""What a dry run measures and predicts."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import made
from miner import costs, forecast, rates
from miner.cache import open_shard
from miner.config import Config, Data, Fleet, Game, Machines
from miner.costs import Rates, Site, Work
from miner.errors import UsageError
from miner.pool import Pool
from pipelines import resample
from trainers.config import PretrainConfig
from trainers.data import IdSet

NOTHING = dict.fromkeys(Rates.__dataclass_fields__, 0.0) | {"gpus": 0}
SITE = Site(nodes=1, gpus=1, cores=8, trainers=1, training=1, pool_actors=4, bandwidth=1e9)
WORK = Work(
    images=100_000,
    shards=8,
    size=32,
    decode=100_000,
    stored=2_000_000_000,
    sweeps=2,
    views=6,
    block=4096,
    updates=2,
    steps=100,
    look_up=True,
    id_images=50_000,
    epochs=10,
    sample=6_400,
    kept=1_000,
)


def of(**known: float) -> Rates:
    """Rates of which only these are not zero."""
    return Rates(**NOTHING | known)  # type: ignore[arg-type]


def seconds(found: Rates, site: Site = SITE, work: Work = WORK) -> dict[str, float]:
    return {name: part.seconds for name, part in costs.predict(found, site, work).items()}


def drawn(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return made.pool(tmp_path_factory.mktemp("costs"), drawn(600), 2)


# --- the model -------------------------------------------------------------------------------------------------------


def test_each_cost_is_of_its_part() -> None:
    every = replace(of(**dict.fromkeys(NOTHING, 1e-3)), gpus=1)  # type: ignore[arg-type]
    quick = replace(SITE, bandwidth=np.inf)
    before = seconds(every, quick)
    belongs = {
        "pretrain": ("classifier", 10 * 50_000),
        "decode": ("decode", 100_000 / 4),
        "digest": ("decode", 100_000 / 4 + 50_000),
        "forward": ("game", 2 * 6 * 100_000),
        "step": ("game", 100),
        "move": ("game", 2 * 100_000 / 4),
        "drive": ("game", 2 * 100_000),
        "strata": ("restore", 6_400),
        "sample": ("restore", 100_000),
        "index": ("start", 100_000),
        "id_set": ("start", 1),
        "rank": ("rank", 100_000),
        "table": ("rank", 100_000 / 4),
        "export": ("export", 1_000),
    }
    for name, (part, times) in belongs.items():
        after = seconds(replace(every, **{name: 2e-3}), quick)  # type: ignore[arg-type]
        assert after[part] - before[part] == pytest.approx(times * 1e-3), name
        if name != "forward":  # the ID set is scored, too, before the game
            assert {k: v for k, v in after.items() if k != part} == {k: v for k, v in before.items() if k != part}


def test_the_slowest_decides_and_is_named() -> None:
    found = costs.predict(of(gpus=1, forward=1e-6), SITE, WORK)["game"]
    assert found.bound == "trainers"
    assert found.seconds == pytest.approx(2 * 6 * 0.1 + 2 * 100_000 * costs.SNAPSHOT / 1e9)
    slow_network = costs.predict(of(gpus=1, forward=1e-6), replace(SITE, bandwidth=1e8), WORK)["game"]
    assert slow_network.bound == "network"
    assert slow_network.seconds == pytest.approx(2 * (100_000 * 3072 + 100_000 * costs.SNAPSHOT) / 1e8)
    assert costs.predict(of(gpus=1, gather=1e-3), SITE, WORK)["game"].bound == "pool actors"
    many = replace(SITE, nodes=64, gpus=8, trainers=512, bandwidth=np.inf)
    assert costs.predict(of(gpus=8, forward=1e-9), many, WORK)["game"].bound == "driver"
    assert costs.predict(of(gpus=1, decode=1e-5), SITE, WORK)["decode"].bound == "disk"


def test_more_gpus_share_a_sweep_and_nothing_else() -> None:
    found = of(gpus=1, forward=1e-5, pretrain=1e-5, strata=1e-4)
    one, eight = seconds(found), seconds(found, replace(SITE, gpus=8, trainers=8))
    last = 7 / 8 * WORK.block / 2  # images that most trainers wait for at the end of a sweep
    assert one["game"] - eight["game"] == pytest.approx(2 * 6 * 1e-5 * (100_000 * 7 / 8 - last))
    assert {k: v for k, v in one.items() if k != "game"} == {k: v for k, v in eight.items() if k != "game"}


def test_trainers_on_cpus_share_cores() -> None:
    cpu = Site(nodes=1, gpus=0, cores=9, trainers=1, training=1, pool_actors=1, bandwidth=np.inf)
    found = of(forward=1e-3)
    assert costs.predict(found, cpu, WORK)["game"].bound == "trainers"
    assert seconds(found, cpu)["game"] == pytest.approx(2 * 6 * 100 / 8, rel=1e-3)  # one core is left to the others
    assert seconds(found, replace(cpu, trainers=4))["game"] >= 2 * 6 * 100 / 8
    alone = Site(nodes=1, gpus=0, cores=1, trainers=1, training=1, pool_actors=1, bandwidth=np.inf)
    crowded = replace(alone, trainers=2)
    busy = replace(found, gather=1e-3)  # gathering takes the core from scoring
    assert costs.predict(busy, alone, WORK)["game"].bound == "cores"
    assert seconds(busy, alone)["game"] == pytest.approx(2 * 100 * 7, rel=1e-2)
    assert seconds(busy, crowded)["game"] >= seconds(busy, alone)["game"]


def test_look_ups_are_a_rate_of_their_own() -> None:
    on_gpu = of(gpus=1, forward=1e-5, look_up=1e-5)
    assert seconds(on_gpu)["game"] - seconds(replace(on_gpu, look_up=0.0))["game"] == pytest.approx(1.0)
    unasked = replace(WORK, look_up=False, sample=0)
    assert seconds(on_gpu, work=unasked)["restore"] == 0
    assert seconds(on_gpu, work=unasked)["game"] == pytest.approx(seconds(replace(on_gpu, look_up=0.0))["game"])


def test_few_shards_leave_actors_idle() -> None:
    found = of(gpus=1, decode=1e-3)
    even = seconds(found, replace(SITE, pool_actors=4))["decode"]
    assert seconds(found, replace(SITE, pool_actors=5))["decode"] == pytest.approx(even)  # 2 shards are the most
    assert seconds(found, replace(SITE, pool_actors=8))["decode"] < even


def test_memory_and_bytes() -> None:
    small, large = (costs.memory(SITE, replace(WORK, images=n), 0, 1 << 20) for n in (1_000_000, 2_000_000))
    assert large["driver"] - small["driver"] == costs.DRIVER_ROW * 1_000_000
    assert large["pool actor"] - small["pool actor"] == costs.ACTOR_ROW * 1_000_000 / 4
    assert large["trainer"] == small["trainer"]
    assert costs.bytes_read(WORK) == 2e9 + 3 * 100_000 * 3072 + 1_000 * 20_000
    own = replace(WORK, decode=0, stored=0)
    assert costs.bytes_read(own) == 3 * 100_000 * 3072 + 1_000 * 3072


# --- this machine, and others ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is measured, and no process is started for it."""
    monkeypatch.setattr(rates, "PATIENCE", 0.01)
    monkeypatch.setattr(rates, "POINTS", 512)
    monkeypatch.setattr(rates, "_imports", lambda: 1.0)


SMALL = Config(game=Game(views=2, batch=32), pretrain=PretrainConfig(batch=32))


def test_rates_are_measured(pool: Pool, digits: IdSet, quick: None) -> None:
    found = rates.measured(SMALL, pool, digits, 0.1)
    assert all(value > 0 for name, value in asdict(found).items() if name != "gpus")
    assert np.isfinite(list(asdict(found).values())).all()
    assert 1e-6 < found.decode < 1e-2
    assert found.step > 32 * found.forward  # there and back on 64 images
    assert found.pretrain > found.forward / 2


def test_the_rules_that_update_otherwise_are_measured(pool: Pool, digits: IdSet) -> None:
    for rule in ("reference", "equilibrium", "dos"):
        found = rates.rows(Config(data=Data(pool=pool.path), game=Game(rule=rule)), pool, digits)  # type: ignore[arg-type]
        assert found["move"] > 0


def test_nothing_is_written_and_nothing_stands_in_the_way(
    pool: Pool, digits: IdSet, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(data: bytes, size: int) -> np.ndarray:
        raise ValueError("no image")

    before = sorted(Path(pool.path).rglob("*"))
    monkeypatch.setattr("miner.cache.decode", bad)
    config = replace(SMALL, data=Data(pool=pool.path, checkpoint="net.safetensors"))
    told = forecast.told(config, pool, digits, rates.measured(config, pool, digits, 0.1))
    assert "GiB in all processes" in told
    assert sorted(Path(pool.path).rglob("*")) == before


def test_what_was_decoded_before_is_not_decoded_again(tmp_path: Path, digits: IdSet) -> None:
    pool = made.pool(tmp_path, drawn(60), 2)
    config = Config(data=Data(pool=pool.path))
    assert forecast.work_of(config, pool, digits).decode == 60
    assert forecast.work_of(config, pool, digits).stored == sum(shard.bytes for shard in pool.shards)
    open_shard(pool, 1, 32)
    assert forecast.work_of(config, pool, digits).decode == 30
    assert forecast.work_of(replace(config, data=replace(config.data, size=16)), pool, digits).decode == 60


def test_work_follows_the_settings(pool: Pool, digits: IdSet) -> None:
    config = Config(data=Data(pool=pool.path, checkpoint="net.safetensors"), game=Game(rounds=3, steps=10, views=2))
    found = forecast.work_of(config, pool, digits)
    assert (found.images, found.sweeps, found.views, found.steps, found.updates) == (600, 3, 2, 20, 3)
    assert (found.epochs, found.id_images, found.kept, found.sample) == (0, len(digits.train_images), 6, 6 * 64)
    reference = replace(config, game=Game(rule="reference", rounds=2, steps=10))
    assert forecast.work_of(reference, pool, digits).updates == 20


def test_a_fleet_is_told_beside_this_machine(pool: Pool, digits: IdSet) -> None:
    fleet = Fleet(nodes=2, gpus=4, cores=32, gpu_images=1e5, dollars=10.0)
    config = Config(data=Data(pool=pool.path), machines=Machines(pool_actors=8), fleet=fleet)
    work = forecast.work_of(config, pool, digits)
    site = forecast.there(config, work)
    assert (site.trainers, site.pool_actors, site.bandwidth) == (8, 2, 1e9)  # one a shard, and there are two
    there = forecast.rates_there(of(forward=1e-3, look_up=1e-4, step=1.0, decode=1e-4), fleet, 128)
    assert (there.forward, there.look_up, there.gpus) == (1e-5, 1 / forecast.LOOK_UPS, 4)
    assert (there.step, there.pretrain, there.decode) == pytest.approx((6 * 128 * 1e-5, 3e-5, 1e-4))
    quicker = forecast.rates_there(of(forward=1e-3), replace(fleet, gpu_look_ups=1e6), 128)
    assert quicker.look_up == 1e-6
    told = forecast.told(config, pool, digits, of(forward=1e-3, imports=36.0))
    total = sum(
        part.seconds for part in costs.predict(forecast.rates_there(of(imports=36.0), fleet, 128), site, work).values()
    )
    assert "fleet       2 machines of 4 GPUs and 32 cores" in told
    assert f"{total / 3600 * 2 * 10:,.2f} dollars" in told


@pytest.mark.parametrize(
    ("fleet", "gpus", "flag"),
    [
        (Fleet(nodes=1, gpus=8), 0, "--fleet.gpu-images"),
        (Fleet(nodes=1), 1, "--fleet.gpus"),
        (Fleet(nodes=-1), 0, "--fleet.nodes"),
        (Fleet(nodes=1, gigabytes=0.0), 0, "--fleet.gigabytes"),
    ],
)
def test_what_cannot_be_predicted_is_said(fleet: Fleet, gpus: int, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        forecast.check(fleet, gpus)


def test_a_dry_run_is_what_ray_makes_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    monkeypatch.setattr(os, "nice", added.append)
    monkeypatch.setattr(os, "environ", {"RAY_worker_niceness": "7"})
    resample.like_a_worker()
    assert (added, os.environ["OMP_NUM_THREADS"]) == ([7], "1")
