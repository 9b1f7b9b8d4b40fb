"""Take images out of a finished run: its weights table and its subsets, cut again from the stored ranking.

The list of what was taken out, RUN/excluded.parquet, is the source of truth: whatever writes the weights table applies
it, so that further subsets of the run leave these images out too. Nothing is scored again. Images that remain keep
their order and their weights (whose mean is 1 over what was eligible when they were mined); each gamma-subset is again
the first floor(gamma N) of them, N being what it was (paper Eq. 9): all rows but those of the pool's exclusion list.
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from miner import ranking
from miner.errors import MinerError, UsageError
from miner.files import Place, atomic, local_copy, read_json, remove_folder
from miner.pool import Pool
from miner.ranking import NO_RANK, Rows
from miner.run_dir import RunDir, write_file, write_json
from miner.subset import class_histogram, is_written, write_subset
from miner.weights import TABLE, excluded_counts, load_weights, write_arrow

LIST = pa.schema([pa.field("uid", pa.string(), nullable=False), pa.field("excluded_by", pa.string(), nullable=False)])
MOST_REASONS = 100  # the table counts them in int8
_STAGED = "recut"  # folder of what a cut in progress needs


def read_list(run: Place) -> pa.Table:
    """What was taken out of ``run``, in schema LIST, sorted by uid. MinerError when the list is damaged."""
    path = run / "excluded.parquet"
    if not path.exists():
        return LIST.empty_table()
    try:
        with local_copy(path) as local:
            table = pq.ParquetFile(local).read()
        table.validate(full=True)
        if not table.schema.equals(LIST) or any(table[name].null_count for name in LIST.names):
            raise ValueError("other columns")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MinerError(f"{path}: damaged ({error}); restore it, for it says what must not be used") from None
    return table


def exclude(run: Place, reasons: Mapping[str, str], say: Callable[[str], None] = print) -> dict[str, Any]:
    """Add uids (with the reason, ``excluded_by``) to the list of ``run``, and cut table and subsets again.

    Returns the new summary. Stopped at any moment, the same call finishes it; repeated, it changes nothing. Raises
    UsageError for a uid that is not in the run's pool, MinerError when too few images are left for a subset, both
    before anything is written.
    """
    with RunDir(run).locked():
        summary = summary_of(run)
        pool = Pool.open(str(summary["pool_path"]))
        _finish_staged(run)
        table = load_weights(run)
        merged = _merged(run, table, reasons)
        out = _reasons_of(table, merged)
        cuts = _recipes(run, (table.schema.metadata or {}).get(b"draw", b"").decode())
        rows = _rows(table, out)
        for name, recipe in cuts.items():
            _size(rows, recipe, name)
        if len(merged) > len(read_list(run)):
            with atomic(run / "excluded.parquet") as sink:
                pq.write_table(merged, sink)
        write_json(run / _STAGED / "subsets.json", cuts)
        table = apply_list(run)
        for name, recipe in cuts.items():
            figures = _recut(run / name, pool, table, recipe, say)
            if name in summary["subsets"]:  # else of an earlier command's gammas
                summary["subsets"][name] = figures
        summary["excluded"] = excluded_counts(table)
        write_json(run / "summary.json", summary)
        remove_folder(run / _STAGED)
    return summary


def summary_of(run: Place) -> dict[str, Any]:
    """summary.json of a finished run, with "pool_path" and "subsets" in their types. MinerError without a sound one."""
    try:
        summary = read_json(run / "summary.json")
        sound = isinstance(summary["pool_path"], str) and isinstance(summary["subsets"], dict)
    except (FileNotFoundError, NotADirectoryError):
        raise MinerError(f"{run}/summary.json: missing; run pipelines.resample to its end first") from None
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise MinerError(f"{run}/summary.json: damaged; run pipelines.resample again")
    return dict(summary)


# --- the list -----------------------------------------------------------------------------------------------


def _merged(run: Place, table: pa.Table, reasons: Mapping[str, str]) -> pa.Table:
    """The run's list with ``reasons``; the first reason given stays."""
    before = read_list(run)
    uids = pa.array(sorted(reasons), pa.string())
    there = pc.unique(table["uid"].filter(pc.is_in(table["uid"], uids)))
    unknown = uids.filter(pc.invert(pc.is_in(uids, there)))
    if len(unknown):
        raise UsageError(f"{len(unknown):,} uids are not in the run's pool (e.g. {unknown[0]}); nothing was changed")
    fresh = uids.filter(pc.invert(pc.is_in(uids, before["uid"].combine_chunks())))
    added = pa.table({"uid": fresh, "excluded_by": [reasons[uid] for uid in fresh.to_pylist()]}, schema=LIST)
    merged = pa.concat_tables([before, added]).sort_by("uid").combine_chunks()
    if len(pc.unique(merged["excluded_by"])) > MOST_REASONS:
        raise UsageError(f"over {MOST_REASONS} reasons for exclusion in one run; give fewer, broader ones")
    return merged


def _reasons_of(table: pa.Table, listed: pa.Table) -> pa.ChunkedArray:
    """``excluded_by`` of each row of the table when the list is applied, string; what is there already stays."""
    place = pc.index_in(table["uid"], listed["uid"].combine_chunks())
    return pc.coalesce(table["excluded_by"].cast(pa.string()), pc.take(listed["excluded_by"].combine_chunks(), place))


# --- the weights table --------------------------------------------------------------------------------------


def apply_list(run: Place) -> pa.Table:
    """The weights table of ``run`` without what is on its list: written if it was not so yet, and returned.

    All shards are staged before the first one is replaced: a table is never half old, half new for long, and what
    is half-way is finished by the next call.
    """
    _finish_staged(run)
    table, listed = load_weights(run), read_list(run)
    out = _reasons_of(table, listed)
    if out.null_count == table["excluded_by"].null_count:
        return table
    rank = _closed_ranks(run, table, out)
    files: list[Place] = sorted((run / "weights").glob("shard-*.arrow"), key=str)
    edges = np.searchsorted(table["shard"].to_numpy(), np.arange(len(files) + 1)).tolist()
    (run / _STAGED).mkdir(parents=True, exist_ok=True)
    for path, (start, stop) in zip(files, pairwise(edges), strict=True):
        old, why = table.slice(start, stop - start), out.slice(start, stop - start)
        write_arrow(_shard(old, why, rank[start:stop]), run / _STAGED / path.name)
    write_json(run / _STAGED / "COMMITTED", [path.name for path in files])
    _finish_staged(run)
    return load_weights(run)


def forget_staged(run: Place) -> None:
    """Drop what a stopped cut had staged: the table is about to be written anew from the run's own weights."""
    (run / _STAGED / "COMMITTED").unlink(missing_ok=True)


def _closed_ranks(run: Place, table: pa.Table, out: pa.ChunkedArray) -> np.ndarray:
    """Ranks without gaps, uint64 ``[N]``, in the order of the stored ones; NO_RANK where excluded."""
    stored = pc.fill_null(table["rank"], NO_RANK).to_numpy()
    order = np.argsort(stored, kind="stable")[: len(table) - table["rank"].null_count]
    if not np.array_equal(stored[order], np.arange(len(order), dtype=np.uint64)):
        raise MinerError(f"{run}/weights: its ranks have gaps; run pipelines.resample again, to its end")
    order = order[pc.is_null(out).to_numpy()[order]]
    rank = np.full(len(table), NO_RANK, np.uint64)
    rank[order] = np.arange(len(order), dtype=np.uint64)
    return rank


def _shard(old: pa.Table, out: pa.ChunkedArray, rank: np.ndarray) -> pa.Table:
    """One shard of the table after exclusions."""
    keep = pc.is_null(out).to_numpy()
    new = {
        "weight": pa.array(np.where(keep, old["weight"].to_numpy(), np.float32(0))),
        "rank": pa.array(rank, mask=~keep),
        "excluded_by": out.combine_chunks().dictionary_encode().cast(TABLE.field("excluded_by").type),
    }
    columns = [new.get(field.name, old[field.name].combine_chunks()) for field in TABLE]
    return pa.Table.from_arrays(columns, schema=TABLE.with_metadata(old.schema.metadata))


def _finish_staged(run: Place) -> None:
    """Put staged shards in place, if all of them were staged."""
    note = run / _STAGED / "COMMITTED"
    if not note.exists():
        return
    names = read_json(note)
    if not isinstance(names, list) or not all(re.fullmatch(r"shard-[0-9]{6,9}\.arrow", str(name)) for name in names):
        raise MinerError(f"{note}: damaged; run pipelines.resample again")
    for name in names:
        write_file(run / "weights" / name, (run / _STAGED / name).read_bytes())
    note.unlink()


# --- the subsets --------------------------------------------------------------------------------------------


def still_held(run: Place) -> dict[str, int]:
    """Folders in ``run`` whose manifest names images of its list, and how many: exports are not cut again."""
    listed, found = read_list(run)["uid"].combine_chunks(), {}
    manifests: list[Place] = sorted(run.glob("*/manifest.parquet"), key=str)
    for path in manifests:
        with local_copy(path) as local:
            uids = pq.ParquetFile(local).read(["uid"])["uid"]
        if count := pc.sum(pc.is_in(uids, listed)).as_py():
            found[path.parent.name] = count
    return found


def _recipes(run: Place, draw: str) -> dict[str, dict[str, Any]]:
    """subset.json of every subset of the run, also of those that a stopped cut had begun to replace.

    Exports that lie in the run are no subsets of it: they are left to ``still_held``. MinerError for a subset that
    the table's ranking, of ``draw``, did not give.
    """
    kept = run / _STAGED / "subsets.json"
    found: dict[str, dict[str, Any]] = read_json(kept) if kept.exists() else {}
    places: list[Place] = sorted(run.glob("subset-*/subset.json"), key=str)
    found |= {path.parent.name: read_json(path) for path in places if not (path.parent / "croissant.json").exists()}
    for name, recipe in found.items():
        named = re.fullmatch(r"subset-[0-9.e-]{1,20}", name)
        if not named or not isinstance(recipe, dict) or not {"gamma", "n", "draw"} <= recipe.keys():
            raise MinerError(f"{run / name}: no subset that this version cuts again; remove or export it again")
        if draw and recipe["draw"] != draw:
            raise MinerError(
                f"{run / name}: cut by --draw {recipe['draw']}, before the run was ranked by {draw}; remove it"
            )
    return found


def rows_of(table: pa.Table) -> Rows:
    """What sizes and figures of a subset are computed from, of a weights table after exclusions."""
    return _rows(table, table["excluded_by"])


def _rows(table: pa.Table, out: pa.ChunkedArray) -> Rows:
    eligible = pc.is_null(out).to_numpy()
    weight = np.where(eligible, table["weight"].to_numpy(), 0).astype(np.float64)
    return Rows(weight, ranking.uid_words(table["uid"]), eligible, None)


def _size(rows: Rows, recipe: dict[str, Any], name: str) -> int:
    seed = recipe.get("settings", {}).get("data", {}).get("seed", 0)
    try:
        return ranking.subset_size(rows, float(recipe["gamma"]), int(recipe["n"]), str(recipe["draw"]), int(seed))
    except MinerError as error:
        raise MinerError(f"{name}: {error}; or remove this subset") from None


def _recut(
    folder: Place, pool: Pool, table: pa.Table, recipe: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the subset anew unless it is there already; its figures for the summary."""
    rows = rows_of(table)
    size = _size(rows, recipe, folder.name)
    chosen = table.filter(pc.less(table["rank"], pa.scalar(size, pa.uint64()))).sort_by("rank")
    made = ("format", "version", "count", "fingerprint", "tars", "manifest_sha256")
    told = {name: value for name, value in recipe.items() if name not in made}
    told["clipped_share"] = ranking.clipped_share(rows, float(recipe["gamma"]), int(recipe["n"]))
    told["effective_sample_size"] = ranking.effective_sample_size(rows)
    told["classes"] = class_histogram(chosen, pool.classes)
    done = is_written(folder, chosen, told)
    if done is None:
        done = write_subset(pool, chosen, folder, told, lambda count: None)
        say(f"{folder}: cut again, {done['count']:,} images")
    return {name: done[name] for name in ("gamma", "count", "clipped_share", "effective_sample_size")}
