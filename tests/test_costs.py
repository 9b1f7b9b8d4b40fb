"""What a dry run predicts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import made
from miner import costs
from miner.config import Config, Data, Game, Machines
from miner.costs import Rates
from miner.pool import Pool
from trainers.data import IdSet


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return made.pool(tmp_path_factory.mktemp("costs"), made.pixels(600, 32), 2)


def test_parts_grow_with_what_they_are_for(pool: Pool, digits: IdSet) -> None:
    rates = Rates(decode=1e-3, forward=2e-3, look_up=3e-3, step=0.5)
    config = Config(
        data=Data(pool=pool.path, checkpoint="net.safetensors"),
        game=Game(rounds=3, steps=10, views=2),
        machines=Machines(pool_actors=1),
    )
    found = costs.predicted(config, pool, digits, rates)
    assert found["classifier"] == 0
    assert found["decode"] == pytest.approx(600 * 1e-3)
    assert found["game"] == pytest.approx(600 * (3 * 2 * 2e-3 + 3e-3) + 2 * 10 * 0.5)
    trained = costs.predicted(replace(config, data=Data(pool=pool.path)), pool, digits, rates)
    assert trained["classifier"] == pytest.approx(14 * len(digits.train_images) * 0.5 / 256)
    once = costs.predicted(replace(config, game=Game(rounds=1, views=2)), pool, digits, rates)
    assert once["game"] == pytest.approx(600 * (2 * 2e-3 + 3e-3))


def test_rates_are_measured(pool: Pool, digits: IdSet) -> None:
    rates = costs.measured(Config(data=Data(pool=pool.path)), pool, digits)
    assert 1e-6 < rates.decode < 1e-2
    assert 1e-6 < rates.forward < 1e-1
    assert rates.look_up > 0
    assert rates.step > 2 * 128 * rates.forward / 4
    assert np.isfinite(list(vars(rates).values())).all()


def test_what_does_not_decode_is_no_obstacle(pool: Pool, digits: IdSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(data: bytes, size: int) -> np.ndarray:
        raise ValueError("no image")

    monkeypatch.setattr("miner.cache.decode", bad)
    assert costs.measured(Config(data=Data(pool=pool.path)), pool, digits).forward > 0
    assert "GiB in all processes" in costs.told(Config(data=Data(pool=pool.path)), pool, digits)


def test_the_result_is_left_alone(pool: Pool, digits: IdSet, tmp_path: Path) -> None:
    before = sorted(Path(pool.path).rglob("*"))
    costs.told(Config(data=Data(pool=pool.path)), pool, digits)
    assert sorted(Path(pool.path).rglob("*")) == before
