"""The main job: pool + ID set + classifier -> weights table -> gamma-subsets, in one resumable run directory."""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from miner import memory, store
from miner.board import Board
from miner.cache import is_shared
from miner.cluster import Crew, Loss
from miner.config import Config
from miner.files import Place
from miner.frozen import look_ups
from miner.inputs import check, check_sizes, duplicates, eligible, open_pool
from miner.loop import Game, theta_of
from miner.outcome import Outcome, portable
from miner.progress import Display
from miner.rays import LostError, connect, put, store_use
from miner.run_dir import RunDir, write_json
from trainers import models
from trainers.checkpoint import load_net, pack, save_checkpoint, unpack
from trainers.data import load_id
from trainers.image_set import ImageSet


@dataclass
class Mined:
    """What a run left: where, the summary that was printed, and one entry a subset."""

    run: Place
    summary: dict[str, Any]
    subsets: list[Place]


class Mining:
    """One run, step by step; ``run_all`` is the order of the steps."""

    def __init__(self, config: Config, display: Display) -> None:
        check(config)
        self.config, self.display = config, display
        self.dir = RunDir(config.run_dir)
        self.pool = open_pool(config)
        self.times: dict[str, float] = {}
        self.decoded: set[int] = set()  # shards whose pixels lie in the cache
        self.n = eligible(self.pool)
        check_sizes(config, self.n)

    def run_all(self) -> Mined:
        """Everything, from the committed state of the run directory to subsets."""
        started = time.monotonic()
        self.id_set = load_id(self.config.data.id, self.config.data.size)
        settings = self.config.mining() | {"pool": self.pool.fingerprint, "id": self.id_set.fingerprint}
        with self.dir.locked():
            self.dir.begin(settings, self.config.output.resume)
            self.dir.tidy()
            self.display.follow(self.dir.path, self.config.game.effective_rounds)
            self.uid_N2, self.repeated = duplicates(self.pool)
            outcome = self.outcome(settings)
            self.connect()
            self.display.joined_ray()
            self.crew = Crew(self.config, self.pool.path, len(self.pool.shards), self.id_set, self.display)
            try:
                self.times["start"] = time.monotonic() - started
                table, workers = self.mined(outcome)
            finally:
                self.crew.dismiss()
            subsets = self.timed("export", outcome.export, table)
            self.times["total"] = time.monotonic() - started
            summary = outcome.summary(table, subsets) | workers
            summary["seconds"] = {name: round(value, 2) for name, value in self.times.items()}
            self.dir.tidy()
            summary["bytes_used"] = self.dir.bytes_used()
            write_json(self.dir.path / "summary.json", summary)
        return Mined(self.dir.path, summary, [self.dir.path / name for name in subsets])

    def connect(self) -> None:
        """Join Ray, or start one with as large an object store as is needed."""
        address, wanted = self.config.machines.address, store.needed(self.config, self.pool.count, self.id_set)
        if address in (None, "local") and (line := store.complaint(wanted)):
            self.display.say(line)
        connect(address, object_store_bytes=wanted)

    def outcome(self, settings: dict[str, Any]) -> Outcome:
        """What will write the results."""
        told = json.dumps(portable(settings), sort_keys=True)
        run_id = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
        return Outcome(self.config, self.dir, self.pool, self.id_set, run_id, self.n, self.uid_N2, self.display)

    def timed(self, name: str, step: Any, *args: Any) -> Any:
        """Run one step and add up its seconds."""
        started = time.monotonic()
        try:
            return step(*args)
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.monotonic() - started

    # --- with actors, whatever becomes of them -------------------------------------------------------------------

    def mined(self, outcome: Outcome) -> tuple[pa.Table, dict[str, Any]]:
        """The weights table, and who worked on it. Lost processes are replaced, and all go on from what was kept."""
        losses: list[Loss] = []
        while True:
            try:
                self.timed("classifier", self.classifier)
                self.timed("decode", self.prepare)
                game, first = self.timed("restore", self.restored)
                while losses:
                    self.crew.record(losses.pop(0))
                self.timed("game", self.play, game, first)
                return self.timed("rank", outcome.rank, self.crew), self.workers()
            except LostError as error:
                losses.append(self.crew.mend(error))

    def restored(self) -> tuple[Game, int]:
        """A game whose actors are all in the state of the last commit, and the round to play next."""
        first = self.dir.rewind()
        for note in self.dir.notes:
            self.display.say(note)
        self.dir.notes.clear()
        game = Game(self.config, self.crew, self.dir, self.pool.shards, self.display)
        if first > 0:
            self.display.say(f"resuming {self.dir.path} after {first} committed rounds")
            game.restore(first - 1)
        else:
            self.crew.each("reset")
            self.crew.check_left()
            game.theta = theta_of(self.theta_0)
            game.near = look_ups(self.config, self.crew, self.pool, self.uid_N2, self.dir.path, game.theta)
        self.crew.join(self.config.game.parts)
        self.crew.forget()
        return game, first

    def play(self, game: Game, first: int) -> None:
        """Rounds from ``first`` on."""
        with Board(self.dir.path / "tensorboard", first) as board:

            def on_round(record: dict[str, Any]) -> None:
                self.display.figures = f"L_out {record['l_out']:.4f}, ESS {record['effective_sample_size']:,.0f}"
                number = f"round {record['round'] + 1}/{self.config.game.effective_rounds}"
                self.display.say(f"{number}: {self.display.figures} (effective size), {record['seconds']:.1f} s")
                board.add(record)
                self.display.committed(record)

            game.play(first, on_round)

    def workers(self) -> dict[str, Any]:
        """Who did the work, for the summary, and what it had to put up with."""
        return {
            "accuracy": self.accuracy,
            "undecodable": self.undecodable[:20],
            "pool_actors": len(self.crew.pools),
            "trainers": self.crew.get([trainer.where.remote() for trainer in self.crew.trainers]),
            "deaths": self.crew.deaths,
            "object_store": store_use(),
            "memory": memory.survey(
                self.crew.get([actor.memory.remote() for actor in [*self.crew.pools, *self.crew.trainers]])
            ),
        }

    # --- the frozen classifier -----------------------------------------------------------------------------------

    def classifier(self) -> None:
        """theta_0 on every trainer: from RUN, from --checkpoint, or trained on the ID set now."""
        path = self.dir.path / "classifier.safetensors"
        data, crew = self.config.data, self.crew
        source = path if path.exists() else data.checkpoint
        if source is None:
            report = self.pretrain()
            net = models.create(data.model, len(self.id_set.classes))
            net.load_state_dict(unpack(crew.get(crew.trainers[0].state.remote())))
            meta = {"accuracy": report["accuracy"], "seed": data.seed}
        else:
            net, meta = load_net(source, data.model, self.id_set.classes)
        if not path.exists():
            facts = {"id": data.id, "size": data.size, "id_fingerprint": self.id_set.fingerprint}
            save_checkpoint(path, net, meta | facts | {"model": data.model, "classes": list(self.id_set.classes)})
            self.dir.pretraining.forget()
            crew.kept()
        self.theta_0 = pack(net)
        blob = put(self.theta_0)
        crew.get([trainer.set_state.remote(blob) for trainer in crew.trainers])
        self.accuracy = meta.get("accuracy")
        known = "accuracy unknown" if self.accuracy is None else f"{self.accuracy:.1%} of the ID test images right"
        self.display.say(f"classifier: {data.model}, {known} ({source or 'trained'})")

    def pretrain(self) -> dict[str, Any]:
        """Train on the ID set in the first trainer, with progress; its epochs are committed one by one."""
        trainer = self.crew.trainers[0]
        done = trainer.pretrain.remote(self.config.pretrain, str(self.dir.path.resolve()))
        self.display.phase("pretrain", 1)
        told: dict[str, Any] = {}
        while not self.crew.wait([done], seconds=1.0)[0]:
            before, told = told, self.crew.get(trainer.progress.remote())
            if not told:
                continue
            if not before:
                self.display.phase("pretrain", told["steps"], told["first"])
            if told["epoch"] > before.get("epoch", told["epoch"]):
                self.crew.kept()
            note = f"epoch {told['epoch']}/{told['epochs']}, loss {told['loss']:.3f}"
            self.display.advance(told["step"] - before.get("step", told["first"]), "steps", note)
        return dict(self.crew.get(done))

    # --- the pool's pixels ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Decode every shard once, mark duplicates, images of the ID set, and what does not decode."""
        known = ImageSet("ID", (self.id_set.train_images, self.id_set.test_images)).digests()
        digests, owner = put(np.unique(known)), self.crew.owner
        counts = [shard.count for shard in self.pool.shards]
        self.display.phase("decode", sum(counts))
        shared = is_shared(self.pool)
        if shared:
            self.decode(counts)
        jobs = [actor.prepare.remote(s, self.repeated[s], digests) for s, actor in enumerate(owner)]
        first_time = not hasattr(self, "undecodable")
        found = []
        for shard, job in enumerate(jobs):
            found += [f"{self.pool.shards[shard].name}: {image}" for image in self.crew.get(job)]
            if not shared:
                self.count(shard, counts[shard])
        self.undecodable = found
        self.display.quarantined(len(self.undecodable))
        for image in self.undecodable[:3] if first_time else ():
            self.display.say(f"quarantined: {image}")

    def decode(self, counts: list[int]) -> None:
        """Fill the cache that all nodes see: whoever is free takes the next shard."""
        free, todo = list(self.crew.pools), iter(range(len(counts)))
        busy: dict[Any, tuple[Any, int]] = {}
        while True:
            while free and (shard := next(todo, None)) is not None:
                actor = free.pop()
                busy[actor.decode.remote(shard)] = actor, shard
            if not busy:
                return
            for ref in self.crew.wait(list(busy))[0]:
                self.crew.get(ref)
                actor, shard = busy.pop(ref)
                free.append(actor)
                self.count(shard, counts[shard])

    def count(self, shard: int, images: int) -> None:
        """A shard is decoded."""
        if shard not in self.decoded:  # else it was only mapped again, after a loss
            self.decoded.add(shard)
            self.crew.kept()
        self.display.advance(images)


def mine(config: Config) -> Mined:
    """Run the main job and return where its results are: what ``python -m pipelines.resample`` does.

    Shows its progress on stderr. Raises MinerError for everything a user can mend.

    >>> from miner.config import Config, Data, Output, Selection
    >>> config = Config(Data(pool="demo", id="demo"), selection=Selection((0.1, 0.01)), output=Output("runs/demo"))
    >>> mined = mine(config)  # doctest: +SKIP
    >>> mined.subsets  # doctest: +SKIP
    [PosixPath('runs/demo/subset-0.1'), PosixPath('runs/demo/subset-0.01')]
    """
    with Display() as display:
        return Mining(config, display).run_all()
