"""FAISS over features: the nearest ID images of a pool image, and k-means strata of the pool.

Features are penultimate features of the *frozen* ID-trained classifier, never of the one in the game, which
the game pulls about. FAISS searches on CPUs; on a GPU, for which its package is seldom there, one matrix product does.
"""

from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from miner.errors import MinerError

K_NEAREST = 50  # the leak guard judges by the 50th neighbour: one odd ID image should not condemn
_SPARE = 14  # more candidates than needed, so that float32 search noise cannot decide who is 50th
ON_DEVICE = 1 << 29  # bytes of cosines and candidates that a GPU holds at once
WHITENED = 48  # axes that strata are found in
POINTS_PER_STRATUM = 64  # k-means sees this many images a stratum

Features = NDArray[np.float32]

# Below this FAISS compares vector by vector, without BLAS: since 1.15 below 128,000 = queries x axes, where on one
# thread that is seven times slower. The last block of a shard, of 900 images, took longer than the 4,096 before it.
faiss.cvar.distance_compute_blas_threshold = 20


def unit(features_ND: Features) -> Features:
    """Rows scaled to length 1 (zero rows stay zero), float32 ``[N, D]``."""
    norm = np.sqrt((features_ND.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    return (features_ND / np.maximum(norm, 1e-12)).astype(np.float32)


class NearestID:
    """Exact cosine search over the ID set's features."""

    def __init__(self, id_features_MD: Features, threads: int, device: torch.device | None = None) -> None:
        """``device``: a GPU on which all vectors lie and are compared, in blocks; None or a CPU: FAISS."""
        self.threads = threads
        self.id_MD = unit(id_features_MD)
        self.k = min(K_NEAREST, len(self.id_MD))
        self.candidates = min(self.k + _SPARE, len(self.id_MD))
        self.index: Any = None
        self.on_device: torch.Tensor | None = None
        if device is not None and device.type != "cpu":
            self.on_device = torch.from_numpy(self.id_MD).to(device)
        else:
            self.index = faiss.IndexFlatIP(self.id_MD.shape[1])
            self.index.add(self.id_MD)

    def query(self, features_BD: Features) -> tuple[NDArray[np.int32], Features, Features]:
        """Nearest ID row, its cosine, and the cosine of the 50th nearest, ``[B]`` each (int32, float32, float32).

        Distances in float32 change in the last bits with the batch they are asked in: that search proposes
        candidates, their cosines are recomputed in float64, ties go to the smaller ID row.
        """
        query_BD = unit(features_BD)
        if self.on_device is not None:
            return self._on_device(torch.from_numpy(query_BD).to(self.on_device.device))
        faiss.omp_set_num_threads(self.threads)  # a setting of the process, which `fit_strata` changes
        _, candidate_BK = self.index.search(query_BD, self.candidates)
        candidate_BK = np.sort(candidate_BK, axis=1)
        cosine_BK = np.empty(candidate_BK.shape)
        for start in range(0, len(query_BD), 256):  # keeps the gathered float64 vectors within some 50 MB
            part = slice(start, start + 256)
            vectors = self.id_MD[candidate_BK[part]].astype(np.float64)
            cosine_BK[part] = np.matmul(vectors, query_BD[part].astype(np.float64)[:, :, None])[:, :, 0]
        order = np.argsort(-cosine_BK, axis=1, kind="stable")
        first, last = order[:, :1], order[:, self.k - 1 : self.k]
        return (
            np.take_along_axis(candidate_BK, first, 1)[:, 0].astype(np.int32),
            np.take_along_axis(cosine_BK, first, 1)[:, 0].astype(np.float32),
            np.take_along_axis(cosine_BK, last, 1)[:, 0].astype(np.float32),
        )

    def _on_device(self, query_BD: torch.Tensor) -> tuple[NDArray[np.int32], Features, Features]:
        """``query`` where the vectors lie: the same candidates but for float32 noise, the same float64 cosines."""
        assert self.on_device is not None
        found = []
        # A query's float32 cosines, and its candidates in float32 and float64.
        bytes_each = 4 * len(self.id_MD) + 12 * self.candidates * self.id_MD.shape[1]
        for part_bD in query_BD.split(max(ON_DEVICE // bytes_each, 1)):
            row_bK = (part_bD @ self.on_device.T).topk(self.candidates, dim=1).indices.sort(dim=1).values
            cosine_bK = torch.einsum("bkd,bd->bk", self.on_device[row_bK].double(), part_bD.double())
            cosine_bK, order_bK = cosine_bK.sort(dim=1, descending=True, stable=True)
            nearest_b = row_bK.gather(1, order_bK[:, :1])[:, 0]
            found.append((nearest_b.int(), cosine_bK[:, 0].float(), cosine_bK[:, self.k - 1].float()))
        empty = torch.empty(0, self.candidates)
        found = found or [(empty[:, 0].int(), empty[:, 0], empty[:, 0])]
        row, first, last = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return row, first, last


def check_finite(features_ND: Features) -> Features:
    """``features_ND`` as they are; MinerError if any is not finite."""
    if not np.isfinite(features_ND).all():
        raise MinerError(
            "features are not finite: the classifier has diverged; start anew from another --checkpoint and --out"
        )
    return features_ND


class Strata(NamedTuple):
    """Clusters of what images look like: an image's stratum is the nearest centroid to ``(x - centre) @ axes``."""

    centre: Features  # [F]
    axes: Features  # [F, P]
    centroids: Features  # [strata, P]

    def assign(self, looks_BF: Features) -> NDArray[np.int32]:
        """Stratum of each row, int32 ``[B]``; distances in float64, ties to the smaller centroid."""
        points = (looks_BF.astype(np.float64) - self.centre) @ self.axes.astype(np.float64)
        centroids = self.centroids.astype(np.float64)
        squared = (centroids**2).sum(axis=1)[None, :] - 2.0 * points @ centroids.T
        return squared.argmin(axis=1).astype(np.int32)


def fit_strata(looks_SF: Features, strata: int, seed: int, threads: int, whiten: int = WHITENED) -> Strata:
    """k-means clusters of ``looks_SF`` float32 ``[S, F]`` in its ``whiten`` strongest principal axes.

    Each axis is scaled to variance 1, so that no layer's scale decides; 0 leaves the rows as they are. MinerError if
    any value is not finite.
    """
    check_finite(looks_SF)
    centre, axes = np.zeros(looks_SF.shape[1], np.float32), np.eye(looks_SF.shape[1], dtype=np.float32)
    if whiten:
        centre, axes = _whitening(looks_SF.astype(np.float64), whiten)
    if not axes.shape[1]:  # all look the same: one stratum. FAISS would divide by their number of axes, and die
        return Strata(centre, np.zeros((len(centre), 1), np.float32), np.zeros((1, 1), np.float32))
    faiss.omp_set_num_threads(threads)
    kmeans = faiss.Kmeans(
        axes.shape[1],
        strata,
        niter=20,
        seed=seed & 0x7FFFFFFF,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_STRATUM,
    )
    kmeans.train(np.ascontiguousarray((looks_SF - centre) @ axes))
    return Strata(centre, axes, np.asarray(kmeans.centroids, dtype=np.float32))


def _whitening(looks_SF: NDArray[np.float64], most: int) -> tuple[Features, Features]:
    """(centre [F], axes [F, P]): the strongest principal axes of the standardised columns, scaled to variance 1."""
    centre, spread = looks_SF.mean(axis=0), looks_SF.std(axis=0)
    scale = 1.0 / np.where(spread > 1e-6, spread, np.inf)  # a column that never changes says nothing
    standard = (looks_SF - centre) * scale
    variance, direction = np.linalg.eigh(standard.T @ standard / len(standard))
    kept = np.argsort(-variance, kind="stable")[:most]
    kept = kept[variance[kept] > 1e-6]
    axes = scale[:, None] * direction[:, kept] / np.sqrt(variance[kept])
    return centre.astype(np.float32), axes.astype(np.float32)
