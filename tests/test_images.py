"""Pixels of encoded images: whatever decodes them, they are PIL's, and so is the verdict on damaged ones."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miner import images
from miner.images import decode
from miner.tars import read_samples


def by_pil(data: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | str:
    with monkeypatch.context() as patch:
        patch.setattr(images, "_jpeg", lambda data: None)
        return outcome(data, size)


def outcome(data: bytes, size: int) -> np.ndarray | str:
    try:
        return decode(data, size)
    except ValueError as error:
        return re.sub("0x[0-9a-f]+", "", str(error))  # PIL names a buffer by its address


def jpeg(side: int, seed: int, mode: str = "RGB", **how: object) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (side, side + 3), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    small.convert(mode).save(buffer, "JPEG", **how)
    return buffer.getvalue()


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    side=st.integers(1, 80),
    size=st.sampled_from([8, 32]),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
)
def test_jpegs_have_pils_pixels(
    side: int, size: int, mode: str, quality: int, subsampling: int, progressive: bool
) -> None:
    how = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    data = jpeg(side, side, mode, **how)
    with pytest.MonkeyPatch.context() as patch:
        np.testing.assert_array_equal(decode(data, size), by_pil(data, size, patch))
    assert (images._jpeg(data) is None) == (mode == "CMYK")


@settings(max_examples=1000, derandomize=True, database=None, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), way=st.integers(0, 2), value=st.integers(0, 255))
def test_damaged_jpegs_get_pils_verdict(at: float, way: int, value: int) -> None:
    data = bytearray(jpeg(40, 1, quality=80, restart_marker_blocks=2))
    place = int(at * len(data))
    if way == 0:
        data[place] = value
    else:
        data = data[:place] if way == 1 else data[:place] + data[place + 7 :]
    with pytest.MonkeyPatch.context() as patch:
        np.testing.assert_equal(outcome(bytes(data), 32), by_pil(bytes(data), 32, patch))


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", None)
    with pytest.raises(ValueError, match="at most 100"):
        decode(jpeg(11, 0), 8)


def test_real_jpegs_have_pils_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.environ.get("OUTLIER_DATA")
    if root is None:
        pytest.skip("OUTLIER_DATA names no folder of real tars")
    tar = Path(root) / "tinyimagenet64" / "train-000000.tar"
    whole = tar.read_bytes()
    found = [whole[sample.offset : sample.offset + sample.size] for sample in read_samples(tar)[:500]]
    for data in found:
        np.testing.assert_array_equal(decode(data, 32), by_pil(data, 32, monkeypatch))
    assert sum(images._jpeg(data) is not None for data in found) == 500
