"""Source "parquet": Hugging Face image data sets, `data/train-00000-of-00005.parquet`, written to tars as they are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miner.errors import MinerError, UsageError
from miner.files import parse_json, regular_size
from miner.recipe import PER_TAR, Item, Job, Plan, Recipe, digest, files_of, state
from miner.tars import IMAGES, MAX_IMAGE, MAX_LABEL

AT_ONCE = 16  # rows in memory
BUFFER = 1 << 20  # bytes read at a time: a row group may have gigabytes
EXT = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))
EMPTY, LARGE, OTHER = "without bytes", "over 16 MB", "not a JPEG, PNG or WEBP"


@dataclass(frozen=True)
class Columns:
    """Which columns hold image and label, and the names of the labels, where the file gives them."""

    image: str
    label: str | None
    classes: tuple[str, ...]
    rows: int


def plan_parquet(recipe: Recipe) -> Plan:
    """Jobs of up to 10,000 rows, none of two files."""
    jobs: list[Job] = []
    classes: tuple[str, ...] | None = None
    for path in _paths(recipe):
        columns, size, stamp = columns_of(path), recipe.per_shard or PER_TAR, digest([path, *state(path)])
        if classes not in (None, columns.classes):
            raise MinerError(f"{path}: other classes than in the files before it; make one pool of each data set")
        classes = columns.classes
        first = jobs[-1].first + jobs[-1].count if jobs else 0
        for start in range(0, columns.rows, size):
            rows = min(size, columns.rows - start)
            jobs.append(Job(len(jobs), "parquet", path, stamp, first + start, rows, start=start))
    if not jobs:
        raise MinerError(f"{recipe.inputs[0]}: no rows in these files")
    return Plan(tuple(jobs), classes or ())


def _paths(recipe: Recipe) -> list[str]:
    """The input files; of a copy of a repository those in its `data` folder."""
    inputs = tuple(
        deeper if os.path.isdir(deeper := os.path.join(path, "data")) and not _has_parquet(path) else path
        for path in recipe.inputs
    )
    return files_of(Recipe(recipe.source, inputs, recipe.glob), (".parquet",))


def _has_parquet(path: str) -> bool:
    return any(name.endswith(".parquet") for name in os.listdir(path))


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    regular_size(path)
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise MinerError(f"{path}: not a sound Parquet file ({error}); fetch it again") from None


def columns_of(path: str) -> Columns:
    """Image and label columns of a Parquet file, by type and by the `huggingface` note in its schema.

    MinerError where there is no column `struct<bytes: binary, path: string>`, UsageError where there are several and
    none is called `image`.
    """
    with _opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    features = _features(schema.metadata or {})
    images = [field.name for field in schema if _is_image(field.type)]
    if not images:
        raise MinerError(f"{path}: no image column (struct<bytes: binary, path: string>)")
    if len(images) > 1 and "image" not in images:
        raise UsageError(f"{path}: image columns {', '.join(images)}; keep one, or call one `image`")
    named = {name: kind["names"] for name, kind in features.items() if _is_class(kind)}
    labels = [field.name for field in schema if pa.types.is_integer(field.type)]
    known = [name for name in labels if name in named] or [name for name in labels if name in ("label", "labels")]
    label = "label" if "label" in known else known[0] if known else None
    return Columns("image" if "image" in images else images[0], label, tuple(named.get(label or "", ())), rows)


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    types = {field.name: field.type for field in kind}
    return "bytes" in types and (pa.types.is_binary(types["bytes"]) or pa.types.is_large_binary(types["bytes"]))


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        features = parse_json(metadata[b"huggingface"], "huggingface")["info"]["features"]
    except (KeyError, TypeError, MinerError):
        return {}
    return features if isinstance(features, dict) else {}


def _is_class(kind: Any) -> bool:
    names = kind.get("names") if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def parquet_items(job: Job, skipped: dict[str, int]) -> Iterator[Item]:
    """The images of one job; rows that hold none are counted in ``skipped``."""
    columns = columns_of(job.path)
    wanted = [columns.image, *([columns.label] if columns.label else [])]
    with _opened(job.path) as file:
        stop = 0
        for group in range(file.num_row_groups):
            start, stop = stop, stop + file.metadata.row_group(group).num_rows
            if stop <= job.start or start >= job.start + job.count:
                continue
            for batch in file.iter_batches(AT_ONCE, row_groups=[group], columns=wanted, use_threads=False):
                batch.validate(full=True)
                rows = range(start, start := start + len(batch))
                inside = range(max(rows.start, job.start), min(rows.stop, job.start + job.count))
                part = batch.slice(inside.start - rows.start, max(len(inside), 0))
                yield from _items(job, columns, inside, part, skipped)
                if start >= job.start + job.count:
                    break


def _items(job: Job, columns: Columns, rows: range, part: pa.RecordBatch, skipped: dict[str, int]) -> Iterator[Item]:
    labels = part[columns.label].to_pylist() if columns.label else [None] * len(part)
    classes = len(columns.classes) or MAX_LABEL
    for row, image, label in zip(rows, part[columns.image].to_pylist(), labels, strict=True):
        data, path = (image or {}).get("bytes"), (image or {}).get("path")
        path = path if isinstance(path, str) else None
        ext = _ext(data, path) if data else None
        if data is None or ext is None or len(data) > MAX_IMAGE:
            why = EMPTY if not data else LARGE if ext else OTHER
            skipped[why] = skipped.get(why, 0) + 1
            continue
        if label is not None and label >= classes:
            raise MinerError(f"{job.path}: row {row}: label {label}, but only {classes} classes")
        yield Item(job.first + row - job.start, ext, data, label if label is None or label >= 0 else None, path)


def _ext(data: bytes, path: str | None) -> str | None:
    """By the first bytes; by the name where they say nothing: an image that is broken stays, to be quarantined."""
    for start, ext in EXT:
        if data.startswith(start):
            return ext
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    ext = path.rpartition(".")[2].lower() if path else ""
    return ext.replace("jpeg", "jpg") if ext in IMAGES else None
