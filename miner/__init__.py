"""Mine background images that teach a classifier what it does not know.

>>> from miner import load_subset                          # doctest: +SKIP
>>> subset = load_subset("runs/demo/subset-0.01")          # doctest: +SKIP
>>> image, label = subset[0]                               # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miner.pool import Pool
    from miner.subset import Subset, load_subset
    from miner.weights import load_weights

__all__ = ["Pool", "Subset", "load_subset", "load_weights"]
_HOME = {"Pool": "pool", "Subset": "subset", "load_subset": "subset", "load_weights": "weights"}


def __getattr__(name: str) -> Any:
    """Import on first use: `import miner` stays cheap, and reading a subset needs no Ray."""
    if name not in _HOME:
        raise AttributeError(f"module 'miner' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"miner.{_HOME[name]}"), name)
