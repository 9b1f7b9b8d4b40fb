"""One ranking for several classifiers or ID sets: the rankings of finished runs over one pool, pooled."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miner import baselines, ranking
from miner.errors import MinerError, UsageError
from miner.files import Place, place
from miner.pool import Pool
from miner.progress import Display
from miner.run_dir import RunDir, write_json
from miner.subset import class_histogram, write_subset
from miner.weights import FORMAT_VERSION, TABLE, excluded_counts, load_weights, write_arrow

How = Literal["mean-rank", "max-weight"]
_SOURCE = ("run_id", "id", "id_fingerprint", "model", "rule", "draw", "seed", "rounds")


@dataclass
class Source:
    """One run that is pooled."""

    path: Place
    summary: dict[str, Any]
    table: pa.Table  # ``miner.weights.TABLE``
    facts: dict[str, str]  # the table's metadata

    @classmethod
    def open(cls, path: Place) -> "Source":
        """Read a finished run. Raises MinerError naming what is missing or damaged."""
        where = path / "summary.json"
        try:
            summary = dict(json.loads(where.read_text(encoding="utf-8")))
            if not isinstance(summary["n"], int):
                raise ValueError("n is no number")
            if not all(isinstance(summary[name], str) for name in ("pool_path", "id", "model")):
                raise ValueError("pool_path, id or model is no text")
        except (FileNotFoundError, NotADirectoryError):
            raise MinerError(f"{where}: missing; finish the run with pipelines.resample first") from None
        except (KeyError, TypeError, ValueError) as error:
            raise MinerError(f"{where}: damaged ({error}); mine again") from None
        table = load_weights(path)
        facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        return cls(path, summary, table, facts)


def pool_runs(
    runs: Sequence[str | os.PathLike[str]],
    how: How,
    gammas: Sequence[float],
    out: Place,
    display: Display | None = None,
) -> dict[str, Any]:
    """Pool the rankings of finished ``runs`` over one pool into OUT/weights and OUT/subset-<gamma>; OUT/summary.json.

    ``mean-rank``: images by rising mean of the runs' ranks. ``max-weight``: by falling maximum of the runs' weights,
    each of mean 1 over its own eligible images. An image that any run excludes is excluded, for the reason that the
    first such run gives; ties are settled by uid. Subsets of several gammas are nested. What belongs to one run
    is empty in the table: losses, visits, ID neighbours, strata.

    Raises UsageError for fewer than two runs, for runs of different pools and for a gamma that cannot be had,
    MinerError for a run that is not finished and for an ``out`` that holds something else.
    """
    pooling = Pooling(runs, how, gammas)
    folder = RunDir(out, unit="pooling")
    folder.begin({"pool": pooling.pool.fingerprint, **pooling.facts}, resume=False)
    (out / "summary.json").unlink(missing_ok=True)  # written last: what it names is complete
    table = pooling.write_table(out / "weights")
    display = display or Display()
    subsets = {f"subset-{gamma:g}": pooling.write_subset(table, gamma, out, display) for gamma in gammas}
    folder.round(0).mkdir(parents=True, exist_ok=True)
    folder.commit(0)  # from here on OUT is kept for these runs; other gammas may still be added
    summary = pooling.summary(table, subsets)
    write_json(out / "summary.json", summary)
    return summary


class Pooling:
    """The runs, read and ranked; writes what ``pool_runs`` leaves."""

    def __init__(self, runs: Sequence[str | os.PathLike[str]], how: How, gammas: Sequence[float]) -> None:
        _check(runs, how, gammas)
        self.sources = [Source.open(place(run)) for run in runs]
        _check_one_pool(self.sources)
        first = self.sources[0]
        self.how, self.n = how, int(first.summary["n"])
        self.pool = Pool.open(first.summary["pool_path"])
        if self.pool.fingerprint != first.facts.get("pool_fingerprint"):
            raise MinerError(f"{first.path}: the pool {self.pool.path} changed since it was mined; restore it")
        self.facts = {
            "how": how,
            "runs": [{name: source.facts.get(name) for name in _SOURCE} for source in self.sources],
        }
        self.run_id = hashlib.blake2b(json.dumps(self.facts, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.excluded = pc.coalesce(*(source.table["excluded_by"].cast(pa.string()) for source in self.sources))
        uid_N2 = ranking.uid_words(first.table["uid"])
        rows = ranking.Rows(_score(self.sources, how), uid_N2, pc.is_null(self.excluded).to_numpy(), None)
        self.rank_N = ranking.rank_rows(rows, "topk", 0)
        self.rows = rows._replace(weight=_weights(rows, self.rank_N, how))
        self.sizes = {gamma: _size(self.rows, gamma, self.n) for gamma in gammas}

    def write_table(self, folder: Place) -> pa.Table:
        """Write the weights table, sharded as the pool is, and return it."""
        first, count = self.sources[0].table, len(self.rank_N)
        facts = {
            "format_version": FORMAT_VERSION,
            "pool_fingerprint": self.pool.fingerprint,
            "run_id": self.run_id,
            "rule": self.how,
            "draw": "topk",
            "runs": json.dumps(self.facts["runs"]),
        }
        values: dict[str, Any] = {name: first[name] for name in ("uid", "key", "shard", "row", "label")}
        values |= {
            "weight": pa.array(self.rows.weight.astype(np.float32)),
            "visits": pa.array(np.zeros(count, np.uint32)),
            "rank": pa.array(self.rank_N, mask=~self.rows.eligible),
            "excluded_by": self.excluded.combine_chunks().dictionary_encode(),
        }
        columns = [values.get(field.name, pa.nulls(count)) for field in TABLE]
        arrays = [column.cast(field.type) for column, field in zip(columns, TABLE, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=TABLE.with_metadata({k: str(v) for k, v in facts.items()}))
        folder.mkdir(exist_ok=True)
        for shard, (start, stop) in enumerate(pairwise(self.pool.edges.tolist())):
            write_arrow(table.slice(start, stop - start), folder / f"shard-{shard:06d}.arrow")
        return table

    def write_subset(self, table: pa.Table, gamma: float, out: Place, display: Display) -> dict[str, Any]:
        """Cut and write OUT/subset-<gamma>; returns subset.json's content."""
        chosen = table.filter(pc.less(table["rank"], pa.scalar(self.sizes[gamma], pa.uint64()))).sort_by("rank")
        recipe = {
            "gamma": gamma,
            "n": self.n,
            "draw": "topk",
            "pool": {"name": self.pool.name, "fingerprint": self.pool.fingerprint, "licence": self.pool.licence},
            "run_id": self.run_id,
            **self.facts,
            "clipped_share": ranking.clipped_share(self.rows, gamma, self.n),
            "effective_sample_size": ranking.effective_sample_size(self.rows),
            "classes": class_histogram(chosen, self.pool.classes),
        }
        display.phase(f"subset-{gamma:g}", self.sizes[gamma])
        return write_subset(self.pool, chosen, out / f"subset-{gamma:g}", recipe, display.advance)

    def summary(self, table: pa.Table, subsets: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What was pooled and what came of it, for people and scripts; keys as in the summary of a run."""
        figures = ("gamma", "count", "clipped_share", "effective_sample_size")
        return {
            "pool": self.pool.name,
            "pool_path": self.pool.path,
            "images": self.pool.count,
            "n": self.n,
            "id": _joined(source.summary["id"] for source in self.sources),
            "model": _joined(source.summary["model"] for source in self.sources),
            "rule": self.how,
            "run_id": self.run_id,
            **self.facts,
            "paths": [str(source.path) for source in self.sources],
            "excluded": excluded_counts(table),
            "subsets": {name: {k: subset[k] for k in figures} for name, subset in subsets.items()},
        }


def _check(runs: Sequence[str | os.PathLike[str]], how: str, gammas: Sequence[float]) -> None:
    if how not in get_args(How):
        raise UsageError(f"--how {how}: choose one of {', '.join(get_args(How))}")
    if len(runs) < 2:
        raise UsageError("nothing to pool: give two or more run directories")
    ranking.check_gammas(gammas)


def _check_one_pool(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        same = first.facts.get("pool_fingerprint") == other.facts.get("pool_fingerprint")
        # One pool cut into other shards has the same fingerprint, but its rows stand in another order.
        if not same or first.table["uid"] != other.table["uid"]:
            raise UsageError(f"{first.path} and {other.path}: mined from different pools; pool runs of one")


def _score(sources: Sequence[Source], how: str) -> ranking.Floats:
    """What images are ordered by, largest first, float64 ``[N]``. Ranks are added, not averaged: sums are exact."""
    if how == "mean-rank":
        ranks = [pc.fill_null(source.table["rank"], 0).to_numpy() for source in sources]
        return -np.stack(ranks).astype(np.float64).sum(axis=0)
    return np.stack([source.table["weight"].to_numpy() for source in sources]).astype(np.float64).max(axis=0)


def _weights(rows: ranking.Rows, rank_N: ranking.Words, how: str) -> ranking.Floats:
    """Weights of mean 1, 0 where excluded, float64 ``[N]``: the maximum itself, scaled, or by place in the order."""
    members = np.flatnonzero(rows.eligible)
    if not len(members):
        raise UsageError("nothing to pool: every image is excluded by one of the runs")
    weight_N = np.zeros(len(rank_N))
    if how == "mean-rank":
        weight_N[members] = baselines.place_weights(np.argsort(rank_N[members]))
    else:
        weight_N[members] = rows.weight[members] / rows.weight[members].mean()
    return weight_N


def _size(rows: ranking.Rows, gamma: float, n: int) -> int:
    ranking.check_size(gamma, n)
    try:
        return ranking.subset_size(rows, gamma, n, "topk", 0)
    except MinerError:
        left = int(rows.eligible.sum())
        raise UsageError(
            f"--gamma {gamma:g} of {n:,} images cannot be had: only {left:,} are excluded by none of the runs; lower it"
        ) from None


def _joined(names: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(names))
