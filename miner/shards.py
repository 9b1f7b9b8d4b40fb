"""One shard of a pool: make its tar or adopt a file; gives index rows and a manifest entry."""

import hashlib
import json
import os
from typing import Any

import numpy as np
import pyarrow as pa

from miner.errors import MinerError
from miner.files import atomic, read_ranges, sha256
from miner.images import dimensions
from miner.pool import INDEX_SCHEMA, uid_of
from miner.sources import Job
from miner.tars import MAX_IMAGE, TarWriter, expand, read_samples

CHUNK = 4 << 20


def shard_job(folder: str, job: Job) -> tuple[pa.Table, dict[str, Any]]:
    """Make or adopt one shard: its index rows (INDEX_SCHEMA) and its entry for pool.json."""
    if job.kind == "raw":
        return _adopt_raw(job)
    if job.kind == "tar":
        return _adopt_tar(folder, job)
    root, name = job.path, f"{job.number:06d}.tar"
    rows = []
    with TarWriter(os.path.join(folder, name)) as tar:
        for number, (path, label) in enumerate(job.items, job.first):
            with open(os.path.join(root, path), "rb") as file:
                data = file.read(MAX_IMAGE + 1)
            if len(data) > MAX_IMAGE:
                raise MinerError(f"{os.path.join(root, path)}: grew over {MAX_IMAGE} bytes; run again")
            ext = path.rpartition(".")[2].lower().replace("jpeg", "jpg")
            rows.append(write_image(tar, f"{number:09d}", ext, data, label, {"path": path}))
    return index_table(job.number, rows), made_entry(name, tar, len(rows))


def write_image(
    tar: TarWriter, key: str, ext: str, data: bytes, label: int | None, note: dict[str, Any] | None
) -> dict[str, Any]:
    offset = tar.write(f"{key}.{ext}", data)
    if label is not None:
        tar.write(f"{key}.cls", str(label).encode())
    if note is not None:
        tar.write(f"{key}.json", json.dumps(note).encode())
    return _row(key, ext, offset, data, label)


def _row(key: str, ext: str, offset: int, data: bytes, label: int | None) -> dict[str, Any]:
    width, height = dimensions(data)
    return {
        "uid": uid_of(data),
        "key": key,
        "offset": offset,
        "size": len(data),
        "ext": ext,
        "label": label,
        "width": width,
        "height": height,
    }


def index_table(shard: int, rows: list[dict[str, Any]]) -> pa.Table:
    full = [{**row, "shard": shard, "row": number} for number, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=INDEX_SCHEMA)


def made_entry(name: str, tar: TarWriter, count: int) -> dict[str, Any]:
    """Entry of a tar that was just written into the pool as ``name``."""
    return _entry(name, name, count, tar.size, tar.sha256)


def _entry(name: str, path: str, count: int, size: int, digest: str) -> dict[str, Any]:
    entry = {"name": name, "kind": "tar", "path": path, "count": count}
    return {**entry, "bytes": size, "sha256": digest, "file_bytes": size}


def _adopt_tar(folder: str, job: Job) -> tuple[pa.Table, dict[str, Any]]:
    path = job.path
    if path.endswith(".gz"):
        path = os.path.join(os.path.abspath(folder), f"{job.number:06d}.tar")
        with atomic(path) as file:
            expand(job.path, file)
    rows = []
    samples = read_samples(path)
    for start in range(0, len(samples), 256):
        part = samples[start : start + 256]
        images = read_ranges(path, [(sample.offset, sample.size) for sample in part])
        rows += [_row(s.key, s.ext, s.offset, data, s.label) for s, data in zip(part, images, strict=True)]
    inside = os.path.dirname(path) == os.path.abspath(folder)
    name = os.path.basename(job.path).removesuffix(".gz")
    entry = _entry(name, os.path.basename(path) if inside else path, len(rows), os.path.getsize(path), sha256(path))
    return index_table(job.number, rows), entry


def _adopt_raw(job: Job) -> tuple[pa.Table, dict[str, Any]]:
    height, width, channels = job.record_shape
    record = height * width * channels
    step = max(1, CHUNK // record)
    digest, uids = hashlib.sha256(), []
    for start in range(0, job.count, step):
        count = min(step, job.count - start)
        block = read_ranges(job.path, [(job.record_offset + start * record, count * record)])[0]
        digest.update(block)
        view = memoryview(block)
        uids += [uid_of(view[i * record : (i + 1) * record]) for i in range(count)]
    listed = set(job.excluded)
    rows = range(job.count)
    columns = {
        "uid": uids,
        "key": [f"{job.first + row:09d}" for row in rows],
        "shard": np.full(job.count, job.number, np.int32),
        "row": np.arange(job.count, dtype=np.int32),
        "offset": job.record_offset + record * np.arange(job.count, dtype=np.int64),
        "size": np.full(job.count, record, np.int64),
        "ext": ["png"] * job.count,
        "label": [None] * job.count,
        "width": np.full(job.count, width, np.int32),
        "height": np.full(job.count, height, np.int32),
        "excluded_by": ["exclude-list" if row in listed else None for row in rows],
    }
    entry = {
        "name": f"{job.number:06d}",
        "kind": "raw",
        "path": job.path,
        "count": job.count,
        "bytes": job.count * record,
        "sha256": digest.hexdigest(),
        "file_bytes": os.path.getsize(job.path),
        "record_offset": job.record_offset,
        "record_shape": list(job.record_shape),
        "order": job.order,
    }
    return pa.table(columns, schema=INDEX_SCHEMA), entry
