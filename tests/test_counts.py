"""What work costs in counts, which no slow machine changes: bytes read, images forwarded, images decoded."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.speed import made
from benchmarks.speed.export import read_bytes
from miner import cache
from miner.config import Game
from miner.pool import Pool
from miner.subset import write_subset
from miner.weights import ShardState, final_table
from trainers.actor import Trainer
from trainers.data import IdSet
from trainers.views import views


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return made.pool(tmp_path_factory.mktemp("counts"), made.pixels(4000, 32), 2)


def test_export_reads_little_more_than_what_it_keeps(pool: Pool, tmp_path: Path) -> None:
    rank = np.random.default_rng(0).permutation(pool.count).astype(np.uint64)
    whole = final_table(pool.index(), ShardState.fresh("hedge", pool.count), 1.0, rank, {})
    chosen = whole.filter(pa.array(rank < 40)).sort_by("rank")
    before = read_bytes()
    recipe = write_subset(pool, chosen, tmp_path / "subset", {"gamma": 0.01, "draw": "rank"}, lambda count: None)
    written = sum((tmp_path / "subset" / tar["name"]).stat().st_size for tar in recipe["tars"])
    index = 2 * (Path(pool.path) / "index.parquet").stat().st_size  # where images lie, and what their uids are
    whole_pool = sum(shard.bytes for shard in pool.shards)
    assert read_bytes() - before - index < 2.5 * written < 0.1 * whole_pool  # what it wrote is read again, to be hashed


def test_a_score_forwards_each_view_once(digits: IdSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    trainer = Trainer("small", digits, seed=0, game=Game(views=6))
    trainer.look_up_id()
    features = trainer.net.features

    def counted(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return features(x)

    monkeypatch.setattr(trainer.net, "features", counted)
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    others = len(list(views(torch.from_numpy(images), 6, digits.flip)))
    trainer.score(images, look_up=True)
    assert sum(seen) == 300 * (1 + others)
    assert not any(p.grad is not None for p in trainer.net.parameters())


def test_an_image_is_decoded_once(pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decoded: list[int] = []
    decode = cache.decode
    monkeypatch.setattr(cache, "decode", lambda data, size: decoded.append(1) or decode(data, size))
    for _ in range(3):
        cache.open_shard(pool, 0, 32, str(tmp_path))
    assert len(decoded) == pool.shards[0].count == 2000
