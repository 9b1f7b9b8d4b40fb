"""Images of one size with their keys and their origin: what outlier sets and OOD test sets are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

BLOCK = 4096  # images hashed at once


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size. ``parts`` are uint8 [n_i, S, S, 3], arrays or read-only maps; read them with ``take``.

    ``keys`` name the images (None: their row), ``origin`` says in JSON types where they come from ("kind", "path",
    "fingerprint", ...), ``kind`` is "natural" or "noise". With ``rows`` (int64) only these images of the joined
    parts belong to the set, in that order: a pool's excluded images stay out of it so.
    """

    name: str
    parts: tuple[np.ndarray, ...]
    keys: Sequence[str] | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    kind: str = "natural"
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._edges[-1]) if self.rows is None else len(self.rows)

    @property
    def size(self) -> int:
        """Height and width of the images, pixels."""
        return int(self.parts[0].shape[1])

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images of these rows, in any order and as often as wanted: a new uint8 array [k, S, S, 3]. IndexError."""
        wanted = np.asarray(rows, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.name}: rows {wanted.min()} to {wanted.max()} of {len(self)} images")
        if self.rows is not None:
            wanted = self.rows[wanted]
        images = np.empty((len(wanted), self.size, self.size, 3), np.uint8)
        part = np.searchsorted(self._edges, wanted, "right") - 1
        for number in np.unique(part).tolist():
            here = np.flatnonzero(part == number)
            images[here] = self.parts[number][wanted[here] - self._edges[number]]
        return images

    def key(self, row: int) -> str:
        """Name of one image within the set."""
        return str(row) if self.keys is None else self.keys[row]

    def digests(self) -> np.ndarray:
        """BLAKE2b-128 of each image's pixels, "S16" [n] (numpy drops trailing zero bytes where it prints one)."""
        return self._digests

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.cumsum([0] + [len(part) for part in self.parts])

    @cached_property
    def _digests(self) -> np.ndarray:
        found = np.empty(len(self), "S16")
        for start in range(0, len(self), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(self)))
            pixels = self.take(rows).reshape(len(rows), -1)
            found[rows] = [hashlib.blake2b(image.data, digest_size=16).digest() for image in pixels]
        return found
