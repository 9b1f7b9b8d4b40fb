"""Opening, reading, verifying and naming pools; decoding hostile images; the decoded cache."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from miner import cache
from miner.build import write_arrays_pool
from miner.errors import MinerError, UsageError
from miner.pool import INDEX_SCHEMA, Pool, resolve, uid_of

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return write_arrays_pool(str(tmp_path / "pool"), "noise", IMAGES, np.arange(50) % 3, ["a", "b", "c"])


@pytest.fixture
def remote(pool: Pool) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(pool.path, "/bucket/noise", recursive=True)
    yield "memory://bucket/noise"
    memory.rm("/bucket", recursive=True)


def test_rows_and_images_come_back(pool: Pool) -> None:
    assert (pool.name, pool.count, pool.classes) == ("noise", 50, ("a", "b", "c"))
    index = pool.index()
    assert index.schema.equals(INDEX_SCHEMA)
    assert index["label"].to_pylist() == (np.arange(50) % 3).tolist()
    assert set(index["width"].to_pylist()) == {32}
    row = 0
    for shard in range(len(pool.shards)):
        part = pool.shard_index(shard, ["uid", "row"])
        assert part["row"].to_pylist() == list(range(pool.shards[shard].count))
        order = list(range(part.num_rows))[::-1]
        for i, data in zip(order, pool.read(shard, order), strict=True):
            assert uid_of(data) == part["uid"][i].as_py()
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), IMAGES[row + i])
        row += part.num_rows
    pool.verify()


def test_the_footer_of_the_index_is_read_once_by_each_process(pool: Pool) -> None:
    whole = Path(pool.path, "index.parquet").read_bytes()
    expected = [pool.shard_index(shard) for shard in range(len(pool.shards))]
    data = pool.read(0, [1])
    elsewhere = pickle.dumps(pool)
    Path(pool.path, "index.parquet").write_bytes(whole[:-8] + b"\xff" * 8)  # what tells where the footer begins
    assert [pool.shard_index(shard) for shard in range(len(pool.shards))] == expected
    with pytest.raises(MinerError, match=r"index\.parquet: damaged"):
        pickle.loads(elsewhere).shard_index(0)
    Path(pool.path, "index.parquet").write_bytes(whole)
    assert pickle.loads(elsewhere).read(0, [1]) == data


def test_pools_repeat_and_the_fingerprint_ignores_the_cut(tmp_path: Path, pool: Pool) -> None:
    again = write_arrays_pool(str(tmp_path / "again"), "noise", IMAGES, np.arange(50) % 3, ["a", "b", "c"])
    for name in os.listdir(pool.path):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "pool" / name).read_bytes()
    cut = write_arrays_pool(str(tmp_path / "cut"), "noise", IMAGES[::-1], None, [], shard_count=7)
    assert len(cut.shards) == 7
    assert cut.fingerprint == again.fingerprint
    other = write_arrays_pool(str(tmp_path / "other"), "noise", IMAGES[1:], None, [])
    assert other.fingerprint != again.fingerprint


def test_a_missing_or_shorter_shard_is_caught_at_open(pool: Pool) -> None:
    path = pool.shards[2].path
    os.truncate(path, pool.shards[2].bytes - 512)
    with pytest.raises(MinerError, match=r"000002\.tar: \d+ bytes, not"):
        Pool.open(pool.path)
    os.unlink(path)
    with pytest.raises(MinerError, match=r"000002\.tar: No such file"):
        Pool.open(pool.path)


def test_an_index_of_another_pool_is_caught_at_open(tmp_path: Path, pool: Pool) -> None:
    other = write_arrays_pool(str(tmp_path / "other"), "noise", IMAGES[:49], None, [])
    shutil.copy(f"{other.path}/index.parquet", f"{pool.path}/index.parquet")
    with pytest.raises(MinerError, match=r"index\.parquet: 49 rows in 4 shards; pool\.json says 50"):
        Pool.open(pool.path)
    with open(f"{pool.path}/index.parquet", "wb") as file:
        file.write(b"PAR1 not quite")
    with pytest.raises(MinerError, match=r"index\.parquet: damaged"):
        Pool.open(pool.path)
    os.unlink(f"{pool.path}/index.parquet")
    with pytest.raises(MinerError, match=r"index\.parquet: missing"):
        Pool.open(pool.path)


def edit(pool: Pool, **changes: object) -> None:
    path = Path(pool.path, "pool.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifests_that_cannot_be_trusted_are_refused(tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(MinerError, match=r"pool\.json: missing"):
        Pool.open(str(tmp_path))
    edit(pool, version=2)
    with pytest.raises(MinerError, match="format version 2, this program reads 1"):
        Pool.open(pool.path)
    edit(pool, version=1, shards=[{"name": "x"}])
    with pytest.raises(MinerError, match="damaged manifest"):
        Pool.open(pool.path)
    entry = {"name": "x", "kind": "tar", "count": 50, "bytes": 9, "sha256": "", "file_bytes": 9}
    for path in ("../../secret", "pipe:cat /etc/passwd", "file:///etc/passwd", "s3://other/x.tar"):
        edit(pool, shards=[entry | {"path": path}])
        with pytest.raises(MinerError, match=r"damaged manifest .*refused"):
            Pool.open(pool.path)
    Path(pool.path, "pool.json").write_text("{")
    with pytest.raises(MinerError, match="not JSON"):
        Pool.open(pool.path)


def test_verify_finds_a_flipped_byte(pool: Pool) -> None:
    offset = pool.shard_index(1)["offset"][3].as_py()
    path = Path(pool.shards[1].path)
    raw = bytearray(path.read_bytes())
    raw[offset + 100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(MinerError, match=r"000001\.tar: its bytes changed"):
        Pool.open(pool.path).verify()


def test_verify_finds_a_wrong_index_and_a_wrong_fingerprint(tmp_path: Path, pool: Pool) -> None:
    edit(pool, fingerprint="0" * 32)
    with pytest.raises(MinerError, match="do not give the fingerprint"):
        Pool.open(pool.path).verify()
    swapped = IMAGES.copy()
    swapped[0, 0, 0, 0] ^= 1
    other = write_arrays_pool(str(tmp_path / "other"), "noise", swapped, None, [])
    shutil.copy(f"{other.path}/index.parquet", f"{pool.path}/index.parquet")
    with pytest.raises(MinerError, match=r"another uid in row 0 of 000000\.tar|byte ranges outside"):
        Pool.open(pool.path).verify()


def test_a_url_pool_reads_as_the_local_one(
    pool: Pool, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTLIER_CACHE", str(tmp_path / "cache"))
    far = Pool.open(remote)
    assert far.fingerprint == pool.fingerprint
    assert far.index().equals(pool.index())
    rows = [11, 0, 5, 5, 4]
    assert far.read(3, rows) == pool.read(3, rows)
    far.verify()
    pixels, bad = cache.open_shard(far, 0, 32)
    assert np.array_equal(pixels, IMAGES[:13])
    assert bad == {}
    assert os.listdir(tmp_path / "cache") == [far.fingerprint]


def test_shell_and_chained_urls_are_refused() -> None:
    for url in ("pipe:cat x", "pipe://cat", "| ls", "file://a::http://b", "simplecache::s3://b/c", "git://x"):
        with pytest.raises(UsageError, match="refused"):
            resolve(url)
        with pytest.raises(UsageError, match="refused"):
            Pool.open(url)


def test_names_resolve(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLIER_POOLS", os.path.dirname(pool.path))
    assert resolve("pool") == pool.path
    assert resolve(pool.path) == pool.path
    assert resolve("s3://bucket/pool") == "s3://bucket/pool"
    with pytest.raises(UsageError) as error:
        resolve("imagenet")
    assert "python -m pipelines.shard --input IMAGENET/train --name imagenet" in str(error.value)
    with pytest.raises(UsageError, match=r"withdrew .* nothing is downloaded; adopt your own copy"):
        resolve("tiny-images")
    with pytest.raises(UsageError, match="no pool 'nosuch'"):
        resolve("nosuch")
