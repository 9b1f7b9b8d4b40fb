"""Give a subset to others, in the form that their loader reads; and get one back from a list of its images.

python -m pipelines.export runs/demo --gamma 0.01 --format imglist

webdataset: tars, with a dataset card (the default). manifest: everything but pixels, to share where the images may
not be. imglist: imglist.txt and image files, for OpenOOD and pytorch-ood. npy: uint8 [N, S, S, 3], in the shape of
300K_random_images.npy. datacomp: uids.npy for DataComp's resharder. parquet: for the Hugging Face Hub and its viewer.

A manifest becomes tars again where the pool is, the very same ones, however that pool is sharded by now:

python -m pipelines.export --rehydrate manifest-0.01 --pool imagenet --out subset-0.01

Images that must go, by uid, one a line (works on every format that has tars, or a manifest alone):

python -m pipelines.export subset-0.01 --remove uids.txt --out subset-0.01-2
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from miner.errors import MinerError, UsageError
from miner.files import Place, place, read_whole
from pipelines import cli

if TYPE_CHECKING:
    from miner.export import Export  # brings torch along, for which --help should not wait
    from miner.subset import Subset


@dataclass(frozen=True)
class Config:
    """Export a subset."""

    source: Annotated[str, tyro.conf.Positional] = ""
    """A run with its subsets, or a subset: folder or URL."""
    format: Literal["webdataset", "manifest", "imglist", "npy", "datacomp", "parquet"] = "webdataset"
    """What to write."""
    out: str | None = None
    """Folder, or URL of an object store. Default: beside the subset, e.g. RUN/imglist-0.01."""
    gamma: float | None = None
    """Which subset of a run; one that has only one need not say."""
    size: int | None = None
    """npy: pixels a side, by default 32; the centre square of each image is scaled to it."""
    remove: str | None = None
    """File of uids to leave out, one a line. What has no such uid is not an error: one list serves many subsets."""
    rehydrate: str | None = None
    """Instead of a source with tars: a subset of which only the manifest is here. Its images come from --pool."""
    pool: str | None = None
    """Pool to rehydrate from: name, folder or URL, as in pipelines.resample. datacomp: images are then named as this
    pool's source names them, by the `uid` of img2dataset and CommonPool, so that its own shards can be resharded."""
    allow_missing: bool = False
    """Rehydrate: leave out what the pool does not have, and say so, instead of ending without an export."""


def main() -> None:
    config = tyro.cli(Config, prog="python -m pipelines.export", description=__doc__)
    if bool(config.source) == bool(config.rehydrate):
        raise UsageError("give a run or a subset, or --rehydrate with one; not both; see --help")
    if config.rehydrate and not config.pool:
        raise UsageError("--rehydrate and --pool go together: the images come from the pool")
    if config.pool and not config.rehydrate and config.format != "datacomp":
        raise UsageError("--pool is for --rehydrate, or for --format datacomp")
    if config.size is not None and (config.size < 1 or config.format != "npy"):
        raise UsageError(f"--size {config.size}: at least 1, and for --format npy only")
    if config.allow_missing and not config.rehydrate:
        raise UsageError("--allow-missing is for --rehydrate")
    report(config, make(config))


def make(config: Config) -> "Export":
    """Export as ``config`` says. Raises MinerError or UsageError."""
    from miner.export import export
    from miner.pool import Pool, resolve
    from miner.progress import Display
    from miner.subset import Subset

    subset = Subset(find_subset(config.source or str(config.rehydrate), config.gamma))
    removed = read_uids(config.remove) if config.remove else frozenset()
    pool = Pool.open(resolve(config.pool)) if config.pool else None
    out = place(config.out) if config.out else default_out(subset, config.format)
    with Display() as display:
        return export(
            subset,
            config.format,
            out,
            size=config.size or 32,
            pool=pool,
            removed=removed,
            allow_missing=config.allow_missing,
            display=display,
        )


def find_subset(source: str, gamma: float | None) -> Place:
    """The folder of the subset that ``source`` is, or that the run ``source`` has for ``gamma``."""
    path = place(source)
    if path.name in ("subset.json", "manifest.parquet"):
        path = path.parent
    if (path / "subset.json").exists():
        if gamma is not None:
            raise UsageError(f"--gamma {gamma:g}: chooses one of a run's subsets; {path} is one already")
        return path
    files: list[Place] = sorted(path.glob("subset-*/subset.json"), key=str)
    found = {file.parent.name: file.parent for file in files}
    if not found:
        raise MinerError(f"{path}: neither a subset (no subset.json) nor a run that has some; finish the run first")
    first = next(iter(found))
    name = f"subset-{gamma:g}" if gamma is not None else first
    if name not in found or (gamma is None and len(found) > 1):
        told = f"has {', '.join(found)}; say which, e.g. --gamma {first.removeprefix('subset-')}"
        raise UsageError(f"{path}: {told}; pipelines.resample cuts others from the same run")
    return found[name]


def default_out(subset: "Subset", style: str) -> Place:
    """Beside the subset, named by format: ``imglist-0.01`` for ``subset-0.01``."""
    path = subset.path.resolve()
    return path.parent / f"{style}-{path.name.removeprefix('subset-')}"


def read_uids(path: str) -> frozenset[str]:
    """The uids of a text file, one a line. Raises MinerError naming the line that is none."""
    lines = read_whole(place(path)).decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip() and not re.fullmatch("[0-9a-f]{32}", line.strip()):
            raise MinerError(f"{path}: line {number} is {line.strip()[:80]!r}, no uid; give 32 hex characters a line")
    return frozenset(line.strip() for line in lines if line.strip())


def report(config: Config, done: "Export") -> None:
    """Print what was written, what was left out, and how to read it."""
    from miner.card import reader

    sizes = [file.bytes for file in done.files]
    if config.format == "imglist":
        sizes += done.rows["tar_size"].to_pylist()
    print(f"{config.format}: {done.folder}, {len(done.rows):,} images, {sum(sizes):,} bytes in {len(sizes):,} files")
    if config.remove:
        print(f"removed: {done.removed:,} images that {config.remove} names")
    if done.lost:
        print(f"missing: {done.lost:,} images, listed in {done.folder}/missing.csv")
    kinds = sorted(set(done.rows["ext"].to_pylist()))
    if config.format == "webdataset" and len(kinds) > 1:
        print(f"note: {' and '.join(kinds)} mixed; Hugging Face's webdataset loader wants one kind: --format parquet")
    print(f"read it: {reader(config.format, done.rows)}")


if __name__ == "__main__":
    cli.run(main)
