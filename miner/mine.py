"""The main job: pool + ID set + classifier -> weights table -> gamma-subsets, in one resumable run directory."""

import hashlib
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from torch.utils.tensorboard import SummaryWriter

from miner import cluster, memory, ranking, telemetry
from miner.config import Config
from miner.frozen import look_ups
from miner.inputs import check, check_sizes, duplicates, eligible, open_pool
from miner.loop import Game
from miner.progress import Display
from miner.rays import connect, get
from miner.run_dir import RunDir, write_json
from miner.subset import class_histogram, write_subset
from miner.weights import FORMAT_VERSION, excluded_counts, load_weights
from trainers import models
from trainers.checkpoint import load_net, pack, save_checkpoint, unpack
from trainers.data import load_id
from trainers.image_set import ImageSet


@dataclass
class Mined:
    """What a run left: where, the summary that was printed, and one entry a subset."""

    run: Path
    summary: dict[str, Any]
    subsets: list[Path]


class Mining:
    """One run, step by step; ``run_all`` is the order of the steps."""

    def __init__(self, config: Config, display: Display) -> None:
        check(config)
        self.config, self.display = config, display
        self.dir = RunDir(config.run_dir)
        self.pool = open_pool(config)
        self.times: dict[str, float] = {}
        self.n = eligible(self.pool)
        check_sizes(config, self.n)

    def run_all(self) -> Mined:
        """Everything, from the committed state of the run directory to subsets."""
        started = time.monotonic()
        self.id_set = load_id(self.config.data.id, self.config.data.size)
        settings = self.config.mining() | {"pool": self.pool.fingerprint, "id": self.id_set.fingerprint}
        first = self.dir.begin(settings, self.config.output.resume)
        self.display.follow(self.dir.path, self.config.game.effective_rounds)
        portable = json.dumps(_portable(settings), sort_keys=True)
        self.run_id = hashlib.blake2b(portable.encode(), digest_size=8).hexdigest()
        connect(self.config.machines.address)
        self.display.joined_ray()
        self.crew = cluster.crew(self.config, self.pool.path, len(self.pool.shards), self.id_set)
        try:
            self.times["start"] = time.monotonic() - started
            accuracy = self.timed("classifier", self.classifier)
            self.timed("decode", self.prepare)
            self.timed("game", self.play, first)
            table = self.timed("rank", self.finish)
            subsets = self.timed("export", self.export, table)
            self.times["total"] = time.monotonic() - started
            summary = self.summary(table, subsets, accuracy)
        finally:
            self.crew.dismiss()
        write_json(self.dir.path / "summary.json", summary)
        return Mined(self.dir.path, summary, [self.dir.path / name for name in subsets])

    def timed(self, name: str, step: Any, *args: Any) -> Any:
        """Run one step and keep its seconds."""
        started = time.monotonic()
        result = step(*args)
        self.times[name] = time.monotonic() - started
        return result

    # --- the frozen classifier -----------------------------------------------------------------------------------

    def classifier(self) -> float | None:
        """theta_0 on every trainer: from RUN, from --checkpoint, or trained on the ID set now; its accuracy."""
        path = self.dir.path / "classifier.safetensors"
        trainers, data = self.crew.trainers, self.config.data
        source = path if path.exists() else data.checkpoint
        if source is None:
            report = self.pretrain()
            state = trainers[0].state.remote()
            get([trainer.set_state.remote(state) for trainer in trainers[1:]])
            net = models.create(data.model, len(self.id_set.classes))
            net.load_state_dict(unpack(get(state)))
            meta = {"accuracy": report["accuracy"], "seed": data.seed}
        else:
            net, meta = load_net(source, data.model, self.id_set.classes)
            blob = ray.put(pack(net))
            get([trainer.set_state.remote(blob) for trainer in trainers])
        if not path.exists():
            facts = {"id": data.id, "size": data.size, "id_fingerprint": self.id_set.fingerprint}
            save_checkpoint(path, net, meta | facts | {"model": data.model, "classes": list(self.id_set.classes)})
        accuracy = meta.get("accuracy")
        known = "accuracy unknown" if accuracy is None else f"{accuracy:.1%} of the ID test images right"
        self.display.say(f"classifier: {data.model}, {known} ({source or 'trained'})")
        return accuracy

    def pretrain(self) -> dict[str, Any]:
        """Train on the ID set in the first trainer, with progress."""
        trainer = self.crew.trainers[0]
        done = trainer.pretrain.remote(self.config.pretrain)
        self.display.phase("pretrain", 1)
        steps = 0
        while not ray.wait([done], timeout=1.0)[0]:
            told = get(trainer.progress.remote())
            if not told:
                continue
            if self.display.total == 1:
                self.display.phase("pretrain", told["steps"])
            note = f"epoch {told['epoch']}/{told['epochs']}, loss {told['loss']:.3f}"
            self.display.advance(told["step"] - steps, "steps", note)
            steps = told["step"]
        return dict(get(done))

    # --- the game ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Decode every shard once, mark duplicates, images of the ID set, and what does not decode."""
        self.uid_N2, repeated = duplicates(self.pool)
        counts = [shard.count for shard in self.pool.shards]
        self.display.phase("decode", sum(counts))
        known = ImageSet("ID", (self.id_set.train_images, self.id_set.test_images)).digests()
        digests, owner = ray.put(np.unique(known)), self.crew.owner
        jobs = {actor.prepare.remote(shard, repeated[shard], digests): shard for shard, actor in enumerate(owner)}
        self.undecodable: list[str] = []
        found: dict[int, list[str]] = {}
        while jobs:
            for ref in ray.wait(list(jobs), num_returns=1)[0]:
                shard = jobs.pop(ref)
                found[shard] = get(ref)
                self.display.advance(counts[shard])
                telemetry.gauge("shards_waiting", len(jobs))
        for shard in sorted(found):
            self.undecodable += [f"{self.pool.shards[shard].name}: {image}" for image in found[shard]]
        self.display.quarantined(len(self.undecodable))
        for image in self.undecodable[:3]:
            self.display.say(f"quarantined: {image}")

    def play(self, first: int) -> None:
        """Rounds from ``first`` on; look-ups and strata belong to round 0."""
        writer = SummaryWriter(str(self.dir.path / "tensorboard"), purge_step=first)

        def on_round(record: dict[str, Any]) -> None:
            self.display.committed(record)
            self.display.figures = f"L_out {record['l_out']:.4f}, ESS {record['effective_sample_size']:,.0f}"
            number = f"round {record['round'] + 1}/{self.config.game.effective_rounds}"
            self.display.say(f"{number}: {self.display.figures} (effective size), {record['seconds']:.1f} s")
            for name, value in record.items():
                if name != "round" and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, record["round"])

        game = Game(self.config, self.crew, self.dir, self.display, on_round)
        if first > 0:
            self.display.say(f"resuming {self.dir.path} after {first} committed rounds")
            game.restore(first - 1)
        else:
            images = len(self.id_set.train_images)
            game.near = look_ups(self.config, self.crew, self.pool, self.uid_N2, images, self.display)
        game.play(first)
        writer.close()

    # --- ranking and subsets -------------------------------------------------------------------------------------

    def finish(self) -> pa.Table:
        """Rank the pool, write the weights table, and return it."""
        columns = self.crew.each("ranking_columns")
        joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        strata = joined["stratum"] if self.config.strata_for(self.pool.count) > 1 else None
        self.rows = ranking.Rows(joined["weight"], self.uid_N2, joined["eligible"], strata)
        rank = ranking.rank_rows(self.rows, self.config.draw, self.config.data.seed)
        total = sum(float(c["weight"].sum()) for c in columns)
        scale = float(joined["eligible"].sum()) / total
        folder = self.dir.path / "weights"
        folder.mkdir(exist_ok=True)
        ranks = [(str(folder.resolve()), scale, rank[a:b]) for a, b in pairwise(self.pool.edges)]
        self.crew.each("write_table", self.metadata(total), per_shard=ranks)
        return load_weights(self.dir.path)

    def metadata(self, total: float) -> dict[str, str]:
        """Schema metadata of the weights table."""
        data, game = self.config.data, self.config.game
        facts = {
            "format_version": FORMAT_VERSION,
            "pool_fingerprint": self.pool.fingerprint,
            "run_id": self.run_id,
            "rounds": game.effective_rounds,
            "seed": data.seed,
            "rule": game.rule,
            "draw": self.config.draw,
            "id": self.id_set.name,
            "id_fingerprint": self.id_set.fingerprint,
            "model": data.model,
            "weight_sum": repr(total),
        }
        return {name: str(value) for name, value in facts.items()}

    def export(self, table: pa.Table) -> dict[str, dict[str, Any]]:
        """Cut and write a subset for every gamma; {folder name: subset.json}."""
        written: dict[str, dict[str, Any]] = {}
        for gamma in self.config.selection.gamma:
            size = ranking.subset_size(self.rows, gamma, self.n, self.config.draw, self.config.data.seed)
            keep = pc.less(table["rank"], pa.scalar(size, pa.uint64()))
            chosen = table.filter(keep).sort_by("rank")
            name = f"subset-{gamma:g}"
            self.display.phase(name, size)
            recipe = self.recipe(gamma, chosen)
            written[name] = write_subset(self.pool, chosen, self.dir.path / name, recipe, self.display.advance)
        return written

    def recipe(self, gamma: float, chosen: pa.Table) -> dict[str, Any]:
        """All that is needed to draw the subset again, and the figures to judge it by."""
        return {
            "gamma": gamma,
            "n": self.n,
            "draw": self.config.draw,
            "pool": {
                "name": self.pool.name,
                "fingerprint": self.pool.fingerprint,
                "licence": self.pool.licence,
            },
            "id": {"name": self.id_set.name, "fingerprint": self.id_set.fingerprint},
            "run_id": self.run_id,
            "settings": _portable(self.config.mining()),
            "clipped_share": ranking.clipped_share(self.rows, gamma, self.n),
            "effective_sample_size": ranking.effective_sample_size(self.rows),
            "classes": class_histogram(chosen, self.pool.classes),
        }

    def summary(self, table: pa.Table, subsets: dict[str, dict[str, Any]], accuracy: float | None) -> dict[str, Any]:
        """What the run found, for people and scripts."""
        return {
            "pool": self.pool.name,
            "pool_path": self.pool.path,
            "images": self.pool.count,
            "n": self.n,
            "id": self.id_set.name,
            "model": self.config.data.model,
            "accuracy": accuracy,
            "rule": self.config.game.rule,
            "rounds": self.config.game.effective_rounds,
            "excluded": excluded_counts(table),
            "undecodable": self.undecodable[:20],
            "subsets": {
                name: {k: s[k] for k in ("gamma", "count", "clipped_share", "effective_sample_size")}
                for name, s in subsets.items()
            },
            "pool_actors": len(self.crew.pools),
            "trainers": get([trainer.where.remote() for trainer in self.crew.trainers]),
            "memory": memory.survey(get([a.memory.remote() for a in self.crew.pools + self.crew.trainers])),
            "seconds": {name: round(value, 2) for name, value in self.times.items()},
        }


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without where this machine keeps its files: the same run elsewhere gives the same bytes."""
    data = settings["data"] | {name: Path(str(settings["data"][name])).name for name in ("pool", "id")}
    if data["checkpoint"]:
        data["checkpoint"] = Path(data["checkpoint"]).name
    return settings | {"data": data}


def mine(config: Config) -> Mined:
    """Run the main job and return where its results are. Raises MinerError for everything a user can mend."""
    with Display() as display:
        return Mining(config, display).run_all()
