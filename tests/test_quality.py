"""The benchmark of work until a ranking is good: what it counts and what it calls converged."""

import numpy as np
import pytest

from benchmarks.quality import Course, agreements, forwards, reached, rho, smooth
from miner.config import Data
from pipelines.compare_selectors import mining_config


def test_forwards_are_counted_up_to_each_update() -> None:
    """A sweep is one forward a view and image, a training step three of 2 x 128 images, the guard's ID set one."""
    records = [{"scored": 1000, "train_steps": 2}, {"scored": 600, "train_steps": 2}, {"scored": 600}]
    game = mining_config("mined:views=2,rounds=3", Data(), (0.1,))
    assert forwards(records, game, 50).tolist() == [2050, 2050 + 1200 + 1536, 2050 + 2 * (1200 + 1536)]
    released = mining_config("reference", Data(), (0.1,))  # it learns while it trains, and has no guard
    assert forwards([{"train_steps": 5}, {"train_steps": 5}], released, 50).tolist() == [3840, 7680]


def test_a_run_has_converged_once_it_agrees_for_good() -> None:
    end = np.arange(6, dtype=np.float32)
    end[5] = np.nan  # excluded
    near, far = end[[1, 0, 2, 3, 4, 5]], end[[4, 3, 2, 1, 0, 5]]
    run = Course(np.array([10, 20, 30, 40]), np.array([1.0, 2.0, 3.0, 4.0]), np.stack([end, far, end, end]))
    assert agreements(run, end).tolist() == pytest.approx([1, -1, 1, 1])
    assert reached(run, agreements(run, end)) == (3, 30, 3.0)
    assert rho(near, end) == pytest.approx(0.9)
    assert reached(run, np.array([0.1, 0.5, 0.4, 0.3])) == ("never (0.50 after 2)", 40, "–")


def test_smoothing_is_that_of_a_sweep() -> None:
    loss, label = np.array([1.0, 3.0, 5.0]), np.array([2, 2, -1])
    assert smooth(loss, label, 0.5).tolist() == [1.5, 2.5, 5.0]
