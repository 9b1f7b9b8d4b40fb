"""A subset in another form, or without some of its images: data first, subset.json last, from its one manifest.

Every export also holds the manifest, a dataset card (README.md) and croissant.json. Where the images are those of the
subset itself, manifest.parquet and subset.json are its own, byte for byte, so that every export can be rehydrated.
"""

import contextlib
import csv
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from miner.blocks import Stream, TarImages, checked_rows, layout, spans, without
from miner.buckets import BucketPath, check_writable
from miner.card import card
from miner.croissant import count, croissant
from miner.errors import MinerError, UsageError
from miner.files import CHUNK, Place, atomic, open_binary
from miner.formats import File, recorded, write_datacomp, write_imglist, write_npy, write_parquet, write_tars
from miner.pool import Pool
from miner.progress import Display
from miner.rehydrate import PoolImages, find
from miner.run_dir import write_file, write_json
from miner.source_uids import named_by_source
from miner.subset import Subset, fingerprint

Format = Literal["webdataset", "manifest", "imglist", "npy", "datacomp", "parquet"]
PIXELS = ("webdataset", "imglist", "npy", "parquet")  # formats that hold images
MARK = "export.unfinished"
OURS = (
    *("subset.json", "outliers-*.tar", "outliers.npy", "uids.npy", "imglist.txt", "images/*/*", "data/*"),
    *("missing.csv", "sizes.json", "manifest.parquet", "croissant.json", "README.md", ".*.tmp"),
)


@dataclass(frozen=True)
class Export:
    """What came of an export: subset.json's content, its rows, its data files; images taken out, and not to be had."""

    folder: Place
    recipe: dict[str, Any]
    rows: pa.Table
    files: list[File]
    removed: int
    lost: int


def export(
    subset: Subset,
    style: Format,
    out: Place,
    *,
    size: int = 32,
    pool: Pool | None = None,
    removed: frozenset[str] = frozenset(),
    allow_missing: bool = False,
    display: Display | None = None,
) -> Export:
    """Write ``subset`` to the folder or URL ``out`` in format ``style``; an earlier export there is replaced.

    Images come from the subset's tars, or by uid from ``pool``; ``datacomp`` takes from it what its source calls them.
    ``removed``: uids to leave out. ``size``: pixels a side in ``npy``. What the pool does not have, or has with other
    bytes, goes to ``out``/missing.csv and ends the export with a MinerError, unless ``allow_missing`` makes it the
    subset of the rest. MinerError too for a damaged subset, a full disk, and an ``out`` that holds something else;
    UsageError for ``out`` being the subset itself.
    """
    rows = checked_rows(subset)
    gone = pc.is_in(rows["uid"], pa.array(sorted(removed), pa.string())).to_numpy().copy()
    asked = rows.filter(pa.array(~gone))
    if not len(asked):
        raise MinerError(f"{subset.path}: nothing is left of its {len(rows)} images; there is nothing to export")
    display = display or Display()
    read: PoolImages | TarImages | None = None
    if pool is not None and style != "datacomp":
        display.phase("look up", pool.count)
        read = PoolImages(pool, find(pool, asked["uid"], display.advance))
    elif style in PIXELS:
        read = TarImages(subset, asked)
    check_out(out, subset.path)
    lost = read.missing() if isinstance(read, PoolImages) else {}
    most = len(asked) - 1 if allow_missing else 0  # images that may be lost
    if len(lost) > most:
        if not (out / "subset.json").exists():
            mark(out)
        _refuse(asked, lost, out)  # an export that lies there stays
    mark(out)
    clear(out)
    files: list[File] = []
    if read is not None and style in PIXELS:
        display.phase(style, len(asked))
        stream = Stream(asked, read, display.advance)
        files = _pixels(stream, style, out, size)
        lost = stream.lost
    if len(lost) > most:
        clear(out)
        _refuse(asked, lost, out)
    if lost:
        _list_missing(asked, lost, out)
        gone[np.flatnonzero(~gone)[list(lost)]] = True
    if style == "datacomp":
        uids = rows.filter(pa.array(~gone))["uid"]
        files = write_datacomp(out, uids if pool is None else named_by_source(pool, uids))
    return _finish(subset, style, out, rows, gone, files, len(lost))


def check_out(out: Place, source: Place) -> None:
    """Errors as ``export`` has them for an ``out`` that cannot be used; nothing in it is changed."""
    if isinstance(out, BucketPath):
        check_writable(out.url)
    if str(out.resolve()) == str(source.resolve()):
        raise UsageError(f"{out}: is the subset itself; give another --out, and remove the old one when you have it")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names and MARK not in names and not {"subset.json", "croissant.json"} <= names:
        raise MinerError(f"{out}: not empty and no export; give another --out")


def mark(out: Place) -> None:
    """Say that what lies in ``out`` is no whole export, and may be replaced."""
    write_file(out / MARK, b"python -m pipelines.export did not come to its end here; run the same command again\n")


def clear(out: Place) -> None:
    """Remove what an export writes; subset.json goes first."""
    for pattern in OURS:
        stale: list[Place] = list(out.glob(pattern))
        for path in stale:
            path.unlink(missing_ok=True)
    if isinstance(out, Path):
        for folder in (*out.glob("images/*"), out / "images", out / "data"):
            with contextlib.suppress(OSError):  # not there, or something else in it
                folder.rmdir()


def _pixels(stream: Stream, style: Format, out: Place, size: int) -> list[File]:
    if style == "webdataset":
        return write_tars(out, stream.blocks())
    if style == "imglist":
        return write_imglist(out, stream.blocks())
    if style == "npy":
        return write_npy(out, stream.blocks(), size, len(stream.rows))
    return write_parquet(out, stream.blocks(), sum(1 for _ in spans(stream.rows)))


def _list_missing(rows: pa.Table, lost: dict[int, str], out: Place) -> None:
    """Write missing.csv (uid, key, why)."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("uid", "key", "why"))
    for row, why in sorted(lost.items()):
        table.writerow((rows["uid"][row].as_py(), rows["key"][row].as_py(), why))
    write_file(out / "missing.csv", text.getvalue().encode())


def _refuse(rows: pa.Table, lost: dict[int, str], out: Place) -> NoReturn:
    """List what is missing, and end with a MinerError."""
    _list_missing(rows, lost, out)
    first = min(lost)
    told = f"{len(lost):,} of {len(rows):,} images, the first {rows['uid'][first].as_py()}: {lost[first]}"
    if len(lost) == len(rows):
        raise MinerError(f"{out}/missing.csv: {told}; nothing is left to export")
    raise MinerError(f"{out}/missing.csv: {told}; nothing was exported; --allow-missing exports the rest")


def _finish(
    subset: Subset, style: Format, out: Place, rows: pa.Table, gone: np.ndarray, files: list[File], lost: int
) -> Export:
    """Manifest, card and the rest of the descriptions; subset.json last."""
    old, changed = subset.recipe, bool(gone.any())
    with atomic(out / "manifest.parquet") as sink:
        if changed:
            rows = without(rows, gone)
            pq.write_table(rows, sink, compression="zstd")
        else:
            with open_binary(subset.path / "manifest.parquet") as source:
                shutil.copyfileobj(source, sink, CHUNK)
    manifest = recorded(out, "manifest.parquet")
    if not changed and manifest.sha256 != old["manifest_sha256"]:
        raise MinerError(
            f"{subset.path}/manifest.parquet: its bytes changed since it was written; get the subset again"
        )
    hashes = {file.name: file.sha256 for file in files}
    recipe = old | {"tars": _tars(old, rows, hashes, subset.path), "manifest_sha256": manifest.sha256}
    if changed:
        recipe |= {"count": len(rows), "fingerprint": fingerprint(rows["uid"])}
        recipe["removed"] = count(old.get("removed")) + int(gone.sum())
        recipe.pop("classes", None)  # counted images that are no longer there
    if style in ("webdataset", "manifest"):
        write_json(out / "sizes.json", {tar["name"]: tar["count"] for tar in recipe["tars"]})
    pool, ident = (value if isinstance(value, dict) else {} for value in (recipe.get("pool"), recipe.get("id")))
    title = f"Outliers from {pool.get('name')} for {ident.get('name')}, gamma {recipe.get('gamma')}"
    write_json(out / "croissant.json", croissant(recipe, rows, style, [*files, manifest], title))
    write_file(out / "README.md", card(recipe, rows, style, title).encode())
    write_json(out / "subset.json", recipe)
    (out / MARK).unlink(missing_ok=True)
    return Export(out, recipe, rows, [*files, manifest], int(gone.sum()) - lost, lost)


def _tars(old: dict[str, Any], rows: pa.Table, hashes: dict[str, str], where: Place) -> list[dict[str, Any]]:
    """subset.json's list of tars. One whose images changed and that was not written now has no hash (null).

    Raises MinerError for a tar that was written of the same images and is not the one recorded.
    """
    before, sizes = {tar["name"]: tar for tar in old["tars"]}, layout(rows)[1]
    tars = []
    for name, start, stop in spans(rows):
        known = before[name]["sha256"] if before[name]["count"] == stop - start else None
        if known and hashes.get(name, known) != known:
            raise MinerError(f"{where}/subset.json: {name} of these images is another tar; get the subset again")
        sha = hashes.get(name, known)
        tars.append({"name": name, "count": stop - start, "bytes": sizes[name], "sha256": sha})
    return tars
