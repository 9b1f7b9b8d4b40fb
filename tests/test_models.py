"""The nets: sizes known from their papers, the features/head split, losses that ignore batch-mates."""

import pytest
import torch

from miner.errors import UsageError
from trainers import models
from trainers.train import autocast, place, uniformity

MILLIONS = {  # for 10 classes
    "small": (0.1, 0.5),
    "medium": (0.92, 0.93),
    "wrn-40-2": (2.24, 2.25),
    "wrn-40-4": (8.94, 8.97),
    "wrn-28-10": (36.4, 36.6),
    "resnet18": (11.16, 11.18),
    "densenet-bc-100": (0.76, 0.78),
}


def images(n: int, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def test_every_model_has_a_known_size():
    assert set(MILLIONS) == set(models.NAMES)


@pytest.mark.parametrize("name", models.NAMES)
def test_parameter_count(name):
    low, high = MILLIONS[name]
    assert low < sum(p.numel() for p in models.create(name, 10).parameters()) / 1e6 < high


@pytest.mark.parametrize("name", models.NAMES)
def test_forward_is_head_of_features(name):
    net = models.create(name, 7).eval()
    x = images(2)
    with torch.no_grad():
        features = net.features(x)
        assert features.shape == (2, net.feature_dim)
        assert torch.equal(net(x), net.head(features))
        assert net(x).shape == (2, 7)


def test_convolutions_see_the_whole_image():
    # 64 px goes through the same net: pooling is global, so only the feature map grows.
    net = models.create("small", 10).eval()
    with torch.no_grad():
        assert net(images(2, 64)).shape == (2, 10)


@pytest.mark.parametrize("name", ["small", "wrn-40-4", "densenet-bc-100"])
def test_eval_mode_loss_does_not_depend_on_batch_mates(name):
    # Sharding the pool is exact only if this holds (frozen BatchNorm, no dropout).
    net = models.create(name, 10)
    with torch.no_grad():
        net(images(16) + 0.5)  # running statistics other than the initial ones
        net.eval()
        x = images(8) * torch.linspace(0.2, 4, 8).view(8, 1, 1, 1)
        together = uniformity(net(x))
        alone = torch.cat([uniformity(net(row[None])) for row in x])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std() > 1e-3


def test_mixed_precision_loss_stays_near_float32():
    net = place(models.create("small", 10), torch.device("cpu"))
    x = images(64)
    with torch.no_grad():
        net(x)
        net.eval()
        exact = uniformity(net(x))
        with autocast(torch.device("cpu")):
            mixed = uniformity(net(x))
    assert mixed.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, mixed]))[0, 1] > 0.99


def test_dropout_only_in_the_wide_nets_that_the_paper_drops_in():
    rates = {name: getattr(models.create(name, 10), "dropout", 0.0) for name in ("wrn-40-2", "wrn-40-4", "wrn-28-10")}
    assert rates == {"wrn-40-2": 0.0, "wrn-40-4": 0.3, "wrn-28-10": 0.3}


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (models.create("small", 10, seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_unknown_model_names_the_choices():
    with pytest.raises(UsageError, match=r"'vgg': unknown; choose one of small, medium, wrn-40-2"):
        models.create("vgg", 10)
