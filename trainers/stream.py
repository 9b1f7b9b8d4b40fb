"""Which outliers a step sees: an endless order that depends on (seed, step) only, or on the hardest of an epoch."""

import numpy as np
import torch

from trainers.models import Net
from trainers.recipes import Recipe
from trainers.sets import ImageSet
from trainers.train import predict


class Stream:
    """Batches of ``recipe.batch_outliers`` images of a set, cycled when an epoch needs more than there are."""

    def __init__(self, images: ImageSet, recipe: Recipe, seed: int, per_epoch: int, classes: int) -> None:
        self.images, self.recipe, self.seed = images, recipe, seed
        self.per_epoch, self.classes = per_epoch, classes
        self.rows = np.arange(len(images))
        if 0 < recipe.outlier_budget < len(images):
            chosen = np.random.default_rng([seed, 3]).choice(len(images), recipe.outlier_budget, replace=False)
            self.rows = np.sort(chosen)
        self.seen = np.zeros(len(images), bool)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def begin(self, epoch: int, net: Net) -> None:
        """Prepare an epoch; with ``hard_from`` score that many random outliers and keep the most confident.

        As many are kept as OE-M keeps: twice the ID images of an epoch (MixOE's baseline script).
        """
        self._orders.clear()
        self.hard: np.ndarray | None = None
        if not self.recipe.hard_from:
            return
        rng = np.random.default_rng([self.seed, 5, epoch])
        drawn = np.sort(rng.choice(self.rows, min(self.recipe.hard_from, len(self.rows)), replace=False))
        pixels = (torch.from_numpy(self.images.take(part)) for part in np.array_split(drawn, -(-len(drawn) // 4096)))
        msp = [predict(net, part)[:, : self.classes].softmax(1).amax(1).cpu().numpy() for part in pixels]
        hardest = np.argsort(-np.concatenate(msp), kind="stable")
        self.hard = drawn[hardest[: 2 * self.recipe.batch * self.per_epoch]]

    def take(self, epoch: int, step: int) -> np.ndarray:
        """Outliers uint8 [batch_outliers, S, S, 3] of the epoch's ``step``."""
        count = self.recipe.batch_outliers
        rows = self.rows if self.hard is None else self.hard
        places = np.arange(count) + step * count
        if self.recipe.outlier_order == "shuffled" and self.hard is None:
            places += epoch * self.per_epoch * count
        elif self.recipe.outlier_order == "window":
            places += int(np.random.default_rng([self.seed, 7, epoch]).integers(len(rows)))
        if self.recipe.outlier_order == "shuffled":
            laps, at = np.divmod(places, len(rows))
            chosen = np.array([self._order(epoch, int(lap), rows)[i] for lap, i in zip(laps, at, strict=True)])
        else:
            chosen = rows[places % len(rows)]
        self.seen[chosen] = True
        return self.images.take(chosen)

    def _order(self, epoch: int, lap: int, rows: np.ndarray) -> np.ndarray:
        """One permutation of ``rows``; laps go on from epoch to epoch unless each epoch has rows of its own."""
        key = (0 if self.hard is None else epoch + 1, lap)
        if key not in self._orders:
            if len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            self._orders[key] = np.random.default_rng([self.seed, 11, *key]).permutation(rows)
        return self._orders[key]
