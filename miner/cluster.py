"""Ray: start or join it, and set out pool and trainer actors."""

import logging
import os
from typing import Any

import ray

from miner.config import Config
from miner.errors import MinerError, UsageError
from miner.loop import Crew
from trainers.data import IdSet


def connect(address: str | None) -> None:
    """Join the Ray cluster at ``address``, or start a private one on this machine; its processes end with ours.

    Never joins a cluster that merely happens to run here. Threads that wait must not spin: two libraries with
    a thread pool each (torch, faiss) would otherwise slow each other on few cores.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MinerError(f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]})") from None


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
    threads = machines.threads or max((os.cpu_count() or 2) - 1, 1)
    shared = ray.put(id_set)
    trainer = TrainerActor.options(**kind)
    trainers = [
        trainer.remote(config.data.model, shared, config.data.seed, threads, game.alpha, game.lr, game.batch)
        for _ in range(machines.trainers)
    ]
    wanted = machines.pool_actors or min(cpus, 16)
    # Pool actors reserve no CPU: they must all be placed on whatever there is, spread over the nodes.
    actor = PoolActor.options(num_cpus=0, scheduling_strategy="SPREAD")
    pools: list[Any] = [
        actor.remote(pool, config.data.size, config.data.seed, game.rule, game.eta)
        for _ in range(max(1, min(wanted, shards)))
    ]
    return Crew(pools, [pools[shard % len(pools)] for shard in range(shards)], trainers)
