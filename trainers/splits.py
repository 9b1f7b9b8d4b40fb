"""ID sets cut down: long-tailed training sets, and classes held out as OOD (MixOE's fine-grained benches too)."""

import re
from collections.abc import Sequence

import numpy as np

from miner.errors import MinerError, UsageError
from trainers.data import IdSet, make_id_set
from trainers.image_set import ImageSet

# Classes that stay in distribution and classes held out, of each bench of MixOE (Zhang et al., WACV 2023).
MIXOE = {"aircraft": (90, 10), "car": (150, 46), "butterfly": (150, 50), "bird": (200, 55)}
FORMS = "give labels (3,5,7), random:COUNT:SEED or mixoe:BENCH:SPLIT"


def long_tail(id_set: IdSet, ratio: float) -> IdSet:
    """Keep the first n_c = int(n_max · ratio^(c/(K-1))) training images of class c; the test set stays whole.

    ``ratio`` is the smallest class over the largest, 0 < ratio <= 1: 0.01 is an imbalance factor of 100. n_max is
    the size of the largest class; a class that has fewer than n_c images keeps them all. The exponential profile
    and the deterministic choice are those of PASCL (Wang et al. 2022). UsageError for a ratio outside of (0, 1]
    and for one that leaves a class without images.
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"--long-tail {ratio}: smallest class over largest, in (0, 1]; 0.01 for a factor of 100")
    classes, labels = len(id_set.classes), id_set.train_labels
    n_max = int(np.bincount(labels).max())
    kept = []
    for c in range(classes):
        count = int(n_max * ratio ** (c / (classes - 1)))
        if count == 0:
            raise UsageError(
                f"--long-tail {ratio}: class {id_set.classes[c]!r} keeps no image; the least is {1 / n_max:.3g}"
            )
        kept.append(np.flatnonzero(labels == c)[:count])
    rows = np.sort(np.concatenate(kept))
    train = id_set.train_images[rows], labels[rows]
    return make_id_set(id_set.name, id_set.classes, train, (id_set.test_images, id_set.test_labels), id_set.flip)


def hold_out(id_set: IdSet, labels: Sequence[int]) -> tuple[IdSet, ImageSet]:
    """The set without these classes, the others numbered anew in order, and their test images as "held-out".

    UsageError for labels that the set has not, that come twice, or that leave less than two classes; MinerError
    when no test image has one of them.
    """
    names, out = id_set.classes, sorted(labels)
    if not out or len(set(out)) < len(out) or not 0 <= out[0] <= out[-1] < len(names) or len(names) - len(out) < 2:
        given = ",".join(map(str, labels))
        raise UsageError(f"--hold-out {given}: distinct labels from 0 to {len(names) - 1}, two classes must stay")
    new = np.full(len(names), -1)
    stay = [label for label in range(len(names)) if label not in set(out)]
    new[stay] = np.arange(len(stay))
    train, test = new[id_set.train_labels] >= 0, new[id_set.test_labels] >= 0
    if test.all():
        raise MinerError(f"{id_set.name}: no test image of the classes held out ({', '.join(names[c] for c in out)})")
    smaller = make_id_set(
        id_set.name,
        tuple(names[label] for label in stay),
        (id_set.train_images[train], new[id_set.train_labels[train]]),
        (id_set.test_images[test], new[id_set.test_labels[test]]),
        id_set.flip,
    )
    keys = [f"test {row}" for row in np.flatnonzero(~test).tolist()]
    origin = {"kind": "held-out", "id": id_set.name, "id_fingerprint": id_set.fingerprint, "labels": out}
    return smaller, ImageSet("held-out", (id_set.test_images[~test],), keys, origin)


def parse_hold_out(text: str, id_set: IdSet) -> tuple[int, ...]:
    """The labels, ascending, that ``text`` names among the classes of ``id_set``.

    "3,5,7": these. "random:20:1": 20 of them drawn with seed 1. "mixoe:car:0": the held-out classes of that bench
    (aircraft, car, butterfly or bird) in that split (0, 1 or 2), for a set of the bench's 100, 196, 200 or 255
    classes. MixOE's butterfly files number their classes from 1 although its splits count from 0, so that its class
    0 is empty; here label i is class i of the set.
    UsageError for any other text and for a set with another number of classes.
    """
    classes = len(id_set.classes)
    if re.fullmatch(r"\d+(,\d+)*", text):
        return tuple(sorted(map(int, text.split(","))))
    if match := re.fullmatch(r"random:(\d+):(\d+)", text):
        count, seed = int(match[1]), int(match[2])
        if not 0 < count <= classes - 2 or seed >= 2**32:
            raise UsageError(f"--hold-out {text}: 1 to {classes - 2} of {classes} classes, and a seed below 2^32")
        return _sorted(_legacy_choice(classes, count, seed))
    if match := re.fullmatch(r"mixoe:(\w+):([012])", text):
        if match[1] not in MIXOE:
            raise UsageError(f"--hold-out {text}: the benches of MixOE are {', '.join(MIXOE)}")
        inside, outside = MIXOE[match[1]]
        if classes != inside + outside:
            raise UsageError(f"--hold-out {text}: has {inside + outside} classes, the ID set {id_set.name} {classes}")
        return _sorted(np.setdiff1d(np.arange(classes), _legacy_choice(classes, inside, int(match[2]))))
    raise UsageError(f"--hold-out {text}: {FORMS}")


def _legacy_choice(classes: int, count: int, seed: int) -> np.ndarray:
    # MixOE drew so, and numpy promises that this generator's stream stays as it is.
    return np.random.RandomState(seed).choice(classes, count, replace=False)


def _sorted(labels: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(labels.tolist()))
