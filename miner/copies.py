"""Find copies of reference images: re-encoded, mirrored, cropped. FAISS proposes, aligned pixels decide.

A copy's thumbnail is nearly that of some window of its original, so that thumbnails of all windows are indexed, and
those of an image and of its mirror image are looked up. A candidate is aligned and judged by the correlation of its
detail. How well unrelated images agree is measured on ID test images turned upside down, which are copies of nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miner import aligned
from miner.aligned import COARSE, SIDE
from trainers.image_set import ImageSet

BLOCK = 512  # images looked up at once: it bounds memory
_PART = 128  # pairs aligned at once
CANDIDATES = 8  # references an image is compared with
FINE = 2  # of them aligned at full size
_GATE = 0.85  # coarse correlation of what is worth aligning: 19 in 20 leaks that can be found at all lie above 0.93
_VIEWS = 32  # nearest windows asked for
_AXES = 48  # principal axes of thumbnails: 95 % of their variance on CIFAR-10
_LISTS, _PROBED = 1024, 16  # inverted lists, and how many are searched
_SAMPLE = 2000  # references that axes and lists are fitted on
_STEPS = 3  # of alignment, at either size
UPRIGHT = 0.97  # a window of this scale is no crop


class Pairs(NamedTuple):
    """Images and references that look alike, ``[P]`` each, by query and then by falling ``detail``."""

    query: NDArray[np.int64]
    row: NDArray[np.int64]  # of the reference, all sets joined
    detail: NDArray[np.float32]
    correlation: NDArray[np.float32]
    window: NDArray[np.float32]  # [P, 3] of the reference
    mirrored: NDArray[np.bool_]

    def where(self, keep: NDArray[Any]) -> "Pairs":
        """These pairs only."""
        return Pairs(*(values[keep] for values in self))


class Copies:
    """The references of all sets, indexed for ``find``. Rows count through the sets in their order."""

    def __init__(
        self, sets: Mapping[str, ImageSet], threads: int, seed: int = 0, advance: Callable[[int], None] | None = None
    ) -> None:
        """``advance`` hears how many references were indexed. Memory: 46 * 56 bytes a reference."""
        faiss.omp_set_num_threads(threads)
        torch.set_num_threads(threads)
        self.sets = list(sets.values())
        self.edges = np.cumsum([0] + [len(images) for images in self.sets])
        self.windows = aligned.grid()
        self._fit(np.random.default_rng(seed), seed)
        for start in range(0, len(self), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(self)))
            self.index.add(self._points(aligned.thumbnails(self._pixels(rows))))
            if advance is not None:
                advance(len(rows))

    def __len__(self) -> int:
        return int(self.edges[-1])

    def take(self, rows: NDArray[np.int64]) -> np.ndarray:
        """References, uint8 ``[n, S, S, 3]``."""
        owner = self.owner(rows)
        found = np.empty((len(rows), *[self.sets[0].size] * 2, 3), np.uint8)
        for number in np.unique(owner).tolist():
            here = owner == number
            found[here] = self.sets[number].take(rows[here] - self.edges[number])
        return found

    def owner(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which set each reference belongs to, by number."""
        return np.asarray(np.searchsorted(self.edges, rows, "right") - 1, np.int64)

    def _fit(self, rng: np.random.Generator, seed: int) -> None:
        """Principal axes of the thumbnails, and the lists of the index."""
        rows = np.sort(rng.permutation(len(self))[:_SAMPLE])
        parts = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
        thumbs = torch.cat([aligned.thumbnails(self._pixels(part)).flatten(0, 1) for part in parts])
        _, axes = torch.linalg.eigh((thumbs.T @ thumbs).double())
        self.axes = axes[:, -_AXES:].float()
        lists = int(np.clip(len(self) * len(self.windows) // 512, 1, min(_LISTS, max(len(thumbs) // 40, 1))))
        quantizer = faiss.IndexFlatIP(_AXES)
        kind = faiss.ScalarQuantizer.QT_8bit
        self.index: Any = faiss.IndexIVFScalarQuantizer(quantizer, _AXES, lists, kind, faiss.METRIC_INNER_PRODUCT)
        self._quantizer = quantizer  # FAISS does not keep it alive
        self.index.cp.seed, self.index.cp.niter = seed & 0x7FFFFFFF, 10
        self.index.cp.min_points_per_centroid = 1
        self.index.nprobe = _PROBED
        self.index.train((thumbs @ self.axes).numpy())

    def _pixels(self, rows: NDArray[np.int64]) -> Tensor:
        return aligned.pixels(torch.from_numpy(self.take(rows)))

    def _points(self, thumbs_BVF: Tensor) -> NDArray[np.float32]:
        """What the index holds of thumbnails, float32 ``[B V, _AXES]``."""
        return np.ascontiguousarray((thumbs_BVF @ self.axes).flatten(0, 1).numpy())

    @torch.inference_mode()
    def find(self, images: np.ndarray, own: NDArray[np.int64] | None = None) -> Pairs:
        """Pairs of uint8 images ``[B, S, S, 3]`` and references that agree roughly; which are copies, a threshold says.

        At most ``FINE`` for an image. ``own``: references ``[B]`` that the images are themselves, not to be found.
        """
        x = aligned.pixels(torch.tensor(images))
        row, view, mirrored = self._candidates(x, own)
        found = row >= 0
        query = np.repeat(np.arange(len(images)), found.sum(axis=1))
        row, view, mirrored = row[found], view[found], mirrored[found]
        window, rough = self._aligned(x, query, row, mirrored, self.windows[torch.from_numpy(view)], COARSE)
        order = np.lexsort((-rough, query))  # the best candidates of each image first
        place = np.arange(len(order)) - np.searchsorted(query[order], query[order])
        keep = order[(place < FINE) & (rough[order] >= _GATE)]
        query, row, mirrored, window = query[keep], row[keep], mirrored[keep], window[torch.from_numpy(keep)]
        window, agreement = self._aligned(x, query, row, mirrored, window, SIDE)
        ours, theirs = self._both(x, query, row, mirrored)
        sharp = aligned.detail(aligned.cut(theirs, window[:, None], SIDE)[:, 0], ours).numpy()
        order = np.lexsort((-sharp, query))
        return Pairs(query, row, sharp, agreement, window.numpy(), mirrored).where(order)

    def _candidates(
        self, x_BCSS: Tensor, own: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(reference, its window, whether the image is mirrored), ``[B, CANDIDATES]`` each; -1: fewer were found."""
        views = (self._points(aligned.thumbnails(x, whole=True)) for x in (x_BCSS, x_BCSS.flip(3)))
        both = [self.index.search(points, _VIEWS) for points in views]
        near, place = (np.concatenate(parts, axis=1) for parts in zip(*both, strict=True))
        flipped = np.repeat([[False, True]], _VIEWS, axis=1).repeat(len(near), axis=0)
        row = np.where(place < 0, -1, place // len(self.windows))
        if own is not None:
            row[row == own[:, None]] = -1
        order = np.argsort(np.where(row < 0, np.inf, -near), axis=1, kind="stable")
        row, place, flipped = (np.take_along_axis(values, order, 1) for values in (row, place, flipped))
        by_row = np.argsort(row, axis=1, kind="stable")  # a reference is tried in its nearest window
        ordered = np.take_along_axis(row, by_row, 1)
        again = np.zeros(row.shape, bool)
        np.put_along_axis(again, by_row[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        first = np.argsort(again | (row < 0), axis=1, kind="stable")[:, :CANDIDATES]
        row = np.take_along_axis(np.where(again, -1, row), first, 1)
        return row, np.take_along_axis(place, first, 1) % len(self.windows), np.take_along_axis(flipped, first, 1)

    def _both(
        self, x_BCSS: Tensor, query: NDArray[np.int64], row: NDArray[np.int64], mirrored: NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        """The images, mirrored where asked for, and their references, float32 ``[P, 3, SIDE, SIDE]`` each."""
        ours = x_BCSS[torch.from_numpy(query)]
        turned = torch.from_numpy(mirrored)[:, None, None, None]
        return torch.where(turned, ours.flip(3), ours), self._pixels(row)

    def _aligned(
        self,
        x_BCSS: Tensor,
        query: NDArray[np.int64],
        row: NDArray[np.int64],
        mirrored: NDArray[np.bool_],
        window: Tensor,
        side: int,
    ) -> tuple[Tensor, NDArray[np.float32]]:
        """Windows after alignment, and the correlations there; below full size of luminance alone."""
        windows, found = [window[:0]], [torch.empty(0)]
        for start in range(0, len(query), _PART):
            part = slice(start, start + _PART)
            ours, theirs = self._both(x_BCSS, query[part], row[part], mirrored[part])
            if side < SIDE:
                ours, theirs = aligned.grey(ours), aligned.grey(theirs)
            here, agreement = aligned.align(theirs, ours, window[part], side, _STEPS)
            windows.append(here)
            found.append(agreement)
        return torch.cat(windows), torch.cat(found).numpy()


def best(pairs: Pairs, count: int) -> NDArray[np.float32]:
    """The highest ``detail`` of each of ``count`` images, ``[count]``; 0 where nothing agrees even roughly."""
    found = np.zeros(count, np.float32)
    np.maximum.at(found, pairs.query, pairs.detail)
    return found


def threshold(detail_N: NDArray[np.float32], alarms: float) -> float:
    """The least value that at most a share ``alarms`` of ``detail_N`` exceeds."""
    return float(np.sort(detail_N)[::-1][min(int(alarms * len(detail_N)), len(detail_N) - 1)])


def kinds(pairs: Pairs) -> list[str]:
    """What was done to each reference: re-encoded, flipped, cropped, flipped+cropped."""
    whole = pairs.window[:, 0] >= UPRIGHT
    plain = np.where(whole, "re-encoded", "cropped")
    return np.where(pairs.mirrored, np.where(whole, "flipped", "flipped+cropped"), plain).tolist()
