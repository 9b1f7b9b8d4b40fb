"""One shard's live columns in numpy, their Arrow snapshots, and THE schema of the weights table."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miner import rules
from miner.errors import MinerError
from miner.files import Place, atomic, local_copy, place
from miner.rules import Floats, Sums

FORMAT_VERSION = 1
REASONS = (
    "",
    "exclude-list",
    "duplicate",
    "decode",
    "near-id",
    "id-duplicate",
)  # codes of ``excluded``; "" is eligible

TABLE = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),  # BLAKE2b-128 of the stored bytes, 32 hex characters
        pa.field("key", pa.string(), nullable=False),  # WebDataset key
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # row within the shard
        pa.field("label", pa.int32()),  # the pool's own class index
        pa.field("weight", pa.float32(), nullable=False),  # mean 1 over rows eligible when mined; 0 where excluded
        pa.field("loss", pa.float32()),  # latest uniformity loss (paper Eq. 5), over views and smoothed
        pa.field("loss_mean", pa.float32()),  # over all visits
        pa.field("visits", pa.uint32(), nullable=False),
        pa.field("rank", pa.uint64()),  # a gamma-subset is rank < floor(gamma N); null where excluded
        pa.field("nn_id_row", pa.int32()),  # nearest training image of the ID set under the frozen classifier
        pa.field("nn_id_cosine", pa.float32()),
        pa.field("nn50_id_cosine", pa.float32()),  # 50th nearest: what the leak guard judges by
        pa.field("stratum", pa.int32()),  # feature cluster
        pa.field("excluded_by", pa.dictionary(pa.int8(), pa.string())),  # of REASONS, or of miner.exclude's list
    ]
)

_LIVE = {
    "excluded": np.int8,
    "state": np.float64,  # hedge: log w; reference: v; every other rule: w
    "momentum": np.float64,  # reference only
    "average": np.float64,  # hedge: sum over rounds of the normalised weights
    "loss": np.float32,
    "loss_sum": np.float64,
    "visits": np.uint32,
    "nn_id_row": np.int32,
    "nn_id_cosine": np.float32,
    "nn50_id_cosine": np.float32,
    "stratum": np.int32,
    "boundary": np.float32,  # poem: |w'z| of one posterior draw w; NaN under every other rule
}


@dataclass
class ShardState:
    """The columns of one shard, ``[n]`` each, dtypes in ``_LIVE``, and the rule that moves them."""

    rule: str
    columns: dict[str, np.ndarray]
    swept: int = -1  # last round whose losses were applied: applying a round twice is a no-op
    updated: int = -1  # likewise for the rule, and for the average of its weights
    averaged: int = -1

    @classmethod
    def fresh(cls, rule: str, rows: int) -> "ShardState":
        """Uniform weights, nothing scored yet."""
        columns = {name: np.zeros(rows, dtype) for name, dtype in _LIVE.items()}
        if rule not in ("hedge", "reference"):
            columns["state"] += 1.0
        for name in ("loss", "nn_id_cosine", "nn50_id_cosine", "boundary"):
            columns[name] += np.float32(np.nan)
        columns["nn_id_row"] -= 1
        return cls(rule, columns)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def eligible(self) -> np.ndarray:
        """Rows that take part in the game, bool ``[n]``."""
        return self["excluded"] == 0

    def exclude(self, rows: np.ndarray, reason: str) -> None:
        """Take rows (indices or mask) out of the game; the first reason given stays."""
        chosen = np.zeros(len(self["excluded"]), bool)
        chosen[rows] = True
        self["excluded"][chosen & self.eligible] = REASONS.index(reason)

    def weight(self) -> Floats:
        """Weights the game is played with now, float64 ``[n]``; 0 where excluded."""
        state = self["state"]
        live = np.exp(state) if self.rule == "hedge" else rules.softplus(state) if self.rule == "reference" else state
        return np.where(self.eligible, live, 0.0)

    def outcome(self) -> Floats:
        """Weights to select by: hedge's average over rounds, every other rule's latest; 0 where excluded."""
        return np.where(self.eligible, self["average"], 0.0) if self.rule == "hedge" else self.weight()

    def apply_losses(self, round_: int, loss_N: np.ndarray) -> None:
        """Take in one sweep's losses (float32 ``[n]``), once a round."""
        if self.swept >= round_:
            return
        self["loss"][:] = np.where(np.isnan(loss_N), self["loss"], loss_N)  # not scored in this sweep: keep the last
        self["loss_sum"][:] += np.where(self.eligible, loss_N.astype(np.float64), 0.0)
        self["visits"][:] += self.eligible.astype(np.uint32)
        self.swept = round_

    def loss_mean(self) -> Floats:
        """Mean loss over all visits, float64 ``[n]``; NaN where never visited."""
        visits = self["visits"]
        return np.where(visits > 0, self["loss_sum"] / np.maximum(visits, 1), np.nan)

    def sums(self) -> Sums:
        """This shard's part of the round's global sums."""
        keep = self.eligible
        return rules.shard_sums(self.weight()[keep], self["loss"][keep].astype(np.float64))

    def write(self, path: Place) -> None:
        """Snapshot the live columns as an Arrow IPC file (memory-mappable), atomically."""
        metadata = {"rule": self.rule, "swept": str(self.swept), "averaged": str(self.averaged)}
        table = pa.table({name: pa.array(self.columns[name]) for name in _LIVE}).replace_schema_metadata(metadata)
        write_arrow(table, path)

    @classmethod
    def read(cls, path: Place) -> "ShardState":
        """Restore a snapshot; raises MinerError naming the file when it is damaged."""
        table = read_arrow(path)
        expected = pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in _LIVE.items()])
        try:
            metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
            rule, swept, averaged = metadata["rule"], int(metadata["swept"]), int(metadata["averaged"])
            sound = table.schema.equals(expected) and not any(column.null_count for column in table.columns)
            if sound and len(table):
                low, high = pc.min_max(table["excluded"]).as_py().values()
                sound = 0 <= low <= high < len(REASONS)
        except (KeyError, ValueError):
            sound = False
        if not sound:
            raise MinerError(f"{path}: not a weights snapshot of this version; start the run in a new --out folder")
        columns = {name: table[name].to_numpy().astype(dtype) for name, dtype in _LIVE.items()}
        return cls(rule, columns, swept, averaged, averaged)  # a commit lies between two rounds


def final_table(
    index: pa.Table, state: ShardState, scale: float, rank_N: np.ndarray, metadata: dict[str, str]
) -> pa.Table:
    """One shard of THE weights table: pool index columns beside learned ones, in schema ``TABLE``.

    ``scale`` brings the outcome weights to mean 1 over the whole pool's eligible rows.
    """
    keep, seen = state.eligible, state["nn_id_row"] >= 0
    excluded = pa.array([REASONS[code] or None for code in state["excluded"]], pa.string())
    values: dict[str, Any] = {name: index[name].combine_chunks() for name in ("uid", "key", "shard", "row", "label")}
    values |= {
        "weight": (state.outcome() * scale).astype(np.float32),
        "loss": _nullable(state["loss"], ~np.isnan(state["loss"])),
        "loss_mean": _nullable(state.loss_mean().astype(np.float32), state["visits"] > 0),
        "visits": state["visits"],
        "rank": _nullable(rank_N, keep),
        "nn_id_row": _nullable(state["nn_id_row"], seen),
        "nn_id_cosine": _nullable(state["nn_id_cosine"], seen),
        "nn50_id_cosine": _nullable(state["nn50_id_cosine"], seen),
        "stratum": state["stratum"],
        "excluded_by": excluded.dictionary_encode().cast(TABLE.field("excluded_by").type),
    }
    arrays = [pa.array(values[field.name]).cast(field.type) for field in TABLE]
    return pa.Table.from_arrays(arrays, schema=TABLE.with_metadata(metadata))


def _nullable(values: np.ndarray, valid: np.ndarray) -> pa.Array:
    return pa.array(values, mask=~valid)


def write_arrow(table: pa.Table, path: Place) -> None:
    """Write an Arrow IPC file; a reader sees all of it or none. Raises MinerError when the disk is full."""
    with atomic(path) as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_arrow(path: Place) -> pa.Table:
    """Memory-map an Arrow IPC file (at a URL, a copy of it); raises MinerError when it is missing or damaged."""
    try:
        with local_copy(path) as local, pa.memory_map(local) as source:
            table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)  # else offsets and codes that point anywhere are followed
        return table
    except (OSError, pa.ArrowException, ValueError) as error:
        raise MinerError(f"{path}: cannot be read as Arrow ({error}); restore the file or mine again") from None


def load_weights(run: str | os.PathLike[str] | Place) -> pa.Table:
    """The weights table of a finished run (``TABLE``), a folder or a URL; rows in (shard, row) order.

    Raises MinerError where there is none, or a damaged one.

    >>> table = load_weights("runs/demo")
    >>> heaviest = table.sort_by([("weight", "descending")]).slice(0, 2)
    >>> heaviest["key"].to_pylist()
    ['000000019', '000000018']
    >>> table.filter(table["excluded_by"].is_null()).num_rows
    20
    """
    files: list[Place] = sorted((place(run) / "weights").glob("shard-*.arrow"), key=str)
    if not files:
        raise MinerError(f"{run}: no weights/shard-*.arrow here; finish the run first")
    tables = [_read_table(path) for path in files]
    for path, table in zip(files, tables, strict=True):
        if table.schema.metadata != tables[0].schema.metadata:
            raise MinerError(f"{path}: of another ranking than {files[0]}; run pipelines.resample again, to its end")
    return pa.concat_tables(tables)


def _read_table(path: Place) -> pa.Table:
    table = read_arrow(path)
    if not table.schema.equals(TABLE) or any(table[f.name].null_count for f in TABLE if not f.nullable):
        raise MinerError(f"{path}: not a weights table of this version; mine again")
    return table


def excluded_counts(table: pa.Table) -> dict[str, int]:
    """How many rows of a weights table each reason took out: every reason of REASONS, then those of exclusion lists."""
    counts = pc.value_counts(table["excluded_by"].cast(pa.string())).to_pylist()
    found = {count["values"]: count["counts"] for count in counts}
    listed = sorted(reason for reason in found if reason is not None and reason not in REASONS)
    return {reason: found.get(reason, 0) for reason in [*REASONS[1:], *listed]}
