"""The one training loop: every method, from scratch or from a checkpoint, in one process or several.

What a step sees depends on (seed, step) alone: the views of ID images and their order are the same for all methods
of one seed, so that methods can be compared in pairs, and a run that goes on after an epoch repeats to the last bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miner.errors import MinerError, UsageError
from trainers.checkpoint import pack, restore
from trainers.config import PretrainConfig
from trainers.data import IdSet, augment, normalise, tensor
from trainers.models import Net
from trainers.objectives import draw, energy, forward, losses, total
from trainers.recipes import Objective, Recipe
from trainers.sets import ImageSet
from trainers.stream import Stream
from trainers.train import Meter, Progress, accuracy, autocast, own_randomness, place, predict, set_lr

OnEpoch = Callable[[int, bytes, dict], None]


@dataclass(frozen=True)
class World:
    """One of ``size`` processes that train together: it takes every ``size``-th image of each batch."""

    rank: int = 0
    size: int = 1

    def check(self, recipe: Recipe) -> None:
        """Raise UsageError unless every process gets as many images of a batch as the others."""
        outliers = recipe.batch_outliers if recipe.objective.outliers else 0
        if recipe.batch % self.size or outliers % self.size:
            more = f" and {outliers} outliers" if outliers else ""
            raise UsageError(f"--workers {self.size}: must divide batch {recipe.batch}{more}")

    def mean(self, tensors: list[Tensor]) -> None:
        """Replace the tensors by their means over all processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:  # the line was cut: nothing else fails here
            first = str(error).strip().splitlines()[0]
            raise MinerError(f"training: lost the other processes ({first}); run the same command again") from None
        for t, part in zip(tensors, (flat / self.size).split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


def fit(
    net: Net,
    id_set: IdSet,
    outliers: ImageSet | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    on_progress: Progress,
    *,
    phase: str = "train",
    resume: tuple[int, bytes] | None = None,
    on_epoch: OnEpoch | None = None,
    world: World | None = None,
) -> dict:
    """Train ``net`` in place; returns accuracy (test), loss (last epoch), images forwarded, outliers_seen, seconds.

    ``on_epoch`` gets the epoch's number from 1, the state to go on from, and its mean terms; ``resume`` is such
    a number and state. Bit-identical for the same seed, thread count, worker count and machine (on CUDA up to
    its own kernels' order). Raises MinerError for a loss that is not finite, naming epoch and step, and for
    outliers that are missing or of another size than the ID images.
    """
    loop = Loop(net, id_set, outliers, recipe, seed, device, world or World())
    recipe = loop.recipe
    meter = Meter(phase, recipe.epochs, loop.per_epoch * recipe.epochs, on_progress)
    record: dict = {}
    with own_randomness(seed, device) as generator:
        first = loop.restore(generator, *resume) if resume else 0
        for epoch in range(first, recipe.epochs):
            record = loop.epoch(epoch, generator, meter)
            if on_epoch:
                on_epoch(epoch + 1, loop.state(generator), record)
    return {
        "accuracy": accuracy(net, id_set.test_images, id_set.test_labels, len(id_set.classes)),
        "loss": record.get("loss"),
        "images": loop.per_epoch * recipe.epochs * recipe.images_per_step,
        "outliers_seen": int(loop.stream.seen.sum()) if loop.stream else 0,
        "seconds": meter.seconds(),
    }


def pretrain(
    net: Net,
    id_set: IdSet,
    config: PretrainConfig,
    seed: int,
    device: torch.device,
    on_progress: Progress,
    *,
    resume: tuple[int, bytes] | None = None,
    on_epoch: OnEpoch | None = None,
) -> dict:
    """``fit`` with cross-entropy alone: the classifier that mining starts from."""
    recipe = Recipe(
        Objective(),
        epochs=config.epochs,
        batch=config.batch,
        lr=config.lr,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
    )
    return fit(net, id_set, None, recipe, seed, device, on_progress, phase="pretrain", resume=resume, on_epoch=on_epoch)


def mean_energies(net: Net, id_set: IdSet, outliers: ImageSet, seed: int) -> tuple[float, float]:
    """Mean energy of 1,000 ID training images and of as many outliers: margins must lie about them."""
    rng = np.random.default_rng([seed, 13])
    rows = rng.choice(len(id_set.train_images), min(1000, len(id_set.train_images)), replace=False)
    others = rng.choice(len(outliers), min(1000, len(outliers)), replace=False)
    inside, outside = (tensor(part) for part in (id_set.train_images[rows], outliers.take(others)))
    return tuple(energy(predict(net, part)).mean().item() for part in (inside, outside))  # type: ignore[return-value]


class Loop:
    """The state of one run of ``fit`` between epochs."""

    def __init__(
        self,
        net: Net,
        id_set: IdSet,
        outliers: ImageSet | None,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        world: World,
    ) -> None:
        n = len(id_set.train_images)
        recipe = recipe.fitted(n)
        _check(id_set, outliers, recipe, world)
        place(net, device).train()
        self.net, self.id_set, self.recipe = net, id_set, recipe
        self.seed, self.device, self.world = seed, device, world
        self.images, self.labels = (tensor(a).to(device) for a in (id_set.train_images, id_set.train_labels))
        self.per_epoch = n // recipe.batch
        self.optimizer = _optimizer(net, recipe)
        self.stream: Stream | None = None
        if recipe.objective.outliers and outliers is not None:
            self.stream = Stream(outliers, recipe, seed, self.per_epoch, len(id_set.classes))

    # --- between epochs ------------------------------------------------------------------------------------------

    def state(self, generator: torch.Generator) -> bytes:
        """All that the next epoch depends on."""
        more = {"generator": generator.get_state(), "global": torch.get_rng_state()}
        if self.device.type == "cuda":
            more["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.stream:
            more["seen"] = torch.from_numpy(np.packbits(self.stream.seen))
        return pack(self.net, self.optimizer, more)

    def restore(self, generator: torch.Generator, epoch: int, blob: bytes) -> int:
        """Go back to the state after ``epoch`` epochs; returns ``epoch``."""
        more = restore(blob, self.net, self.optimizer)
        generator.set_state(more["generator"])
        torch.set_rng_state(more["global"])
        if "cuda" in more and self.device.type == "cuda":
            torch.cuda.set_rng_state(more["cuda"], self.device)
        if self.stream:
            self.stream.seen = np.unpackbits(more["seen"].numpy(), count=len(self.stream.seen)).astype(bool)
        return epoch

    def epoch(self, epoch: int, generator: torch.Generator, meter: Meter) -> dict:
        """One pass over the ID set; returns the mean of each term and of the loss, and the learning rate."""
        order = torch.randperm(len(self.images), generator=generator)
        if self.stream:
            self.stream.begin(epoch, self.net)
        sums: dict[str, float] = {}
        for step in range(self.per_epoch):
            rows = order[step * self.recipe.batch : (step + 1) * self.recipe.batch]
            terms = self.step(epoch, step, rows.to(self.device), generator)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
            meter.add(epoch * self.per_epoch + step, self.recipe.images_per_step, sum(terms.values()))
        self.world.mean([buffer for buffer in self.net.buffers() if buffer.is_floating_point()])
        means = {name: value / self.per_epoch for name, value in sums.items()}
        return {"loss": sum(means.values()), **means, "lr": self.optimizer.param_groups[0]["lr"]}

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self, epoch: int, step: int, rows: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Descend once on ID ``rows`` and the step's outliers; returns the terms before the step."""
        recipe, number = self.recipe, epoch * self.per_epoch + step
        mine = slice(self.world.rank, None, self.world.size)
        self._set_lr(epoch, number)
        x = _views(self.images[rows], generator, recipe.augment_id, self.id_set.flip)
        inside, labels, outside = normalise(x[mine]), self.labels[rows][mine], None
        if self.stream:
            chances = torch.Generator().manual_seed(_mixed(self.seed, number))
            images = torch.from_numpy(self.stream.take(epoch, step)).to(self.device)
            mirror = self.id_set.flip or recipe.augment_outliers == "flip"
            outside = normalise(_views(images, chances, recipe.augment_outliers, mirror)[mine])
        chance = draw(recipe.objective, inside.shape[-1], self.seed, number)
        with autocast(self.device):
            out = forward(self.net, recipe, inside, outside, chance)
        parts = losses(recipe.objective, out, labels, chance.lam, recipe.label_smoothing)
        terms = total(parts, recipe.reduction, recipe.images_per_step // self.world.size)
        return self._descend(terms, f"epoch {epoch + 1}, step {step + 1}")

    def _descend(self, terms: dict[str, Tensor], where: str) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        values = torch.stack([term.detach() for term in terms.values()])
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        self.world.mean([values, *gradients])
        found = dict(zip(terms, values.tolist(), strict=True))
        if not math.isfinite(sum(found.values())):
            named = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            raise MinerError(f"training, {where}: the loss is not finite ({named}); lower the learning rate (--lr)")
        self.optimizer.step()
        return found

    def _set_lr(self, epoch: int, number: int) -> None:
        recipe = self.recipe
        done = (number + 1) / (self.per_epoch * recipe.epochs)
        if not recipe.milestones:
            set_lr(self.optimizer, recipe.lr, done, recipe.warmup, recipe.lr_min)
            return
        lr = recipe.lr * 0.1 ** sum(epoch >= milestone for milestone in recipe.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * min(1.0, done / recipe.warmup) if recipe.warmup else lr


def _check(id_set: IdSet, outliers: ImageSet | None, recipe: Recipe, world: World) -> None:
    world.check(recipe)
    if not recipe.objective.outliers:
        return
    side = id_set.train_images.shape[1]
    if outliers is None or not len(outliers):
        raise MinerError("training: this objective needs outliers, and there are none; name some with --outliers")
    found = outliers.parts[0].shape[1:]
    if found != (side, side, 3):
        raise MinerError(f"training: outliers are {list(found)}, ID images {[side, side, 3]}; load both at one --size")


def _optimizer(net: Net, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        net.parameters(), recipe.lr, momentum=0.9, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
    )


def _mixed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, 19, number]).generate_state(1, np.uint64)[0])


def _views(images: Tensor, generator: torch.Generator, how: str, flip: bool) -> Tensor:
    """Random views uint8 of uint8 images [n, S, S, 3]; ``flip`` allows mirroring."""
    if how == "crop-flip":
        return augment(images, generator, flip)
    if how == "flip" and flip:
        mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        return torch.where(mirrored[:, None, None, None], images.flip(2), images)
    return images
