"""What --dry-run says of a run: on this machine and on those of --fleet, by the model of ``miner.costs``."""

import os
from dataclasses import replace
from math import inf

from miner import cache, inputs, rules, store
from miner.config import Config, Fleet
from miner.costs import Rates, Site, Work, bytes_read, memory, predict
from miner.errors import UsageError
from miner.neighbors import POINTS_PER_STRATUM
from miner.pool import Pool
from miner.sweep import block_size
from trainers.data import IdSet

LOOK_UPS = 200_000  # a second on a GPU: a guess, for want of one to measure on


def work_of(config: Config, pool: Pool, id_set: IdSet) -> Work:
    """What a run under ``config`` has to do."""
    game, n, size = config.game, pool.count, config.data.size
    sweeps, steps, _ = inputs.work(config, n)
    new = [entry for number, entry in enumerate(pool.shards) if not cache.is_there(pool, number, size)]
    strata = config.strata_for(n) if sweeps else 0
    ids = len(id_set.train_images)
    sample = (strata * POINTS_PER_STRATUM if strata > 1 else 0) + (ids if game.rule == "poem" else 0)
    return Work(
        images=n,
        shards=len(pool.shards),
        size=size,
        decode=sum(entry.count for entry in new),
        stored=sum(entry.bytes for entry in new),
        sweeps=sweeps,
        views=game.views,
        block=block_size(size),
        updates=steps if game.rule in rules.STEPWISE else game.effective_rounds,
        steps=steps,
        look_up=config.guarded,
        id_images=ids,
        epochs=0 if config.data.checkpoint else config.pretrain.epochs,
        sample=min(sample, n),
        kept=int(sum(config.selection.gamma) * n),
    )


def here(config: Config, work: Work, gpus: int) -> Site:
    """This machine."""
    cores = os.cpu_count() or 1
    actors = config.machines.pool_actors or min(cores, 16)
    trainers = config.machines.trainers
    return Site(1, gpus, cores, trainers, min(config.game.parts, trainers), min(actors, work.shards), inf)


def check(fleet: Fleet, gpus: int) -> None:
    """Raise UsageError when a run on ``fleet`` cannot be predicted on this machine with ``gpus``."""
    if fleet.nodes < 0 or fleet.gpus < 0 or (fleet.cores or 1) < 1 or not fleet.gigabytes > 0 or fleet.dollars < 0:
        raise UsageError(
            f"--fleet.nodes {fleet.nodes} --fleet.gpus {fleet.gpus} --fleet.cores {fleet.cores} --fleet.gigabytes "
            f"{fleet.gigabytes:g} --fleet.dollars {fleet.dollars:g}: no machines are like that"
        )
    if fleet.nodes and fleet.gpus and not gpus and not (fleet.gpu_images and fleet.gpu_images > 0):
        raise UsageError(f"--fleet.gpus {fleet.gpus}: no GPU is here to measure; give --fleet.gpu-images as well")
    if fleet.nodes and gpus and not fleet.gpus:
        raise UsageError("--fleet.gpus 0: here a GPU scores, so what cores do is not measured; give --fleet.gpus")


def there(config: Config, work: Work) -> Site:
    """The machines of --fleet."""
    fleet, cores = config.fleet, config.fleet.cores or os.cpu_count() or 1
    actors = config.machines.pool_actors or min(fleet.nodes * cores, 16)
    trainers = fleet.nodes * max(fleet.gpus, 1)
    training, bandwidth = min(config.game.parts, trainers), 1e9 * fleet.gigabytes
    return Site(fleet.nodes, fleet.gpus, cores, trainers, training, min(actors, work.shards), bandwidth, fleet.dollars)


def rates_there(rates: Rates, fleet: Fleet, batch: int) -> Rates:
    """``rates`` as they are on the machines of ``fleet``; ``batch``: ID images of a training step."""
    if not fleet.gpus:
        return rates
    forward, look_up = rates.forward, rates.look_up if rates.gpus else 1.0 / LOOK_UPS
    found = replace(rates, gpus=fleet.gpus, look_up=1.0 / fleet.gpu_look_ups if fleet.gpu_look_ups else look_up)
    if fleet.gpu_images:  # there and back is three times as far as there
        forward = 1.0 / fleet.gpu_images
        found = replace(found, forward=forward, pretrain=3.0 * forward, step=6.0 * batch * forward)
    return found


# --- for people ------------------------------------------------------------------------------------------------------


def told(config: Config, pool: Pool, id_set: IdSet, rates: Rates) -> str:
    """What a run takes on this machine, and on those of --fleet."""
    work, fleet = work_of(config, pool, id_set), config.fleet
    name = f"{rates.gpus} GPUs" if rates.gpus else f"{os.cpu_count()} CPU cores"
    found = [
        f"here        {name}; an image: {rates.decode * 1e6:,.0f} us to decode, {rates.forward * 1e6:,.0f} us a view, "
        f"{rates.look_up * 1e6:,.0f} us to look up; {rates.step * 1e3:,.0f} ms a training step",
        *_lines(config, work, id_set, rates, here(config, work, rates.gpus)),
    ]
    if fleet.nodes:
        site = there(config, work)
        rates = rates_there(rates, fleet, config.game.batch)
        found += [
            f"fleet       {site.nodes:,} machines of {site.gpus} GPUs and {site.cores} cores, "
            f"{fleet.gigabytes:g} GB/s; {1 / rates.forward:,.0f} images/s a " + ("GPU" if site.gpus else "core"),
            *_lines(config, work, id_set, rates, site),
        ]
    return "\n".join(found)


def _lines(config: Config, work: Work, id_set: IdSet, rates: Rates, site: Site) -> list[str]:
    parts = predict(rates, site, work)
    total = sum(part.seconds for part in parts.values())
    longest = max(parts, key=lambda name: parts[name].seconds)
    wanted = replace(config, machines=replace(config.machines, trainers=site.trainers))
    id_bytes = id_set.train_images.nbytes + id_set.test_images.nbytes
    each = memory(site, work, id_bytes, store.needed(wanted, work.images, id_set))
    count = {"pool actor": site.pool_actors, "trainer": site.trainers}
    memories = [
        (f"{count[kind]} x " if kind in count else "") + f"{kind} {size / 2**30:.1f}" for kind, size in each.items()
    ]
    everything = sum(size * count.get(kind, 1) for kind, size in each.items())
    price = f", {total / 3600 * site.nodes * site.dollars:,.2f} dollars" if site.dollars else ""
    return [
        *(f"  {name:<10}{part.seconds:>10,.1f} s  {part.bound}" for name, part in parts.items()),
        f"  {'total':<10}{total:>10,.1f} s  {total / 3600:.2f} hours{price}, most of it {longest}",
        f"  memory    {everything / 2**30:>10,.1f} GiB in all processes: {', '.join(memories)}",
        f"  read      {bytes_read(work) / 1e9:>10,.1f} GB, unless it is in memory already",
    ]
