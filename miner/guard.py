"""The leak guard: which images of the pool are too near the ID set to call them background. numpy only.

Hardness finds images of the ID classes first. One image's distance to the ID set says little about what it shows;
that of its whole class in the pool says much: on CIFAR-10 against 120 Tiny-ImageNet classes the guard's cosine tells
images of ID classes from others with AUROC 0.68 one by one, and whole classes with 0.90. What is near is measured on
the ID images themselves: a pool without any ID class loses nothing.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from miner.rules import Floats

NO_CLASS = -1


class ClassSums(NamedTuple):
    """What one shard contributes to the means over classes; ``[C]`` each, C its largest class index + 1."""

    total: Floats
    images: Floats


def near_id(cosine_M: NDArray[np.float32], label_M: NDArray[np.int32], threshold: float) -> NDArray[np.bool_]:
    """The images too near the ID set: mask bool ``[M]``.

    ``cosine_M`` is the cosine to the 50th nearest ID image, ``label_M`` the pool's own class (NO_CLASS: none). A class
    is left out as a whole when its mean cosine lies above ``threshold``; an image without a class when its own does.
    """
    nearness_M = cosine_M.astype(np.float64)
    known = label_M != NO_CLASS
    nearness_M[known] = class_means([class_sums(cosine_M, label_M)])[label_M[known]]
    return np.asarray(nearness_M > threshold)


def class_sums(value_M: NDArray[np.float32], label_M: NDArray[np.int32]) -> ClassSums:
    """Sum (float64) and number of the values of each class; images without a class do not count."""
    known = label_M != NO_CLASS
    return ClassSums(
        np.bincount(label_M[known], weights=value_M[known]).astype(np.float64),
        np.bincount(label_M[known]).astype(np.float64),
    )


def class_means(parts: list[ClassSums]) -> Floats:
    """The mean of each class over all shards, float64 ``[C]``, added in the order given; 0 for an empty class."""
    size = max(len(part.total) for part in parts)
    total, count = np.zeros(size), np.zeros(size)
    for part in parts:
        total[: len(part.total)] += part.total
        count[: len(part.images)] += part.images
    return np.asarray(total / np.maximum(count, 1), np.float64)
