"""What the frozen classifier theta_0 fits before the first sweep: ID neighbours, strata, POEM's boundary."""

from typing import Any

import numpy as np

from miner import ranking
from miner.cluster import Crew
from miner.config import Config
from miner.guard import NO_CLASS
from miner.neighbors import POINTS_PER_STRATUM
from miner.pool import Pool
from miner.progress import Display
from miner.ranking import Words
from miner.rays import get

_SAMPLE_SALT = 2  # who is in the sample that strata and boundary are fitted on


def look_ups(config: Config, crew: Crew, pool: Pool, uid_N2: Words, id_images: int, display: Display) -> float:
    """Index the ID set and fit strata and boundary, as far as they are asked for, on every trainer.

    Returns the leak guard's threshold: --exclude-near-id of the ID training images are less near to the others.
    Features stay inside a trainer. POEM's boundary is fitted on as many pool images as there are ``id_images``.
    """
    poem = config.game.rule == "poem"
    cosines = get([trainer.look_up_id.remote(poem and trainer is crew.trainers[0]) for trainer in crew.trainers])
    guard = config.selection.exclude_near_id
    near = float(np.quantile(cosines[0].astype(np.float64), guard)) if guard else np.inf
    strata = config.strata_for(pool.count)
    if strata > 1:
        display.phase("strata", 1)
        images, label = sample(config, crew, pool, uid_N2, strata * POINTS_PER_STRATUM)
        if config.selection.guard == "image":
            label = np.full_like(label, NO_CLASS)
        fitted = crew.trainers[0].fit_strata.remote(strata, near, label, *images)
        get([trainer.set_strata.remote(fitted) for trainer in crew.trainers])
    if poem:
        display.phase("boundary", 1)
        images, _ = sample(config, crew, pool, uid_N2, id_images)
        boundary = crew.trainers[0].fit_boundary.remote(*images)
        get([trainer.set_boundary.remote(boundary) for trainer in crew.trainers])
    return near


def sample(config: Config, crew: Crew, pool: Pool, uid_N2: Words, count: int) -> tuple[list[Any], np.ndarray]:
    """Up to ``count`` eligible rows drawn by the seed: references to their images, an array a shard; their classes."""
    uniform = ranking.uniform(uid_N2, config.data.seed, _SAMPLE_SALT)
    columns = crew.each("places")
    eligible, label = (np.concatenate(found) for found in zip(*columns, strict=True))
    chosen = np.argsort(np.where(eligible, uniform, np.inf), kind="stable")[: eligible.sum()]
    chosen, edges = np.sort(chosen[:count]), pool.edges
    parts = []
    for shard, actor in enumerate(crew.owner):
        rows = chosen[(chosen >= edges[shard]) & (chosen < edges[shard + 1])] - edges[shard]
        parts.append(actor.rows_of.remote(shard, rows))
    return parts, label[chosen]
