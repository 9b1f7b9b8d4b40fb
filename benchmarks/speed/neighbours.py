"""Nearest ID images of pool images: exact FAISS search, beside numpy and two approximate indexes."""

import faiss
import numpy as np

from benchmarks.speed.timing import Way, rates, table
from miner.neighbors import K_NEAREST, NearestID, unit

ID, QUERIES, SIDE = 50_000, 1024, 128


def vectors(rng: np.random.Generator, count: int, centres: np.ndarray) -> np.ndarray:
    """Feature vectors as classifiers give them: clusters, never negative."""
    near = centres[rng.integers(0, len(centres), count)]
    return np.maximum(near + rng.normal(0, 0.6, near.shape), 0.0).astype(np.float32)


def main(repeat: int) -> None:
    """Print the table."""
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (10, SIDE))
    base, asked = vectors(rng, ID, centres), vectors(rng, QUERIES, centres)
    exact = NearestID(base, threads=1)
    base_unit, asked_unit = unit(base), unit(asked)
    truth = exact.index.search(asked_unit, K_NEAREST)[1]
    found: dict[str, np.ndarray] = {}

    def by_numpy() -> int:
        cosine = asked_unit @ base_unit.T
        found["numpy, all products"] = np.argpartition(-cosine, K_NEAREST, axis=1)[:, :K_NEAREST]
        return QUERIES

    def by(name: str, index: object) -> Way:
        def way() -> int:
            found[name] = index.search(asked_unit, K_NEAREST)[1]  # type: ignore[attr-defined]
            return QUERIES

        return way

    def ours() -> int:
        exact.query(asked)
        return QUERIES

    ways: dict[str, Way] = {
        "NearestID.query (64 neighbours, cosines in float64)": ours,
        "FAISS flat": by("FAISS flat", exact.index),
        "numpy, all products": by_numpy,
    }
    quantizer = faiss.IndexFlatIP(SIDE)
    ivf = faiss.IndexIVFFlat(quantizer, SIDE, 256, faiss.METRIC_INNER_PRODUCT)
    ivf.train(base_unit)
    ivf.add(base_unit)
    ivf.nprobe = _least(ivf, "nprobe", asked_unit, truth)
    ways[f"IVF, 256 lists, {ivf.nprobe} probed"] = by(f"IVF, 256 lists, {ivf.nprobe} probed", ivf)
    hnsw = faiss.IndexHNSWFlat(SIDE, 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.add(base_unit)
    hnsw.hnsw.efSearch = _least(hnsw.hnsw, "efSearch", asked_unit, truth, hnsw)
    ways[f"HNSW 32, efSearch {hnsw.hnsw.efSearch}"] = by(f"HNSW 32, efSearch {hnsw.hnsw.efSearch}", hnsw)
    speed = rates(ways, repeat)
    first = next(iter(speed.values()))
    rows = [
        (name, rate, rate / first, _recall(found[name], truth) if name in found else 1.0)
        for name, rate in speed.items()
    ]
    table(
        f"{K_NEAREST} nearest of {ID:,} ID vectors of {SIDE}, {QUERIES:,} asked at once, one core",
        ("", "queries/s", "of the first", f"recall@{K_NEAREST}"),
        rows,
    )


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K_NEAREST for a, b in zip(found, truth, strict=True)]))


def _least(settings: object, name: str, asked: np.ndarray, truth: np.ndarray, index: object = None) -> int:
    """The least effort (a power of two) with a recall of 0.99."""
    index = index or settings
    for effort in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        setattr(settings, name, effort)
        if _recall(index.search(asked, K_NEAREST)[1], truth) >= 0.99:  # type: ignore[attr-defined]
            break
    return effort
