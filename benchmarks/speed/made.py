"""Inputs for the measurements: the demo's pool drawn larger, as JPEGs in tars and as a pool over them; a classifier."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from miner import demo
from miner.build import finish, prepare, run_job
from miner.config import Game
from miner.pool import Pool
from miner.recipe import Recipe
from miner.tars import TarWriter
from trainers.actor import Trainer
from trainers.checkpoint import save_checkpoint
from trainers.config import PretrainConfig
from trainers.data import load_id


def pixels(count: int, side: int, seed: int = 0) -> list[np.ndarray]:
    """The demo's first images at ``side`` px, uint8 [side, side, 3]; where it has too few, those of more seeds."""
    wanted = Image.Resampling.BICUBIC
    drawn, found = demo.pool_arrays(seed)[0][:count], []
    if len(drawn) < count:
        found = pixels(count - len(drawn), side, seed + 1)
    return [np.asarray(Image.fromarray(one).resize((side, side), wanted)) for one in drawn] + found


def jpeg(image: np.ndarray) -> bytes:
    """JPEG of quality 90."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tars(folder: Path, images: list[np.ndarray], count: int, classes: int = 1) -> list[str]:
    """``count`` WebDataset tars of JPEGs and labels, which go through all ``classes`` in turn."""
    folder.mkdir(parents=True)
    paths = [folder / f"{part:06d}.tar" for part in range(count)]
    for path, rows in zip(paths, np.array_split(np.arange(len(images)), count), strict=True):
        with TarWriter(path) as tar:
            for row in rows.tolist():
                tar.write(f"{row:06d}.jpg", jpeg(images[row]))
                tar.write(f"{row:06d}.cls", str(row % classes).encode())
    return [str(path) for path in paths]


def pool(folder: Path, images: list[np.ndarray], shards: int) -> Pool:
    """A pool that adopts ``shards`` tars of these images, ``folder``/tars, where they lie."""
    tars(folder / "tars", images, shards)
    return adopted(folder, Recipe("tars", (str(folder / "tars"),)))


def adopted(folder: Path, recipe: Recipe) -> Pool:
    """The pool ``folder``/pool of what ``recipe`` names."""
    made = folder / "pool"
    made.mkdir()
    planned = prepare(recipe, str(made))
    for job in planned.jobs:
        run_job(str(made), job)
    return finish(recipe, str(made), "made", planned)


def classifier(path: Path) -> str:
    """A checkpoint of ``small`` after one epoch on the demo's ID set."""
    trainer = Trainer("small", load_id("demo"), seed=0, game=Game())
    trainer.pretrain(PretrainConfig(epochs=1, batch=64, lr=0.1))
    save_checkpoint(path, trainer.net, {"model": "small", "classes": list(trainer.id_set.classes)})
    return str(path)
