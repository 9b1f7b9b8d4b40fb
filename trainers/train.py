"""What every training loop here shares, and the joint step of the game; the loop of all methods is in fit.py."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miner.errors import MinerError
from trainers.data import normalise, tensor
from trainers.models import Net

Progress = Callable[[dict], None]


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where it pays (CUDA, CPUs with AVX512-BF16 or AMX), else None: plain float32."""
    cpu_has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cuda" or (device.type == "cpu" and cpu_has_it) else None


def autocast(device: torch.device) -> torch.autocast:
    """The mixed-precision context of every forward pass here; does nothing where ``amp_dtype`` is None."""
    dtype = amp_dtype(device)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def place(net: nn.Module, device: torch.device) -> nn.Module:
    """Move ``net`` to ``device`` in channels_last layout, which the convolutions are fastest in."""
    return net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def uniformity(logits: Tensor) -> Tensor:
    """KL(U||p) = logsumexp(z) - mean(z) - log K in float32, one per row [n]; 0 = uniform (paper eq. 5)."""
    logits = logits.float()
    return logits.logsumexp(dim=1) - logits.mean(dim=1) - math.log(logits.shape[1])


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """``net`` in eval mode (BatchNorm statistics stay, no dropout); its own mode is put back."""
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


def features_and_logits(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 features [n, D] and logits [n, K] of normalised x [n, 3, S, S]; mode and gradients are the caller's.

    The trunk runs in mixed precision, the head in float32: bfloat16 logits would tie a third of the losses.
    """
    with autocast(x.device):
        trunk = net.features(x)
    features = trunk.float()
    return features, net.head(features)


def predict(net: Net, images: Tensor, batch: int = 1000) -> Tensor:
    """Eval-mode logits float32 [n, K], as evaluation has them, on the net's device for uint8 [n, S, S, 3] anywhere."""
    device = next(net.parameters()).device
    with eval_mode(net), torch.no_grad():
        logits = [features_and_logits(net, normalise(part.to(device)))[1] for part in images.split(batch)]
    return torch.cat(logits)


def accuracy(net: Net, images: np.ndarray, labels: np.ndarray, classes: int | None = None) -> float:
    """Share in [0, 1] of uint8 images [n, S, S, 3] whose largest logit is the label's (eval mode).

    Only the first ``classes`` logits count, where a reject class follows them.
    """
    guesses = predict(net, tensor(images))[:, :classes].argmax(dim=1).cpu().numpy()
    return float((guesses == labels).mean())


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, where: str) -> float:
    """One step down ``loss``; returns its value. Raises MinerError, changing nothing, if it is not finite."""
    value = loss.item()
    if not math.isfinite(value):
        raise MinerError(f"{where}: the loss became {value}; lower the learning rate (--lr)")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value


def joint_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    id_images: Tensor,
    id_labels: Tensor,
    outlier_images: Tensor,
    factors: Tensor | None,
    alpha: float,
) -> tuple[float, Tensor]:
    """One descent step on mean CE(ID) + alpha * mean(factors * uniformity(outliers)), from ONE joint forward.

    Images are normalised float32 [*, 3, S, S]; ``factors`` float32 [B] or None for ones. The net's mode is
    the caller's: eval while mining (frozen BatchNorm, so that no loss depends on its batch-mates), train in
    outlier exposure. Returns (cross-entropy, outlier losses float32 [B]), both before the step.
    Raises MinerError when the loss is not finite; the net is then unchanged.
    """
    with autocast(id_images.device):
        logits = net(torch.cat([id_images, outlier_images])).float()
    cross_entropy = F.cross_entropy(logits[: len(id_images)], id_labels)
    losses = uniformity(logits[len(id_images) :])
    weighted = losses if factors is None else factors * losses
    descend(optimizer, cross_entropy + alpha * weighted.mean(), "joint step")
    return cross_entropy.item(), losses.detach()


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A CPU generator for order and augmentation; dropout's global generator is seeded and put back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def cycle(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches of exactly ``size`` without end, cut from one permutation of ``n`` after another."""
    rows = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rows) < size:
            rows = torch.cat([rows, torch.randperm(n, generator=generator)])
        yield rows[:size]
        rows = rows[size:]


class Meter:
    """Reports about once a second: images/s, epoch, mean loss since the last report, seconds left."""

    def __init__(self, phase: str, epochs: int, steps: int, on_progress: Progress) -> None:
        self.phase, self.epochs, self.steps, self.report = phase, epochs, steps, on_progress
        self.start = self.last = time.monotonic()
        self.images = self.count = 0
        self.loss = 0.0
        self.first = steps

    def seconds(self) -> float:
        """Since the meter was made."""
        return time.monotonic() - self.start

    def add(self, step: int, images: int, loss: float) -> None:
        """Step ``step`` (from 0) is done; a run that goes on counts from the step it went on at."""
        self.first = min(self.first, step)
        self.images, self.count, self.loss = self.images + images, self.count + 1, self.loss + loss
        now = time.monotonic()
        if now - self.last < 1.0 and step + 1 < self.steps:
            return
        self.report(
            {
                "phase": self.phase,
                "epoch": step * self.epochs // self.steps + 1,
                "epochs": self.epochs,
                "step": step + 1,
                "first": self.first,
                "steps": self.steps,
                "loss": self.loss / self.count,
                "images_per_s": self.images / max(now - self.last, 1e-9),
                "seconds_left": (now - self.start) / (step + 1 - self.first) * (self.steps - step - 1),
            }
        )
        self.last, self.images, self.count, self.loss = now, 0, 0, 0.0


def batches(n: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches: a fresh permutation of ``n`` each epoch, its incomplete last batch dropped."""
    size = min(size, n)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        yield from order[: n // size * size].split(size)


def set_lr(
    optimizer: torch.optim.Optimizer, peak: float, done: float, warmup: float = 0.0, lowest: float = 0.0
) -> None:
    """Linear from 0 to ``peak`` while ``done`` (share of all steps) is below ``warmup``, then cosine to ``lowest``."""
    rest = (done - warmup) / (1 - warmup)
    cosine = lowest + (peak - lowest) * (1 + math.cos(math.pi * rest)) / 2
    for group in optimizer.param_groups:
        group["lr"] = peak * done / warmup if done < warmup else cosine
