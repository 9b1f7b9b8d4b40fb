"""A tiny pool, a subset of it, and the same pool in other shards, for the tests of exports."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from miner.build import finish, prepare, run_job
from miner.images import png
from miner.pool import Pool, uid_of
from miner.sources import Recipe
from miner.subset import Subset, load_subset, write_subset
from miner.tars import TarWriter

SIDE, COUNT, CHOSEN = 24, 60, 20
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)
RECIPE = {
    "gamma": 0.25,
    "draw": "rank",
    "pool": {"name": "tiny", "fingerprint": "0" * 32, "licence": "CC-BY-4.0"},
    "id": {"name": "digits", "fingerprint": "1" * 32},
    "run_id": "ab" * 8,
    "settings": {"game": {"rule": "hedge"}},
    "classes": {"cat": 12, "dog": 8},
}


def write_pool(folder: Path, order: Sequence[int], shards: int, first: int = 0, images: np.ndarray = PIXELS) -> Pool:
    """A pool of ``shards`` tars, the images in this order; keys count from ``first``, classes are row mod 3."""
    tars = folder / "tars"
    tars.mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.array(order), shards)):
        with TarWriter(tars / f"part-{number}.tar") as tar:
            for place, row in enumerate(part.tolist()):
                key = f"at/{first + 1000 * number + place:06d}"
                tar.write(f"{key}.png", png(images[row]))
                tar.write(f"{key}.cls", str(row % 3).encode())
    return adopt(Recipe("tars", (str(tars),)), folder / "pool")


def adopt(recipe: Recipe, folder: Path) -> Pool:
    folder.mkdir(parents=True, exist_ok=True)
    planned = prepare(recipe, str(folder))
    for job in planned.jobs:
        run_job(str(folder), job)
    return finish(recipe, str(folder), "tiny", planned, "CC-BY-4.0")


def write_chosen(pool: Pool, folder: Path, rows: Sequence[int]) -> Subset:
    """The subset of these rows of the pool, in this rank order."""
    n = len(rows)
    chosen = pool.index().take(pa.array(rows))
    chosen = chosen.append_column("weight", pa.array(np.linspace(3, 1, n, dtype=np.float32)))
    chosen = chosen.append_column("rank", pa.array(np.arange(n), pa.uint64()))
    chosen = chosen.append_column("nn_id_row", pa.nulls(n, pa.int32()))
    chosen = chosen.append_column("nn_id_cosine", pa.nulls(n, pa.float32()))
    write_subset(pool, chosen, folder, RECIPE, lambda count: None)
    return load_subset(folder)


def uid(row: int) -> str:
    """The uid of an image of ``write_pool``."""
    return uid_of(png(PIXELS[row]))
