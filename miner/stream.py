"""A subset as a stream of images that can be left anywhere and taken up there again."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from miner.errors import UsageError

if TYPE_CHECKING:
    from miner.subset import Subset


class SubsetStream(IterableDataset):
    """Iterable view of a ``Subset``; DataLoader workers take turns, so that each item comes once.

    In rank order, or with ``seed`` in an order that belongs to (seed, epoch): see ``set_epoch``. ``state_dict`` and
    ``load_state_dict`` are those that torchdata's StatefulDataLoader looks for: each worker keeps its own, and as many
    workers must go on. In a plain loop they are called here:

    >>> from miner import load_subset
    >>> stream = load_subset("runs/demo/subset-0.1").stream(seed=0)
    >>> passing = iter(stream)
    >>> image, label = next(passing)
    >>> saved = stream.state_dict()
    >>> other = load_subset("runs/demo/subset-0.1").stream(seed=0)
    >>> other.load_state_dict(saved)
    >>> len(list(other)) == len(list(passing)) == len(stream.subset) - 1
    True
    """

    def __init__(self, subset: "Subset", seed: int | None = None) -> None:
        self.subset, self.seed = subset, seed
        # Persistent workers see it change.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self._given, self._share, self._resumed = 0, (0, 1), False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass (with ``seed``); call it before each, as for torch's DistributedSampler.

        DataLoader workers hear of it too, persistent ones as well.
        """
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """What ``set_epoch`` chose."""
        return int(self._epoch)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        if not self._resumed:
            self._given = 0
        elif share != self._share:
            raise UsageError(f"this state is of one of {self._share[1]} workers, not {share[1]}: go on with as many")
        self._share, self._resumed = share, False
        return self._rest()

    def _rest(self) -> Iterator[tuple[Any, int]]:
        first, step = self._share
        count = len(self.subset)
        order = np.arange(count)
        if self.seed is not None:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for i in order[first::step][self._given :].tolist():
            item = self.subset[i]
            self._given += 1
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands: plain numbers and strings, for JSON or a checkpoint."""
        return {
            "fingerprint": self.subset.recipe["fingerprint"],
            "seed": self.seed,
            "epoch": self.epoch,
            "given": self._given,
            "worker": self._share[0],
            "workers": self._share[1],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass begin after the last item that was given when ``state`` was taken.

        Raises UsageError for the state of another subset or another seed, and, once iteration begins, of another
        number of workers.
        """
        try:
            told = state["fingerprint"], state["seed"]
            epoch, given = int(state["epoch"]), int(state["given"])
            share = int(state["worker"]), int(state["workers"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{self.subset.path}: not the state of a stream ({error!r})") from None
        if told != (self.subset.recipe["fingerprint"], self.seed) or not 0 <= given <= len(self.subset):
            raise UsageError(f"{self.subset.path}: this state is of another subset or of another seed")
        self.set_epoch(epoch)
        self._given, self._share, self._resumed = given, share, True
