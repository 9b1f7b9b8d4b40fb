"""The embedded demo: digits, the drawn pool and the held-out families."""

import time

import numpy as np
import pytest

from miner import demo
from miner.demo_draw import bilinear, count_blocks, stroke_masks
from miner.errors import UsageError


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray]:
    return demo.pool_arrays()


@pytest.fixture(scope="module")
def held_out() -> dict[str, np.ndarray]:
    return demo.held_out()


def as_bytes(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_digits_are_split_by_class_and_disjoint() -> None:
    train, train_labels, test, test_labels, classes = demo.digits()
    assert train.shape == (1297, 32, 32, 3)
    assert test.shape == (500, 32, 32, 3)
    assert train.dtype == test.dtype == np.uint8
    assert train_labels.dtype == test_labels.dtype == np.int64
    assert classes == tuple("0123456789")
    assert np.bincount(test_labels).tolist() == [50] * 10
    assert np.bincount(train_labels).min() >= 120
    assert not as_bytes(train) & as_bytes(test)


def test_digits_keep_every_image_and_its_label() -> None:
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    wanted = sorted((label, image.tobytes()) for image, label in zip(levels.astype(np.uint8), labels, strict=True))
    train, train_labels, test, test_labels, _ = demo.digits(size=8)
    images = np.concatenate([train, test])[..., 0]
    # At 8 px nothing is interpolated, so the levels can be had back.
    back = np.rint(images.reshape(-1, 64) * (16 / 255)).astype(np.uint8)
    found = zip(np.concatenate([train_labels, test_labels]), back, strict=True)
    assert sorted((label, image.tobytes()) for label, image in found) == wanted


def test_digits_are_white_on_black_and_grey() -> None:
    train = demo.digits()[0]
    assert train.max() == 255
    assert train.min() == 0
    assert (train[..., 0] == train[..., 1]).all()
    assert (train[..., 0] == train[..., 2]).all()
    assert train[:, 8:24, 8:24].mean() > 2 * train[:, :, :4].mean()


def test_digits_in_other_sizes() -> None:
    large, small = demo.digits(size=64)[0], demo.digits(size=32)[0]
    assert large.shape == (1297, 64, 64, 3)
    halved = large.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - small).max() < 20
    with pytest.raises(UsageError, match="8 or more, not 7"):
        demo.digits(size=7)


def test_bilinear_is_that_of_pillow() -> None:
    from PIL import Image

    grid = np.random.default_rng(0).integers(0, 256, (1, 8, 8))
    ours = bilinear(grid, 32)[0] / 64**2
    picture = Image.fromarray(grid[0].astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(ours, np.asarray(picture), atol=1e-3)


def test_a_stroke_lies_where_it_was_asked_for() -> None:
    start, end = np.array([[[-12.0, -8.0]]]), np.array([[[12.0, -8.0]]])
    mask = stroke_masks(start, end, np.array([4.0]))[0]
    assert mask[6:9, 6:26].all()
    assert not mask[12:].any()
    assert count_blocks(mask[None]).sum() == mask.sum()


def test_pool_is_large_and_mostly_far(pool: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = pool
    assert images.shape == (21000, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    share = dict(zip(demo.FAMILIES, np.bincount(labels, minlength=len(demo.FAMILIES)) / len(labels), strict=True))
    assert sum(share[family] for family in demo.FAR) > 0.7
    assert all(0 < share[family] < 0.04 for family in demo.NEAR)
    assert not demo.FAR & demo.NEAR
    # Shuffled: every tenth of the pool holds every family.
    assert all(len(set(part)) == len(demo.FAMILIES) for part in np.array_split(labels, 10))


def test_same_seed_same_bytes_and_another_seed_others(pool: tuple[np.ndarray, np.ndarray]) -> None:
    again_images, again_labels = demo.pool_arrays()
    assert np.array_equal(pool[0], again_images)
    assert np.array_equal(pool[1], again_labels)
    for family in demo.FAMILIES:
        assert np.array_equal(demo.draw(family, 20, seed=3), demo.draw(family, 20, seed=3))
        assert not np.array_equal(demo.draw(family, 20, seed=3), demo.draw(family, 20, seed=4))


def test_pool_is_made_in_seconds() -> None:
    start = time.process_time()
    demo.pool_arrays(seed=5)
    assert time.process_time() - start < 30


@pytest.mark.parametrize("family", demo.FAMILIES)
def test_every_family_varies(family: str) -> None:
    images = demo.draw(family, 200, seed=0)
    assert images.shape == (200, 32, 32, 3)
    assert images.dtype == np.uint8
    spread = np.ptp(images.reshape(200, -1), axis=1)
    assert (spread > 0).all()
    assert np.median(spread) > 30
    assert len(as_bytes(images)) >= 195


def test_pool_repeats_itself_hardly(pool: tuple[np.ndarray, np.ndarray]) -> None:
    assert len(as_bytes(pool[0])) > 0.99 * len(pool[0])


def test_draw_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match="no demo family 'dogs'"):
        demo.draw("dogs", 3, seed=0)
    with pytest.raises(UsageError, match="1 or more, not 0"):
        demo.draw("noise", 0, seed=0)


def test_more_mirrored_digits_than_there_are_repeat() -> None:
    images = demo.draw("mirrored-digits", 4000, seed=0)
    assert len(images) == 4000
    assert 2000 < len(as_bytes(images)) < 4000


def test_near_families_have_the_sharpness_of_digits() -> None:
    def steps(images: np.ndarray) -> float:
        grey = images[..., 0].astype(np.int64)
        return float(np.abs(np.diff(grey, axis=2)).max(axis=(1, 2)).mean())

    of_digits = steps(demo.digits()[0])
    for family in demo.NEAR | {"scribbles"}:
        assert 0.75 < steps(demo.draw(family, 300, seed=0)) / of_digits < 1.25
    assert steps(demo.draw("shapes", 300, seed=0)) > 1.25 * of_digits


def test_held_out_families(held_out: dict[str, np.ndarray]) -> None:
    assert tuple(held_out) == demo.HELD_OUT
    assert not set(demo.HELD_OUT) & set(demo.FAMILIES)
    again, other = demo.held_out(), demo.held_out(seed=2)
    for name, images in held_out.items():
        assert images.shape == (400, 32, 32, 3)
        assert images.dtype == np.uint8
        assert (np.ptp(images.reshape(400, -1), axis=1) > 0).all()
        assert np.array_equal(images, again[name])
        assert not np.array_equal(images, other[name])
        assert len(as_bytes(images)) >= 390


def test_id_pool_and_held_out_share_no_image(
    pool: tuple[np.ndarray, np.ndarray], held_out: dict[str, np.ndarray]
) -> None:
    train, _, test, _, _ = demo.digits()
    of_id, of_pool = as_bytes(train) | as_bytes(test), as_bytes(pool[0])
    of_held_out = as_bytes(np.concatenate(list(held_out.values())))
    assert not of_id & of_pool
    assert not of_id & of_held_out
    assert not of_pool & of_held_out


@pytest.mark.parametrize("family", ["mirrored-digits", "broken-digits"])
def test_digits_of_the_pool_come_from_the_train_split(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = demo._split()
    before = demo.draw(family, 300, seed=0)
    monkeypatch.setattr(demo, "_split", lambda: (*split[:2], split[2][:0], split[3][:0]))
    assert np.array_equal(before, demo.draw(family, 300, seed=0))


def test_seven_segments_show_no_digit() -> None:
    # 0 top, 1 upper right, 2 lower right, 3 bottom, 4 lower left, 5 upper left, 6 middle.
    lit = ["012345", "12", "01346", "01236", "1256", "02356", "023456", "012", "0123456", "012356"]
    patterns = {sum(1 << int(segment) for segment in shown) for shown in lit}
    assert patterns <= demo.SEGMENT_DIGITS
    assert demo.SEGMENTS[0].tolist() == [-8, -14, 8, -14]
    assert demo.SEGMENTS[6].tolist() == [-8, 0, 8, 0]
