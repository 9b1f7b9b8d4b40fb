"""Feeding: images a second that one worker process delivers to another, as uint8 batches.

Every way reads the same images, in the form that suits it best, with one worker: ours one pool actor, the others one
worker of torch's DataLoader, Ray Data its own. The consumer touches every pixel.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import webdataset
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.speed import made
from benchmarks.speed.timing import Way, rates, table
from miner.actors import PoolActor
from miner.rays import connect
from miner.sweep import IN_FLIGHT, block_size

IMAGES, TARS, BATCH = 16_384, 4, 256


class Files:
    """The same images in every form: tars of JPEGs, a folder of JPEGs, a pool over the tars, MDS, litdata."""

    def __init__(self, folder: Path, side: int) -> None:
        self.folder, self.side = folder, side
        self.pixels = made.pixels(IMAGES, side)
        self.pool = made.pool(folder, self.pixels, TARS).path
        self.tars = sorted(str(path) for path in (folder / "tars").iterdir())
        for i, image in enumerate(self.pixels):
            path = folder / "images" / str(i % 10) / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(made.jpeg(image))


def to_array(image: Any) -> np.ndarray:
    """PIL image to uint8 [H, W, 3]."""
    return np.asarray(image)


def stacked(items: list[Any]) -> torch.Tensor:
    """A batch of uint8 [n, H, W, 3]."""
    return torch.from_numpy(np.stack([item[0] if isinstance(item, tuple) else item for item in items]))


def consumed(batches: Iterator[Any]) -> int:
    """Take all batches; every pixel is looked at."""
    count = 0
    for batch in batches:
        array = np.asarray(batch)
        array.max()
        count += len(array)
    return count


def pool_actor(files: Files, fresh: bool) -> Way:
    """One pool actor, blocks as a sweep asks for them; ``fresh``: nothing is decoded yet."""
    size = block_size(files.side)

    per = IMAGES // TARS
    asked = [(s, np.arange(a, min(a + size, per), dtype=np.int32)) for s in range(TARS) for a in range(0, per, size)]
    actor = PoolActor.options(num_cpus=0).remote(files.pool, files.side, 0, "hedge", 0.1)
    ray.get(actor.ping.remote())

    def way() -> int:
        if fresh:
            for cached in Path(files.pool).glob("cache/*/*"):
                cached.unlink()
            ray.get(actor.__ray_call__.remote(lambda shards: shards.images.clear()))
        return consumed(ahead(actor.rows_of, asked))

    return way


def ahead(method: Any, calls: list[tuple[Any, ...]]) -> Iterator[np.ndarray]:
    """Results of an actor's method in order, as many on their way as a sweep has."""
    todo, on_the_way = list(calls), list[Any]()
    while todo or on_the_way:
        while todo and len(on_the_way) < IN_FLIGHT:
            on_the_way.append(method.remote(*todo.pop(0)))
        yield ray.get(on_the_way.pop(0))


def loader(dataset: Any) -> Way:
    """torch's DataLoader over ``dataset`` with one worker."""
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": 1, "collate_fn": stacked, "persistent_workers": True}
    found = DataLoader(dataset, **options)
    return lambda: consumed(iter(found))


def web_dataset(files: Files) -> Way:
    """webdataset's usual chain, decoded by PIL."""
    found = webdataset.WebDataset(files.tars, shardshuffle=False, empty_check=False)
    return loader(found.decode("rgb8").to_tuple("jpg"))


def image_folder(files: Files) -> Way:
    """torchvision's ImageFolder."""
    return loader(ImageFolder(str(files.folder / "images"), transform=to_array))


def ray_data(files: Files) -> Way:
    """Ray Data's reader of tars."""

    def way() -> int:
        found = ray.data.read_webdataset(files.tars, include_paths=False)
        return consumed(np.stack(batch["jpg"]) for batch in found.iter_batches(batch_size=BATCH))

    return way


def mosaic(files: Files) -> Way:
    """Mosaic's streaming, of plain arrays."""
    from streaming import MDSWriter, StreamingDataset

    out = str(files.folder / "mds")
    with MDSWriter(out=out, columns={"x": f"ndarray:uint8:{files.side},{files.side},3"}) as writer:
        for pixels in files.pixels:
            writer.write({"x": pixels})

    class Arrays(StreamingDataset):
        def __getitem__(self, i: int) -> Any:
            return super().__getitem__(i)["x"]

    return loader(Arrays(local=out, batch_size=BATCH, shuffle=False))


def lit(files: Files) -> Way:
    """LitData, of plain arrays."""
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    out = str(files.folder / "lit")
    cache = Cache(out, chunk_bytes="64MB")
    for i, pixels in enumerate(files.pixels):
        cache[i] = torch.from_numpy(pixels)
    cache.done()
    cache.merge()
    return loader(_Squeezed(StreamingDataset(out)))


class _Squeezed(torch.utils.data.IterableDataset):
    """Arrays of a LitData set."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[np.ndarray]:
        return (item.numpy() for item in self.inner)


def main(repeat: int) -> None:
    """Print the tables."""
    connect(None, num_cpus=2)
    ray.data.DataContext.get_current().enable_progress_bars = False
    others: dict[str, Callable[[Files], Way]] = {
        "webdataset 1.0 + PIL": web_dataset,
        "ImageFolder": image_folder,
        "ray.data.read_webdataset": ray_data,
        "mosaicml-streaming (arrays)": mosaic,
        "litdata (arrays)": lit,
    }
    for side in (32, 64):
        with tempfile.TemporaryDirectory() as where:
            files = Files(Path(where), side)
            ways = {
                "pool actor, first epoch": pool_actor(files, fresh=True),
                "pool actor": pool_actor(files, fresh=False),
            }
            ways |= {name: make(files) for name, make in others.items()}
            found = rates(ways, repeat)
        best = found["pool actor"]
        rows = [(name, rate, best / rate) for name, rate in found.items()]
        table(f"{IMAGES:,} images of {side} px", ("", "images/s", "pool actor is faster by"), rows)
    ray.shutdown()
