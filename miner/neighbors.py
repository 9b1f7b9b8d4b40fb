"""FAISS over features: the nearest ID images of a pool image, and k-means strata of the pool.

Features are penultimate features of the *frozen* ID-trained classifier, never of the one in the game, which
the game pulls about. FAISS runs on the GPU when faiss-gpu is installed and a GPU is visible, on the CPU else.
"""

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from miner.errors import MinerError

K_NEAREST = 50  # the leak guard judges by the 50th neighbour: one odd ID image should not condemn
_SPARE = 14  # more candidates than needed, so that float32 search noise cannot decide who is 50th
POINTS_PER_STRATUM = 64  # k-means sees this many images a stratum

Features = NDArray[np.float32]


def unit(features_ND: Features) -> Features:
    """Rows scaled to length 1 (zero rows stay zero), float32 ``[N, D]``."""
    norm = np.sqrt((features_ND.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    return (features_ND / np.maximum(norm, 1e-12)).astype(np.float32)


class NearestID:
    """Exact cosine search over the ID set's features."""

    def __init__(self, id_features_MD: Features, threads: int) -> None:
        self.threads = threads
        self.id_MD = unit(id_features_MD)
        self.k = min(K_NEAREST, len(self.id_MD))
        self.index: Any = faiss.IndexFlatIP(self.id_MD.shape[1])
        if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
            self.index = faiss.index_cpu_to_all_gpus(self.index)
        self.index.add(self.id_MD)

    def query(self, features_BD: Features) -> tuple[NDArray[np.int32], Features, Features]:
        """Nearest ID row, its cosine, and the cosine of the 50th nearest, ``[B]`` each (int32, float32, float32).

        FAISS's own distances change in the last bits with the batch they are asked in: it proposes candidates,
        their cosines are recomputed in float64, ties go to the smaller ID row.
        """
        faiss.omp_set_num_threads(self.threads)  # a setting of the process, which `fit_strata` changes
        query_BD = unit(features_BD)
        _, candidate_BK = self.index.search(query_BD, min(self.k + _SPARE, len(self.id_MD)))
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


def fit_strata(features_SD: Features, strata: int, seed: int, threads: int) -> Features:
    """k-means centroids ``[strata, D]`` of unit features: one stratum a centroid. MinerError if any is not finite."""
    faiss.omp_set_num_threads(threads)
    sample = unit(features_SD)
    if not np.isfinite(sample).all():
        raise MinerError(
            "features are not finite: the classifier has diverged; start anew from another --checkpoint and --out"
        )
    kmeans = faiss.Kmeans(
        sample.shape[1],
        strata,
        niter=20,
        seed=seed & 0x7FFFFFFF,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_STRATUM,
    )
    kmeans.train(sample)
    return np.asarray(kmeans.centroids, dtype=np.float32)


def assign_strata(features_BD: Features, centroids_KD: Features) -> NDArray[np.int32]:
    """Nearest centroid of each row, int32 ``[B]``; distances in float64, ties to the smaller centroid."""
    points = unit(features_BD).astype(np.float64)
    centroids = centroids_KD.astype(np.float64)
    squared = (centroids**2).sum(axis=1)[None, :] - 2.0 * points @ centroids.T
    return squared.argmin(axis=1).astype(np.int32)
