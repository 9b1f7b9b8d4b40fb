"""TrainerActor: scores blocks of the pool forward-only and takes the game's training steps. GPU when there is one."""

import os
from typing import Any

import numpy as np
import ray
import torch

from miner.neighbors import NearestID, assign_strata, fit_strata
from trainers import models
from trainers.checkpoint import pack, restore
from trainers.config import PretrainConfig
from trainers.data import IdSet, augment, normalise
from trainers.fit import pretrain
from trainers.train import autocast, joint_step, place, uniformity

# Images a forward pass: what fits a CPU's caches, a GPU's memory. Who scores a block must not change the arithmetic.
_FORWARD = {"cpu": 256, "cuda": 4096}


class Trainer:
    """One classifier and the ID set, as a plain class: tests use it without Ray."""

    def __init__(
        self, model: str, id_set: IdSet, seed: int, threads: tuple[int, int], alpha: float, lr: float, batch: int
    ) -> None:
        self.training_threads, self.scoring_threads = threads
        self.seed, self.alpha, self.batch = seed, alpha, batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.deterministic = True
        self.id_set = id_set
        self.net = models.create(model, len(id_set.classes), seed)
        place(self.net, self.device).eval()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        self.nearest: NearestID | None = None
        self.centroids: np.ndarray | None = None
        self.told: dict[str, Any] = {}

    def where(self) -> dict[str, Any]:
        """Device and process, for the log."""
        name = (
            torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"CPU, {self.scoring_threads} threads (training: {self.training_threads})"
        )
        return {"device": name, "pid": os.getpid()}

    def pretrain(self, config: PretrainConfig) -> dict[str, Any]:
        """Train on the ID set from scratch; returns what ``trainers.train.pretrain`` reports."""
        torch.set_num_threads(self.training_threads)
        report = pretrain(self.net, self.id_set, config, self.seed, self.device, self.told.update)
        self.net.eval()
        return report

    @ray.method(concurrency_group="tell")
    def progress(self) -> dict[str, Any]:
        """The latest progress report of a ``pretrain`` going on in another thread."""
        return dict(self.told)

    def state(self) -> bytes:
        """Classifier and optimiser state as safetensors bytes."""
        return pack(self.net, self.optimizer)

    def set_state(self, blob: bytes) -> None:
        """Take over what ``state`` gave; a state without an optimiser's resets it."""
        restore(blob, self.net, self.optimizer)
        self.net.eval()

    # --- the frozen classifier: features, neighbours, strata ---------------------------------------------------

    @torch.inference_mode()
    def _forward(self, images_BHWC: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 features and logits. The head runs in float32: bfloat16 logits would tie a third of the losses."""
        torch.set_num_threads(self.scoring_threads)
        features, logits = [], []
        size = _FORWARD[self.device.type]
        for start in range(0, len(images_BHWC), size):
            part = torch.tensor(images_BHWC[start : start + size])
            with autocast(self.device):
                trunk = self.net.features(normalise(part.to(self.device)))
            features.append(trunk.float().cpu())
            logits.append(self.net.head(trunk.float()).cpu())
        return torch.cat(features), torch.cat(logits)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Penultimate features float32 ``[n, D]`` of uint8 images ``[n, S, S, 3]``."""
        return self._forward(images)[0].numpy()

    def look_up_id(self) -> None:
        """Index the ID training set under the classifier as it is now."""
        self.nearest = NearestID(self.features(self.id_set.train_images), self.scoring_threads)

    def fit_strata(self, strata: int, *parts: np.ndarray) -> np.ndarray:
        """k-means centroids of the given images' features, float32 ``[strata, D]``."""
        return fit_strata(self.features(np.concatenate(parts)), strata, self.seed, self.training_threads)

    def set_centroids(self, centroids: np.ndarray) -> None:
        """Strata that ``score`` assigns images to."""
        self.centroids = centroids

    # --- the game ------------------------------------------------------------------------------------------------

    def score(self, images: np.ndarray, look_up: bool) -> dict[str, np.ndarray]:
        """Uniformity loss float32 ``[n]`` of each image; with ``look_up`` nearest ID images and stratum beside it."""
        features, logits = self._forward(images)
        scores = {"loss": uniformity(logits).numpy()}
        if look_up:
            vectors = features.numpy()
            if self.nearest is not None:
                found = self.nearest.query(vectors)
                scores |= dict(zip(("nn_id_row", "nn_id_cosine", "nn50_id_cosine"), found, strict=True))
            if self.centroids is not None:
                scores["stratum"] = assign_strata(vectors, self.centroids)
        return scores

    def train(
        self, round_: int, first: int, order: np.ndarray, factors: np.ndarray | None, *parts: np.ndarray
    ) -> tuple[list[float], np.ndarray]:
        """Descend CE(ID) + alpha L_out for ``len(order) / batch`` steps, numbered from ``first`` in the round.

        ``parts`` hold the background images shard by shard, ``order`` brings them into batch order; ``factors``
        (float64, in batch order) weight their losses. Returns cross-entropies a step and losses an image.
        Random views and ID draws depend on (seed, round, step) only.
        """
        torch.set_num_threads(self.training_threads)
        images = np.concatenate(parts)[order]
        entropies, losses = [], []
        for step, start in enumerate(range(0, len(images), self.batch), first):
            mixed = np.random.SeedSequence([self.seed, round_, step]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            rows = torch.randint(len(self.id_set.train_labels), (self.batch,), generator=generator)
            labels = torch.from_numpy(self.id_set.train_labels[rows.numpy()]).to(self.device)
            inside = torch.from_numpy(self.id_set.train_images[rows.numpy()]).to(self.device)
            outside = torch.from_numpy(images[start : start + self.batch]).to(self.device)
            both = normalise(augment(torch.cat([inside, outside]), generator, self.id_set.flip))
            weight = None
            if factors is not None:
                weight = torch.from_numpy(factors[start : start + self.batch].astype(np.float32)).to(self.device)
            entropy, loss = joint_step(
                self.net, self.optimizer, both[: len(inside)], labels, both[len(inside) :], weight, self.alpha
            )
            entropies.append(entropy)
            losses.append(loss.cpu().numpy())
        return entropies, np.concatenate(losses)


# One thread works, one call at a time in the order they came; the other answers ``progress`` meanwhile.
_OPTIONS: Any = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {"tell": 1}}
TrainerActor = ray.remote(**_OPTIONS)(Trainer)
