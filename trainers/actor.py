"""TrainerActor: scores blocks of the pool forward-only and takes the game's training steps. GPU when there is one."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from miner import telemetry
from miner.baselines import poem_distance, poem_draw, poem_posterior
from miner.config import Game
from miner.files import place
from miner.guard import near_id
from miner.neighbors import WHITENED, NearestID, Strata, check_finite, fit_strata, unit
from miner.observed import observed
from miner.run_dir import RunDir, write_file
from miner.sweep import block_size
from trainers import models
from trainers.checkpoint import pack, restore
from trainers.config import PretrainConfig
from trainers.data import IdSet, normalise
from trainers.fit import pretrain
from trainers.room import fitting, free_bytes
from trainers.together import Group, descend_together, listen, own_gradients, own_positions, part_sizes
from trainers.train import autocast, features_and_logits, joint_step, uniformity
from trainers.train import place as to_device
from trainers.views import game_batch, on_device, views

Tensors = tuple[torch.Tensor, ...]

# Images a forward pass: what fits a CPU's caches; a GPU halves it until it fits its memory.
_FORWARD = {"cpu": 256, "cuda": 4096}

_STATE = "state.safetensors"  # of a pre-training epoch
_NEAR_SAMPLE, _NEAR_SALT = 5_000, 0x1D  # ID images that say how near is near


class Trainer:
    """One classifier and the ID set, as a plain class: tests use it without Ray."""

    def __init__(self, model: str, id_set: IdSet, seed: int, game: Game, share: int = 1) -> None:
        """``share``: how many trainers there are on this machine, which score in as many parts of its cores."""
        # One core is left to pool actors and driver: OpenMP threads that share a core wait for each other.
        self.training_threads, self.scoring_threads = game.threads, max(((os.cpu_count() or 2) - 1) // share, 1)
        self.share, self.seed, self.alpha, self.batch, self.views = share, seed, game.alpha, game.batch, game.views
        self.by_features = game.rule == "dos"  # as published: clusters of its features, not of all that is seen
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.at_once = _FORWARD[self.device.type]
        torch.backends.cudnn.deterministic = True
        self.id_set = id_set
        self.net = models.create(model, len(id_set.classes), seed)
        to_device(self.net, self.device).eval()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=game.lr, momentum=0.9, weight_decay=5e-4)
        self.nearest: NearestID | None = None
        self.strata: Strata | None = None
        self.id_features: np.ndarray | None = None  # between ``look_up_id`` and ``fit_boundary`` only
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []  # between ``see`` and a fit
        self.id_near: np.ndarray | None = None
        self.boundary: np.ndarray | None = None
        self.told: dict[str, Any] = {}
        self.parts, self.sizes = game.parts, part_sizes(game.batch, game.parts)
        self.group = Group()
        self.held: dict[bytes, torch.Tensor] = {}  # images of blocks, from one sweep to the next

    def where(self) -> dict[str, Any]:
        """Device and process, for the log."""
        name = (
            torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"CPU, {self.scoring_threads} threads (training: {self.training_threads})"
        )
        return {"device": name, "pid": os.getpid()}

    def pretrain(self, config: PretrainConfig, folder: str | None = None) -> dict[str, Any]:
        """Train on the ID set from scratch; returns what ``trainers.train.pretrain`` reports.

        Epochs are committed in ``folder``, a run directory, and training goes on after the last one there.
        """
        torch.set_num_threads(self.training_threads)
        if folder is None:
            report = pretrain(self.net, self.id_set, config, self.seed, self.device, self.told.update)
        else:
            report = self._pretrain_in(RunDir(place(folder)).pretraining, config)
        self.net.eval()
        return report

    def _pretrain_in(self, kept: RunDir, config: PretrainConfig) -> dict[str, Any]:
        def on_epoch(epoch: int, state: bytes, means: dict[str, Any]) -> None:
            write_file(kept.round(epoch - 1) / _STATE, state)
            kept.commit(epoch - 1)

        done, tell = kept.last_sound() + 1, self.told.update
        resume = (done, (kept.round(done - 1) / _STATE).read_bytes()) if done else None
        net, id_set, seed = self.net, self.id_set, self.seed
        return pretrain(net, id_set, config, seed, self.device, tell, resume=resume, on_epoch=on_epoch)

    @ray.method(concurrency_group="tell")
    def ping(self) -> bool:
        """That this process lives; answered while it works."""
        return True

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
    def _batched(self, images_BHWC: torch.Tensor, forward: Callable[[torch.Tensor], Tensors]) -> Tensors:
        """What ``forward`` gives of the normalised images, batch by batch, joined; all of it stays on the device."""
        torch.set_num_threads(self.scoring_threads)
        parts = [forward(normalise(batch)) for batch in images_BHWC.split(self.at_once)]
        return tuple(torch.cat(found) for found in zip(*parts, strict=True))

    def _forward(self, images: torch.Tensor) -> Tensors:
        """Float32 features and logits."""
        return self._batched(images, partial(features_and_logits, self.net))

    def _look(self, images: torch.Tensor) -> Tensors:
        """Features, logits, and what strata are found in, which costs more: only for what needs it."""
        if self.by_features:
            features, logits = self._forward(images)
            return features, logits, torch.from_numpy(unit(features.cpu().numpy()))
        return self._batched(images, self._described)

    def _described(self, x: torch.Tensor) -> Tensors:
        """Float32 features, logits and looks: ``features_and_logits`` with the maps on the way."""
        with autocast(self.device):
            trunk, looks = self.net.described(x)
        features = trunk.float()
        return features, self.net.head(features), looks

    def features(self, images: np.ndarray) -> np.ndarray:
        """Penultimate features float32 ``[n, D]`` of uint8 images ``[n, S, S, 3]``; block by block on the device."""
        size = block_size(images.shape[1])
        blocks = [images[start : start + size] for start in range(0, max(len(images), 1), size)]
        return np.concatenate([self._features(block) for block in blocks])

    @fitting
    def _features(self, images: np.ndarray) -> np.ndarray:
        return self._forward(on_device(images, self.device))[0].cpu().numpy()

    @fitting
    def looks(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Float32 features ``[n, D]``, and what strata are found in ``[n, F]``, of uint8 images ``[n, S, S, 3]``."""
        features, _, looks = self._look(on_device(images, self.device))
        return features.cpu().numpy(), looks.cpu().numpy()

    def look_up_id(self, keep: bool = False) -> np.ndarray:
        """Index the ID training set under the classifier as it is now; ``keep`` its features for ``fit_boundary``.

        Returns how near ID images are themselves: the cosine to the 50th nearest, float32, of 5,000 drawn by the seed.
        A second call only repeats the answer: the frozen classifier is asked once.
        """
        if self.id_near is not None and not keep:
            return self.id_near
        features = self.features(self.id_set.train_images)
        self.nearest = NearestID(features, self.scoring_threads, self.device)
        self.id_features = features if keep else None
        rng = np.random.default_rng([self.seed, _NEAR_SALT])
        rows = np.sort(rng.permutation(len(features))[:_NEAR_SAMPLE])
        self.id_near = self.nearest.query(features[rows])[2]
        return self.id_near

    def see(self, first: bool, looks: bool, *parts: np.ndarray) -> None:
        """Keep features, and ``looks``, of these images for the next fit; the ``first`` call forgets earlier ones."""
        images, before = np.concatenate(parts), [] if first else self.seen
        features, found = self.looks(images) if looks else (self.features(images), np.empty(0))
        self.seen = [*before, (features, found)]

    def _seen(self) -> list[np.ndarray]:
        seen, self.seen = self.seen, []
        return [np.concatenate(parts) for parts in zip(*seen, strict=True)]

    def fit_strata(self, strata: int, near: float, labels: np.ndarray) -> Strata:
        """Strata of those seen that the leak guard would spare, given their classes in the pool (-1: none)."""
        features, looks = self._seen()
        if np.isfinite(near) and self.nearest is not None:
            spared = ~near_id(self.nearest.query(features)[2], labels, near)
            looks = looks[spared] if spared.any() else looks
        whiten = 0 if self.by_features else WHITENED
        return fit_strata(looks, min(strata, len(looks)), self.seed, self.training_threads, whiten)

    def set_strata(self, strata: Strata) -> None:
        """Strata that ``score`` assigns images to."""
        self.strata = strata

    def fit_boundary(self) -> np.ndarray:
        """POEM's w, float64 ``[D]``: one posterior draw, fitted on the features of the ID set and of those seen.

        Needs ``look_up_id(keep=True)`` before it. Raises MinerError when features are not finite.
        """
        outliers = check_finite(self._seen()[0])
        assert self.id_features is not None
        mean, precision = poem_posterior(check_finite(self.id_features), outliers)
        self.id_features = None
        return poem_draw(mean, precision, self.seed)

    def set_boundary(self, boundary: np.ndarray) -> None:
        """The w whose |w'z| ``score`` gives beside the loss."""
        self.boundary = boundary

    # --- the game ------------------------------------------------------------------------------------------------

    def forget(self) -> tuple[int, bool]:
        """Let go of all images that were kept. Returns how many bytes could be kept, and whether on a GPU."""
        self.held.clear()
        gpu = self.device.type == "cuda"  # its own; memory is shared with the other trainers of this machine
        return free_bytes(self.device) // (2 if gpu else 2 * self.share), gpu

    @fitting
    def score(self, images: np.ndarray | None, look_up: bool, key: bytes = b"") -> dict[str, np.ndarray]:
        """Uniformity loss float32 ``[n]`` of each image, the mean over ``views`` of it.

        The images are kept under ``key``, if it is not empty; None are those that were kept under it.
        With ``look_up`` beside it: nearest ID images, stratum, distance to POEM's boundary, as far as they were set.
        """
        scores: dict[str, np.ndarray] = {}
        x = self.held[key] if images is None else on_device(images, self.device)
        if look_up and self.strata is not None:
            features, logits, looks = self._look(x)
        else:
            features, logits = self._forward(x)
        losses = [uniformity(logits)]
        losses += [uniformity(self._forward(view)[1]) for view in views(x, self.views, self.id_set.flip)]
        loss = torch.stack(losses).double().mean(dim=0).float()  # on a GPU nothing has been waited for up to here
        if look_up:
            if self.strata is not None:
                scores["stratum"] = self.strata.assign(looks.cpu().numpy())
            if self.nearest is not None:
                found = self.nearest.query(features.cpu().numpy())
                scores |= dict(zip(("nn_id_row", "nn_id_cosine", "nn50_id_cosine"), found, strict=True))
            if self.boundary is not None:
                scores["boundary"] = poem_distance(features.cpu().numpy(), self.boundary)
        scores["loss"] = loss.cpu().numpy()
        if key:
            self.held[key] = x
        return scores

    def meet(self) -> tuple[str, int]:
        """Address and port at which trainers that are to train together find this one, the first of them."""
        self.meeting = listen()
        return self.meeting.getsockname()

    def join(self, rank: int, world: int, where: tuple[str, int]) -> None:
        """Train as member ``rank`` of ``world`` from now on; all members are told at once."""
        self.group = Group(rank, world)
        if world > 1:
            self.group.meet(where, self.device, self.meeting if rank == 0 else None)

    def train(
        self, round_: int, first: int, order: np.ndarray, factors: np.ndarray | None, *parts: np.ndarray
    ) -> tuple[list[float], np.ndarray]:
        """Descend CE(ID) + alpha L_out for some steps, numbered from ``first`` in the round.

        ``parts`` hold background images shard by shard, ``order`` brings them into batch order: all of them when this
        trainer trains alone, its ``own_positions`` when it is one of a group. ``factors`` (float64, likewise) weight
        their losses. Returns cross-entropies a step and losses an image, of whole batches.
        Random views and ID draws depend on (seed, round, step) only.
        """
        torch.set_num_threads(self.training_threads)
        images = np.concatenate(parts)[order]
        own = own_positions(self.batch, 1, self.parts, self.group.rank, self.group.world)
        weights = None if factors is None else torch.from_numpy(factors.astype(np.float32)).to(self.device)
        entropies, losses = [], []
        for step, start in enumerate(range(0, len(images), len(own)), first):
            moment = [self.seed, round_, step]
            outliers = images[start : start + len(own)]
            inside, labels, outside = game_batch(self.id_set, self.batch, own, outliers, moment, self.device)
            weight = None if weights is None else weights[start : start + len(own)]
            if self.parts == 1:
                entropy, loss = joint_step(self.net, self.optimizer, inside, labels, outside, weight, self.alpha)
            else:
                shares = own_gradients(self.net, inside, labels, outside, weight, self.alpha, self.sizes, self.group)
                rows = self.group.gather(shares, self.parts)
                entropy, loss = descend_together(self.net, self.optimizer, rows, self.alpha, self.sizes)
            entropies.append(entropy)
            losses.append(loss.cpu().numpy())
        return entropies, np.concatenate(losses)


# One thread works, one call at a time in the order they came; the other answers ``progress`` meanwhile.
_OPTIONS: Any = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {"tell": 1}}
TrainerActor = ray.remote(**_OPTIONS)(observed(Trainer, score=telemetry.scored))
