"""Set out the pool and trainer actors of a run on whatever machines Ray has."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from miner.config import Config
from miner.errors import UsageError
from miner.rays import get
from trainers.data import IdSet


@dataclass
class Crew:
    """The actors and who owns what."""

    pools: list[Any]
    owner: list[Any]  # shard -> pool actor
    trainers: list[Any]

    def each(self, method: str, *args: Any, per_shard: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """``method(shard, *per_shard[shard], *args)`` for every shard, one message an actor; in shard order."""
        extra = per_shard or [()] * len(self.owner)
        mine = [[s for s, owner in enumerate(self.owner) if owner is actor] for actor in self.pools]
        calls = [
            actor.each.remote(method, shards, [extra[s] for s in shards], args)
            for actor, shards in zip(self.pools, mine, strict=True)
        ]
        found = {
            s: r for shards, results in zip(mine, get(calls), strict=True) for s, r in zip(shards, results, strict=True)
        }
        return [found[shard] for shard in range(len(self.owner))]

    def dismiss(self) -> None:
        """End all actors, so that their CPUs and GPUs are free for whatever comes next."""
        for actor in self.pools + self.trainers:
            ray.kill(actor)


def crew(config: Config, pool: str, shards: int, id_set: IdSet) -> Crew:
    """Start the actors. Trainers take a GPU each where the cluster has any, else one CPU's slot."""
    from miner.actors import PoolActor
    from trainers.actor import TrainerActor

    game, machines = config.game, config.machines
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    kind = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
    if machines.trainers > (gpus or cpus):
        raise UsageError(f"--trainers {machines.trainers}: the cluster has {gpus} GPUs and {cpus} CPUs")
    # One core is left to pool actors and driver: OpenMP threads that share a core wait for each other at every layer.
    scoring = max(((os.cpu_count() or 2) - 1) // machines.trainers, 1)
    threads = (game.threads, scoring)
    shared = ray.put(id_set)
    trainer = TrainerActor.options(**kind)
    run = str(config.run_dir.absolute())  # where each process keeps its log
    trainers = [
        trainer.remote(config.data.model, shared, config.data.seed, threads, game, watch=(run, f"trainer-{i}"))
        for i in range(machines.trainers)
    ]
    wanted = machines.pool_actors or min(cpus, 16)
    # Pool actors reserve no CPU: they must all be placed on whatever there is, spread over the nodes.
    actor = PoolActor.options(num_cpus=0, scheduling_strategy="SPREAD")
    pools: list[Any] = [
        actor.remote(pool, config.data.size, config.data.seed, game.rule, game.eta, watch=(run, f"pool-{i}"))
        for i in range(max(1, min(wanted, shards)))
    ]
    return Crew(pools, [pools[shard % len(pools)] for shard in range(shards)], trainers)
