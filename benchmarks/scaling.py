"""What mining 1.28 and 79.3 million images takes on 1, 8 and 64 GPUs, by the model of ``miner.costs``: a table.

    python -m benchmarks.scaling

Measured here, on drawn pools of the same form: decoding, hashing, gathering, all that is done to rows, start. Not
measured: what a GPU scores. It is --share of --tflops (an accelerator's dense bf16 peak) over the FLOPs of a view,
which are counted; or --gpu-images, once somebody has measured it. Prices, cores and disks are inputs as well.

The run is the default one (hedge, one round of six views, leak guard over 50,000 ID images, 1,024 strata, gamma 1 %)
of a WRN-40-2 that is there already. Pools: ImageNet as JPEGs of 500 x 375 in tars of 10,000, mined at 32 px, never
decoded before; `tiny_images.bin`, 32 px.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import made
from benchmarks.speed.timing import machine, table
from miner import costs, forecast, rates
from miner.config import Config, Data, Fleet, Machines
from miner.costs import Part, Rates
from miner.pool import Pool
from miner.recipe import PER_RAW, PER_TAR, Recipe
from pipelines import resample
from trainers import models
from trainers.data import IdSet, load_id

MODEL = "wrn-40-2"
IMAGENET, IMAGENET_BYTES, SHAPE = 1_281_167, 110_000, (375, 500)  # images, bytes of one, rows and columns
TINY = 79_302_017
DRAWN = 2 * PER_RAW  # images of the tiny pool that is measured
JPEGS = 600  # of the other
NOISE = 20.0  # standard deviation: makes a JPEG of quality 90 about as large as ImageNet's
ID = 50_000


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 peak of a GPU; default: an H100 SXM's")
    parser.add_argument("--share", type=float, default=0.05, help="of the peak that scoring reaches: an assumption")
    parser.add_argument(
        "--gpu-images", type=float, help="images a second that a GPU scores in one view, in their place"
    )
    parser.add_argument("--gpu-look-ups", type=float, default=forecast.LOOK_UPS, help="images a second: an assumption")
    parser.add_argument("--dollars", type=float, default=3.0, help="a GPU and hour, with its share of the machine")
    parser.add_argument("--cores", type=int, default=16, help="CPU cores a GPU")
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="10^9 bytes a second between a machine and the disk"
    )
    parser.add_argument("--pool-actors", type=int, help="processes that own the pool; default: as the command's, 16")
    asked = parser.parse_args()
    resample.like_a_worker()
    flops = view_flops()
    speed = asked.gpu_images or asked.share * asked.tflops * 1e12 / flops
    print(f"{machine()}\n{MODEL}: {flops / 1e9:.3f} GFLOP a view; {speed:,.0f} images/s a GPU")
    config = Config(
        data=Data(model=MODEL, checkpoint="there already"), machines=Machines(pool_actors=asked.pool_actors)
    )
    id_set = of_size(load_id("demo"), ID)
    rows = []
    with tempfile.TemporaryDirectory() as where:
        imagenet, tiny, found = measured(config, id_set, Path(where))
        for name, pool, rate in (("1.28 M", imagenet, found[0]), ("79.3 M", tiny, found[1])):
            for gpus in (1, 8, 64):
                each = min(gpus, 8)
                fleet = Fleet(gpus // each, each, each * asked.cores, speed, asked.gpu_look_ups, asked.gigabytes)
                fleet = replace(fleet, dollars=each * asked.dollars)
                rows.append((name, gpus, *told(replace(config, fleet=fleet), pool, id_set, rate)))
    parts = ("start", "decode", "restore", "game", "rank", "export")
    head = ("images", "GPUs", *(f"{part} s" for part in parts), "all, minutes", "dollars", "most of it")
    table("predicted, not run", head, rows)


def view_flops() -> float:
    """Floating-point operations of one view: a multiplication and an addition are two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        models.create(MODEL, 10)(torch.empty(1, 3, 32, 32))
    return float(counter.get_total_flops())


def of_size(id_set: IdSet, count: int) -> IdSet:
    """As many ID images, which repeat: only their number counts here."""
    order = np.resize(np.arange(len(id_set.train_images)), count)
    return replace(id_set, train_images=id_set.train_images[order], train_labels=id_set.train_labels[order])


def measured(config: Config, id_set: IdSet, folder: Path) -> tuple[Pool, Pool, tuple[Rates, Rates]]:
    """Both pools, of which only the manifest is of their size, and what work on each costs here."""
    rng = np.random.default_rng(0)
    (folder / "tiny").mkdir()
    rng.integers(0, 256, (DRAWN, 3072), np.uint8).tofile(folder / "tiny_images.bin")
    tiny = made.adopted(folder / "tiny", Recipe("tiny-images", (str(folder / "tiny_images.bin"),)))
    (folder / "imagenet").mkdir()
    imagenet = made.pool(folder / "imagenet", photographs(rng), 1)
    print(f"ImageNet's JPEGs: {imagenet.shards[0].bytes / JPEGS:,.0f} bytes drawn, {IMAGENET_BYTES:,} in the pool")
    of_tiny = rates.measured(config, tiny, id_set, 5.0)
    decode = rates.decoded(config, imagenet)[1]
    export = rates.rows(config, imagenet, id_set)["export"]
    of_imagenet = replace(of_tiny, decode=decode, export=export)
    return (
        larger(imagenet, IMAGENET, PER_TAR, IMAGENET_BYTES),
        larger(tiny, TINY, PER_RAW, 3072),
        (of_imagenet, of_tiny),
    )


def photographs(rng: np.random.Generator) -> list[np.ndarray]:
    """Drawn images as large as ImageNet's, with noise that compresses as badly as what photographs show."""
    high, wide = SHAPE
    found = made.pixels(JPEGS, max(SHAPE))
    return [
        np.clip(one[:high, :wide] + rng.normal(0, NOISE, (high, wide, 3)), 0, 255).astype(np.uint8) for one in found
    ]


def larger(pool: Pool, count: int, per_shard: int, each: int) -> Pool:
    """``pool`` as it would be with ``count`` images of ``each`` bytes: its first shard, again and again."""
    sizes = [per_shard] * (count // per_shard) + ([count % per_shard] if count % per_shard else [])
    shards = tuple(replace(pool.shards[0], count=size, bytes=size * each) for size in sizes)
    return replace(pool, shards=shards, count=count)


def told(config: Config, pool: Pool, id_set: IdSet, rate: Rates) -> tuple[object, ...]:
    """A row of the table."""
    work, fleet = forecast.work_of(config, pool, id_set), config.fleet
    site = forecast.there(config, work)
    parts = costs.predict(forecast.rates_there(rate, fleet, config.game.batch), site, work)
    total = sum(part.seconds for part in parts.values())
    longest, part = max(parts.items(), key=seconds)
    figures = [parts[name].seconds for name in ("start", "decode", "restore", "game", "rank", "export")]
    return *figures, total / 60, total / 3600 * site.nodes * site.dollars, f"{longest}: {part.bound}"


def seconds(item: tuple[str, Part]) -> float:
    """What parts are compared by."""
    return item[1].seconds


if __name__ == "__main__":
    main()
