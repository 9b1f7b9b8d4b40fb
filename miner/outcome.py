"""From the last weights to what users get: ranking, weights table, gamma-subsets, and the summary of a run."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miner import ranking
from miner.cluster import Crew
from miner.config import Config
from miner.exclude import apply_list, forget_staged, read_list, rows_of
from miner.pool import Pool
from miner.progress import Display
from miner.ranking import Rows, Words
from miner.run_dir import RunDir
from miner.subset import class_histogram, is_written, write_subset
from miner.weights import FORMAT_VERSION, excluded_counts
from trainers.data import IdSet


@dataclass
class Outcome:
    """Writes the results of one run into its directory."""

    config: Config
    dir: RunDir
    pool: Pool
    id_set: IdSet
    run_id: str
    n: int  # N of gamma N
    uid_N2: Words
    display: Display

    def rank(self, crew: Crew) -> pa.Table:
        """Rank the pool, write the weights table, and return it."""
        self.display.phase("rank", 1)
        columns = crew.each("ranking_columns")
        joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        total = sum(float(c["weight"].sum()) for c in columns)
        del columns  # they lie in Ray's object store as long as anybody looks at them
        strata = joined["stratum"] if self.config.strata_for(self.pool.count) > 1 else None
        self.rows = Rows(joined["weight"], self.uid_N2, joined["eligible"], strata)
        rank = ranking.rank_rows(self.rows, self.config.draw, self.config.data.seed)
        scale = float(joined["eligible"].sum()) / total
        folder = self.dir.path / "weights"
        folder.mkdir(exist_ok=True)
        ranks = [(str(folder.resolve()), scale, rank[a:b]) for a, b in pairwise(self.pool.edges)]
        forget_staged(self.dir.path)
        crew.each("write_table", self.metadata(total), per_shard=ranks)
        table = apply_list(self.dir.path)
        if len(read_list(self.dir.path)):
            self.rows = rows_of(table)
        return table

    @property
    def rounds(self) -> int:
        """Rounds that were played."""
        return self.dir.committed()[-1] + 1

    def metadata(self, total: float) -> dict[str, str]:
        """Schema metadata of the weights table."""
        data, game = self.config.data, self.config.game
        facts = {
            "format_version": FORMAT_VERSION,
            "pool_fingerprint": self.pool.fingerprint,
            "run_id": self.run_id,
            "rounds": self.rounds,
            "seed": data.seed,
            "rule": game.rule,
            "draw": self.config.draw,
            "id": self.id_set.name,
            "id_fingerprint": self.id_set.fingerprint,
            "model": data.model,
            "weight_sum": repr(total),
        }
        return {name: str(value) for name, value in facts.items()}

    def export(self, table: pa.Table) -> dict[str, dict[str, Any]]:
        """Cut and write a subset for every gamma, unless it lies there already; {folder name: subset.json}."""
        written: dict[str, dict[str, Any]] = {}
        for gamma in self.config.selection.gamma:
            size = ranking.subset_size(self.rows, gamma, self.n, self.config.draw, self.config.data.seed)
            keep = pc.less(table["rank"], pa.scalar(size, pa.uint64()))
            chosen = table.filter(keep).sort_by("rank")
            name = f"subset-{gamma:g}"
            self.display.phase(name, size)
            folder, recipe = self.dir.path / name, self.recipe(gamma, chosen)
            written[name] = is_written(folder, chosen, recipe) or write_subset(
                self.pool, chosen, folder, recipe, self.display.advance
            )
        return written

    def recipe(self, gamma: float, chosen: pa.Table) -> dict[str, Any]:
        """All that is needed to draw the subset again, and the figures to judge it by."""
        return {
            "gamma": gamma,
            "n": self.n,
            "draw": self.config.draw,
            "pool": {
                "name": self.pool.name,
                "fingerprint": self.pool.fingerprint,
                "licence": self.pool.licence,
            },
            "id": {"name": self.id_set.name, "fingerprint": self.id_set.fingerprint},
            "run_id": self.run_id,
            "settings": portable(self.config.mining()),
            "clipped_share": ranking.clipped_share(self.rows, gamma, self.n),
            "effective_sample_size": ranking.effective_sample_size(self.rows),
            "classes": class_histogram(chosen, self.pool.classes),
        }

    def summary(self, table: pa.Table, subsets: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What was found, for people and scripts."""
        return {
            "pool": self.pool.name,
            "pool_path": self.pool.path,
            "images": self.pool.count,
            "n": self.n,
            "id": self.id_set.name,
            "model": self.config.data.model,
            "rule": self.config.game.rule,
            "rounds": self.rounds,
            "excluded": excluded_counts(table),
            "subsets": {
                name: {k: s[k] for k in ("gamma", "count", "clipped_share", "effective_sample_size")}
                for name, s in subsets.items()
            },
        }


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without where this machine keeps its files: the same run elsewhere gives the same bytes."""
    data = settings["data"] | {name: Path(str(settings["data"][name])).name for name in ("pool", "id")}
    if data["checkpoint"]:
        data["checkpoint"] = Path(data["checkpoint"]).name
    return settings | {"data": data}
