"""Which images of a pool or subset are images of the ID set or of an OOD test set, or copies of them."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from miner.cache import gather, open_shard
from miner.copies import BLOCK, Copies, best, kinds, threshold
from miner.errors import MinerError
from miner.files import Place, atomic, local_copy
from miner.images import decode
from miner.pool import Pool
from miner.progress import Display
from miner.subset import Subset
from trainers.image_set import ImageSet

KINDS = ("exact", "re-encoded", "flipped", "cropped", "flipped+cropped")
SAVE = 60.0  # seconds between two times that what was found is kept
SEED = 0
FLOOR = 0.5  # least threshold: unrelated natural images seldom reach it, and copies lie above it anyway
MOST_CLEAN = 10_000  # ID test images that say how much unrelated images agree

PAIRS = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # in the pool, all shards joined, or in the subset's manifest
        pa.field("set", pa.string(), nullable=False),  # reference set
        pa.field("set_row", pa.int64(), nullable=False),
        pa.field("set_key", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # one of KINDS
        pa.field("detail", pa.float32(), nullable=False),  # correlation of edges and texture, which decides
        pa.field("correlation", pa.float32(), nullable=False),  # of the aligned pixels
        pa.field(
            "scale", pa.float32(), nullable=False
        ),  # side of the window of the reference that is seen, share of its own
        pa.field("x", pa.float32(), nullable=False),  # its centre, likewise
        pa.field("y", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Target:
    """What is audited.

    ``blocks(first)`` gives (rows int64 ``[n]``, images uint8 ``[n, S, S, 3]``) from row ``first`` on, the row after a
    block or 0; ``named`` uids and keys.
    """

    name: str
    path: str
    fingerprint: str
    count: int
    blocks: Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]
    named: Callable[[np.ndarray], tuple[list[str], list[str]]]
    encoded: Callable[[int], bytes]
    undecodable: list[str] = field(default_factory=list)


def pool_target(pool: Pool, size: int) -> Target:
    """All images of a pool at ``size`` px but those of its exclusion list and those that do not decode."""
    bad_keys: list[str] = []

    def blocks(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        bad_keys.clear()
        edges = pool.edges.tolist()
        for shard, part in enumerate(pool.index_parts(["excluded_by"])):
            if edges[shard + 1] <= first:
                continue
            images, bad = open_shard(pool, shard, size)
            keep = pc.is_null(part["excluded_by"]).to_numpy().copy()
            keep[list(bad)] = False
            bad_keys.extend(f"{pool.shards[shard].name}: row {row}: {reason}" for row, reason in bad.items())
            rows = np.flatnonzero(keep)
            for start in range(int(np.searchsorted(rows, first - edges[shard])), len(rows), BLOCK):
                here = rows[start : start + BLOCK]
                yield here + edges[shard], gather(images, here)

    def place(row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(pool.edges, row, "right")) - 1
        return shard, row - int(pool.edges[shard])

    def named(rows: np.ndarray) -> tuple[list[str], list[str]]:
        uids, keys = np.empty(len(rows), object), np.empty(len(rows), object)
        shard = np.searchsorted(pool.edges, rows, "right") - 1
        for number in np.unique(shard).tolist():
            here = shard == number
            index = pool.shard_index(number, ["uid", "key"]).take(pa.array(rows[here] - pool.edges[number]))
            uids[here], keys[here] = index["uid"].to_pylist(), index["key"].to_pylist()
        return uids.tolist(), keys.tolist()

    def encoded(row: int) -> bytes:
        shard, inside = place(row)
        return pool.read(shard, [inside])[0]

    return Target(pool.name, pool.path, pool.fingerprint, pool.count, blocks, named, encoded, bad_keys)


def subset_target(subset: Subset, size: int) -> Target:
    """The images of a gamma-subset at ``size`` px, in rank order."""
    bad_keys: list[str] = []
    uids, keys = (subset.manifest[name] for name in ("uid", "key"))

    def blocks(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        bad_keys.clear()
        for start in range(-(-first // BLOCK) * BLOCK, len(subset), BLOCK):
            rows, images = [], []
            for row in range(start, min(start + BLOCK, len(subset))):
                try:
                    images.append(decode(subset.encoded(row), size))
                except ValueError as error:
                    bad_keys.append(f"{keys[row]}: {error}")
                else:
                    rows.append(row)
            if rows:
                yield np.array(rows), np.stack(images)

    def named(rows: np.ndarray) -> tuple[list[str], list[str]]:
        return uids.take(pa.array(rows)).to_pylist(), keys.take(pa.array(rows)).to_pylist()

    path = str(subset.path)
    fingerprint = str(subset.recipe["fingerprint"])
    return Target(subset.path.resolve().name, path, fingerprint, len(subset), blocks, named, subset.encoded, bad_keys)


@dataclass(frozen=True)
class Audit:
    """``table`` is in schema PAIRS; ``about`` says in JSON types what was audited, and by which threshold."""

    table: pa.Table
    about: dict[str, Any]

    @property
    def images(self) -> int:
        """How many images have at least one pair."""
        return len(pc.unique(self.table["row"]))


def settings(target: Target, sets: Mapping[str, ImageSet], alarms: float) -> dict[str, Any]:
    """What decides the outcome of an audit, in JSON types."""
    known = {name: {"images": len(x), "fingerprint": str(x.origin["fingerprint"])} for name, x in sets.items()}
    size = next(iter(sets.values())).size
    return {"fingerprint": target.fingerprint, "sets": known, "size": size, "alarms": alarms, "floor": FLOOR}


def audit(
    target: Target, sets: Mapping[str, ImageSet], clean: str, alarms: float, display: Display, kept: Place | None = None
) -> Audit:
    """Compare every image of ``target`` with all of ``sets``, which are opened at one size, in bounded memory.

    ``clean`` names the set (the ID test images) that the threshold is measured on: at most a share ``alarms`` of its
    images, turned upside down so that they are copies of nothing, agrees as well with any reference. What is found is
    written to ``kept`` every minute, and an audit that was interrupted goes on from there.
    """
    display.phase("index", sum(map(len, sets.values())))
    copies = Copies(sets, torch.get_num_threads(), SEED, display.advance)
    limit, measured = _calibrated(copies, list(sets).index(clean), alarms, display)
    about = settings(target, sets, alarms) | {"target": target.name, "path": target.path, "threshold": limit}
    about |= {"clean": clean, **measured}
    known = {name: _sorted(images) for name, images in sets.items()}
    before = _begun(kept, about)
    if before.about["checked"]:
        display.say(f"going on after {before.about['checked']:,} images that were audited before")
    display.phase("audit", target.count, before.about["next"])
    tables, told, started = [before.table], before.about, time.monotonic()

    def so_far() -> Audit:
        seconds = before.about["seconds"] + time.monotonic() - started
        bad = list(dict.fromkeys([*before.about["undecodable"], *target.undecodable]))[:20]
        tables[:] = [pa.concat_tables(tables).combine_chunks()]
        return Audit(tables[0], about | told | {"seconds": round(seconds, 2), "undecodable": bad})

    saved = started
    for rows, images in target.blocks(told["next"]):
        if len(found := _pairs(target, sets, known, copies, limit, rows, images)):
            tables.append(found)
        told = {"checked": told["checked"] + len(rows), "next": int(rows[-1]) + 1}
        display.advance(len(rows))
        if kept is not None and time.monotonic() - saved > SAVE:
            write_audit(so_far(), kept)
            saved = time.monotonic()
    return so_far()


def _begun(kept: Place | None, about: dict[str, Any]) -> Audit:
    """What an interrupted audit with the same settings and threshold had found, or nothing."""
    with contextlib.suppress(MinerError, KeyError, TypeError, ValueError):
        if kept is not None and kept.exists():
            found = read_audit(kept)
            told: dict[str, Any] = {name: int(found.about[name]) for name in ("checked", "next")}
            told |= {"seconds": float(found.about["seconds"]), "undecodable": list(found.about["undecodable"])}
            if about.items() <= found.about.items():
                return Audit(found.table, told)
    return Audit(PAIRS.empty_table(), {"checked": 0, "next": 0, "seconds": 0.0, "undecodable": []})


def _calibrated(copies: Copies, clean: int, alarms: float, display: Display) -> tuple[float, dict[str, Any]]:
    """The threshold, and how ID test images agree with the references: upside down, and as they are."""
    images = copies.sets[clean]
    rows = np.sort(np.random.default_rng(SEED).permutation(len(images))[:MOST_CLEAN])
    display.phase("calibrate", 2 * len(rows))
    down, upright = [], []
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        shown = images.take(part)
        own = part + copies.edges[clean]  # a symmetric image is its own copy, even upside down
        down.append(best(copies.find(np.ascontiguousarray(shown[:, ::-1]), own), len(part)))
        upright.append(best(copies.find(shown, own), len(part)))
        display.advance(2 * len(part))
    nothing, itself = np.concatenate(down), np.concatenate(upright)
    limit = max(threshold(nothing, alarms), FLOOR)
    return limit, {
        "clean_images": len(rows),
        "upside_down": {f"{q:g}": round(float(np.quantile(nothing, q)), 4) for q in (0.5, 0.9, 0.99, 0.999)},
        "as_they_are": {f"{q:g}": round(float(np.quantile(itself, q)), 4) for q in (0.5, 0.9, 0.99, 0.999)},
        "clean_above": float((nothing > limit).mean()),
        "id_copies": float((itself > limit).mean()),  # of other ID images: CIFAR-10's test set has some in train
    }


def _sorted(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of decoded pixels, rising, and their rows."""
    digests = images.digests()
    order = np.argsort(digests, kind="stable")
    return digests[order], order


def _pairs(
    target: Target,
    sets: Mapping[str, ImageSet],
    known: Mapping[str, tuple[np.ndarray, np.ndarray]],
    copies: Copies,
    limit: float,
    rows: np.ndarray,
    images: np.ndarray,
) -> pa.Table:
    """The pairs of one block: pixel for pixel in every set, then copies that are not."""
    ours = ImageSet("block", (images,)).digests()
    found: dict[str, list[Any]] = {name: [] for name in ("query", "set", "set_row", *PAIRS.names[6:])}

    def add(*values: Any) -> None:
        for column, value in zip(found.values(), values, strict=True):
            column.append(value)

    seen = set()
    names = list(sets)
    for number, name in enumerate(names):
        digests, order = known[name]
        at = np.minimum(np.searchsorted(digests, ours), len(digests) - 1)
        for query in np.flatnonzero(digests[at] == ours).tolist():
            add(query, name, int(order[at[query]]), "exact", 1.0, 1.0, 1.0, 0.5, 0.5)
            seen.add((query, number))
    pairs = copies.find(images)
    pairs = pairs.where(pairs.detail > limit)
    owner = copies.owner(pairs.row)
    for i, kind in enumerate(kinds(pairs)):
        query, number = int(pairs.query[i]), int(owner[i])
        if (query, number) not in seen:  # one pair for each image and set, the best
            seen.add((query, number))
            inside = int(pairs.row[i] - copies.edges[number])
            add(query, names[number], inside, kind, pairs.detail[i], pairs.correlation[i], *pairs.window[i].tolist())
    place = rows[np.array(found.pop("query"), np.int64)]
    uids, keys = target.named(place) if len(place) else ([], [])
    there = [sets[name].key(row) for name, row in zip(found["set"], found["set_row"], strict=True)]
    columns = {"uid": uids, "key": keys, "row": place, "set_key": there} | found
    return pa.table({name: columns[name] for name in PAIRS.names}, schema=PAIRS)


def write_audit(audit: Audit, path: Place) -> None:
    """Write the pairs and, in the schema's metadata, what they are; complete or absent."""
    table = audit.table.replace_schema_metadata({"outlier-miner": json.dumps(audit.about)})
    with atomic(path) as sink:
        pq.write_table(table, sink, compression="zstd")


def read_audit(path: Place) -> Audit:
    """What ``write_audit`` wrote. MinerError for what is damaged or of another kind."""
    try:
        with local_copy(path) as local:
            table = pq.ParquetFile(local).read()
        table.validate(full=True)
        about = json.loads((table.schema.metadata or {})[b"outlier-miner"])
        if not table.schema.equals(PAIRS) or not isinstance(about, dict):
            raise ValueError("its columns are not those of an audit")
    except (pa.ArrowException, OSError, ValueError, KeyError, RecursionError) as error:
        raise MinerError(f"{path}: no audit that can be read ({error}); run pipelines.audit again") from None
    return Audit(table.replace_schema_metadata(None), about)
