"""What the frozen classifier tells of the pool: views, looks, strata behind the guard. A plain class, without Ray."""

import dataclasses
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miner.config import Game
from miner.errors import MinerError
from miner.guard import NO_CLASS
from trainers import models, room
from trainers.actor import Trainer
from trainers.data import IdSet, normalise
from trainers.train import uniformity
from trainers.views import on_device, views


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def trainer(id_set: IdSet, **game: object) -> Trainer:
    return Trainer("small", id_set, seed=2, game=Game(**game))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small_set(digits: IdSet) -> IdSet:
    """A few digits, some of them again as test images."""
    return dataclasses.replace(digits, train_images=digits.train_images[:300], train_labels=digits.train_labels[:300])


def test_views_are_the_mirror_image_and_shifts_reflected_at_the_edge(images: np.ndarray) -> None:
    pixels = torch.from_numpy(images)
    found = [view.numpy() for view in views(pixels, 6, flip=True)]
    assert len(found) == 5
    np.testing.assert_array_equal(found[0], images[:, :, ::-1])
    down_right = found[1]  # the window moves by (2, 1)
    np.testing.assert_array_equal(down_right[:, :-2, :-1], images[:, 2:, 1:])
    np.testing.assert_array_equal(down_right[:, -1, :-1], images[:, -3, 1:])  # reflected about the last row
    assert [view.shape for view in found] == [images.shape] * 5
    assert len(list(views(pixels, 6, flip=False))) == 4
    assert list(views(pixels, 1, flip=True)) == []
    np.testing.assert_array_equal(next(views(pixels, 2, flip=False)), down_right)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_loss_is_the_mean_over_views(small_set: IdSet, images: np.ndarray, count: int) -> None:
    big = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    flipped = dataclasses.replace(small_set, flip=True)
    actor = trainer(flipped, views=count)
    told = actor.score(big, look_up=False)["loss"]
    assert told.dtype == np.float32
    each = []
    with torch.inference_mode():
        for view in (torch.from_numpy(big), *views(torch.from_numpy(big), count, flip=True)):
            features = torch.from_numpy(actor.features(view.numpy()))
            each.append(uniformity(actor.net.head(features)).numpy())
    assert len(each) == count
    np.testing.assert_allclose(told, np.mean(each, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["small", "wrn-40-2", "resnet18"])
def test_looks_are_means_and_deviations_at_every_depth(name: str) -> None:
    net = models.create(name, 10).eval()
    x = normalise(torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)))
    with torch.no_grad():
        features, looks = net.described(x)
        torch.testing.assert_close(features, net.features(x))
    assert looks.dtype == torch.float32
    torch.testing.assert_close(looks[:, :3], x.mean(dim=(2, 3)))
    torch.testing.assert_close(looks[:, 3:6], x.flatten(2).std(dim=2))
    torch.testing.assert_close(looks[:, -2 * net.feature_dim : -net.feature_dim], features)


def test_strata_are_fitted_on_what_the_guard_spares(small_set: IdSet) -> None:
    actor = trainer(small_set)
    near = actor.look_up_id()
    assert near.dtype == np.float32
    assert len(near) == 300
    assert near.max() <= 1.0 + 1e-6
    rng = np.random.default_rng(3)
    far = rng.integers(0, 256, (64, *small_set.train_images.shape[1:]), dtype=np.uint8)
    mixed = np.concatenate([small_set.train_images[:64], far])
    labels = np.repeat(np.array([0, 1], np.int32), 64)
    cosine = [actor.nearest.query(actor.features(part))[2].mean() for part in (mixed[:64], far)]  # type: ignore[union-attr]
    assert cosine[0] > cosine[1]
    threshold = float(np.mean(cosine))
    actor.see(True, True, mixed[:32])  # of a fit that came to nothing
    actor.see(True, True, mixed[:40], mixed[40:64])
    actor.see(False, True, mixed[64:])
    spared = actor.fit_strata(4, threshold, labels)
    actor.see(True, True, far)
    alone = actor.fit_strata(4, np.inf, np.full(64, NO_CLASS, np.int32))
    for one, other in zip(spared, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_dos_clusters_its_unit_features(small_set: IdSet) -> None:
    actor = trainer(small_set, rule="dos")
    actor.look_up_id()
    actor.see(True, True, small_set.train_images)
    strata = actor.fit_strata(5, np.inf, np.zeros(300, np.int32))
    assert strata.centroids.shape == (5, actor.net.feature_dim)
    np.testing.assert_array_equal(strata.axes, np.eye(actor.net.feature_dim))


@pytest.mark.parametrize(("most", "batches"), [(100, [40]), (17, [40, 20, 10, 10, 10, 10])])
def test_a_batch_is_halved_until_it_fits_the_gpu(
    small_set: IdSet, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, most: int, batches: list[int]
) -> None:
    actor, seen = trainer(small_set), []
    actor.at_once, forward = 40, actor.net.features

    def limited(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    expected = actor.features(images)
    monkeypatch.setattr(actor.net, "features", limited)
    np.testing.assert_allclose(actor.features(images), expected, rtol=1e-4, atol=1e-5)
    assert seen == batches
    most = 0
    with pytest.raises(MinerError, match="one image does not fit"):
        actor.features(images)


@pytest.mark.parametrize("what", ["trainers.actor.on_device", "torch.cat", "miner.neighbors.NearestID.query"])
def test_whatever_does_not_fit_the_gpu_is_tried_again(
    small_set: IdSet, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    big = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    actor, calls = trainer(small_set, views=2), []
    actor.look_up_id()
    expected = actor.score(big, look_up=True)
    folder, _, name = what.rpartition(".")
    owner = pkgutil.resolve_name(folder)
    whole = getattr(owner, name)

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails_once)
    found = actor.score(big, look_up=True, key=b"k")
    assert len(calls) > 1
    assert actor.at_once == 128
    assert list(actor.held) == [b"k"]
    assert found.keys() == expected.keys()
    for column, values in expected.items():
        np.testing.assert_allclose(found[column], values, rtol=1e-4, atol=1e-5)


def test_features_of_a_large_set_go_to_the_device_block_by_block(
    small_set: IdSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, sizes = trainer(small_set), []
    whole = actor.features(small_set.train_images)
    assert actor.features(small_set.train_images[:0]).shape == (0, actor.net.feature_dim)

    def seen(images: np.ndarray, device: torch.device) -> torch.Tensor:
        sizes.append(len(images))
        return on_device(images, device)

    monkeypatch.setattr("trainers.actor.on_device", seen)
    monkeypatch.setattr("trainers.actor.block_size", lambda size: 256)
    assert actor.features(small_set.train_images).tobytes() == whole.tobytes()
    assert sizes == [256, 44]


def test_trainers_of_one_machine_share_what_is_free(small_set: IdSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.actor.free_bytes", lambda device: 1200)
    rooms = [Trainer("small", small_set, seed=0, game=Game(), share=share).forget() for share in (1, 2, 3)]
    assert rooms == [(600, False), (300, False), (200, False)]


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (
            "0::/a/b\n",
            {
                "a/memory.max": "5000",
                "a/memory.current": "4500",
                "a/memory.stat": "anon 4000\ninactive_file 400\n",
                "a/b/memory.max": "max",
                "a/b/memory.current": "100",
                "a/b/memory.stat": "inactive_file 0\n",
            },
        ),
        (
            "7:cpu,cpuacct:/x\n4:memory:/docker/77\n0::/\n",  # in a container without a view of the host's groups
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "4500",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 400\n",
            },
        ),
        ("0::/\n", {"memory.max": "5000", "memory.current": "9000", "memory.stat": ""}),
    ],
)
def test_a_containers_limit_counts(
    own: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(room, "OWN", tmp_path / "own")
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    assert room.free_bytes(torch.device("cpu")) == (0 if "9000" in files.values() else 900)
