"""The images of a subset out of a pool, however that is sharded and ordered by now: uids decide, not places."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from miner.pool import Pool

NOT_THERE = "not in the pool"
CHANGED = "its bytes in the pool are no longer those that its uid names"


def raw_uids(uids: pa.ChunkedArray) -> np.ndarray:
    """Uids of 32 hex characters as 16 bytes each, ``S16 [n]``, which sort and compare as the text does."""
    return np.frombuffer(bytes.fromhex("".join(uids.to_pylist())), "S16")


def find(pool: Pool, uids: pa.ChunkedArray, advance: Callable[[int], None] = lambda images: None) -> np.ndarray:
    """Shard and row of each of these uids in ``pool``, int64 ``[n, 2]``; -1 where the pool has none.

    Reads the index's column of uids once, shard by shard. Of an image that the pool holds twice the last place counts.
    """
    wanted = raw_uids(uids)
    order = np.argsort(wanted, kind="stable")
    rising = wanted[order]
    found = np.full((len(wanted), 2), -1, np.int64)
    if not len(wanted):
        return found
    for shard, part in enumerate(pool.index_parts(["uid"])):
        have = raw_uids(part["uid"])
        at = np.minimum(np.searchsorted(rising, have), len(rising) - 1)
        rows = np.flatnonzero(rising[at] == have)
        found[order[at[rows]]] = np.stack([np.full(len(rows), shard), rows], axis=1)
        advance(len(have))
    return found


class PoolImages:
    """Reads a subset's images from a pool by byte ranges; ``places`` is what ``find`` found."""

    def __init__(self, pool: Pool, places: np.ndarray) -> None:
        self.pool, self.places = pool, places

    def missing(self) -> dict[int, str]:
        """Rows that the pool does not have, and why."""
        return dict.fromkeys(np.flatnonzero(self.places[:, 0] < 0).tolist(), NOT_THERE)

    def __call__(self, rows: np.ndarray) -> list[bytes | str]:
        """The bytes of these rows (int64 ``[n]``) of the subset, or why there are none."""
        images: list[bytes | str] = [NOT_THERE] * len(rows)
        for shard in np.unique(self.places[rows, 0][self.places[rows, 0] >= 0]).tolist():
            here = np.flatnonzero(self.places[rows, 0] == shard)
            here = here[np.argsort(self.places[rows[here], 1])]  # forward through the file
            there = self.places[rows[here], 1].tolist()
            for at, data in zip(here.tolist(), self.pool.read_unchanged(shard, there), strict=True):
                images[at] = CHANGED if data is None else data
        return images
