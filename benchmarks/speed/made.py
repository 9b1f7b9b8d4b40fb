"""Inputs for the measurements: the demo's pool drawn larger, as JPEGs in tars and as a pool over them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from miner import demo
from miner.build import finish, prepare, run_job
from miner.pool import Pool
from miner.sources import Recipe
from miner.tars import TarWriter


def pixels(count: int, side: int) -> list[np.ndarray]:
    """The demo's first images at ``side`` px, uint8 [side, side, 3]."""
    wanted = Image.Resampling.BICUBIC
    return [np.asarray(Image.fromarray(one).resize((side, side), wanted)) for one in demo.pool_arrays()[0][:count]]


def jpeg(image: np.ndarray) -> bytes:
    """JPEG of quality 90."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tars(folder: Path, images: list[np.ndarray], count: int) -> list[str]:
    """``count`` WebDataset tars of JPEGs and labels."""
    folder.mkdir(parents=True)
    paths = [folder / f"{part:06d}.tar" for part in range(count)]
    for path, rows in zip(paths, np.array_split(np.arange(len(images)), count), strict=True):
        with TarWriter(path) as tar:
            for row in rows.tolist():
                tar.write(f"{row:06d}.jpg", jpeg(images[row]))
                tar.write(f"{row:06d}.cls", b"0")
    return [str(path) for path in paths]


def pool(folder: Path, source: Path) -> Pool:
    """A pool that adopts the tars in ``source`` where they lie."""
    folder.mkdir(parents=True)
    recipe = Recipe("tars", (str(source),))
    planned = prepare(recipe, str(folder))
    for job in planned.jobs:
        run_job(str(folder), job)
    return finish(recipe, str(folder), folder.name, planned)
