"""Raw layouts adopted in place: tiny_images.bin with its exclusion list, and .npy arrays."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miner import cache
from miner.build import finish, prepare, run_job
from miner.errors import MinerError
from miner.pool import Pool, uid_of
from miner.recipe import Recipe

RNG = np.random.default_rng(1)


def make(recipe: Recipe, folder: Path) -> Pool:
    plan = prepare(recipe, str(folder))
    for job in plan.jobs:
        run_job(str(folder), job)
    return finish(recipe, str(folder), "raw", plan)


def test_tiny_images_in_place_with_an_exclusion_list(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (10, 32, 32, 3), np.uint8)
    path = tmp_path / "tiny_images.bin"
    path.write_bytes(b"".join(image.tobytes(order="F") for image in images))
    record = np.frombuffer(path.read_bytes()[3072:6144], np.uint8).reshape(32, 32, 3, order="F")
    assert np.array_equal(record, images[1])
    (tmp_path / "list.txt").write_text("1\n10\n\n4\n")
    recipe = Recipe("tiny-images", (str(path),), exclude_list=str(tmp_path / "list.txt"), per_shard=4)
    pool = make(recipe, tmp_path / "pool")
    assert [shard.count for shard in pool.shards] == [4, 4, 2]
    excluded = pool.index(["excluded_by"])["excluded_by"].to_pylist()
    assert [i for i, why in enumerate(excluded) if why == "exclude-list"] == [0, 3, 9]
    assert excluded.count(None) == 7
    pixels = [cache.open_shard(pool, shard, 32)[0] for shard in range(3)]
    assert np.array_equal(np.concatenate(pixels), images)
    assert not any(part.flags.owndata or part.flags.writeable for part in pixels)
    assert not (tmp_path / "pool" / "cache").exists()
    assert pool.index(["uid"])["uid"][5].as_py() == uid_of(images[5].tobytes(order="F"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(pool.read(1, [2])[0]))), images[6])
    small, _ = cache.open_shard(pool, 2, 16)
    assert np.array_equal(small[1], np.asarray(Image.fromarray(images[9]).resize((16, 16), Image.Resampling.BILINEAR)))
    pool.verify()
    with open(path, "r+b") as file:
        file.seek(4 * 3072 + 5)
        file.write(bytes([images[4].tobytes(order="F")[5] ^ 1]))
    with pytest.raises(MinerError, match=r"tiny_images\.bin: its bytes changed .*shard 000001"):
        pool.verify()


@pytest.mark.parametrize("line", ["0", "11", "x", "1.0", "-3"])
def test_exclusion_lists_that_do_not_fit_name_the_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "tiny_images.bin").write_bytes(bytes(30720))
    (tmp_path / "list.txt").write_text(f"1\n{line}\n")
    recipe = Recipe("tiny-images", (str(tmp_path / "tiny_images.bin"),), exclude_list=str(tmp_path / "list.txt"))
    with pytest.raises(MinerError, match=r"list\.txt: line 2: .* no image number from 1 to 10"):
        make(recipe, tmp_path / "pool")


def test_npy_in_place(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (9, 20, 32, 3), np.uint8)
    np.save(tmp_path / "a.npy", images[:5])
    np.save(tmp_path / "b.npy", images[5:])
    pool = make(Recipe("npy", (str(tmp_path / "a.npy"), str(tmp_path / "b.npy")), per_shard=3), tmp_path / "pool")
    assert [shard.count for shard in pool.shards] == [3, 2, 3, 1]
    assert np.array_equal(np.concatenate([pool.records(shard) for shard in range(4)]), images)
    assert pool.index(["key"])["key"].to_pylist() == [f"{i:09d}" for i in range(9)]
    assert cache.open_shard(pool, 3, 32)[0].shape == (1, 32, 32, 3)
    pool.verify()


class Touchy:
    """Unpickling this makes a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_npy_of_other_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays: dict[str, np.ndarray] = {
        "float": np.zeros((2, 4, 4, 3)),
        "fortran": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)),
        "grey": np.zeros((2, 4, 4), np.uint8),
        "object": np.array([Touchy()], object),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(MinerError, match=f"{name}.npy: .*wanted a C-ordered uint8 array"):
            make(Recipe("npy", (f"{name}.npy",)), tmp_path / "pool")
    np.save(tmp_path / "short.npy", np.zeros((2, 4, 4, 3), np.uint8))
    os.truncate(tmp_path / "short.npy", 150)
    with pytest.raises(MinerError, match=r"short\.npy: 150 bytes where its header says 224"):
        make(Recipe("npy", ("short.npy",)), tmp_path / "pool")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(MinerError, match=r"text\.npy: no readable \.npy header"):
        make(Recipe("npy", ("text.npy",)), tmp_path / "pool")
    assert not (tmp_path / "unpickled").exists()
    assert not (tmp_path / "pool").exists()
