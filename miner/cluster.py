"""The pool and trainer actors of a run: set out on whatever machines Ray has, watched, replaced when they are lost.

A new process is a new handle, and nothing is ever sent to an old one again. Those that live on take their calls in
the order in which they were made. So a call of before a loss can at worst be done by a process that nobody asks any
more, and all that it can write are the bytes that its successor writes too.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miner.config import Config
from miner.errors import MinerError, UsageError
from miner.logs import log
from miner.progress import Display
from miner.rays import LostError, get, put
from miner.weights import REASONS
from trainers.data import IdSet

POLL = 2.0  # seconds between two looks at what is being waited for
PATIENCE = 60.0  # seconds without an answer to "are you there?" after which a process counts as lost
PLACING = 60.0  # seconds that a new trainer may wait for a slot while others can do its work
TELL = 10.0  # seconds between two lines that say what is being waited for
MOST_LOSSES = 10  # in a row, without anything new that is kept


@dataclass(frozen=True)
class Loss:
    """Who was lost, in which phase, and since when (monotonic seconds) nothing had been kept."""

    error: LostError
    names: list[str]
    phase: str
    since: float


class Crew:
    """The actors and who owns what. ``owner[shard]`` is a pool actor; the first of ``trainers`` also trains."""

    def __init__(self, config: Config, pool: str, shards: int, id_set: IdSet, display: Display) -> None:
        self.config, self.pool, self.shards, self.display = config, pool, shards, display
        self.id_set, self.id_images = put(id_set), len(id_set.train_images)
        self.kind = _slots(config)
        wanted = config.machines.pool_actors or min(_count("CPU") or 1, 16)
        self.names: dict[Any, str] = {}
        self.watch = str(config.run_dir.resolve())  # where each process keeps its log
        self.pings: dict[Any, tuple[Any, float]] = {}  # actor -> question and when it was put
        self.deaths: list[dict[str, Any]] = []
        self.kept_at, self.losses = time.monotonic(), 0
        self.pools = [self._pool(i) for i in range(max(1, min(wanted, shards)))]
        self.trainers = [self._trainer(i) for i in range(config.machines.trainers)]
        self.members = self.trainers[:1]
        self.holders: dict[bytes, Any] = {}  # a block's key -> trainer that has kept its images
        self.room: dict[Any, int] = {}  # bytes of images that each trainer could still keep
        self._assemble()

    @property
    def owner(self) -> list[Any]:
        """Pool actor of each shard."""
        return [self.pools[shard % len(self.pools)] for shard in range(self.shards)]

    # --- calls ---------------------------------------------------------------------------------------------------

    def each(self, method: str, *args: Any, per_shard: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """``method(shard, *per_shard[shard], *args)`` for every shard, one message an actor; in shard order."""
        extra = per_shard or [()] * self.shards
        mine = [range(i, self.shards, len(self.pools)) for i in range(len(self.pools))]
        calls = [
            actor.each.remote(method, list(shards), [extra[s] for s in shards], args)
            for actor, shards in zip(self.pools, mine, strict=True)
        ]
        found: list[Any] = [None] * self.shards
        for shards, results in zip(mine, self.get(calls), strict=True):
            for shard, result in zip(shards, results, strict=True):
                found[shard] = result
        return found

    def get(self, refs: Any) -> Any:
        """Results of calls. Raises LostError when an actor dies, or does not even say that it is there."""
        waiting = list(refs) if isinstance(refs, list) else [refs]
        while waiting:
            done, waiting = self.wait(waiting, len(waiting))
            if waiting:
                get(done)  # a failure is told before the slowest has ended
        return get(refs)

    def wait(self, refs: list[Any], count: int = 1, seconds: float = POLL) -> tuple[list[Any], list[Any]]:
        """``ray.wait`` for at most ``seconds``, with an eye on actors that hang."""
        found = ray.wait(refs, num_returns=count, timeout=seconds, fetch_local=False)
        if not found[0]:
            self._feel_pulse()
        return found

    def _feel_pulse(self) -> None:
        """Ask every actor whether it is there. Raises LostError for one that has not answered for PATIENCE seconds.

        The question is answered beside whatever an actor works at, so that long work is not taken for a standstill.
        """
        now = time.monotonic()
        for actor in [*self.pools, *self.trainers]:
            question, since = self.pings.get(actor) or (actor.ping.remote(), now)
            if ray.wait([question], timeout=0)[0]:
                get(question)
                self.pings.pop(actor, None)
            elif now - since > PATIENCE:
                raise LostError(f"a worker process hangs ({self.names[actor]}: no answer for {PATIENCE:.0f} s)")
            else:
                self.pings[actor] = question, since

    def join(self, most: int) -> None:
        """Have the first ``most`` trainers, as far as there are so many, share training steps from now on."""
        self.members = self.trainers[:most]
        where = self.get(self.members[0].meet.remote()) if len(self.members) > 1 else ("", 0)
        self.get([member.join.remote(rank, len(self.members), where) for rank, member in enumerate(self.members)])

    def forget(self) -> None:
        """Nobody keeps any images, and everybody has room for them."""
        self.holders.clear()
        rooms = self.get([trainer.forget.remote() for trainer in self.trainers])
        asked = self.config.machines.resident
        self.room = {
            trainer: room if (asked if asked is not None else gpu) else 0
            for trainer, (room, gpu) in zip(self.trainers, rooms, strict=True)
        }

    def hold(self, key: bytes, trainer: Any, size: int) -> bool:
        """Whether ``trainer`` is to keep a block's images from now on: when it has room for ``size`` bytes."""
        if self.room.get(trainer, 0) < size:
            return False
        self.room[trainer] -= size
        self.holders[key] = trainer
        return True

    def check_left(self) -> None:
        """Raise MinerError, with their number by reason, when exclusions have left no image of the pool."""
        left, *gone = np.sum(self.each("reasons"), axis=0).tolist()
        if left:
            return
        told = ", ".join(f"{count:,} {reason}" for reason, count in zip(REASONS[1:], gone, strict=True) if count)
        advice = "take another --pool"
        if gone[REASONS.index("near-id") - 1]:
            advice = (
                "the classifier takes what is near-id for ID: start anew with another --checkpoint, or a higher "
                "--exclude-near-id (0: no leak guard), in another --out"
            )
        raise MinerError(f"no image of the pool is left after exclusions ({told or 'it is empty'}): {advice}")

    # --- losses --------------------------------------------------------------------------------------------------

    def kept(self) -> None:
        """Something new lies in the run directory: a loss costs no more than what comes after it."""
        self.kept_at, self.losses = time.monotonic(), 0

    def mend(self, error: LostError) -> Loss:
        """Replace whoever is lost. Raises MinerError when it happens again and again.

        The caller then brings everybody back to what was kept.
        """
        phase, since = self.display.name, self.kept_at
        self.losses += 1
        if self.losses > MOST_LOSSES:
            raise MinerError(f"{error} ({MOST_LOSSES} times in a row without progress: out of memory?)") from None
        self.pings.clear()
        questions = {actor: actor.ping.remote() for actor in [*self.pools, *self.trainers]}
        ray.wait(list(questions.values()), num_returns=len(questions), timeout=PATIENCE)
        lost = {actor: why for actor, question in questions.items() if (why := _trouble(question))}
        names = [self.names[actor] for actor in lost]
        for actor, why in lost.items():
            log.warning("%s is lost: %s", self.names[actor], why)
            ray.kill(actor)
            number = int(self.names.pop(actor).partition("-")[2])
            if actor in self.pools:
                self.pools[number] = self._pool(number)
            else:
                self.trainers[self.trainers.index(actor)] = self._trainer(number)
        self._assemble()
        return Loss(error, names, phase, since)

    def record(self, loss: Loss) -> None:
        """Note a loss that has been made good, and say what it cost: the time since something was last kept."""
        seconds, phase = time.monotonic() - loss.since, loss.phase
        why = str(loss.error).partition(" (")[2].partition(");")[0][:120]
        who = " and ".join(loss.names) or "a process"
        self.deaths.append({"who": who, "phase": phase, "why": why, "seconds_lost": round(seconds, 1)})
        self.display.death(who, f"{why}, in {phase}", seconds)

    def _assemble(self) -> None:
        """Wait until every actor runs. Trainers for which no slot comes free are done without, if there are others."""
        started = spoke = time.monotonic()
        questions = {actor.ping.remote(): actor for actor in [*self.pools, *self.trainers]}
        waiting = list(questions)
        while waiting := ray.wait(waiting, num_returns=len(waiting), timeout=POLL)[1]:
            late = [questions[ref] for ref in waiting]
            now = time.monotonic()
            full = len(self.trainers) > _count("GPU" if self.kind.get("num_gpus") else "CPU")
            if (full or now - started > PLACING) and not self.config.machines.autoscale:
                for actor in [actor for actor in late if actor in self.trainers and len(self.trainers) > 1]:
                    self.trainers.remove(actor)
                    ray.kill(actor)
                    self.display.say(f"no slot for {self.names.pop(actor)}: going on with {len(self.trainers)}")
                waiting = [ref for ref in waiting if questions[ref] in self.names]
            if now - spoke > TELL:
                spoke = now
                missing = ", ".join(sorted(self.names[actor] for actor in late if actor in self.names))
                self.display.say(f"waiting for {missing} to start, or for a free slot ({now - started:.0f} s)")

    def dismiss(self) -> None:
        """End all actors, so that their CPUs and GPUs are free for whatever comes next."""
        for actor in self.pools + self.trainers:
            ray.kill(actor)

    # --- starting ------------------------------------------------------------------------------------------------

    def _pool(self, number: int) -> Any:
        """A new pool actor. It reserves no CPU, so that all are placed on whatever there is, spread over the nodes.

        Where machines start on demand it asks for one CPU: without a demand no machine would start.
        """
        from miner.actors import PoolActor

        data, game = self.config.data, self.config.game
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": _place(number)}
        if self.config.machines.autoscale:
            options = {"num_cpus": 1}
        actor = PoolActor.options(**options).remote(
            self.pool, data.size, data.seed, game.rule, game.eta, watch=(self.watch, f"pool-{number}")
        )
        self.names[actor] = f"pool-{number}"
        return actor

    def _trainer(self, number: int) -> Any:
        """A new trainer: a GPU where the cluster has any, else one CPU's slot."""
        from trainers.actor import TrainerActor

        data, game, machines = self.config.data, self.config.game, self.config.machines
        share = -(-machines.trainers // len(_nodes()))  # trainers on one machine
        actor = TrainerActor.options(**self.kind).remote(
            data.model, self.id_set, data.seed, game, share, watch=(self.watch, f"trainer-{number}")
        )
        self.names[actor] = f"trainer-{number}"
        return actor


def _trouble(question: Any) -> str:
    """Why a question was not answered; "" when it was."""
    try:
        ray.get(question, timeout=0)
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _nodes() -> list[str]:
    """Living machines that do work: a cluster's head often has no CPU to give."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted(node["NodeID"] for node in alive if node["Resources"].get("CPU")) or [alive[0]["NodeID"]]


def _place(number: int) -> Any:
    """Pool actors take turns over the machines.

    A soft wish is not kept: Ray spills a start to whichever machine has a process ready, and two actors would then
    share one machine's disk. A machine that dies meanwhile makes a lost actor like any other, and the next takes over.
    """
    nodes = _nodes()
    return NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=False)


def _count(kind: str) -> int:
    return int(ray.cluster_resources().get(kind, 0))


def _slots(config: Config) -> dict[str, Any]:
    """What a trainer reserves. Raises UsageError when the cluster can never give it."""
    gpus, cpus = _count("GPU"), max(_count("CPU"), 1)
    if config.machines.autoscale:
        return {"num_gpus": 1, "num_cpus": 1}
    if config.machines.trainers > (gpus or cpus):
        raise UsageError(f"--trainers {config.machines.trainers}: the cluster has {gpus} GPUs and {cpus} CPUs")
    return {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
