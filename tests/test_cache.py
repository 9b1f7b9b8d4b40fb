"""Decoding hostile and unusual images, and the decoded cache."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miner import cache
from miner.build import finish, prepare, run_job, write_arrays_pool
from miner.images import decode, dimensions, png
from miner.pool import Pool
from miner.recipe import Recipe
from miner.tars import TarWriter, read_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return write_arrays_pool(str(tmp_path / "pool"), "noise", IMAGES, np.arange(50) % 3, ["a", "b", "c"])


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(side: int = 16384) -> bytes:
    """A PNG of side x side grey pixels, all zero, in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes((side + 1) * 1024)) for _ in range(side // 1024)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [16384, 8192, 9000])
def test_bombs_are_refused_from_their_header(side: int) -> None:
    data = bomb(side)
    assert len(data) < 300_000
    with pytest.raises(ValueError, match=r"pixels|Bomb"):
        decode(data, 32)
    assert dimensions(data) == (0, 0)


def test_every_mode_becomes_rgb() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.stack([grey, 255 - grey, grey // 2], axis=2)
    rgba = np.dstack([rgb, np.full_like(grey, 255)])
    tripled = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(decode(saved(Image.fromarray(rgb)), 16), rgb)
    assert np.array_equal(decode(saved(Image.fromarray(rgb), "WEBP", lossless=True), 16), rgb)
    assert np.array_equal(decode(saved(Image.fromarray(rgba)), 16), rgb)
    assert np.array_equal(decode(saved(Image.fromarray(grey)), 16), tripled)
    assert np.array_equal(decode(saved(Image.fromarray(grey).convert("LA")), 16), tripled)
    assert np.array_equal(decode(saved(Image.fromarray(grey).convert("P")), 16), tripled)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert np.array_equal(decode(saved(deep), 16), tripled)
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode(saved(cmyk, "JPEG"), 16).astype(int) - [255, 0, 0]).max() <= 4
    palette = Image.fromarray(grey).convert("P")
    assert np.array_equal(decode(saved(palette, transparency=b"\0\1\2"), 16), tripled)


def test_the_centre_square_is_kept() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (decode(saved(Image.fromarray(wide)), 20) == 200).all()
    assert (decode(saved(Image.fromarray(wide.transpose(1, 0, 2))), 20) == 200).all()
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 120, 3), np.uint8))
    shrunk = np.asarray(noise.resize((30, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(saved(noise), 10), shrunk[:, 10:20])
    assert decode(saved(Image.new("RGB", (1, 5000))), 32).shape == (32, 32, 3)


def broken_tar(folder: Path) -> list[bytes]:
    noise = saved(Image.fromarray(IMAGES[0]), "JPEG")
    data = [
        noise,
        noise[: len(noise) // 2],
        b"GIF89a not allowed",
        bomb(),
        b"",
        saved(Image.fromarray(IMAGES[1])),
    ]
    os.makedirs(folder)
    with TarWriter(folder / "000000.tar") as tar:
        for i, (content, ext) in enumerate(zip(data, ["jpg", "jpg", "jpg", "png", "png", "png"], strict=True)):
            tar.write(f"{i}.{ext}", content)
    assert len(read_samples(folder / "000000.tar")) == 6
    return data


def test_undecodable_images_cost_one_row_each(tmp_path: Path) -> None:
    broken_tar(tmp_path / "tars")
    recipe, folder = Recipe("tars", (str(tmp_path / "tars"),)), str(tmp_path / "pool")
    plan = prepare(recipe, folder)
    assert [run_job(folder, job) for job in plan.jobs] == [6]
    pool = finish(recipe, folder, "broken", plan)
    assert pool.index()["width"].to_pylist() == [32, 32, 0, 0, 0, 32]
    pixels, bad = cache.open_shard(pool, 0, 32)
    assert sorted(bad) == [1, 2, 3, 4]
    assert "truncated" in bad[1]
    assert all(len(reason.splitlines()) == 1 for reason in bad.values())
    assert not pixels[1:5].any()
    assert np.array_equal(pixels[5], IMAGES[1])


def test_the_cache_is_built_once_and_rebuilt_when_it_does_not_fit(pool: Pool) -> None:
    pixels, _ = cache.open_shard(pool, 1, 32)
    assert np.array_equal(pixels, IMAGES[13:26])
    assert isinstance(pixels, np.memmap)
    assert not pixels.flags.writeable
    path, note = Path(pool.path, "cache/32/000001.npy"), Path(pool.path, "cache/32/000001.json")
    first = path.stat().st_ino
    cache.open_shard(pool, 1, 32)
    assert path.stat().st_ino == first
    for damage in (
        lambda: note.write_text(note.read_text().replace(pool.shards[1].sha256, "0" * 64)),
        lambda: note.write_text("{"),
        lambda: os.truncate(path, 5000),
        lambda: os.truncate(path, 0),
        lambda: np.save(path, IMAGES[:5]),
        note.unlink,
    ):
        damage()
        again, _ = cache.open_shard(pool, 1, 32)
        assert np.array_equal(again, IMAGES[13:26])
    small, _ = cache.open_shard(pool, 1, 16)
    assert np.array_equal(small[0], decode(png(IMAGES[13]), 16))


def test_a_stop_between_note_and_pixels_is_no_cache(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.open_shard(pool, 1, 32)
    path, note = Path(pool.path, "cache/32/000001.npy"), Path(pool.path, "cache/32/000001.json")
    np.save(path, np.zeros_like(IMAGES[13:26]))  # of another pool that lay here before
    note.write_text(note.read_text().replace(pool.shards[1].sha256, "0" * 64))
    replace = os.replace

    def stop(source: str, target: str) -> None:
        if target.endswith(".npy"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.open_shard(pool, 1, 32)
    assert json.loads(note.read_text())["sha256"] == pool.shards[1].sha256
    pixels, _ = cache.open_shard(pool, 1, 32)
    assert np.array_equal(pixels, IMAGES[13:26])


def test_a_pool_that_cannot_be_written_is_cached_elsewhere(pool: Pool, tmp_path: Path) -> None:
    pixels, _ = cache.open_shard(pool, 0, 32, str(tmp_path / "else"))
    assert np.array_equal(pixels, IMAGES[:13])
    assert os.listdir(tmp_path / "else") == [pool.fingerprint]
    assert not os.path.exists(os.path.join(pool.path, "cache"))


@pytest.mark.parametrize("rows", [[3, 4, 5, 6], [0], [12], [5, 9, 7], [7, 6, 5], [4, 4, 5], [2, 4, 6], []])
def test_rows_that_follow_each_other_are_lent_without_a_copy(pool: Pool, rows: list[int]) -> None:
    images = cache.open_shard(pool, 0, 32)[0]
    lent = cache.Lender().lend(images, np.array(rows, np.int32))
    np.testing.assert_array_equal(lent, IMAGES[np.array(rows, np.int64)])
    assert np.shares_memory(lent, images) == (rows in ([3, 4, 5, 6], [0], [12]))
    cache.let_go(images)
    np.testing.assert_array_equal(lent, IMAGES[np.array(rows, np.int64)])  # it is read from the file once more
