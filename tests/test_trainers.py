"""ID sets, augmentation, pre-training, the joint step, fine-tuning and checkpoints, on real images."""

import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, QUICK, silent

from miner.errors import MinerError, UsageError
from miner.images import png
from miner.tars import TarWriter
from trainers import models
from trainers.checkpoint import load_checkpoint, load_net, save_checkpoint
from trainers.config import PretrainConfig
from trainers.data import IdSet, augment, load_id, normalise
from trainers.fit import pretrain
from trainers.scores import outputs
from trainers.train import accuracy, autocast, joint_step, place, predict, uniformity


@pytest.fixture(scope="module")
def real(digits, tmp_path_factory) -> IdSet:
    """600 CIFAR-10 images of $OUTLIER_DATA, else the digits."""
    if "OUTLIER_DATA" not in os.environ:
        return cut(digits, 600)
    source, folder = Path(os.environ["OUTLIER_DATA"]) / "cifar10", tmp_path_factory.mktemp("cifar10")
    names = [path.name for split in ("train", "test") for path in source.glob(f"{split}-000000.tar*")]
    assert names, f"{source}: no train-000000.tar or test-000000.tar"
    for name in [*names, "classes.json"]:
        (folder / name).symlink_to((source / name).resolve())
    loaded = load_id(str(folder))
    assert loaded.classes[:2] == ("airplane", "automobile")
    assert np.bincount(loaded.train_labels).tolist() == [500] * 10
    return cut(loaded, 600)


def cut(id_set: IdSet, n: int) -> IdSet:
    return dataclasses.replace(
        id_set,
        train_images=id_set.train_images[:n],
        train_labels=id_set.train_labels[:n],
        test_images=id_set.test_images[:n],
        test_labels=id_set.test_labels[:n],
    )


@pytest.fixture
def folder(tmp_path, digits) -> Path:
    """A small ID set as tars, 20 train and 10 test digits."""
    halves = {
        "train": (digits.train_images[:20], digits.train_labels),
        "test": (digits.test_images[:10], digits.test_labels),
    }
    for split, (images, labels) in halves.items():
        write_tar(tmp_path / f"{split}-000000.tar", images, labels)
    (tmp_path / "classes.json").write_text(json.dumps([{"index": i, "name": c} for i, c in enumerate(digits.classes)]))
    return tmp_path


def write_tar(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    with TarWriter(path) as tar:
        for row, image in enumerate(images):
            tar.write(f"{row:06d}.png", png(image))
            tar.write(f"{row:06d}.cls", str(labels[row]).encode())


# ID sets


def test_folder_of_tars_gives_its_pixels_and_labels(folder, digits):
    loaded = load_id(str(folder))
    assert loaded.classes == digits.classes
    assert np.array_equal(loaded.train_images, digits.train_images[:20])
    assert np.array_equal(loaded.train_labels, digits.train_labels[:20])
    assert np.array_equal(loaded.test_labels, digits.test_labels[:10])
    assert loaded.train_labels.dtype == np.int64
    assert loaded.flip


def test_packed_tars_give_the_same_set(folder):
    plain = load_id(str(folder))
    for tar in list(folder.glob("*.tar")):
        with open(tar, "rb") as source, gzip.open(f"{tar}.gz", "wb") as target:
            shutil.copyfileobj(source, target)
    assert len(load_id(str(folder)).train_labels) == 20  # beside its plain tar, a packed one is not read twice
    for tar in list(folder.glob("*.tar")):
        tar.unlink()
    before = sorted(folder.iterdir())
    assert load_id(str(folder)).fingerprint == plain.fingerprint
    assert sorted(folder.iterdir()) == before


def test_fingerprint_changes_with_one_label(folder, digits):
    before = load_id(str(folder)).fingerprint
    labels = digits.test_labels[:10].copy()
    labels[3] = (labels[3] + 1) % 10
    write_tar(folder / "test-000000.tar", digits.test_images[:10], labels)
    assert load_id(str(folder)).fingerprint != before
    assert len(before) == 32


def test_other_size(folder):
    assert load_id(str(folder), size=16).train_images.shape == (20, 16, 16, 3)


def test_demo_is_never_mirrored(digits):
    assert not digits.flip
    assert digits.train_images.shape == (1297, 32, 32, 3)


@pytest.mark.parametrize(
    ("name", "flip"),
    [("MNIST", False), ("svhn_32", False), ("my-EMNIST", False), ("Fashion-MNIST", True), ("PathMNIST", True)],
)
def test_sets_of_characters_are_told_by_a_word_of_their_name(folder, tmp_path_factory, name, flip):
    named = tmp_path_factory.mktemp("named") / name
    folder.rename(named)
    assert load_id(str(named)).flip is flip


def test_missing_tars_and_classes_are_named(folder):
    (folder / "test-000000.tar").unlink()
    with pytest.raises(MinerError, match=r"no test-\*\.tar or test-\*\.tar\.gz in it"):
        load_id(str(folder))
    (folder / "classes.json").unlink()
    with pytest.raises(MinerError, match=r"classes\.json: missing; write the class names there"):
        load_id(str(folder))


@pytest.mark.parametrize("text", ["{", "3", '["one"]', '[{"index": 1, "name": "a"}, {"index": 0, "name": "b"}]'])
def test_bad_classes_are_one_line(folder, text):
    (folder / "classes.json").write_text(text)
    with pytest.raises(MinerError, match=r"classes\.json: .*JSON"):
        load_id(str(folder))


def test_label_outside_the_classes_is_named(folder, digits):
    write_tar(folder / "train-000001.tar", digits.train_images[:2], np.array([3, 10]))
    with pytest.raises(MinerError, match=r"train-000001\.tar: 000001: label 10; classes\.json has labels 0 to 9"):
        load_id(str(folder))


def test_image_that_does_not_decode_is_named_even_in_a_packed_tar(folder, digits):
    write_tar(folder / "bad.tar", digits.train_images[:1], np.array([0]))
    with TarWriter(folder / "bad.tar") as tar:
        tar.write("cat.png", b"no png")
        tar.write("cat.cls", b"1")
    (folder / "train-000001.tar.gz").write_bytes(gzip.compress((folder / "bad.tar").read_bytes()))
    with pytest.raises(MinerError, match=r"train-000001\.tar\.gz: cat: does not decode"):
        load_id(str(folder))


def test_broken_gzip_and_broken_tar_name_the_file_of_the_user(folder):
    packed = gzip.compress(os.urandom(4000))
    (folder / "train-000001.tar.gz").write_bytes(packed[:2000])
    with pytest.raises(MinerError, match=r"train-000001\.tar\.gz: cut off or corrupt gzip"):
        load_id(str(folder))
    (folder / "train-000001.tar.gz").write_bytes(packed)
    with pytest.raises(MinerError, match=rf"^{folder}/train-000001\.tar\.gz: "):
        load_id(str(folder))


def test_unknown_id_set_names_the_choices():
    with pytest.raises(UsageError, match=r"'cifar11': no such folder; .* demo, or one of cifar10, cifar100, svhn"):
        load_id("cifar11")


def test_download_that_fails_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OUTLIER_DATASETS", str(tmp_path / "file"))
    with pytest.raises(MinerError, match=r"file: cannot download cifar10 \(.*\); put it there yourself") as caught:
        load_id("cifar10")
    assert "\n" not in str(caught.value)


# Pixels


def test_normalise_is_the_papers_and_channels_last():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    x = normalise(pixels)
    expected = ((pixels.double() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x.double(), expected, atol=1e-6)


def test_augment_gives_true_windows_and_repeats(real):
    images = torch.from_numpy(real.train_images[:100])
    one, two = (augment(images, torch.Generator().manual_seed(3), flip=True) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, augment(images, torch.Generator().manual_seed(4), flip=True))
    padded = F.pad(images, (0, 0, 4, 4, 4, 4))
    seen = set()
    for row in range(100):
        views = {
            (y, x, mirror): (
                padded[row, y : y + 32, x : x + 32].flip(1) if mirror else padded[row, y : y + 32, x : x + 32]
            )
            for y in range(9)
            for x in range(9)
            for mirror in (False, True)
        }
        found = [place for place, view in views.items() if torch.equal(view, one[row])]
        assert found, f"image {row}: no window of it"
        seen.add(found[0])
    assert len(seen) > 60  # of 162 places, 100 draws hit about 74
    assert {mirror for _, _, mirror in seen} == {False, True}


def test_augment_without_flip_never_mirrors(digits):
    ramp = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).repeat(64, 32, 1, 3) + 1
    views = augment(ramp, torch.Generator().manual_seed(0), flip=False)[:, 16, 4:28, 0].int()
    assert (views.diff(dim=1) == 1).all()


# Training


def test_uniformity_golden_values():
    z = torch.tensor([[2.0, 0.0, -1.0], [0.3, 0.3, 0.3]])
    assert uniformity(z).tolist() == pytest.approx([0.737900, 0.0], abs=1e-6)


def test_pretraining_learns_and_repeats_bit_for_bit(real):
    reports: list[dict] = []
    nets = [models.create("small", len(real.classes), seed=1) for _ in range(2)]
    results = [pretrain(nets[0], real, QUICK, 7, CPU, reports.append)]
    torch.manual_seed(99)  # the global generator must not matter
    results.append(pretrain(nets[1], real, QUICK, 7, CPU, silent))
    for one, two in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert results[0]["loss"] == results[1]["loss"] < 2.25  # log 10 = 2.303
    assert results[0]["accuracy"] > 0.15
    assert results[0]["accuracy"] == accuracy(nets[0], real.test_images, real.test_labels)
    last = reports[-1]
    assert (last["phase"], last["epoch"], last["step"]) == ("pretrain", 3, last["steps"])
    assert last["images_per_s"] > 0
    assert last["seconds_left"] == 0
    other = models.create("small", len(real.classes), seed=1)
    pretrain(other, real, QUICK, 8, CPU, silent)
    assert not torch.equal(other.head.weight, nets[0].head.weight)


def test_read_only_arrays_as_ray_gives_them(digits):
    frozen = dataclasses.replace(cut(digits, 64), train_images=digits.train_images[:64].copy())
    frozen.train_images.flags.writeable = False
    result = pretrain(models.create("small", 10), frozen, PretrainConfig(epochs=1, batch=64), 0, CPU, silent)
    assert result["images"] == 64
    assert np.array_equal(frozen.train_images, digits.train_images[:64])


def test_dropout_repeats_with_the_seed(digits):
    short = PretrainConfig(epochs=1, batch=8)
    few = cut(digits, 16)
    weights = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        net = models.create("wrn-40-4", 10, seed=1)
        pretrain(net, few, short, 7, CPU, silent)
        weights.append(net.head.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 1}, {"lr": 0.0}, {"lr": float("nan")}, {"warmup": 1.0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        PretrainConfig(**wrong)


def test_diverging_pretraining_says_where_and_what_to_do(digits):
    net = models.create("small", 10)
    config = PretrainConfig(epochs=3, batch=64, lr=1e30, warmup=0.01)
    with pytest.raises(MinerError, match=r"training, epoch \d+, step \d+: the loss is not finite \(ce .*lower .*--lr"):
        pretrain(net, cut(digits, 600), config, 0, CPU, silent)


def test_joint_step_is_the_hand_computed_one(real):
    x = normalise(torch.from_numpy(real.train_images[:24]))
    y = torch.from_numpy(real.train_labels[:16])
    factors = torch.linspace(0.1, 2.0, 8)
    nets = [place(models.create("small", 10, seed=1), CPU).eval() for _ in range(2)]
    with autocast(CPU):
        z = nets[0](x).float()
    losses = torch.logsumexp(z[16:], 1) - z[16:].mean(1) - np.log(10)
    cross_entropy = -z[:16].log_softmax(1)[torch.arange(16), y].mean()
    (cross_entropy + 0.7 * (factors * losses).sum() / 8).backward()
    optimizer = torch.optim.SGD(nets[1].parameters(), lr=0.1)
    value, given = joint_step(nets[1], optimizer, x[:16], y, x[16:], factors, 0.7)
    assert value == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert torch.allclose(given, losses.detach(), atol=1e-5)
    assert not given.requires_grad
    for before, after in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(after, before - 0.1 * before.grad, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(nets[0].buffers(), nets[1].buffers(), strict=True))


def test_joint_step_without_factors_weighs_all_alike(real):
    x = normalise(torch.from_numpy(real.train_images[:24]))
    y = torch.from_numpy(real.train_labels[:16])
    heads = []
    for factors in (None, torch.ones(8), torch.zeros(8)):
        net = place(models.create("small", 10, seed=1), CPU).eval()
        joint_step(net, torch.optim.SGD(net.parameters(), lr=0.1), x[:16], y, x[16:], factors, 0.5)
        heads.append(net.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_joint_step_refuses_a_loss_that_is_not_finite_and_keeps_the_net(real):
    net = place(models.create("small", 10), CPU)
    before = net.head.weight.clone()
    x, y = normalise(torch.from_numpy(real.train_images[:8])), torch.from_numpy(real.train_labels[:4])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(MinerError, match=r"joint step: the loss became nan; lower the learning rate"):
        joint_step(net, optimizer, x[:4], y, x[4:], torch.full((4,), float("nan")), 0.5)
    assert torch.equal(net.head.weight, before)


# Checkpoints

META = {"model": "small", "classes": list("0123456789"), "accuracy": 0.5, "seed": 3}


def test_checkpoint_round_trip(tmp_path, digits):
    net = models.create("small", 10, seed=4)
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, net, META)
    state, meta = load_checkpoint(path)
    assert meta == META
    assert state.keys() == net.state_dict().keys()
    loaded, _ = load_net(path, "small", digits.classes)
    images = torch.from_numpy(digits.test_images[:32])
    assert torch.equal(predict(net, images), predict(loaded, images))
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


def test_predictions_are_those_of_the_evaluation(digits, monkeypatch):
    monkeypatch.setattr("trainers.train.amp_dtype", lambda device: torch.bfloat16)  # slow without its instructions
    net = models.create("small", 10, seed=4)
    found = predict(net, torch.from_numpy(digits.test_images[:64]))
    assert np.array_equal(found.double().numpy(), outputs(net, digits.test_images[:64]).logits)
    assert not torch.equal(found, found.bfloat16().float())


def test_placed_net_saves_the_same_bytes(tmp_path):
    net = models.create("small", 10, seed=4)
    save_checkpoint(tmp_path / "a", net, META)
    save_checkpoint(tmp_path / "b", place(net, CPU), META)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pickles_are_refused_with_the_way_out(tmp_path):
    net = models.create("small", 10)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    (tmp_path / "net.pt").rename(tmp_path / "net.safetensors")  # told by its bytes, not by its name
    (tmp_path / "old.pth").write_bytes(b"whatever")
    for name in ("net.safetensors", "old.pth"):
        with pytest.raises(MinerError, match=rf"{name}: a pickle, which can run code .*safetensors\.torch\.save_file"):
            load_checkpoint(tmp_path / name)


def test_broken_and_missing_checkpoints_are_one_line(tmp_path):
    save_checkpoint(tmp_path / "net", models.create("small", 10), META)
    (tmp_path / "cut").write_bytes((tmp_path / "net").read_bytes()[:5000])
    with pytest.raises(MinerError, match=r"cut: not a sound safetensors file"):
        load_checkpoint(tmp_path / "cut")
    with pytest.raises(MinerError, match=r"none: no such checkpoint file"):
        load_checkpoint(tmp_path / "none")


def test_checkpoint_for_other_classes_or_model_is_refused(tmp_path):
    path = tmp_path / "net"
    save_checkpoint(path, models.create("small", 10), META)
    with pytest.raises(MinerError, match=r"net: made for 10 classes, the ID set has 3; pre-train anew"):
        load_net(path, "small", ["a", "b", "c"])
    with pytest.raises(MinerError, match=r"net: class 9 is '9', the ID set's 'x'; pre-train anew"):
        load_net(path, "small", list("012345678x"))
    with pytest.raises(MinerError, match=r"net: holds small, not resnet18; pass --model small"):
        load_net(path, "resnet18", list("0123456789"))
    save_checkpoint(path, models.create("resnet18", 10), {})
    for reject in (False, True):
        with pytest.raises(MinerError, match=r"net: shape of .* is .*, in small .*; pre-train anew"):
            load_net(path, "small", list("0123456789"), reject)
