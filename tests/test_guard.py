"""The leak guard: classes of the pool by their mean nearness, single images where there are no classes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miner.guard import NO_CLASS, class_means, class_sums, near_id


def test_a_class_goes_as_a_whole_and_images_without_one_by_themselves() -> None:
    cosine = np.array([0.9, 0.5, 0.7, 0.2, 0.95, 0.1, 0.75], np.float32)
    label = np.array([3, 3, 3, 1, 1, NO_CLASS, NO_CLASS], np.int32)
    assert near_id(cosine, label, 0.69).tolist() == [True, True, True, False, False, False, True]
    assert near_id(cosine, label, 0.70).tolist() == [False] * 6 + [True]  # mean 0.7 is not above it
    alone = np.full(7, NO_CLASS, np.int32)
    assert near_id(cosine, alone, 0.69).tolist() == (cosine > np.float32(0.69)).tolist()


def test_nothing_is_near_beyond_the_farthest() -> None:
    cosine, label = np.array([0.5, 0.6], np.float32), np.array([0, 1], np.int32)
    assert not near_id(cosine, label, np.inf).any()
    assert near_id(cosine, label, -1.0).all()
    assert len(near_id(cosine[:0], label[:0], 0.5)) == 0


@given(st.lists(st.tuples(st.floats(-1, 1, width=32), st.integers(-1, 4)), min_size=1, max_size=40), st.integers(1, 4))
def test_class_means_over_shards_are_means(rows: list[tuple[float, int]], shards: int) -> None:
    value = np.array([v for v, _ in rows], np.float32)
    label = np.array([k for _, k in rows], np.int32)
    cuts = np.array_split(np.arange(len(rows)), shards)
    means = class_means([class_sums(value[cut], label[cut]) for cut in cuts])
    for k in range(len(means)):
        inside = value[label == k].astype(np.float64)
        np.testing.assert_allclose(means[k], inside.mean() if len(inside) else 0.0, atol=1e-12)
