"""Mine background images that teach a classifier what it does not know.

>>> from miner import Pool, load_subset, load_weights
>>> subset = load_subset("runs/demo/subset-0.1")  # map-style: a folder, or a URL
>>> image, label = subset[0]
>>> tuple(image.shape), label
((3, 8, 8), -1)
>>> stream = subset.stream(seed=0)  # iterable, with state_dict and load_state_dict
>>> load_weights("runs/demo").column_names[:4]
['uid', 'key', 'shard', 'row']
>>> Pool.open("pools/letters").count
20

``mine(Config())`` runs the main job; the parts of a ``Config`` are in ``miner.config``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miner.config import Config
    from miner.errors import MinerError
    from miner.mining import Mined, mine
    from miner.pool import Pool
    from miner.stream import SubsetStream
    from miner.subset import Subset, load_subset
    from miner.weights import load_weights

__all__ = ["Config", "Mined", "MinerError", "Pool", "Subset", "SubsetStream", "load_subset", "load_weights", "mine"]
_HOME = {
    "Config": "config",
    "Mined": "mining",
    "MinerError": "errors",
    "Pool": "pool",
    "Subset": "subset",
    "SubsetStream": "stream",
    "load_subset": "subset",
    "load_weights": "weights",
    "mine": "mining",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import on first use: `import miner` stays cheap, and reading needs neither Ray nor torch."""
        if name not in _HOME:
            raise AttributeError(f"module 'miner' has no attribute {name!r}")
        return getattr(import_module(f"miner.{_HOME[name]}"), name)
