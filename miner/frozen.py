"""What the frozen classifier theta_0 fits before the first sweep: ID neighbours, strata, POEM's boundary."""

import hashlib
import json
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from miner import ranking
from miner.cluster import Crew
from miner.config import Config
from miner.files import Place
from miner.guard import NO_CLASS
from miner.neighbors import POINTS_PER_STRATUM, Strata
from miner.pool import Pool
from miner.ranking import Floats, Words
from miner.run_dir import write_file
from miner.sweep import block_size

FILE = "frozen.safetensors"
_SAMPLE_SALT = 2  # who is in the sample that strata and boundary are fitted on


def look_ups(config: Config, crew: Crew, pool: Pool, uid_N2: Words, run: Place, theta: str) -> float:
    """Index the ID set and fit strata and boundary, as far as they are asked for, on every trainer.

    Returns the leak guard's threshold: --exclude-near-id of the ID training images are less near to the others.
    What is fitted is kept in ``run``, with the hash ``theta`` of the classifier that it was fitted under, so that
    a run that goes on, perhaps on another machine, judges all images by the same. Features stay inside a trainer.
    """
    kept = _read(run / FILE, theta)
    poem = config.game.rule == "poem"
    cosines = crew.get([t.look_up_id.remote(poem and not kept and t is crew.trainers[0]) for t in crew.trainers])
    if not kept:
        kept = _fit(config, crew, pool, uid_N2, cosines[0])
        write_file(run / FILE, save(kept, {"theta": theta, "hash": _hash(kept)}))
    if "centroids" in kept:
        strata = ray.put(Strata(*(kept[name] for name in Strata._fields)))
        crew.get([trainer.set_strata.remote(strata) for trainer in crew.trainers])
    if "boundary" in kept:
        crew.get([trainer.set_boundary.remote(kept["boundary"]) for trainer in crew.trainers])
    return float(kept["near"][0])


def _fit(config: Config, crew: Crew, pool: Pool, uid_N2: Words, cosine: np.ndarray) -> dict[str, np.ndarray]:
    """Threshold, strata and boundary. POEM's is fitted on at most as many pool images as the ID set has."""
    guard = config.selection.exclude_near_id
    near = float(np.quantile(cosine.astype(np.float64), guard)) if guard else np.inf
    found = {"near": np.array([near])}
    strata = config.strata_for(pool.count)
    if strata > 1:
        crew.display.phase("strata", 1)
        rows, label = sample(config, crew, pool, uid_N2, strata * POINTS_PER_STRATUM)
        show(config, crew, pool, rows, True)
        if config.selection.guard == "image":
            label = np.full_like(label, NO_CLASS)
        fitted = crew.get(crew.trainers[0].fit_strata.remote(strata, near, label))
        found |= fitted._asdict()
    if config.game.rule == "poem":
        crew.display.phase("boundary", 1)
        show(config, crew, pool, sample(config, crew, pool, uid_N2, crew.id_images)[0], False)
        found["boundary"] = crew.get(crew.trainers[0].fit_boundary.remote())
    return found


def _read(path: Place, theta: str) -> dict[str, np.ndarray]:
    """What was kept under ``theta``, whole; {} else."""
    try:
        blob = path.read_bytes()
        tensors = load(blob)
        told = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")]).get("__metadata__", {})
    except (FileNotFoundError, SafetensorError, ValueError, AttributeError):
        return {}
    return tensors if told == {"theta": theta, "hash": _hash(tensors)} and "near" in tensors else {}


def _hash(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def sample(config: Config, crew: Crew, pool: Pool, uid_N2: Words, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to ``count`` eligible rows of the pool drawn by the seed, in order of rows; their classes."""
    uniform = ranking.uniform(uid_N2, config.data.seed, _SAMPLE_SALT)
    columns = crew.each("places")
    eligible, label = (np.concatenate(found) for found in zip(*columns, strict=True))
    del columns
    chosen = smallest(uniform, eligible, count)
    return chosen, label[chosen]


def show(config: Config, crew: Crew, pool: Pool, rows: np.ndarray, looks: bool) -> None:
    """Have the trainer that fits see these rows' images, two blocks of them at once: all would be gigabytes."""
    edges, owner, size = pool.edges, crew.owner, block_size(config.data.size)
    waiting: list[Any] = []
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        shard = np.searchsorted(edges, block, "right") - 1
        parts = [owner[s].rows_of.remote(s, block[shard == s] - edges[s]) for s in np.unique(shard).tolist()]
        waiting.append(crew.trainers[0].see.remote(start == 0, looks, *parts))
        if len(waiting) > 1:
            crew.get(waiting.pop(0))
    crew.get(waiting)


def smallest(value_N: Floats, eligible_N: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Rows of the ``count`` smallest values among eligible rows, in order of rows; of equal values the first rows."""
    rows = np.flatnonzero(eligible_N)
    return rows[np.sort(ranking.least(value_N[rows], count))]
