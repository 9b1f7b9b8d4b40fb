"""Make a pool of background images, or check one.

python -m pipelines.shard --input imagenet/train --name imagenet

The pool is a folder with an index and a manifest. WebDataset tars, the tars of ImageNet and Places365, `.npy` arrays
and `tiny_images.bin` are adopted where they lie; image folders, Parquet and `.npz` are written to new shards. Every
core works, on a cluster every node (`--address auto`; source and pool then lie on a disk that all nodes see). Stopped?
The same command goes on where it was.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from miner.buckets import is_url
from miner.build import finish, prepare, run_job
from miner.errors import UsageError
from miner.files import place
from miner.manifest import read_manifest
from miner.pool import Pool, pools_folder, resolve
from miner.recipe import Recipe
from miner.sources import detect
from pipelines import cli

Source = Literal["auto", "folder", "places365", "tars", "imagenet", "parquet", "npz", "npy", "tiny-images"]


@dataclass(frozen=True)
class Config:
    """Make a pool of background images, or check one."""

    source: Source = "auto"
    """auto: look what lies at --input. folder: one sub-folder a class, or a .tar of that (in place). places365: the
    same with classes like a/abbey. tars: WebDataset or img2dataset .tar (in place) or .tar.gz (expanded into the pool).
    imagenet: ILSVRC2012_img_train.tar (in place). parquet: Hugging Face's. npz: ImageNet32 or 64. npy: uint8
    [N, H, W, 3], in place. tiny-images: your copy of tiny_images.bin, in place."""
    input: tuple[str, ...] = ()
    """The folder, or the files, or folders of files."""
    name: str | None = None
    """Name to mine it by: `--pool NAME`. Letters, digits, `-`, `_` and dots."""
    out: str | None = None
    """Folder of the pool; for image folders and Parquet also a URL (`s3://bucket/pool`). Default: NAME under
    $OUTLIER_POOLS or ~/.local/share/outlier-miner/pools."""
    glob: str = "*"
    """Which files of an input folder, e.g. `train-*`; of an image folder by path, e.g. `cat/*`; which folders in a .tar
    of folders, e.g. `*/train/*`."""
    exclude_list: str | None = None
    """tiny-images: file of image numbers to leave out, counted from 1, one a line."""
    licence: str = ""
    """Terms of the images; copied into every subset that is mined from them."""
    per_shard: int | None = None
    """Images a shard; not for tars and imagenet, a shard each tar. Default: 10000 in a tar, 65536 in a raw file."""
    workers: int | None = None
    """Tasks at a time. Default: one a core. 1: without Ray."""
    address: str | None = None
    """Ray cluster to join, `auto` on its head node. Default: this machine alone."""
    verify: bool = False
    """Hash every shard and image of the existing pool (--name or --out) again, and make nothing."""


def main() -> None:
    config = tyro.cli(Config, prog="python -m pipelines.shard", description=__doc__)
    if config.workers is not None and config.workers < 1:
        raise UsageError(f"--workers {config.workers}: at least 1")
    if config.verify:
        verify(config)
    else:
        make(config)


def make(config: Config) -> None:
    """Make the pool that ``config`` asks for. Raises MinerError or UsageError."""
    name, folder = destination(config)
    source: str = config.source
    if source == "auto":
        source, what = detect(config.input, config.glob)
        print(f"found {what}: --source {source}")
    recipe = Recipe(source, config.input, config.glob, config.exclude_list, config.per_shard)
    console = Console(stderr=True)
    with console.status("reading names and headers") if console.is_terminal else nullcontext():
        plan = prepare(recipe, folder)
    tracked(config, run_job, [(folder, job) for job in plan.jobs], "sharding")
    pool = finish(recipe, folder, name, plan, config.licence)
    for reason, count in read_manifest(folder)["source"]["skipped"].items():
        if count:
            print(f"skipped {count:,}: {reason}")
    report(pool)
    print(f"next: python -m pipelines.resample --pool {folder if config.out else name} --gamma 0.01")


def verify(config: Config) -> None:
    """Check every byte of a pool. Raises MinerError naming the first file that differs."""
    where = config.out or config.name
    if not where:
        raise UsageError("--verify: name the pool with --name or --out")
    pool = Pool.open(resolve(where))
    tracked(config, verify_shard, [(pool, shard) for shard in range(len(pool.shards))], "verifying")
    pool.verify_fingerprint()
    report(pool)
    print("verified: every shard and every image is as recorded")


def verify_shard(pool: Pool, shard: int) -> int:
    """Check one shard; returns its number of images."""
    pool.verify_shard(shard)
    return pool.shards[shard].count


def destination(config: Config) -> tuple[str, str]:
    """(name, absolute folder or URL) of the pool to make. Raises UsageError."""
    out = config.out or ""
    if out and not is_url(out):
        out = os.path.abspath(out)
    name = config.name or (place(out).name if out else "")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError(f"--name {name!r}: give --name (letters, digits, '-', '_' and dots) or --out")
    return name, out or os.path.abspath(os.path.join(pools_folder(), name))


def tracked(config: Config, function: Callable[..., int], calls: Sequence[tuple[Any, ...]], what: str) -> None:
    """Run calls that return numbers of images behind a progress bar.

    They run on Ray; a single call, or ``--workers 1`` on this machine, needs no second process.
    """
    results: Iterator[tuple[int, int]]
    if config.address is None and (config.workers == 1 or len(calls) == 1):
        results = ((i, function(*call)) for i, call in enumerate(calls))
    else:
        from miner.rays import connect

        slots = connect(config.address, config.workers)
        results = cli.each(function, calls, config.workers or 2 * slots)
    console = Console(stderr=True)
    speed = TextColumn("shards, {task.fields[images]:,} images, {task.fields[rate]:,.0f}/s")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task, images = bar.add_task(what, total=len(calls), images=0, rate=0.0), 0
            for _, count in results:
                images += count
                bar.update(task, advance=1, images=images, rate=images / (bar.tasks[0].elapsed or 1e-9))
    finally:
        cli.disconnect()


def report(pool: Pool) -> None:
    """Print where a pool lies and what identifies it."""
    size = sum(shard.bytes for shard in pool.shards)
    print(f"pool {pool.name}: {pool.path}")
    print(f"{pool.count:,} images in {len(pool.shards):,} shards, {len(pool.classes)} classes, {size:,} bytes")
    print(f"fingerprint {pool.fingerprint}")


if __name__ == "__main__":
    cli.run(main)
