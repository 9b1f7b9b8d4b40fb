"""Test-time scores: hand values, orientation, reject nets, and a small classifier trained on real digits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miner.errors import MinerError, UsageError
from trainers import models, scores
from trainers.abnormality import Abnormality, digest
from trainers.data import normalise
from trainers.scores import NAMES, Outputs, odin, outputs, probabilities, rise, score

OF_LOGITS = ("msp", "maxlogit", "energy", "neg-entropy", "ce-to-uniform", "objectosphere")
Z_OUT = np.array([[1, 1, 1], [3, 0, 0], [-1, 2, 0.5]])
Z_REJECT = np.array([[2, 0, -1, 0.5], [0.5, 1.5, 0, 1]])  # three classes and the reject output


def said(logits: np.ndarray, features: np.ndarray | None = None) -> Outputs:
    """Outputs of these logits; features of length 1 unless given."""
    return Outputs(np.asarray(logits, float), np.eye(len(logits), dtype=np.float32) if features is None else features)


@pytest.fixture(scope="module")
def net(digits) -> models.Net:
    """Forty steps on the digits, left in train mode: what scores must not depend on."""
    net = models.create("small", 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        rows = torch.randint(len(digits.train_labels), (64,), generator=generator).numpy()
        logits = net(normalise(torch.from_numpy(digits.train_images[rows])))
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(digits.train_labels[rows])).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net


@pytest.fixture(scope="module")
def out(net, digits) -> Outputs:
    return outputs(net, digits.test_images)


def with_reject(net: models.Net) -> models.Net:
    """The same net with an eleventh, reject output that is loud and knows nothing of the rest."""
    wider = models.create("small", 11)
    state = net.state_dict()
    torch.manual_seed(0)
    state["head.weight"] = torch.cat([state["head.weight"], torch.randn(1, net.feature_dim)])
    state["head.bias"] = torch.cat([state["head.bias"], torch.tensor([2.0])])
    wider.load_state_dict(state)
    return wider


# --- hand values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("msp", [1 / 3, np.exp(3) / (np.exp(3) + 2), np.exp(2) / (np.exp(-1) + np.exp(2) + np.exp(0.5))]),
        ("maxlogit", [1, 3, 2]),
        ("energy", [2.098612, 3.094923, 2.241311]),
        ("neg-entropy", [-1.098612, -0.366594, -0.621585]),
        ("ce-to-uniform", [1.098612, 2.094923, 1.741311]),
    ],
)
def test_scores_by_hand(name, values):
    found = score(name, said(Z_OUT), 3)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, values, atol=5e-7)


def test_objectosphere_is_msp_times_length_of_the_features():
    features = np.array([[3, 4], [0.6, 0.8], [0, 2]], np.float32)
    found = score("objectosphere", said(Z_OUT, features), 3)
    np.testing.assert_allclose(found, score("msp", said(Z_OUT), 3) * [5, 1, 2], rtol=1e-6)


def test_the_reject_output_is_cut_off_before_the_softmax():
    msp = score("msp", said(Z_REJECT), 3)
    np.testing.assert_allclose(msp, [0.843795, 0.628532], atol=5e-7)
    late = probabilities(Z_REJECT, 4)[:, :3].max(axis=1)
    np.testing.assert_allclose(late, [0.710100, 0.455054], atol=5e-7)  # what must not be reported
    np.testing.assert_allclose(probabilities(Z_REJECT, 3).sum(axis=1), 1)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_reject_output_changes_no_other_score(name):
    loud = np.column_stack([Z_OUT, [900.0, -900, 3]])
    np.testing.assert_array_equal(score(name, said(loud), 3), score(name, said(Z_OUT), 3))


def test_reject_score_is_minus_the_probability_of_the_reject_class():
    found = score("reject", said(Z_REJECT), 3)
    exponentials = np.exp(Z_REJECT)
    np.testing.assert_allclose(found, -exponentials[:, 3] / exponentials.sum(axis=1))
    assert found[0] > found[1]  # less rejected is more in-distribution
    np.testing.assert_allclose(found, -(1 - probabilities(Z_REJECT, 4)[:, :3].sum(axis=1)))


def test_confident_scores_higher_than_flat():
    sure, flat = [9.0, 0, 0, -9], [0.0, 0, 0, 5]
    for name in (*OF_LOGITS, "reject"):
        found = score(name, said(np.array([sure, flat])), 3)
        assert found[0] > found[1], name


@pytest.mark.parametrize(
    ("name", "moved"),
    [("msp", 0), ("neg-entropy", 0), ("ce-to-uniform", 0), ("reject", 0), ("maxlogit", 7.25), ("energy", 7.25)],
)
def test_a_constant_on_all_logits_moves_energy_and_maxlogit_alone(name, moved):
    classes = 3 if name == "reject" else 4
    before, after = score(name, said(Z_REJECT), classes), score(name, said(Z_REJECT + 7.25), classes)
    np.testing.assert_allclose(after, before + moved, rtol=1e-12, atol=1e-12)


def test_far_logits_neither_overflow_nor_tie_early():
    far = np.array([[2000.0, 0, -2000], [-2000, -2000, -2000], [30, 0, 0], [31, 0, 0]])
    for name in OF_LOGITS:
        assert np.isfinite(score(name, said(far), 3)).all()
    msp = score("msp", said(far), 3)
    assert msp[2] < msp[3] < 1  # float32 has 1.0 for both


# --- a real classifier -----------------------------------------------------------------------------------------------


def test_outputs_are_those_of_eval_mode_and_leave_the_net_as_it_was(net, out, digits):
    assert net.training
    before = {name: value.clone() for name, value in net.state_dict().items()}
    again = outputs(net, digits.test_images)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    np.testing.assert_array_equal(again.logits, out.logits)
    assert (out.logits.dtype, out.features.dtype) == (np.float64, np.float32)
    assert (out.logits.shape, out.features.shape) == ((500, 10), (500, net.feature_dim))
    assert (out.logits.argmax(axis=1) == digits.test_labels).mean() > 0.6
    net.eval()
    with torch.no_grad():
        exact = net(normalise(torch.from_numpy(digits.test_images))).numpy()
    net.train()
    np.testing.assert_allclose(out.logits, exact, atol=0.02 * np.abs(exact).max())  # the trunk may be bfloat16
    weight, bias = (value.detach().double().numpy() for value in (net.head.weight, net.head.bias))
    np.testing.assert_allclose(out.logits, out.features @ weight.T + bias, atol=1e-4)  # the head is not


def test_outputs_do_not_depend_on_the_batch_and_take_read_only_maps(net, out, digits, tmp_path):
    np.save(tmp_path / "images.npy", digits.test_images[:130])
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    found = outputs(net, mapped, batch=32)
    assert found.logits.shape == (130, 10)
    np.testing.assert_allclose(found.logits, out.logits[:130], atol=0.02 * np.abs(out.logits).max())
    assert odin(net, mapped, 10, batch=64).shape == (130,)


def test_probabilities_are_the_softmax(out, digits):
    found = probabilities(out.logits, 10)
    assert (found.dtype, found.shape) == (np.float64, (500, 10))
    np.testing.assert_allclose(found, torch.from_numpy(out.logits).softmax(dim=1).numpy(), rtol=1e-12)


def test_what_is_right_scores_higher_than_what_is_wrong(out, digits):
    right = out.logits[:, :10].argmax(axis=1) == digits.test_labels
    for name in ("msp", "neg-entropy", "ce-to-uniform"):
        values = score(name, out, 10)
        assert np.median(values[right]) > np.median(values[~right]), name


# --- ODIN ------------------------------------------------------------------------------------------------------------


def test_odin_without_step_and_temperature_is_msp(net, out, digits):
    msp = score("msp", out, 10)
    same = score("odin", out, 10, net=net, images=digits.test_images, temperature=1, epsilon=0)
    np.testing.assert_array_equal(same, msp)
    hot = score("odin", out, 10, net=net, images=digits.test_images, epsilon=0)
    scaled = out.logits / 1000
    np.testing.assert_allclose(hot, np.exp(scaled.max(axis=1)) / np.exp(scaled).sum(axis=1), rtol=1e-12)
    assert hot.max() < 0.15  # all near 1/10: ranked by the logits' differences, not by the softmax


@pytest.mark.parametrize("epsilon", [0.0014, 0.05])
def test_odins_step_raises_the_confidence(net, out, digits, epsilon):
    msp = score("msp", out, 10)
    moved = score("odin", out, 10, net=net, images=digits.test_images, temperature=1, epsilon=epsilon)
    assert (moved >= msp).mean() > 0.95  # a step down the gradient would lower nearly all
    assert (moved - msp).mean() > 0.5 * epsilon
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


class Tiny(models.Net):
    """A smooth net of 4 px images, for differences in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.feature_dim = 7
        self.first, self.head = nn.Linear(48, 7), nn.Linear(7, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x.flatten(1)))


@pytest.mark.parametrize(("temperature", "classes"), [(1.0, 5), (10.0, 5), (1000.0, 4)])
def test_odins_direction_by_finite_differences(temperature, classes):
    net = Tiny().double()
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def confidence(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return (net(pixels)[:, :classes] / temperature).log_softmax(dim=1).amax(dim=1)

    found = rise(net, x, classes, temperature).flatten(1)
    differences = torch.empty_like(found)
    for pixel in range(48):
        step = torch.zeros(48, dtype=torch.float64)
        step[pixel] = 1e-5
        differences[:, pixel] = confidence(x + step.view(3, 4, 4)) - confidence(x - step.view(3, 4, 4))
    assert torch.equal(found, differences.sign())
    assert 0.2 < (found > 0).double().mean() < 0.8
    assert not x.requires_grad
    assert (confidence(x + 1e-3 * found.view_as(x)) > confidence(x)).all()


def test_odin_moves_the_pixels_by_epsilon_in_normalised_units(net, digits):
    images, epsilon = digits.test_images[:50], 0.1
    x = normalise(torch.from_numpy(images))
    net.eval()
    moved = x + epsilon * rise(net, x, 10, 1000.0)
    with torch.no_grad():
        expected = (net(moved).double() / 1000).softmax(dim=1).amax(dim=1).numpy()
        still = (net(x).double() / 1000).softmax(dim=1).amax(dim=1).numpy()
    net.train()
    found = odin(net, images, 10, epsilon=epsilon)
    assert np.abs(found - expected).max() < 0.1 * np.abs(found - still).mean()  # the trunk may be bfloat16


def test_odin_knows_nothing_of_the_reject_output(net, digits):
    images = digits.test_images[:60]
    wider = with_reject(net)
    for temperature, epsilon in ((1000.0, 0.0014), (1.0, 0.05)):
        np.testing.assert_array_equal(
            odin(wider, images, 10, temperature, epsilon), odin(net, images, 10, temperature, epsilon)
        )


def test_scores_of_a_reject_net_are_those_of_its_classes(net, digits):
    images = digits.test_images[:60]
    plain, wider = outputs(net, images), outputs(with_reject(net), images)
    assert wider.logits.shape == (60, 11)
    for name in OF_LOGITS:
        np.testing.assert_allclose(score(name, wider, 10), score(name, plain, 10), rtol=1e-5, err_msg=name)
    rejected = score("reject", wider, 10)
    assert rejected.min() >= -1
    assert rejected.max() <= 0
    assert np.corrcoef(rejected, wider.logits[:, 10])[0, 1] < 0


# --- abnormality, errors ---------------------------------------------------------------------------------------------


def test_abnormality_is_the_modules_probability_of_normal(net, out, digits):
    torch.manual_seed(0)
    module = Abnormality(net.feature_dim, 10, 32, digest(net)).eval()
    images = digits.test_images[:40]
    found = score("abnormality", out, 10, net=net, images=images, module=module)
    assert (found.dtype, found.shape) == (np.float64, (40,))
    np.testing.assert_array_equal(found, module.risk(net, images))


def test_scores_that_cannot_be_given_are_refused(net, out, digits):
    images = digits.test_images[:5]
    with pytest.raises(UsageError, match="score 'mps': unknown; choose from msp, maxlogit"):
        score("mps", out, 10)
    with pytest.raises(UsageError, match="score reject: this classifier has no reject output"):
        score("reject", out, 10)
    for name in ("odin", "abnormality"):
        with pytest.raises(UsageError, match=f"score {name}: needs the net and the images"):
            score(name, out, 10, net=net)
        with pytest.raises(UsageError, match=f"score {name}: needs the net and the images"):
            score(name, out, 10, images=images)
    with pytest.raises(UsageError, match="needs an abnormality module"):
        score("abnormality", out, 10, net=net, images=images)
    for settings in ({"temperature": 0}, {"temperature": float("nan")}, {"epsilon": -0.1}):
        with pytest.raises(UsageError, match="odin temperature"):
            score("odin", out, 10, net=net, images=images, **settings)


def test_every_name_is_a_score(net, digits):
    images = digits.test_images[:30]
    wider = with_reject(net)
    given = {"net": wider, "images": images, "module": Abnormality(net.feature_dim, 11, 32, digest(wider))}
    for name in NAMES:
        found = score(name, outputs(wider, images), 10, **given)
        assert (found.shape, found.dtype) == ((30,), np.float64), name
        assert np.isfinite(found).all(), name
        assert len(np.unique(found)) > 20, name


def test_broken_outputs_are_refused(net, digits):
    for classes in (1, 4):
        with pytest.raises(MinerError, match=rf"logits \[3, 3\]: {classes} classes need as many outputs"):
            score("msp", said(Z_OUT), classes)
    with pytest.raises(MinerError, match="logits: some are not finite"):
        score("energy", said(np.where(Z_OUT == 3, np.nan, Z_OUT)), 3)
    with pytest.raises(MinerError, match="no images to score"):
        outputs(net, digits.test_images[:0])
    assert net.training
    diverged = models.create("small", 10)
    with torch.no_grad():
        diverged.head.bias[3] = float("inf")
    with pytest.raises(MinerError, match="the classifier diverged"):
        scores.odin(diverged, digits.test_images[:5], 10)
