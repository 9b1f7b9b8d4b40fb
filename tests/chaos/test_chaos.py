"""Kill -9 anything, run the same command again, get the same bytes: one mining under 25 seeded kills, from outside."""

import json
from pathlib import Path

import pytest

from benchmarks import chaos

KILLS, SEED = 40, 7
KINDS = [  # a lost actor costs seconds, a lost driver a start of Ray: the long run is python -m benchmarks.chaos
    *("pool actor", "trainer", "trainer", "pool actor", "driver", "pool actor", "trainer", "pool actor"),
    *("driver, terminated", "trainer", "pool actor", "raylet", "trainer"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


def test_a_mining_under_fire_ends_in_the_same_bytes(folder: Path) -> None:
    pool = chaos.make_pool(folder / "pool")
    round_seconds = chaos.in_peace(pool, folder / "peace")
    fire = chaos.Chaos(pool, folder / "fire", chaos.plan(KILLS, SEED, KINDS), folder / "log.txt")
    kills = fire.play()
    expected = chaos.result(folder / "peace")
    assert len(expected) == chaos.SHARDS + 2 * 4 + 1
    assert chaos.result(folder / "fire") == expected
    assert chaos.half_written(folder / "fire") == []
    assert len(kills) >= 25
    assert {kill.kind for kill in kills} == set(KINDS)
    struck = {kill.phase for kill in kills}
    assert struck >= {"pretrain", "score", "train"}
    assert len(struck) >= 6
    lost = [kill.lost or 0.0 for kill in kills]
    print(f"{len(kills)} kills; lost: mean {sum(lost) / len(lost):.1f} s, most {max(lost):.1f} s")
    start = json.loads((folder / "peace" / "summary.json").read_text())["seconds"]["start"]
    assert max(lost) <= round_seconds + max(30.0, 5 * start)  # a machine that is slow to start Ray is given more
