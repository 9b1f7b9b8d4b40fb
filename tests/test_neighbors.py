"""Nearest ID images and strata against brute force in float64, on features of real images."""

import numpy as np
import pytest
import torch

from miner import demo, neighbors
from miner.errors import MinerError
from miner.neighbors import POINTS_PER_STRATUM, NearestID, fit_strata, unit
from trainers import models
from trainers.data import normalise, tensor


def features(images: np.ndarray) -> np.ndarray:
    """Penultimate features float32 [n, 128] of an untrained net."""
    net = models.create("small", 10).eval()
    with torch.inference_mode():
        return net.features(normalise(tensor(images))).numpy()


@pytest.fixture(scope="module")
def id_features() -> np.ndarray:
    return features(demo.digits()[0][:700])


@pytest.fixture(scope="module")
def pool_features() -> np.ndarray:
    return features(demo.pool_arrays()[0][:600])


def brute(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest row (the smaller at a tie), its cosine and the k-th largest cosine."""
    unit_rows, unit_queries = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (rows, queries))
    cosine = unit_queries @ unit_rows.T
    return cosine.argmax(axis=1), cosine.max(axis=1), np.sort(cosine, axis=1)[:, -k]


def search(rows: np.ndarray, how: str = "faiss") -> NearestID:
    """An index of one thread; "device" searches as on a GPU, here with the vectors on the CPU."""
    index = NearestID(rows, threads=1)
    if how == "device":
        index.on_device, index.index = torch.from_numpy(index.id_MD), None
    return index


both = pytest.mark.parametrize("how", ["faiss", "device"])


def test_unit_rows() -> None:
    scaled = unit(np.array([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]], np.float32))
    assert scaled.dtype == np.float32
    assert scaled == pytest.approx(np.array([[0.6, 0.8], [0, 0], [-1, 0]]))


@both
def test_neighbours_equal_brute_force(id_features: np.ndarray, pool_features: np.ndarray, how: str) -> None:
    row, cosine, fiftieth = search(id_features, how).query(pool_features)
    assert (row.dtype, cosine.dtype, fiftieth.dtype) == (np.int32, np.float32, np.float32)
    best, best_cosine, kth = brute(pool_features, id_features, 50)
    np.testing.assert_allclose(cosine, best_cosine, atol=3e-7)
    np.testing.assert_allclose(fiftieth, kth, atol=3e-7)
    every = brute(pool_features, id_features, 2)[2]
    clear = best_cosine - every > 1e-6  # float32 features cannot tell nearer rows apart
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(row[clear], best[clear])


@both
def test_an_id_image_finds_itself(id_features: np.ndarray, how: str) -> None:
    row, cosine, fiftieth = search(id_features, how).query(id_features * 2.5)
    np.testing.assert_array_equal(row, np.arange(len(id_features)))
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    assert fiftieth.max() < 1


@pytest.mark.parametrize("batch", [1, 7, 64, 299])
def test_answers_do_not_depend_on_the_batch(id_features: np.ndarray, pool_features: np.ndarray, batch: int) -> None:
    index = NearestID(id_features, threads=1)
    whole = index.query(pool_features)
    parts = [index.query(pool_features[i : i + batch]) for i in range(0, len(pool_features), batch)]
    for column, found in enumerate(whole):
        assert np.concatenate([part[column] for part in parts]).tobytes() == found.tobytes()
    two = NearestID(id_features, threads=2).query(pool_features)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(two, whole, strict=True))


@both
def test_ties_go_to_the_smaller_row(id_features: np.ndarray, how: str) -> None:
    copies = np.concatenate([id_features[:100], id_features[:100][::-1], id_features[:100]])
    row, _, _ = search(copies, how).query(id_features[:100])
    np.testing.assert_array_equal(row, np.arange(100))


@both
@pytest.mark.parametrize("count", [1, 2, 49, 50, 51, 63, 64, 65])
def test_few_id_images(id_features: np.ndarray, pool_features: np.ndarray, count: int, how: str) -> None:
    row, cosine, fiftieth = search(id_features[:count], how).query(pool_features[:90])
    best, best_cosine, kth = brute(pool_features[:90], id_features[:count], min(count, 50))
    np.testing.assert_allclose(cosine, best_cosine, atol=3e-7)
    np.testing.assert_allclose(fiftieth, kth, atol=3e-7)
    assert ((row >= 0) & (row < count)).all()
    assert (row == best).mean() > 0.9


@both
def test_no_query(id_features: np.ndarray, how: str) -> None:
    found = search(id_features, how).query(id_features[:0])
    assert [len(column) for column in found] == [0, 0, 0]


def test_a_device_finds_what_faiss_finds(
    id_features: np.ndarray, pool_features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, whole = (search(id_features, how).query(pool_features) for how in ("faiss", "device"))
    sizes: list[int] = []
    einsum = torch.einsum

    def seen(form: str, vectors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        sizes.append(vectors.nbytes)
        return einsum(form, vectors, queries)

    monkeypatch.setattr(neighbors, "ON_DEVICE", 10 << 20)
    monkeypatch.setattr(torch, "einsum", seen)
    found = search(id_features, "device").query(pool_features)
    assert len(sizes) > 1
    assert max(sizes) < 10 << 20
    for column, expected, at_once in zip(found, wanted, whole, strict=True):
        assert column.dtype == expected.dtype
        np.testing.assert_allclose(column, expected, atol=1e-7)
        np.testing.assert_array_equal(column, at_once)


# --- strata ---


def test_strata_repeat_for_a_seed_and_differ_by_it(pool_features: np.ndarray) -> None:
    one, again, other = (fit_strata(pool_features, 8, seed, 1) for seed in (3, 3, 4))
    assert one.centroids.shape == (8, one.axes.shape[1])
    assert {part.dtype for part in one} == {np.dtype(np.float32)}
    assert [part.tobytes() for part in one] == [part.tobytes() for part in again]
    assert one.centroids.tobytes() != other.centroids.tobytes()
    assert len(np.unique(one.assign(pool_features))) == 8


def test_k_means_does_better_than_random_centres(pool_features: np.ndarray) -> None:
    points = unit(pool_features)[: 8 * POINTS_PER_STRATUM].astype(np.float64)

    def spread(centres: np.ndarray) -> float:
        return float(((points[:, None] - centres[None]) ** 2).sum(axis=2).min(axis=1).mean())

    found = fit_strata(points.astype(np.float32), 8, 0, 1, whiten=0)
    assert spread(found.centroids) < 0.8 * spread(points[:8])


@pytest.mark.parametrize("whiten", [0, 6, 48])
def test_assignment_equals_brute_force(pool_features: np.ndarray, whiten: int) -> None:
    strata = fit_strata(pool_features, 12, 0, 1, whiten)
    found = strata.assign(pool_features)
    assert found.dtype == np.int32
    points = (pool_features.astype(np.float64) - strata.centre) @ strata.axes
    distance = ((points[:, None] - strata.centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found, distance.argmin(axis=1))
    parts = [strata.assign(pool_features[i : i + 77]) for i in range(0, 600, 77)]
    np.testing.assert_array_equal(np.concatenate(parts), found)


def test_whitened_axes_have_variance_one_and_no_correlation(pool_features: np.ndarray) -> None:
    looks = np.concatenate([pool_features * 100, np.ones((len(pool_features), 2), np.float32)], axis=1)
    strata = fit_strata(looks, 4, 0, 1, whiten=5)
    assert strata.axes.shape == (looks.shape[1], 5)
    points = (looks.astype(np.float64) - strata.centre) @ strata.axes
    np.testing.assert_allclose(np.cov(points.T, bias=True), np.eye(5), atol=1e-3)
    scaled = fit_strata(looks * 7, 4, 0, 1, whiten=5)  # no column's scale decides
    same = (scaled.assign(looks * 7)[:, None] == scaled.assign(looks * 7)[None]) == (
        strata.assign(looks)[:, None] == strata.assign(looks)[None]
    )
    assert same.mean() > 0.95


def test_a_tie_goes_to_the_smaller_centroid(pool_features: np.ndarray) -> None:
    strata = fit_strata(pool_features, 4, 0, 1)
    twice = strata._replace(centroids=np.concatenate([strata.centroids, strata.centroids]))
    assert twice.assign(pool_features).max() < 4


def test_as_many_strata_as_images(pool_features: np.ndarray) -> None:
    strata = fit_strata(pool_features[:5], 5, 0, 1)
    assert sorted(strata.assign(pool_features[:5]).tolist()) == [0, 1, 2, 3, 4]


def test_features_that_are_not_finite(pool_features: np.ndarray) -> None:
    broken = pool_features[:20].copy()
    broken[3, 0] = np.nan
    with pytest.raises(MinerError, match="features are not finite"):
        fit_strata(broken, 4, 0, 1)


def test_what_looks_all_the_same_is_one_stratum() -> None:
    looks = np.full((200, 7), 3.0, np.float32)
    strata = fit_strata(looks, 10, 0, 1)
    assert strata.assign(looks).tolist() == [0] * 200
