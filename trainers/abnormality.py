"""The abnormality module (Hendrycks & Gimpel 2017, arXiv 1610.02136, section 4) over any frozen classifier.

A decoder redraws the image from the classifier's penultimate features; a risk head judges, from logits, features
and what the decoder got wrong, how likely the image is a normal one. The classifier itself never changes.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miner.errors import MinerError
from trainers.abnormality_config import AbnormalityConfig
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.data import IdSet, normalise, tensor
from trainers.models import Net
from trainers.train import (
    Meter,
    Progress,
    batches,
    cycle,
    descend,
    eval_mode,
    features_and_logits,
    own_randomness,
    place,
    set_lr,
)

CANVAS = 32  # px; larger images are averaged down to it: the decoder has about a million weights at any size
# The squared error reaches the risk head as its mean in each of 8 x 8 cells and channel. Pixel by pixel, the head
# learns the distortions' own patterns and takes glyphs, whose errors are as large, for normal.
GRID = 8
# From slight to the paper's (0.9 to 1.2 and 5 of 28 px): with fatal ones alone, contrast tells normal from abnormal.
NOISE = (0.05, 1.2)  # standard deviation, as a share of the pixels' range
BLUR = (0.5 / 28, 5 / 28)  # standard deviation, as a share of the image's width


class Abnormality(nn.Module):
    """Decoder 128-256-256 and risk head 512-128-1, for a net with ``feature_dim`` features and ``outputs`` logits.

    ``size``: px of the images. ``trunk``: digest of the net that it was trained over and is good for.
    """

    def __init__(self, feature_dim: int, outputs: int, size: int, trunk: str) -> None:
        super().__init__()
        self.size, self.trunk = size, trunk
        self.canvas = min(size, CANVAS)
        self.decoder = _mlp(feature_dim, 128, 256, 256, 3 * self.canvas**2)
        self.from_logits = nn.Linear(outputs, 512)
        self.from_error = nn.Linear(3 * GRID**2, 512, bias=False)
        self.from_features = nn.Linear(feature_dim, 512, bias=False)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, 1, bias=False))

    def error(self, x: Tensor, features: Tensor) -> Tensor:
        """Squared error of the decoder, float32 [n, 3, C, C] with C = min(S, 32), for normalised x [n, 3, S, S]."""
        seen = F.adaptive_avg_pool2d(x, self.canvas) if x.shape[2] > self.canvas else x
        return (seen - self.decoder(features).view(seen.shape)).square()

    def forward(self, x: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """Log-odds of being normal, float32 [n]: the head of gelu(W1 logits + W2 error + W3 features)."""
        error = F.adaptive_avg_pool2d(self.error(x, features), GRID).flatten(1)
        return self.head(self.from_logits(logits) + self.from_error(error) + self.from_features(features)).squeeze(1)

    @torch.no_grad()
    def risk(self, net: Net, images: np.ndarray, batch: int = 1000) -> np.ndarray:
        """Probability of being NORMAL, float64 [n] in [0, 1], of uint8 images [n, S, S, 3]: higher = more ID.

        The module moves to the net's device. Raises MinerError when ``net`` is not, bit for bit, the one that the
        module was trained over, and for images of another size.
        """
        if digest(net) != self.trunk:
            raise MinerError("abnormality module: trained over another classifier; train one over this checkpoint")
        _check_size("images", images, self.size)
        device = next(net.parameters()).device
        self.to(device)
        with eval_mode(net):
            odds = [self(*_trunk(net, part.to(device))) for part in tensor(np.ascontiguousarray(images)).split(batch)]
        return torch.cat(odds).double().sigmoid().cpu().numpy()


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def digest(net: nn.Module) -> str:
    """BLAKE2b-128 of names, types, shapes and bytes of all parameters and buffers, 32 hex characters."""
    result = hashlib.blake2b(digest_size=16)
    for name, value in sorted(net.state_dict().items()):
        result.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        result.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _check_size(what: str, images: np.ndarray, size: int) -> None:
    if images.shape[1:] != (size, size, 3):
        raise MinerError(
            f"abnormality module: {what} {list(images.shape)}, ID images [*, {size}, {size}, 3]; resize to {size} px"
        )


@torch.no_grad()
def _trunk(net: Net, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised pixels, features and logits, all float32, of uint8 images [n, S, S, 3]."""
    x = normalise(images)
    return x, *features_and_logits(net, x)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Abnormal versions of uint8 images [n, S, S, 3]: a third in noise, a third blurred, a third on their side.

    ``generator`` is a CPU generator wherever the images are, so every device sees the same images.
    """
    noisy, blurred, turned = images.tensor_split(3)
    return torch.cat([_noise(noisy, generator), _blur(blurred, generator), _turn(turned, generator)])


def _uniform(n: int, span: tuple[float, float], generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (span[1] - span[0]) + span[0]


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    levels = 255 * _uniform(len(images), NOISE, generator).view(-1, 1, 1, 1)
    noise = (torch.randn(images.shape, generator=generator) * levels).to(images.device)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def _blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur as two products with an [S, S] matrix an image; its rows sum to 1, so edges do not darken."""
    size = images.shape[1]
    widths = (size * _uniform(len(images), BLUR, generator)).to(images.device).view(-1, 1, 1)
    place = torch.arange(size, device=images.device, dtype=torch.float32)
    weights = F.softmax(-((place[:, None] - place) ** 2) / (2 * widths**2), dim=2)
    blurred = torch.einsum("nyr,nrsc,nxs->nyxc", weights, images.float(), weights)
    return blurred.round().clamp(0, 255).to(torch.uint8)


def _turn(images: Tensor, generator: torch.Generator) -> Tensor:
    left = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(left[:, None, None, None], images.rot90(1, (1, 2)), images.rot90(3, (1, 2)))


def train_abnormality(
    net: Net,
    id_set: IdSet,
    config: AbnormalityConfig,
    seed: int,
    device: torch.device,
    on_progress: Progress,
    outliers: np.ndarray | None = None,
) -> tuple[Abnormality, dict[str, Any]]:
    """Train a module over ``net``; returns it in eval mode, and decoder_loss, risk_loss (last epochs), seconds.

    Abnormal are distorted ID training images or, when given, ``outliers`` uint8 [m, S, S, 3], cycled when fewer
    than a run needs. ``net`` moves to ``device`` and changes in no bit. Bit-identical for the same seed, thread
    count and machine (on CUDA up to its own kernels' order). Raises MinerError for no outliers or some of another
    size and, naming epoch and step, when a loss is not finite.
    """
    size = id_set.train_images.shape[1]
    _check_size("outliers", id_set.train_images if outliers is None else outliers, size)
    if outliers is not None and len(outliers) == 0:
        raise MinerError("abnormality module: 0 outliers; give some, or leave them out to distort ID images instead")
    place(net, device)
    start = time.monotonic()
    with own_randomness(seed, device) as generator, eval_mode(net):
        module = Abnormality(net.feature_dim, net.head.out_features, size, digest(net)).to(device)
        training = _Training(net, module, id_set, outliers, config, generator, on_progress)
        decoder_loss = training.fit("decoder", config.decoder_epochs, module.decoder, training.decoder_loss)
        module.decoder.requires_grad_(False)
        risk_loss = training.fit("risk", config.risk_epochs, module, training.risk_loss)
    return module.eval(), {"decoder_loss": decoder_loss, "risk_loss": risk_loss, "seconds": time.monotonic() - start}


class _Training:
    """The losses of both phases and their common loop. ID images pass the net once: they are never augmented."""

    def __init__(
        self,
        net: Net,
        module: Abnormality,
        id_set: IdSet,
        outliers: np.ndarray | None,
        config: AbnormalityConfig,
        generator: torch.Generator,
        on_progress: Progress,
    ) -> None:
        self.net, self.module, self.config = net, module, config
        self.generator, self.on_progress = generator, on_progress
        self.device = next(net.parameters()).device
        self.images = tensor(id_set.train_images).to(self.device)
        known = [_trunk(net, part)[1:] for part in self.images.split(1000)]
        self.features, self.logits = (torch.cat(parts) for parts in zip(*known, strict=True))
        self.outliers = None if outliers is None else tensor(outliers)
        self.batch = {"decoder": min(config.batch, len(self.images)), "risk": min(config.batch // 3, len(self.images))}
        source = self.images if self.outliers is None else self.outliers
        self.others = cycle(len(source), 2 * self.batch["risk"], generator)

    def fit(self, phase: str, epochs: int, part: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> float:
        """Adam on what of ``part`` is not frozen; returns the mean of ``loss_of`` the rows in the last epoch."""
        optimizer = torch.optim.Adam([p for p in part.parameters() if p.requires_grad], self.config.lr)
        per_epoch = len(self.images) // self.batch[phase]
        steps = per_epoch * epochs
        meter = Meter(phase, epochs, steps, self.on_progress)
        recent: list[float] = []
        for step, rows in enumerate(batches(len(self.images), self.batch[phase], epochs, self.generator)):
            set_lr(optimizer, self.config.lr, step / steps)
            where = f"abnormality {phase}, epoch {step // per_epoch + 1}, step {step % per_epoch + 1}"
            value = descend(optimizer, loss_of(rows.to(self.device)), where)
            recent = [*recent, value][-per_epoch:]
            meter.add(step, len(rows), value)
        return sum(recent) / len(recent)

    def decoder_loss(self, rows: Tensor) -> Tensor:
        """Mean squared error on these ID images."""
        return self.module.error(normalise(self.images[rows]), self.features[rows]).mean()

    def risk_loss(self, rows: Tensor) -> Tensor:
        """Cross-entropy on these ID images and twice as many abnormal ones, as in the paper."""
        normal = normalise(self.images[rows]), self.features[rows], self.logits[rows]
        abnormal = _trunk(self.net, self.abnormal())
        odds = self.module(*(torch.cat(pair) for pair in zip(normal, abnormal, strict=True)))
        target = (torch.arange(len(odds), device=odds.device) < len(rows)).float()
        return F.binary_cross_entropy_with_logits(odds, target)

    def abnormal(self) -> Tensor:
        """The next outliers, or ID images of another shuffle, distorted."""
        rows = next(self.others)
        if self.outliers is not None:
            return self.outliers[rows].to(self.device)
        return distort(self.images[rows.to(self.device)], self.generator)


def save_abnormality(path: str | os.PathLike[str], module: Abnormality, meta: Mapping[str, Any]) -> None:
    """Write the module and ``meta`` (JSON) as safetensors, tied to its net by the net's digest; complete or absent.

    Raises MinerError when the disk is full.
    """
    save_checkpoint(path, module, {**meta, "abnormality": {"size": module.size, "trunk": module.trunk}})


def load_abnormality(path: str | os.PathLike[str], net: Net) -> Abnormality:
    """The module of ``path``, on the CPU in eval mode, for ``net``.

    Raises MinerError as ``load_checkpoint`` does, for a file that holds no abnormality module, and when ``net``
    is not, bit for bit, the one that the module was trained over.
    """
    where = os.fspath(path)
    state, meta = load_checkpoint(where)
    made_for = meta.get("abnormality")
    if not isinstance(made_for, dict):
        raise MinerError(f"{where}: holds no abnormality module; name a file of save_abnormality")
    if made_for.get("trunk") != digest(net):
        raise MinerError(f"{where}: trained over another classifier; train a module over this checkpoint")
    try:
        module = Abnormality(net.feature_dim, net.head.out_features, int(made_for["size"]), made_for["trunk"])
        module.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise MinerError(f"{where}: its tensors make no abnormality module; write or fetch it again") from None
    return module.eval()
