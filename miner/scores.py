"""What one sweep says of one shard, and its file: kept shard by shard, so that a loss costs a shard and not a sweep."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from miner.errors import MinerError
from miner.files import Place
from miner.weights import read_arrow, write_arrow

_KNOWN = {
    "loss": np.float32,
    "nn_id_row": np.int32,
    "nn_id_cosine": np.float32,
    "nn50_id_cosine": np.float32,
    "stratum": np.int32,
    "boundary": np.float32,
}


def scores_file(shard: int) -> str:
    """Name of a shard's scores in the sweep's folder."""
    return f"scores-{shard:06d}.arrow"


@dataclass
class Scores:
    """Columns ``[n]`` of one shard, those of ``_KNOWN`` that the sweep gives, and the rows that are ``missing``."""

    columns: dict[str, np.ndarray]
    missing: np.ndarray

    @classmethod
    def fresh(cls, eligible: np.ndarray) -> "Scores":
        """Nothing scored yet; ``eligible`` rows are wanted."""
        return cls({"loss": np.full(len(eligible), np.nan, np.float32)}, eligible.copy())

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def take(self, rows: np.ndarray, found: dict[str, np.ndarray]) -> None:
        """Take in what a trainer found of ``rows``; a second time changes nothing."""
        for name, values in found.items():
            if name not in self.columns:
                self.columns[name] = np.zeros(len(self.missing), _KNOWN[name])
            self.columns[name][rows] = values
        self.missing[rows] = False

    def write(self, path: Place, stamp: str) -> None:
        """Keep complete scores, atomically, with what they belong to and a hash of their bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({name: pa.array(self.columns[name]) for name in sorted(self.columns)})
        write_arrow(table.replace_schema_metadata({"stamp": stamp, "hash": self._hash()}), path)

    @classmethod
    def read(cls, path: Place, stamp: str, eligible: np.ndarray) -> "Scores | None":
        """Kept scores of the sweep ``stamp``; None when there are none, or others, or when they are damaged."""
        if not path.exists():
            return None
        try:
            table = read_arrow(path)
            noted = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            columns = {name: np.array(table[name].to_numpy()) for name in table.column_names}
        except (MinerError, ValueError):
            return None
        found = cls(columns, np.zeros(len(eligible), bool))
        fits = "loss" in columns and all(
            _KNOWN.get(name) == column.dtype and len(column) == len(eligible) for name, column in columns.items()
        )
        if noted.get("stamp") != stamp or not fits or noted.get("hash") != found._hash():
            return None
        return found if np.isfinite(columns["loss"][eligible]).all() else None

    def _hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.columns):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.columns[name]).data)
        return digest.hexdigest()
