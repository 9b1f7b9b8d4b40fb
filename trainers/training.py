"""The training job behind ``pipelines.train``: open the data, refuse leaks, train with resume, save."""

import os
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from miner.errors import MinerError
from miner.files import read_json
from miner.progress import Display, Steps
from miner.run_dir import RunDir, write_file, write_json
from trainers import models
from trainers.checkpoint import load_checkpoint, load_net, save_checkpoint
from trainers.config import TrainConfig
from trainers.data import load_id
from trainers.fit import World, fit, mean_energies
from trainers.overlap import readable, refuse_overlap, write_record
from trainers.sets import ImageSet, open_images, open_outliers
from trainers.splits import hold_out, long_tail, parse_hold_out

STATE, SEEN = "state.safetensors", "outliers.parquet"
ORPHANED = 30.0  # seconds that a worker may live on whose driver was killed: a comparison started again waits for it
MOST_KNOWN = 0.01  # of outliers may be ID training images: of a pool that holds some, not of an ID set taken for one
CHECKPOINT, SUMMARY = "checkpoint.safetensors", "summary.json"


def id_set_of(spec: str, size: int, held_out: tuple[int, ...] | str = "", tail: float | None = None) -> tuple[Any, ...]:
    """(IdSet, test images of its held-out classes or None, their labels), as the flags of ``pipelines.train`` say."""
    id_set, held = load_id(spec, size), None
    labels: tuple[int, ...] = ()
    if held_out:
        labels = parse_hold_out(held_out, id_set) if isinstance(held_out, str) else held_out
        id_set, held = hold_out(id_set, labels)
    return (id_set if tail is None else long_tail(id_set, tail)), held, labels


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as ``config`` says and return the summary; the run directory is ``config.run_dir``."""
    if config.workers > 1:
        from trainers.workers import train_together

        return train_together(config)
    return Training(config, World()).run()


class Training:
    """One run in one process; of several that train together, the first one writes and speaks."""

    def __init__(self, config: TrainConfig, world: World, display: Display | None = None) -> None:
        self.config, self.world, self.display = config, world, display or Display()
        self.chief = world.rank == 0
        self.dir = RunDir(config.run_dir, unit="epoch")
        self.threads = config.threads or max(1, ((os.cpu_count() or 2) - 1) // world.size)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self) -> dict[str, Any]:
        """Data, net, training, files. Raises MinerError, one line, for whatever the user can mend."""
        torch.set_num_threads(self.threads)
        torch.backends.cudnn.deterministic = True
        self.open()
        alone = self.world.size == 1  # else the process that started them all holds the lock
        with self.dir.locked(ORPHANED) if alone else nullcontext(), self.display:
            first = self.begin()
            if done := self.finished(first):
                return done
            if self.chief:
                self.record_outliers()
                self.display.follow(self.dir.path, self.recipe.epochs, self.dir.unit)
                self.tell()
            result = self.fit(first)
            if self.chief:
                self.save(result)
        return result

    # --- before --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Read the data and the net, and refuse what no training should start from."""
        config = self.config
        spec = config.background  # before anything is loaded: it may be missing
        self.id_set, held, self.held_labels = id_set_of(config.id, config.size, config.hold_out, config.long_tail)
        self.outliers = self.open_outliers(spec, held)
        self.recipe = config.recipe.fitted(len(self.id_set.train_images))
        self.world.check(self.recipe)
        self.net, self.made_from = self.open_net()

    def open_outliers(self, spec: str | None, held: ImageSet | None) -> ImageSet | None:
        """The background images; refused when the ID test set, held-out classes or an OOD test set has some of them.

        ID training images among them spoil no test: they are counted, and refused when they are many.
        """
        if spec is None:
            return None
        outliers = open_outliers(spec, self.config.size, self.config.seed)
        inside = {"the ID training set": ImageSet("ID train", (self.id_set.train_images,))}
        known = refuse_overlap(outliers, inside, allow=True)
        if known > MOST_KNOWN * len(outliers):
            refuse_overlap(outliers, inside, self.config.allow_overlap)
        if known and self.chief:
            self.display.say(f"note: {known:,} of {len(outliers):,} outliers are ID training images, pixel for pixel")
        tests = {"the ID test set": ImageSet("ID test", (self.id_set.test_images,))}
        if held is not None:
            tests["the held-out classes"] = held
        for name in self.config.ood:
            for found in open_images(name, self.config.size, self.config.seed):
                tests[f"OOD set {found.name} ({name})"] = found
        refuse_overlap(outliers, tests, self.config.allow_overlap)
        return outliers

    def open_net(self) -> tuple[models.Net, dict[str, Any]]:
        """A fresh net, or that of --checkpoint, and where it comes from."""
        config, classes, reject = self.config, self.id_set.classes, self.config.recipe.objective.reject
        if config.checkpoint is None:
            return models.create(config.model, len(classes) + reject, config.seed), {}
        net, meta = load_net(config.checkpoint, config.model, classes, reject, config.seed)
        made_from = {"checkpoint": str(config.checkpoint), "checkpoint_accuracy": meta.get("accuracy")}
        return net, made_from | {"checkpoint_outliers": meta.get("outliers")}

    def begin(self) -> int:
        """Open the run directory; returns how many epochs are done."""
        outliers = None if self.outliers is None else self.outliers.origin.get("fingerprint")
        facts = {"id_fingerprint": self.id_set.fingerprint, "outliers_fingerprint": outliers}
        settings = self.config.settings() | {"threads": self.threads} | facts
        if self.chief:
            first = self.dir.begin(settings, self.config.resume)
            for note in self.dir.notes:
                self.display.say(note)
        else:
            first = max(self.dir.committed(), default=-1) + 1
        return first

    def finished(self, first: int) -> dict[str, Any] | None:
        """The summary of a run that has all its epochs and files: run again, it changes nothing."""
        if first < self.recipe.epochs:
            return None
        try:
            load_checkpoint(self.dir.path / CHECKPOINT)
            summary = read_json(str(self.dir.path / SUMMARY))
        except (MinerError, FileNotFoundError):  # saved once more
            return None
        if self.chief and self.outliers is not None and not readable(self.dir.path / SEEN):
            self.record_outliers()
        self.display.say(f"{self.dir.path}: finished before, nothing is left to do")
        return dict(summary)

    def record_outliers(self) -> None:
        """outliers.parquet: what ``pipelines.evaluate`` will compare its test images with."""
        seen = self.dir.path / SEEN
        seen.unlink(missing_ok=True)  # of a method that was tried here before
        if self.outliers is not None:
            write_record(self.outliers, seen)

    @property
    def mirrored(self) -> bool:
        """Whether ID images are mirrored at random."""
        return self.id_set.flip and self.recipe.augment_id != "none"

    def tell(self) -> None:
        """Say whether ID images are mirrored, how often outliers repeat, and where energies stand to the margins."""
        recipe, outliers = self.recipe, self.outliers
        how = "mirrored at random" if self.mirrored else "never mirrored"
        self.display.say(f"ID: {self.id_set.name}, {len(self.id_set.train_images):,} training images, {how}")
        if outliers is None:
            return
        used = min(len(outliers), recipe.outlier_budget or len(outliers))
        wanted = len(self.id_set.train_images) // recipe.batch * recipe.batch_outliers
        self.display.say(f"outliers: {outliers.name}, {used:,} images; an epoch takes {wanted:,}")
        if used < recipe.batch_outliers:
            self.display.say(f"outliers: fewer than a batch of {recipe.batch_outliers}: each batch repeats some")
        elif used < wanted:
            self.display.say(f"outliers: cycled, each is seen about {wanted / used:.0f} times an epoch")
        kept = 2 * recipe.batch * (len(self.id_set.train_images) // recipe.batch)
        if 0 < min(recipe.hard_from, used) <= kept:
            self.display.say(f"hard mining: {min(recipe.hard_from, used):,} drawn and {kept:,} wanted: all are kept")
        goal = recipe.objective
        if goal.energy and not self.dir.committed():
            inside, outside = mean_energies(self.net.to(self.device), self.id_set, outliers, self.config.seed)
            self.display.say(f"mean energy: ID {inside:.2f}, outliers {outside:.2f}; margins {goal.m_in}, {goal.m_out}")
            if goal.m_in < inside - 10 or goal.m_out > outside + 10:
                self.display.say("warning: a margin lies more than 10 beyond these energies; see --m-in and --m-out")

    # --- training ------------------------------------------------------------------------------------------------

    def fit(self, first: int) -> dict[str, Any]:
        """Train the epochs that are missing; returns what ``trainers.fit.fit`` does and the last epoch's terms."""
        resume = None
        if first:
            resume = (first, (self.dir.verified(first - 1) / STATE).read_bytes())
            if self.chief:
                self.display.say(f"going on after epoch {first}")
        self.clock = time.monotonic()
        self.writer = SummaryWriter(str(self.dir.path / "tensorboard"), purge_step=first + 1) if self.chief else None
        result = fit(
            self.net,
            self.id_set,
            self.outliers,
            self.recipe,
            self.config.seed,
            self.device,
            Steps(self.display) if self.chief else lambda told: None,
            resume=resume,
            on_epoch=self.commit if self.chief else None,
            world=self.world,
        )
        if self.writer:
            self.writer.close()
        records = self.dir.metrics() if self.chief else []
        seconds = sum(record.pop("seconds", 0.0) for record in records)  # of all sessions
        last = records[-1] if records else {}
        return result | {"loss": last.get("loss"), "terms": last, "seconds": round(seconds, 3)}

    def commit(self, epoch: int, state: bytes, means: dict[str, Any]) -> None:
        """An epoch is over: log, keep its state, and only then call it done."""
        now = time.monotonic()
        record = {"epoch": epoch - 1, **means, "seconds": round(now - self.clock, 3)}
        self.clock = now
        self.dir.log(record)
        write_file(self.dir.round(epoch - 1) / STATE, state)
        self.dir.commit(epoch - 1)
        self.display.committed(record)
        self.display.begin_round(epoch)
        if self.writer:
            for name, value in means.items():
                self.writer.add_scalar(f"train/{name}", value, epoch)
            self.writer.flush()

    # --- after ---------------------------------------------------------------------------------------------------

    def save(self, result: dict[str, Any]) -> None:
        """checkpoint.safetensors, with the outliers' fingerprint inside, and summary.json."""
        config, id_set = self.config, self.id_set
        origin = None
        if self.outliers is not None:
            origin = self.outliers.origin | {"name": self.outliers.name, "count": len(self.outliers)}
        meta = {
            "model": config.model,
            "classes": list(id_set.classes),
            "reject": self.recipe.objective.reject,
            "method": config.method,
            "preset": config.preset,
            "recipe": asdict(self.recipe),
            "id": config.id,
            "id_fingerprint": id_set.fingerprint,
            "size": config.size,
            "hold_out": list(self.held_labels),
            "long_tail": config.long_tail,
            "outliers": origin,
            "seed": config.seed,
            "accuracy": result["accuracy"],
            **self.made_from,
        }
        save_checkpoint(self.dir.path / CHECKPOINT, self.net, meta)
        result |= {
            "images_per_step": self.recipe.images_per_step,
            "threads": self.threads,
            "workers": self.world.size,
            "mirrored": self.mirrored,
        }
        write_json(self.dir.path / SUMMARY, meta | result)
