"""What a run will take on given machines: seconds a part and what bounds it, memory, bytes, dollars.

``predict`` is a pure function of what a run's work costs (``Rates``, measured by ``miner.rates``), of the machines
(``Site``) and of how much is to be done (``Work``); ``miner.forecast`` makes the two and tells people.

A part is made of phases, each of which waits for the one before; within a phase resources work at the same time, and
the slowest decides:

- start: the driver reads ID set and index, then Ray and the actors start, all at once on each machine's cores.
- classifier: one trainer trains; the others wait for its net.
- decode: pool actors read, decode and hash, each its own shards; while one waits for the disk others compute.
- restore: every trainer takes in the whole ID set; then one sees the sample, and fits strata.
- game: in a sweep pool actors gather blocks, the network carries them, trainers score, and the driver hands them out,
  all at once, for each trainer has a block waiting (``miner.sweep``): the slowest decides, and at the end trainers
  wait for the last block. Then pool actors update weights; training steps are one trainer's,
  or with --parts some trainers', commits the disk's.
- rank: the driver ranks, then pool actors write the table.
- export: the driver reads and writes image after image.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

RAY, WORKER = 3.0, 1.6  # what driver with a private Ray, and a trainer's process, take to start, in trainers' imports
BLOCK, BLOCK_TRAINER = 1.3e-3, 1.2e-5  # the driver's seconds a block, and more for each trainer: benchmarks.speed sweep
CALL = 2.5e-4  # the driver's seconds to send an actor one call
ID_SAMPLE = 5_000  # ID images that say how near is near
SNAPSHOT, TABLE = 60, 130  # bytes a row of a commit, of the weights table
DRIVER, ACTOR, TRAINER, GPU_TRAINER, RAY_ITSELF = 0.5e9, 0.25e9, 0.9e9, 4e9, 0.6e9  # bytes of each process at least
DRIVER_ROW, ACTOR_ROW = 90, 85  # bytes a row in the driver, and in all pool actors together


@dataclass(frozen=True)
class Rates:
    """Seconds that a run's work costs. A scorer is a GPU, or one core of a trainer on CPUs."""

    gpus: int  # of the machine; 0: cores scored
    decode: float  # an image: read, decoded and written to the cache, by a core
    digest: float  # an image: hashed and compared with the ID set, by a core
    gather: float  # an image: copied out of the cache and into Ray's store, by a core
    forward: float  # an image: one view, by a scorer
    look_up: float  # an image: nearest ID images and stratum, by a GPU or a core
    pretrain: float  # an ID image: one epoch of pre-training, by a trainer
    step: float  # a training step of the game, by a trainer
    strata: float  # an image of the sample that strata are fitted to, by a trainer
    move: float  # a row: one update of the weights and its snapshot, by the core of a pool actor
    drive: float  # a row: one update, by the driver
    index: float  # a row: read from the index and compared with all others, by the driver
    sample: float  # a row: whether it is in the sample, by the driver
    rank: float  # a row: ranked and cut, by the driver
    table: float  # a row: written to the weights table, by the core of a pool actor
    export: float  # an image of a subset, by the driver
    imports: float  # a process that starts
    id_set: float  # the ID set is read


@dataclass(frozen=True)
class Site:
    """Machines, all alike, and the processes on all of them together."""

    nodes: int
    gpus: int  # of each machine
    cores: int
    trainers: int
    training: int  # trainers that share training steps
    pool_actors: int
    bandwidth: float  # bytes a second of each machine, to disk and network; inf: all is in memory already
    dollars: float = 0.0  # a machine and hour

    @property
    def share(self) -> int:
        """Trainers on one machine."""
        return ceil(self.trainers / self.nodes)

    @property
    def threads(self) -> float:
        """Cores that a trainer computes with: it asks for its share of all but one."""
        return min(max((self.cores - 1) // self.share, 1), self.cores / self.share)

    @property
    def scorers(self) -> float:
        """Of one trainer."""
        return 1.0 if self.gpus else self.threads


@dataclass(frozen=True)
class Work:
    """How much a run does."""

    images: int
    shards: int
    size: int  # pixels a side
    decode: int  # images that are to be decoded: not those of raw files of that size, nor what was decoded before
    stored: int  # their bytes
    sweeps: int
    views: int
    block: int  # images a message
    updates: int  # times that all weights move
    steps: int  # of training
    look_up: bool  # in the first sweep
    id_images: int
    epochs: int  # of pre-training
    sample: int  # images that strata are fitted to
    kept: int  # images of all subsets

    @property
    def pixels(self) -> int:
        """Bytes of all decoded images."""
        return self.images * 3 * self.size**2


class Part(NamedTuple):
    """Seconds of a part of a run, and the resource that most of them are spent on."""

    seconds: float
    bound: str


Phases = list[dict[str, float]]  # one after the other; seconds of resources that work at the same time


def predict(rates: Rates, site: Site, work: Work) -> dict[str, Part]:
    """Every part of a run, named as in ``summary.json``."""
    phases = {
        "start": _start(rates, site, work),
        "classifier": [{"one trainer": work.epochs * work.id_images * rates.pretrain}],
        "decode": _decode(rates, site, work),
        "restore": _restore(rates, site, work),
        "game": _game(rates, site, work),
        "rank": _rank(rates, site, work),
        "export": [{"driver": work.kept * rates.export}],
    }
    return {name: _part(found) for name, found in phases.items()}


def _part(phases: Phases) -> Part:
    seconds: Counter[str] = Counter()
    for phase in phases:
        slowest = max(phase, key=lambda name: phase[name])
        seconds[slowest] += phase[slowest]  # type: ignore[assignment]
    return Part(float(seconds.total()), seconds.most_common(1)[0][0])


def _busiest(site: Site, work: Work) -> float:
    """Rows of the pool actor with the most shards, times how many actors share a core."""
    crowd = max(site.pool_actors / (site.nodes * site.cores), 1.0)
    return ceil(work.shards / site.pool_actors) / work.shards * work.images * crowd


def _start(rates: Rates, site: Site, work: Work) -> Phases:
    # A pool actor needs no torch: a quarter of a trainer's imports.
    at_once = (site.trainers + site.pool_actors / 4) / site.nodes / site.cores
    return [
        {"driver": rates.id_set + work.images * rates.index},
        {"processes": rates.imports * (RAY + WORKER * max(at_once, 1.0))},
    ]


def _decode(rates: Rates, site: Site, work: Work) -> Phases:
    rows, all_bytes = _busiest(site, work), site.nodes * site.bandwidth
    return [
        {"pool actors": rows * work.decode / work.images * rates.decode, "disk": work.stored / all_bytes},
        {"driver": work.id_images * rates.digest},
        {"pool actors": rows * rates.digest, "disk": work.pixels / all_bytes},
    ]


def _restore(rates: Rates, site: Site, work: Work) -> Phases:
    if not work.look_up:
        return [{"driver": 0.0}]
    look_up = rates.look_up / (1.0 if rates.gpus else site.threads)
    forward, blocks = rates.forward / site.scorers, ceil(work.sample / work.block)
    return [
        {"every trainer": work.id_images * forward + ID_SAMPLE * look_up},
        {"driver": work.images * rates.sample},
        {
            "one trainer": work.sample * (forward + look_up),
            "driver": blocks * min(work.shards, work.block) * CALL,
        },
        {"one trainer": work.sample * rates.strata},
    ]


def _game(rates: Rates, site: Site, work: Work) -> Phases:
    rows, all_bytes = _busiest(site, work), site.nodes * site.bandwidth
    update = [
        {"pool actors": work.updates * rows * rates.move, "disk": work.updates * work.images * SNAPSHOT / all_bytes},
        {"driver": work.updates * work.images * rates.drive},
    ]
    training = [{"one trainer" if site.training == 1 else "trainers": work.steps * rates.step / site.training}]
    return [*(sweep(rates, site, work, not number) for number in range(work.sweeps)), *update, *training]


def sweep(rates: Rates, site: Site, work: Work, first: bool) -> dict[str, float]:
    """Seconds of each resource in one pass over the pool; the slowest decides."""
    forward = work.views * rates.forward
    look_up = rates.look_up if first and work.look_up else 0.0
    image = forward / site.scorers + look_up / (1.0 if rates.gpus else site.threads)
    waiting = (1.0 - 1.0 / site.trainers) * work.block / 2  # images: at the end trainers are done one after the other
    hand_out = work.images / work.block * (BLOCK + BLOCK_TRAINER * site.trainers)
    gather = work.images * rates.gather
    crossing = (site.nodes - 1) / site.nodes  # what a trainer gets comes from any machine
    found = {
        "trainers": (work.images / site.trainers + waiting) * image,
        "pool actors": gather / min(site.pool_actors, site.nodes * site.cores),
        "network": work.pixels * (1.0 + crossing) / (site.nodes * site.bandwidth),
        "driver": hand_out,
    }
    if not site.gpus:  # trainers leave a core to the others, or, where they are many, none
        busy = work.images * (forward + look_up) + gather
        found["cores"] = (busy + hand_out) / (site.nodes * site.cores)
    return found


def _rank(rates: Rates, site: Site, work: Work) -> Phases:
    written = work.images * TABLE / (site.nodes * site.bandwidth)
    return [
        {"driver": work.images * rates.rank},
        {"pool actors": _busiest(site, work) * rates.table, "disk": written},
    ]


# --- what is predicted besides seconds -------------------------------------------------------------------------------


def memory(site: Site, work: Work, id_bytes: int, store: int) -> dict[str, float]:
    """Bytes of one process of each kind at its peak; ``store`` of Ray's object store, on all machines together."""
    return {
        "driver": DRIVER + id_bytes + DRIVER_ROW * work.images,
        "pool actor": ACTOR + ACTOR_ROW * work.images / site.pool_actors,
        "trainer": (GPU_TRAINER if site.gpus else TRAINER) + id_bytes,
        "object store": float(store),
        "Ray": RAY_ITSELF * site.nodes,
    }


def bytes_read(work: Work) -> float:
    """From disk or store, unless it is in memory already: to decode, to hash, in every sweep, and for the subsets."""
    each = work.stored / work.decode if work.decode else work.pixels / work.images
    return work.stored + work.pixels * (1 + work.sweeps) + work.kept * each
