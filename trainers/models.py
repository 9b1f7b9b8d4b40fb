"""Image classifiers, written from their papers; each is ``head(features(x))`` over flat features.

All take float32 [n, 3, S, S] with S a multiple of 8 (the last pooling is global) and are made by ``create``.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miner.errors import UsageError


class Net(nn.Module):
    """``forward(x) == head(features(x))``: logits [n, classes]; features are float [n, feature_dim]."""

    feature_dim: int
    head: nn.Linear
    body: nn.Sequential
    cuts: tuple[int, int]  # how much of ``body`` lies before the end of stage 1 and of stage 2

    def features(self, x: Tensor) -> Tensor:
        return _global_mean(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def described(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, D], and what each image looks like at every depth: float32 [n, 2 (3 + C1 + C2 + D)].

        That is the mean and the standard deviation over positions of the input and of the maps behind every stage.
        """
        maps = [x]
        for start, stop in pairwise((0, *self.cuts, len(self.body))):
            maps.append(self.body[start:stop](maps[-1]))
        looks = [part for m in maps for part in (_global_mean(m.float()), _deviation(m.float()))]
        return _global_mean(maps[-1]), torch.cat(looks, dim=1)

    def mixed_features(self, inside: Tensor, outside: Tensor, lam: float, layer: int) -> Tensor:
        """Features [2B, D] of ``inside`` and of the mixture lam inside + (1 - lam) outside, in one batch.

        They are mixed in the input (``layer`` 0) or behind stage 1 or 2, up to where the outliers go along
        with the ID images (OpenMix's manifold variant).
        """
        cut = (0, *self.cuts)[layer]
        both = torch.cat([inside, outside])
        inside, outside = self.body[:cut](both).chunk(2)
        return _global_mean(self.body[cut:](torch.cat([inside, lam * inside + (1 - lam) * outside])))


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _global_mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation over positions; 0 of a single position, which the last map of images of 8 px is."""
    positions = x.flatten(2)
    return positions.std(dim=2) if positions.shape[2] > 1 else torch.zeros_like(positions[:, :, 0])


class Small(Net):
    """Plain 3x3 convolutions with BatchNorm and pooling: made so that a run on CPU cores is practical."""

    def __init__(self, classes: int, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        ends = []
        inputs = 3
        for width, convs in zip(widths, (1, 2, 2), strict=True):
            for i in range(convs):
                layers.append(_conv(inputs, width))
                if i == 0:  # pooled before BatchNorm and ReLU: these cost more than the convolution on a CPU
                    layers.append(nn.MaxPool2d(2))
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            ends.append(len(layers))
        self.body = nn.Sequential(*layers)
        self.cuts = (ends[0], ends[1])
        self.feature_dim = inputs
        self.head = nn.Linear(inputs, classes)


class _WideBlock(nn.Module):
    """BN-ReLU-conv, dropout, BN-ReLU-conv; where the shape changes the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.dropout(F.relu(self.norm2(self.conv1(active))))
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(Net):
    """WRN-depth-widen (Zagoruyko & Komodakis 2016, arXiv 1605.07146, table 1)."""

    def __init__(self, depth: int, widen: int, classes: int, dropout: float) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(_WideBlock(inputs, width * widen, stride if i == 0 else 1, dropout))
                inputs = width * widen
        self.body = nn.Sequential(_conv(3, 16), *blocks, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.cuts = (1 + len(blocks) // 3, 1 + 2 * len(blocks) // 3)
        self.dropout = dropout
        self.feature_dim = inputs
        self.head = nn.Linear(inputs, classes)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(Net):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) with a 3x3 stem and no first pooling, as used on CIFAR."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
        inputs = 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [_BasicBlock(inputs, width, stride), _BasicBlock(width, width, 1)]
            inputs = width
        self.body = nn.Sequential(*layers)
        self.cuts = (5, 7)
        self.feature_dim = inputs
        self.head = nn.Linear(inputs, classes)


class _DenseLayer(nn.Module):
    """BN-ReLU-1x1 to 4 growth, BN-ReLU-3x3 to growth; the result is appended to the input's channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), _conv(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))], dim=1)


class DenseNetBC(Net):
    """DenseNet-BC (Huang et al. 2017, arXiv 1608.06993): three dense blocks, compression 0.5."""

    def __init__(self, depth: int, growth: int, classes: int) -> None:
        super().__init__()
        inputs = 2 * growth
        layers: list[nn.Module] = [_conv(3, inputs)]
        ends = []
        for block in range(3):
            if block:
                layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), _conv(inputs, inputs // 2, 1)]
                layers.append(nn.AvgPool2d(2))
                inputs //= 2
                ends.append(len(layers))
            for _ in range((depth - 4) // 6):
                layers.append(_DenseLayer(inputs, growth))
                inputs += growth
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.cuts = (ends[0], ends[1])
        self.feature_dim = inputs
        self.head = nn.Linear(inputs, classes)


_MAKERS: dict[str, Callable[[int], Net]] = {
    "small": Small,
    "medium": lambda classes: Small(classes, (32, 96, 256)),
    "wrn-40-2": lambda classes: WideResNet(40, 2, classes, dropout=0.0),
    "wrn-40-4": lambda classes: WideResNet(40, 4, classes, dropout=0.3),
    "wrn-28-10": lambda classes: WideResNet(28, 10, classes, dropout=0.3),
    "resnet18": ResNet18,
    "densenet-bc-100": lambda classes: DenseNetBC(100, 12, classes),
}
NAMES: tuple[str, ...] = tuple(_MAKERS)


def create(name: str, classes: int, seed: int = 0) -> Net:
    """A fresh net on the CPU; equal seeds give equal weights. Raises UsageError for an unknown name."""
    if name not in _MAKERS:
        raise UsageError(f"model {name!r}: unknown; choose one of {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MAKERS[name](classes)
