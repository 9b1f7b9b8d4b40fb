"""Decoding: encoded images to uint8 pixels, one core; and the whole of building a pool's cache."""

import io
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image

from benchmarks.speed.made import jpeg, pixels, pool
from benchmarks.speed.timing import Way, compare
from miner import cache
from miner.images import decode
from miner.pool import Pool

IMAGES = 4096


def with_pil(data: bytes) -> np.ndarray:
    """What nearly all loaders do."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def with_torchvision(data: bytes) -> torch.Tensor:
    """The decoder of torchvision.io."""
    return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def main(repeat: int) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for side in (32, 64, 224):
        files = [jpeg(image) for image in pixels(IMAGES, side)]

        def all_by(one: object, files: list[bytes] = files) -> Way:
            def way() -> int:
                for data in files:
                    one(data)  # type: ignore[operator]
                return len(files)

            return way

        ways = {
            "PIL": all_by(with_pil),
            "torchvision.io": all_by(with_torchvision),
            "simplejpeg": all_by(simplejpeg.decode_jpeg),
            "miner.images.decode": all_by(lambda data, side=side: decode(data, side)),
        }
        compare(f"decode JPEGs of {side} px, one core", ways, repeat)
    with tempfile.TemporaryDirectory() as folder:
        compare("build the cache of a pool of JPEGs of 32 px, one core", {"build": _build(Path(folder))}, repeat)


def _build(folder: Path) -> Way:
    made = pool(folder, pixels(IMAGES, 32), 1)

    def way() -> int:
        with tempfile.TemporaryDirectory() as where:
            cache.open_shard(Pool.open(made.path), 0, 32, where)
        return IMAGES

    return way
