"""A finished run opened for reading: summary, weights table, and the pool and ID set it was made from."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miner.errors import MinerError
from miner.files import Place
from miner.pool import Pool
from miner.run_dir import RunDir
from miner.weights import load_weights
from trainers.data import IdSet, load_id

NO_CLASS = "unlabelled"


@dataclass
class Run:
    """A finished run and what it refers to. Arrays ``[N]`` in the order of ``table``; label -1 is none."""

    path: Place
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    table: pa.Table
    pool: Pool
    id_set: IdSet
    weight: np.ndarray
    loss: np.ndarray
    label: np.ndarray
    eligible: np.ndarray
    near_id: np.ndarray

    @classmethod
    def open(cls, path: Place) -> "Run":
        """Raises MinerError when the run is not finished, or pool or ID set are no longer what it mined."""
        summary = _json(path / "summary.json")
        config = _json(path / "config.json")
        pool = Pool.open(summary["pool_path"])
        id_set = load_id(config["data"]["id"], config["data"]["size"])
        for name, what, now in (("pool", "pool", pool), ("id", "ID set", id_set)):
            if now.fingerprint != config[name]:
                raise MinerError(f"{path}: the {what} {now.name} changed since it was mined; restore it or mine again")
        table = load_weights(path)
        if len(table) != pool.count:
            raise MinerError(f"{path}/weights: {len(table)} rows, the pool has {pool.count}; mine again")
        excluded_by = table["excluded_by"].cast(pa.string())
        # The loss of an excluded row is not kept up to date; its mean over visits is what there is.
        loss = pc.coalesce(table["loss"], table["loss_mean"], pa.scalar(np.nan, pa.float32()))
        return cls(
            path,
            summary,
            RunDir(path).metrics(),
            table,
            pool,
            id_set,
            weight=table["weight"].to_numpy().astype(np.float64),
            loss=loss.to_numpy(),
            label=pc.fill_null(table["label"], -1).to_numpy(),
            eligible=pc.is_null(excluded_by).to_numpy(),
            near_id=pc.fill_null(pc.equal(excluded_by, "near-id"), False).to_numpy(),
        )

    def class_name(self, label: int) -> str:
        """The pool's name of a class; its number where it has none."""
        if label < 0:
            return NO_CLASS
        return self.pool.classes[label] if label < len(self.pool.classes) else str(label)

    def largest(self) -> tuple[str, np.ndarray]:
        """Name of the largest subset and who is in it, bool ``[N]``."""
        name, subset = max(self.summary["subsets"].items(), key=lambda item: item[1]["count"])
        chosen = pc.less(self.table["rank"], pa.scalar(subset["count"], pa.uint64()))
        return name, pc.fill_null(chosen, False).to_numpy()


def _json(path: Place) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise MinerError(f"{path}: missing; a report needs a finished run: run pipelines.resample to its end") from None
    except ValueError as error:
        raise MinerError(f"{path}: damaged ({error}); run pipelines.resample again") from None
