"""The abnormality module: a frozen classifier, repeatable training, better scores than MSP, files tied to their net."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import CPU, QUICK, silent
from sklearn.metrics import roc_auc_score

from miner import demo
from miner.errors import MinerError, UsageError
from trainers import models
from trainers.abnormality import (
    GRID,
    Abnormality,
    digest,
    distort,
    load_abnormality,
    save_abnormality,
    train_abnormality,
)
from trainers.abnormality_config import AbnormalityConfig
from trainers.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from trainers.data import IdSet, normalise
from trainers.fit import pretrain
from trainers.train import place, predict

SHORT = AbnormalityConfig(decoder_epochs=6, risk_epochs=3)
BRIEF = AbnormalityConfig(decoder_epochs=1, risk_epochs=1, batch=48)


@pytest.fixture(scope="module")
def few(digits) -> IdSet:
    return dataclasses.replace(digits, train_images=digits.train_images[:200], train_labels=digits.train_labels[:200])


@pytest.fixture(scope="module")
def net(digits) -> models.Net:
    made = models.create("small", 10, seed=0)
    pretrain(made, digits, QUICK, 0, CPU, silent)
    return made.eval()


@pytest.fixture(scope="module")
def trained(net, digits) -> Abnormality:
    return train_abnormality(net, digits, SHORT, 0, CPU, silent)[0]


@pytest.fixture(scope="module")
def brief(net, few) -> Abnormality:
    return train_abnormality(net, few, BRIEF, 0, CPU, silent)[0]


def msp(net: models.Net, images: np.ndarray) -> np.ndarray:
    return predict(net, torch.from_numpy(images)).double().softmax(1).amax(1).numpy()


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    return float(roc_auc_score([1] * len(inside) + [0] * len(outside), np.concatenate([inside, outside])))


def brightness(odd: np.ndarray) -> np.ndarray:
    return odd.astype(np.float64).mean(axis=(1, 2, 3))


# What it is for


def test_risk_beats_msp_on_held_out_and_on_far_families(net, trained, digits):
    far = {family: demo.draw(family, 200, 99) for family in sorted(demo.FAR)}
    inside, plain = trained.risk(net, digits.test_images), msp(net, digits.test_images)
    for sets, gain in ((demo.held_out(), 0.05), (far, 0.1)):
        ours = [auroc(inside, trained.risk(net, images)) for images in sets.values()]
        theirs = [auroc(plain, msp(net, images)) for images in sets.values()]
        assert np.mean(ours) > np.mean(theirs) + gain
        assert min(ours) > 0.8


def test_real_outliers_take_the_place_of_distorted_images(net, trained, digits):
    outliers = demo.draw("seven-segment", 50, 0)
    brief = dataclasses.replace(SHORT, decoder_epochs=2)
    shown, _ = train_abnormality(net, digits, brief, 0, CPU, silent, outliers)  # 90 steps of 84: the 50 are cycled
    inside = digits.test_images
    noise = np.random.default_rng(0).normal(0, 75, inside.shape)
    noisy = (inside + noise).clip(0, 255).astype(np.uint8)
    for odd, told, untold in ((demo.draw("seven-segment", 200, 99), shown, trained), (noisy, trained, shown)):
        better, worse = (auroc(module.risk(net, inside), module.risk(net, odd)) for module in (told, untold))
        assert better > 0.95
        assert better > worse + 0.03


def test_risk_is_a_probability_of_normal_whatever_the_batch(net, brief, digits):
    risk = brief.risk(net, digits.test_images[:70])
    assert risk.dtype == np.float64
    assert risk.shape == (70,)
    assert ((risk > 0) & (risk < 1)).all()
    assert np.allclose(risk, brief.risk(net, digits.test_images[:70], batch=32), atol=1e-5)
    frozen = digits.test_images[:70].copy()
    frozen.flags.writeable = False
    assert np.array_equal(risk, brief.risk(net, frozen))


# The net stays, the module repeats


def test_net_changes_in_no_bit(digits, few):
    net = place(models.create("small", 10, seed=3), CPU).train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    before = digest(net)
    module, _ = train_abnormality(net, few, BRIEF, 0, CPU, silent)
    module.risk(net, few.test_images)
    assert digest(net) == before
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    with torch.no_grad():
        next(net.buffers())[0] += 1e-6
    assert digest(net) != before


def test_both_phases_learn_and_repeat_for_a_seed(net, few, brief):
    torch.manual_seed(99)  # the global generator must not matter
    again, _ = train_abnormality(net, few, BRIEF, 0, CPU, silent)
    other, _ = train_abnormality(net, few, BRIEF, 1, CPU, silent)
    for name, value in brief.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(brief.from_logits.weight, other.from_logits.weight)
    reports: list[dict] = []
    longer = dataclasses.replace(BRIEF, decoder_epochs=4, risk_epochs=4)
    _, found = train_abnormality(net, few, longer, 0, CPU, reports.append)
    x = normalise(torch.from_numpy(few.train_images))
    assert found["decoder_loss"] < 0.9 * x.square().mean().item()
    assert found["risk_loss"] < 0.6  # a third is normal: 0.637 is what a constant reaches
    assert found["seconds"] > 0
    last = {report["phase"]: report for report in reports}
    assert list(last) == ["decoder", "risk"]
    assert [(r["step"], r["steps"], r["epoch"]) for r in last.values()] == [(16, 16, 4), (48, 48, 4)]


def test_decoder_does_not_move_in_the_second_phase(net, few):
    states = []
    for epochs in (1, 2):
        config = dataclasses.replace(BRIEF, risk_epochs=epochs)
        states.append(train_abnormality(net, few, config, 0, CPU, silent)[0].state_dict())
    same = {name: torch.equal(states[0][name], states[1][name]) for name in states[0]}
    assert all(same[name] for name in same if name.startswith("decoder."))
    assert not any(same[name] for name in same if not name.startswith("decoder."))


# The arithmetic


def test_forward_is_the_papers_formula(net, brief, digits):
    x = normalise(torch.from_numpy(digits.test_images[:6]))
    with torch.no_grad():
        features = net.features(x).float()
        logits = net.head(features)
        drawn = brief.decoder(features).view(6, 3, 32, 32)
        cells = ((x - drawn) ** 2).reshape(6, 3, GRID, 4, GRID, 4).mean(dim=(3, 5)).flatten(1)
        parts = logits @ brief.from_logits.weight.T + brief.from_logits.bias
        parts = parts + cells @ brief.from_error.weight.T + features @ brief.from_features.weight.T
        hidden = torch.nn.functional.gelu(parts) @ brief.head[1].weight.T + brief.head[1].bias
        odds = torch.nn.functional.gelu(hidden) @ brief.head[3].weight[0]
        assert torch.allclose(brief(x, features, logits), odds, atol=1e-4)
    assert np.allclose(brief.risk(net, digits.test_images[:6]), odds.double().sigmoid().numpy(), atol=0.02)  # bfloat16


def test_weights_do_not_grow_with_large_images():
    count = {size: sum(p.numel() for p in Abnormality(128, 10, size, "").parameters()) for size in (16, 32, 224)}
    assert count[16] < count[32] == count[224] < 1_300_000
    x, features = torch.rand(2, 3, 64, 64), torch.rand(2, 128)
    module = Abnormality(128, 10, 64, "")
    seen = torch.nn.functional.avg_pool2d(x, 2)
    expected = (seen - module.decoder(features).view(2, 3, 32, 32)) ** 2
    assert torch.allclose(module.error(x, features), expected, atol=1e-6)


def test_distorted_images_are_a_third_each_and_repeat(digits):
    images = torch.from_numpy(digits.train_images[:90])
    one, two = (distort(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.dtype == torch.uint8
    assert torch.equal(one, two)
    assert not torch.equal(one, distort(images, torch.Generator().manual_seed(4)))
    noisy, blurred, turned = one.split(30)
    deviations = (noisy.float() - images[:30]).flatten(1).std(dim=1)
    assert deviations.min() > 5  # 0.05 * 255 less what is cut off at black and white
    assert deviations.max() < 160
    # Blur moves light without making it, and takes detail away.
    assert np.allclose(brightness(blurred.numpy()), brightness(images[30:60].numpy()), atol=20)
    details = [views.float().diff(dim=1).abs().flatten(1).mean(dim=1) for views in (blurred, images[30:60])]
    assert (details[0] < details[1]).all()
    left, right = (images[60:].rot90(k, (1, 2)) for k in (1, 3))
    is_left, is_right = ((turned == side).flatten(1).all(dim=1) for side in (left, right))
    assert (is_left | is_right).all()
    assert is_left.any()
    assert is_right.any()
    flat = torch.full((9, 16, 16, 3), 77, dtype=torch.uint8)
    assert (distort(flat, torch.Generator().manual_seed(0))[3:] == 77).all()  # no edge darkens


# Files


def test_file_brings_back_the_same_scores(tmp_path, net, brief, digits):
    path = tmp_path / "module.safetensors"
    save_abnormality(path, brief, {"id": "demo", "seed": 0})
    assert load_checkpoint(path)[1] == {"id": "demo", "seed": 0, "abnormality": {"size": 32, "trunk": digest(net)}}
    save_checkpoint(tmp_path / "net", net, {})
    copy = models.create("small", 10)
    copy.load_state_dict(load_checkpoint(tmp_path / "net")[0])
    loaded = load_abnormality(path, copy.eval())
    assert np.array_equal(loaded.risk(copy, digits.test_images[:50]), brief.risk(net, digits.test_images[:50]))
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["module.safetensors", "net"]


def test_digest_is_of_the_weights_not_of_their_layout():
    net = models.create("small", 10, seed=4)
    before = digest(net)
    assert digest(place(net, CPU)) == before
    assert len(before) == 32
    assert digest(models.create("small", 10, seed=5)) != before


def test_another_net_is_refused(tmp_path, brief, digits):
    path = tmp_path / "module.safetensors"
    save_abnormality(path, brief, {})
    other = models.create("small", 10, seed=9)
    with pytest.raises(MinerError, match=r"module\.safetensors: trained over another classifier; train a module"):
        load_abnormality(path, other)
    with pytest.raises(MinerError, match="trained over another classifier; train one over this checkpoint"):
        brief.risk(other, digits.test_images)


def test_files_that_hold_no_module_are_one_line(tmp_path, net):
    save_checkpoint(tmp_path / "net", net, {"model": "small"})
    with pytest.raises(MinerError, match="net: holds no abnormality module; name a file of save_abnormality"):
        load_abnormality(tmp_path / "net", net)
    for size in (32, 16, "wide", None):  # a net's tensors, with a claim to be a module
        save_checkpoint(tmp_path / "odd", net, {"abnormality": {"trunk": digest(net), "size": size}})
        with pytest.raises(MinerError, match=r"odd: its tensors make no abnormality module; [^\n]*$"):
            load_abnormality(tmp_path / "odd", net)
    torch.save({}, tmp_path / "module.pt")
    with pytest.raises(MinerError, match=r"module\.pt: a pickle"):
        load_abnormality(tmp_path / "module.pt", net)


# Bad input


def test_no_outliers_and_wrong_sizes_are_refused(net, few, brief):
    for shape, line in (((0, 32, 32, 3), "0 outliers; give some"), ((5, 16, 16, 3), r"outliers \[5, 16, 16, 3\]")):
        with pytest.raises(MinerError, match=f"abnormality module: {line}"):
            train_abnormality(net, few, BRIEF, 0, CPU, silent, np.zeros(shape, np.uint8))
    with pytest.raises(MinerError, match=r"images \[2, 40, 40, 3\], ID images \[\*, 32, 32, 3\]; resize to 32 px"):
        brief.risk(net, np.zeros((2, 40, 40, 3), np.uint8))


def test_divergence_says_where_and_what_to_do(net, few):
    wild = dataclasses.replace(BRIEF, decoder_epochs=3, lr=1e30)
    with pytest.raises(MinerError, match=r"abnormality decoder, epoch \d, step \d: the loss became (nan|inf); lower"):
        train_abnormality(net, few, wild, 0, CPU, silent)


@pytest.mark.parametrize("wrong", [{"decoder_epochs": 0}, {"risk_epochs": 0}, {"batch": 2}, {"lr": float("nan")}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", " ")):
        AbnormalityConfig(**wrong)


def test_batches_larger_than_the_set(net, few):
    tiny = dataclasses.replace(few, train_images=few.train_images[:5])
    module, report = train_abnormality(net, tiny, BRIEF, 0, CPU, silent)
    assert np.isfinite([report["decoder_loss"], report["risk_loss"]]).all()
    assert np.isfinite(module.risk(net, few.test_images[:3])).all()


def test_the_command_leaves_a_module_beside_the_checkpoint(tmp_path, net, digits):
    meta = {"model": "small", "classes": list(digits.classes), "id": "demo", "size": 32}
    save_checkpoint(tmp_path / "checkpoint.safetensors", net, meta)
    words = [sys.executable, "-m", "pipelines.abnormality", str(tmp_path)]
    done = subprocess.run([*words, "--decoder-epochs=1", "--risk-epochs=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, _ = open_checkpoint(tmp_path)
    module = load_abnormality(tmp_path / "abnormality.safetensors", loaded)
    assert module.risk(loaded, digits.test_images[:8]).min() >= 0
    np.save(tmp_path / "leak.npy", digits.test_images[:30])
    refused = subprocess.run([*words, "--outliers", str(tmp_path / "leak.npy")], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "30 of 30 outliers are also in the ID test set" in refused.stderr
