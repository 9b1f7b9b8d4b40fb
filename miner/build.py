"""Make a pool: one job a shard, then one manifest over all. Plain functions; `pipelines.shard` brings Ray.

A finished shard leaves `shards/000007.parquet` and, last, `shards/000007.json`; a second run of the same
command skips it. Nothing written depends on the clock or on the number of workers: same pool, same bytes.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from miner.buckets import check_writable, is_url
from miner.errors import MinerError, UsageError
from miner.files import atomic, file_size, open_binary, place, read_json, read_whole, sha256
from miner.images import png
from miner.manifest import FORMAT, VERSION
from miner.pool import INDEX_SCHEMA, Pool, fingerprint_of
from miner.recipe import Job, Plan, Recipe
from miner.shards import index_table, made_entry, shard_job, write_image
from miner.source_uids import join_names
from miner.sources import plan
from miner.tars import TarWriter


def prepare(recipe: Recipe, folder: str) -> Plan:
    """Plan the jobs and make the pool's folder, or URL, ready. Raises MinerError if it holds something else.

    UsageError for a URL that cannot be written to, and for sources that a pool there cannot hold.
    """
    if is_url(folder):
        check_writable(folder)
    planned = plan(recipe)
    if is_url(folder) and any(job.kind not in ("folder", "parquet") for job in planned.jobs):
        raise UsageError(
            f"{folder}: --source {recipe.source} adopts files where they lie, and nobody would find them from a URL; "
            "only image files in folders and --source parquet are written there"
        )
    folder = folder if is_url(folder) else os.path.abspath(folder)
    note = os.path.join(folder, "shards", "arguments.json")
    arguments = json.dumps(_arguments(recipe), indent=1).encode()
    try:
        begun = read_whole(note)
    except FileNotFoundError:
        begun = b""
    if not begun:
        beside = all(job.path.endswith(".tar") and os.path.dirname(job.path) == folder for job in planned.jobs)
        if _holds(folder) - {"shards"} and not beside:
            raise MinerError(f"{folder}: not empty and no pool of this command; give another --out")
        place(note).parent.mkdir(parents=True, exist_ok=True)
        with atomic(note) as file:
            file.write(arguments)
    elif begun != arguments:
        raise MinerError(f"{folder}: begun with other arguments; remove it or give another --out")
    for where in () if is_url(folder) else (folder, os.path.dirname(note)):
        for name in os.listdir(where):
            if name.startswith(".") and name.endswith(".tmp"):
                os.unlink(os.path.join(where, name))
    return planned


def _holds(folder: str) -> set[str]:
    where = place(folder)
    return {path.name for path in where.iterdir()} if where.exists() else set()


def _arguments(recipe: Recipe) -> dict[str, Any]:
    return {
        "source": recipe.source,
        "inputs": [os.path.abspath(path) for path in recipe.inputs],
        "glob": recipe.glob,
        "per_shard": recipe.per_shard,
        "exclude_list": sha256(recipe.exclude_list) if recipe.exclude_list else None,
    }


def run_job(folder: str, job: Job) -> int:
    """Make one shard unless it is complete; returns its number of images. MinerError names the file.

    A part of the source without any image makes no shard.
    """
    stem = os.path.join(folder, "shards", f"{job.number:06d}")
    done = _complete(folder, stem, job)
    if done is not None:
        return done
    made = shard_job(folder, job)
    with atomic(f"{stem}.parquet") as file:
        pq.write_table(made.table, file)
    note = {"stamp": job.stamp, "shard": made.entry} | ({"skipped": made.skipped} if made.skipped else {})
    with atomic(f"{stem}.json") as file:
        file.write(json.dumps(note, indent=1).encode())
    return made.table.num_rows


def _complete(folder: str, stem: str, job: Job) -> int | None:
    try:
        note = read_json(f"{stem}.json")
        entry, stamp = note["shard"], note["stamp"]
        if stamp != job.stamp:
            raise MinerError(f"{job.path}: changed since {folder} was begun; remove it or give another --out")
        if entry is None:
            return 0  # no image in its part of the source
        size = file_size(os.path.join(folder, entry["path"]))
        recorded, count = int(entry["file_bytes"]), int(entry["count"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MinerError(f"{stem}.json: damaged ({error!r}); remove it and run again") from None
    return count if size == recorded and place(f"{stem}.parquet").exists() else None


def finish(recipe: Recipe, folder: str, name: str, planned: Plan, licence: str = "") -> Pool:
    """Join the shards' rows into index.parquet (and sources.parquet) and write pool.json last; returns the opened pool.

    Raises MinerError when two shards share a key, a label has no class, or there is no image at all.
    """
    stems = [os.path.join(folder, "shards", f"{job.number:06d}") for job in planned.jobs]
    notes = [read_json(f"{stem}.json") for stem in stems]
    stems = [stem for stem, note in zip(stems, notes, strict=True) if note["shard"]]
    entries = [note["shard"] for note in notes if note["shard"]]
    left_out = skipped(planned, notes)
    if not entries:
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
        raise MinerError(f"{recipe.inputs[0]}: no images in it ({reasons})")
    tables = (_rows(f"{stem}.parquet", shard) for shard, stem in enumerate(stems))
    source = {"kind": recipe.source, "arguments": _arguments(recipe), "skipped": left_out}
    join_names(folder, [f"{stem}.parquet" for stem in stems])
    return _write_manifest(folder, name, planned, entries, tables, source, licence)


def skipped(planned: Plan, notes: list[dict[str, Any]]) -> dict[str, int]:
    """Files and rows of the source that are not in the pool, by reason: what the plan and each shard left out."""
    counts = dict(planned.skipped)
    for note in notes:
        for why, count in note.get("skipped", {}).items():
            counts[why] = counts.get(why, 0) + count
    return counts


def _rows(path: str, shard: int) -> pa.Table:
    """A shard's own rows, under the number it has among those that are not empty."""
    with open_binary(path) as file:
        table = pq.read_table(file, schema=INDEX_SCHEMA)
    place = table.schema.get_field_index("shard")
    return table.set_column(place, table.schema.field(place), pa.array(np.full(len(table), shard, np.int32)))


def _write_manifest(
    folder: str,
    name: str,
    planned: Plan,
    entries: list[dict[str, Any]],
    tables: Any,
    source: dict[str, Any],
    licence: str,
) -> Pool:
    kept = []
    with (
        atomic(os.path.join(folder, "index.parquet")) as file,
        pq.ParquetWriter(file, INDEX_SCHEMA) as writer,
    ):
        for entry, table in zip(entries, tables, strict=True):
            top = pc.max(table["label"]).as_py()
            if planned.classes and top is not None and top >= len(planned.classes):
                raise MinerError(
                    f"{os.path.join(folder, entry['path'])}: label {top}, but only {len(planned.classes)} classes"
                )
            writer.write_table(table, row_group_size=table.num_rows)
            kept.append(table.select(["uid"] if entry["kind"] == "raw" else ["uid", "key", "shard"]))
    if entries[0]["kind"] == "tar":
        _check_keys(pa.concat_tables(kept), entries)
    uids = pa.chunked_array([chunk for table in kept for chunk in table["uid"].chunks], pa.string())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "count": len(uids),
        "fingerprint": fingerprint_of(uids),
        "licence": licence,
        "source": source,
        "classes": list(planned.classes),
        "class_info": planned.class_info,
        "shards": entries,
    }
    with atomic(os.path.join(folder, "pool.json")) as file:
        file.write(json.dumps(manifest, indent=1).encode())
    return Pool.open(folder)


def _check_keys(rows: pa.Table, entries: list[dict[str, Any]]) -> None:
    counts = pc.value_counts(rows["key"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        key = twice[0]["values"].as_py()
        shards = rows.filter(pc.equal(rows["key"], key))["shard"].to_pylist()
        paths = " and ".join(entries[shard]["path"] for shard in shards[:2])
        if len({entries[shard]["path"] for shard in shards}) == 1:  # of one archive
            raise MinerError(f"{entries[shards[0]]['path']}: key {key!r} comes twice; unpack it, take --source folder")
        raise MinerError(f"{paths}: both hold key {key!r}; choose the tars of one split with --glob")


def write_arrays_pool(
    directory: str,
    name: str,
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray | None,
    classes: Sequence[str],
    shard_count: int = 4,
) -> Pool:
    """A pool of ``shard_count`` PNG tars from uint8 [n, H, W, 3] and int labels [n]; its bytes repeat."""
    folder = place(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pool.json").unlink(missing_ok=True)
    entries, tables = [], []
    for shard, rows in enumerate(np.array_split(np.arange(len(images)), min(shard_count, len(images)))):
        path, made = f"{shard:06d}.tar", []
        with TarWriter(os.path.join(directory, path)) as tar:
            for row in rows.tolist():
                label = None if labels is None else int(labels[row])
                made.append(write_image(tar, f"{row:09d}", "png", png(images[row]), label, None))
        entries.append(made_entry(path, tar, len(made)))
        tables.append(index_table(shard, made))
    source = {"kind": "arrays", "arguments": {"shape": list(images.shape)}}
    return _write_manifest(directory, name, Plan((), tuple(classes)), entries, tables, source, "")
