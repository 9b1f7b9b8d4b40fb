"""The work of a comparison as Ray tasks: one fine-tuned and judged classifier each, or one that they start from.

What a task needs travels with it; what it made lies in its run directory. A cell is done when its rows.parquet is
there.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from miner.errors import MinerError, UsageError
from miner.files import atomic
from miner.pool import Pool
from miner.rays import get
from miner.subset import load_subset
from pipelines.compare_matrix import Cell
from pipelines.compare_selectors import FULL, NONE
from pipelines.compare_stats import OWN_SCORE
from pipelines.judge import NO_SCORE, Row, judge
from trainers.checkpoint import open_checkpoint
from trainers.config import TrainConfig
from trainers.data import IdSet, load_id
from trainers.image_set import ImageSet
from trainers.noise import NOISE
from trainers.read import ID_TORCHVISION, TORCHVISION
from trainers.sets import open_images
from trainers.train import place
from trainers.training import train

ROWS = "rows.parquet"
SIZE = 32  # px
NO_COST = ("pool_images_scored", "forward_equivalents", "selection_seconds")  # all 0 where nothing is mined
NAMES = ("demo", "demo-pool", "lsun", *NOISE, *TORCHVISION, *ID_TORCHVISION)  # no paths, whatever lies here
_TYPES = {"gamma": pa.float64(), "seed": pa.int64(), "value": pa.float64()}
_COLUMNS = ("pool", "id", "model", "selector", "gamma", "method", "seed", *Row._fields)
SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in _COLUMNS])


@dataclass(frozen=True)
class Job:
    """All that a task needs to do one cell, on whatever machine."""

    cell: Cell
    train: TrainConfig
    pool: str
    sets: tuple[tuple[str, str], ...]  # (group, spec)
    flag: str | None
    cost: Mapping[str, float]
    scores: tuple[str, ...]


# --- what is worked with ---------------------------------------------------------------------------------------


def absolute(spec: str) -> str:
    """A path as it is written on every node and from every folder; names of sets as they are."""
    return os.path.abspath(spec) if spec not in NAMES and os.path.exists(spec) else spec


class Id(NamedTuple):
    """What the driver needs of an ID set; its images are opened by who works with them."""

    spec: str
    images: int
    fingerprint: str


def open_id(spec: str) -> Id:
    """The ID set ``spec``, loaded once to see that it can be, and forgotten."""
    id_set = load_id(spec, SIZE)
    return Id(spec, len(id_set.train_images), id_set.fingerprint)


def fingerprints(sets: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{"group set": fingerprint} of OOD sets (group, spec). Raises UsageError for two of one name in a group."""
    found: dict[str, str] = {}
    for group, spec in sets:
        for images in open_images(spec, SIZE):
            name = f"{group} {images.name}"
            if name in found:
                raise UsageError(f"{spec}: another {group} set is called {images.name}, too; rename one")
            found[name] = images.origin["fingerprint"][:8]
    return found


@lru_cache(maxsize=1)  # a worker process does many cells
def judge_sets(id_spec: str, specs: tuple[tuple[str, str], ...]) -> tuple[IdSet, list[tuple[str, ImageSet]]]:
    """The ID set and the (group, set) that judge its classifiers."""
    sets = [(group, images) for group, spec in specs for images in open_images(spec, SIZE)]
    return load_id(id_spec, SIZE), sets


# --- one cell ----------------------------------------------------------------------------------------------------


def do_cell(job: Job) -> None:
    """Fine-tune, unless that is done; judge; write rows.parquet. Raises MinerError as training and judge do."""
    out = job.train.run_dir
    if not (out / "summary.json").exists():
        train(job.train)
    torch.set_num_threads(job.train.threads)
    summary = json.loads((out / "summary.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, meta = open_checkpoint(out)
    id_set, sets = judge_sets(job.train.id, job.sets)
    # The same noise and the same draws of the 1:5 protocol for all cells: spread is the classifiers' alone.
    rows = judge(place(net, device), meta, id_set, sets, list(job.scores), seed=0).rows  # type: ignore[arg-type]
    rows += cost_rows(job, summary)
    columns = [{**job.cell.columns, **row._asdict()} for row in rows]
    write_table(out / ROWS, pa.Table.from_pylist(columns, schema=SCHEMA))


def scores_of(cell: Cell, methods: Iterable[str]) -> tuple[str, ...]:
    """MSP and the method's own score; without outliers those of all ``methods``, which are held against it."""
    judged = methods if cell.selector == NONE else (cell.method,)
    return tuple(dict.fromkeys(("msp", *(OWN_SCORE.get(method, "msp") for method in judged))))


def judged(path: Path, scores: Iterable[str]) -> bool:
    """Whether the rows of a cell are there, by all ``scores``: another method may ask for one more."""
    return path.exists() and set(scores) <= set(pq.read_table(path, columns=["score"])["score"].to_pylist())


def cost_rows(job: Job, summary: Mapping[str, Any]) -> list[Row]:
    """What the cell cost, and which share of its outliers carries --flag."""
    label, stored = outliers(job)
    told = {**job.cost, "training_images": summary["images"], "training_seconds": summary["seconds"]}
    told |= {"bytes_stored": stored, "outliers": len(label)}
    rows = [Row(NO_SCORE, "cost", "selection", "cost", name, float(value)) for name, value in told.items()]
    if job.flag and len(label):
        marked = flagged(Pool.open(job.pool), job.flag)
        share = float(marked[label].mean())
        rows.append(Row(NO_SCORE, "subset", "subset", "subset", "flagged_share", share))
    return rows


def outliers(job: Job) -> tuple[np.ndarray, int]:
    """The pool class of each outlier, int64 [n] (-1: none), and their bytes on disk."""
    if job.cell.selector == NONE:
        return np.zeros(0, np.int64), 0
    if job.cell.selector == FULL:
        pool = Pool.open(job.pool)
        index = pool.index(["label", "excluded_by"])
        labels = index.filter(pc.is_null(index["excluded_by"]))["label"]
        stored = sum(shard.bytes for shard in pool.shards)
    else:
        subset = load_subset(str(job.train.outliers))
        labels = subset.manifest["label"]
        stored = sum(tar["bytes"] for tar in subset.recipe["tars"])
    return pc.fill_null(labels, -1).to_numpy().astype(np.int64), stored


def flagged(pool: Pool, flag: str) -> np.ndarray:
    """bool [classes + 1]: whether a class carries ``flag``; the last is for images without one, so that -1 works."""
    return np.array([*(bool(entry.get(flag)) for entry in pool.class_info or []), False])


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file; a reader sees all of it or nothing."""
    with atomic(str(path)) as sink:
        pq.write_table(table, sink, compression="zstd")


# --- many at once ------------------------------------------------------------------------------------------------


def in_parallel(
    function: Callable[[Any], Any], calls: Mapping[str, Any], jobs: int | None
) -> Iterator[tuple[str, str | None]]:
    """Run ``function`` on each call as a Ray task; yields (name, what went wrong in one line or None) as they finish.

    A task takes a CPU, and a GPU where there are any; more ``jobs`` than GPUs share them. A task whose process dies is
    tried once more.
    """
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    limit = jobs or gpus or max(1, int(have.get("CPU", 1)))
    share = 1 / math.ceil(limit / gpus) if gpus else 0
    task = ray.remote(function).options(num_cpus=1, num_gpus=share, max_retries=1)
    flying: dict[Any, str] = {}
    queue = iter(calls.items())
    while True:
        while len(flying) < limit and (item := next(queue, None)) is not None:
            flying[task.remote(item[1])] = item[0]
        if not flying:
            return
        for ref in ray.wait(list(flying))[0]:
            name = flying.pop(ref)
            try:
                get(ref)
                yield name, None
            except (MinerError, ray.exceptions.RayError) as error:
                yield name, one_line(error)


def one_line(error: Exception) -> str:
    """An error in one line: a MinerError's own words, the cause of anything else."""
    if isinstance(error, MinerError):
        return " ".join(str(error).splitlines())
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
