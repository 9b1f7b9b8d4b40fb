"""Judge a classifier: its scores on the ID test set, OOD sets and corrupted ID sets, as rows of metrics.

A library without a command: ``pipelines.evaluate``, benchmarks and comparisons call it in their own process.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from miner.errors import MinerError
from trainers import metrics
from trainers.abnormality import Abnormality
from trainers.data import IdSet, load_id
from trainers.image_set import ImageSet
from trainers.models import Net
from trainers.read import fit_all, npy, npy_images
from trainers.scores import Outputs, outputs, probabilities, score
from trainers.splits import hold_out

FULL, REPEATED, MISCLASSIFICATION, REJECTION, FEATURES = "full", "1:5", "misclassification", "rejection", "features"
ID, CORRUPTED = "id", "corrupted"  # groups beside near, far and noise; corrupted-3 is severity 3
MEAN = "mean"  # the set of a group's unweighted mean over its sets
NO_SCORE = "none"  # the score of figures that depend on none: those of the probabilities and the features
OF_PROBABILITIES = ("accuracy", "ece", "nll", "brier", "mean_confidence")
SEVERITIES = 5
MINIMUM = 20  # images; in a smaller set 95 % cannot be told from all
CHUNK = 4000  # images scored at once; a multiple of the batch, so that a set's batches are those of one call


class Row(NamedTuple):
    """One figure; ``metric`` is a name of ``trainers.metrics``, with _std the spread of the 1:5 protocol's draws."""

    score: str
    group: str
    set: str
    protocol: str
    metric: str
    value: float


@dataclass(frozen=True)
class Judged:
    """Rows of metrics, and the raw scores (score name -> float64 [n], higher = more ID) that plots are drawn from.

    ``sets`` is keyed by (group, set name); ``correct`` bool [n]: which ID test images are classified correctly.
    """

    rows: list[Row]
    id_name: str
    id_scores: dict[str, np.ndarray]
    correct: np.ndarray
    sets: dict[tuple[str, str], dict[str, np.ndarray]]

    @cached_property
    def values(self) -> dict[tuple[str, str, str, str, str], float]:
        """The figures by (score, group, set, protocol, metric)."""
        return {(row.score, row.group, row.set, row.protocol, row.metric): row.value for row in self.rows}

    @property
    def groups(self) -> dict[str, list[str]]:
        """The names of the OOD sets of each group, in the order in which they were given."""
        names: dict[str, list[str]] = {}
        for group, name in self.sets:
            names.setdefault(group, []).append(name)
        return names


@dataclass(frozen=True)
class Scorer:
    """A classifier (anywhere; its mode is kept), its number of classes, and what to ask of it.

    ``module`` is for the score abnormality; ``on_images`` is told how many images more are scored.
    """

    net: Net
    classes: int
    scores: Sequence[str]
    module: Abnormality | None = None
    on_images: Callable[[int], None] = lambda _: None

    def chunks(self, images: ImageSet) -> Iterator[tuple[Outputs, dict[str, np.ndarray]]]:
        """Outputs and scores of CHUNK images at a time: what nobody keeps is gone."""
        for start in range(0, len(images), CHUNK):
            pixels = images.take(np.arange(start, min(start + CHUNK, len(images))))
            out = outputs(self.net, pixels)
            ask = partial(score, out=out, classes=self.classes, net=self.net, images=pixels, module=self.module)
            yield out, {name: ask(name) for name in self.scores}
            self.on_images(len(pixels))

    def of_set(self, images: ImageSet) -> dict[str, np.ndarray]:
        """The scores of a set, float64 [n] each."""
        return _joined([found for _, found in self.chunks(images)])

    def classified(self, images: ImageSet) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Probabilities float64 [n, K], features float32 [n, D] and scores of a set."""
        parts = list(self.chunks(images))
        shares = probabilities(np.concatenate([out.logits for out, _ in parts]), self.classes)
        return shares, np.concatenate([out.features for out, _ in parts]), _joined([found for _, found in parts])


def judge(
    net: Net,
    meta: Mapping[str, Any],
    id_set: IdSet,
    sets: Sequence[tuple[str, ImageSet]],
    scores: Sequence[str],
    seed: int,
    repeats: int = 10,
    module: Abnormality | None = None,
    on_images: Callable[[int], None] = lambda _: None,
) -> Judged:
    """All metrics of ``net`` under ``scores``: OOD detection a set, misclassification and features on ID test images.

    ``meta`` is the checkpoint's, of which "classes" is read. ``sets`` are (group, set); a set's name is its own in
    its group. Each is judged whole (protocol "full", rule "first") and by the 1:5 protocol of OE (mean of
    ``repeats`` draws from ``seed``, and their spread; rule "closest"). A group's mean is over its sets, unweighted;
    groups never meet. Raises MinerError for a class count that is not the ID set's, for sets of less than
    MINIMUM images and for scores that are not finite, UsageError as ``trainers.scores.score`` does.
    """
    check_classes(meta, id_set)
    inside = ImageSet(id_set.name, (id_set.test_images,))
    _check_sets([(ID, inside), *sets])
    scorer = Scorer(net, len(meta["classes"]), scores, module, on_images)
    shares, features, id_scores = scorer.classified(inside)
    rows = _classified_rows(ID, id_set.name, shares, id_set.test_labels, id_scores)
    rows += _feature_rows(id_set.name, features, id_set.test_labels)
    found = {(group, images.name): scorer.of_set(images) for group, images in sets}
    detected: list[Row] = []
    for (group, name), of_score in found.items():
        for which, outside in of_score.items():
            whole = metrics.ood(id_scores[which], outside)
            drawn = metrics.ood_repeated(id_scores[which], outside, seed, repeats)
            detected += [Row(which, group, name, FULL, metric, value) for metric, value in whole.items()]
            detected += [Row(which, group, name, REPEATED, metric, value) for metric, value in drawn.items()]
    rows += detected + group_means(detected)
    return Judged(rows, id_set.name, id_scores, shares.argmax(axis=1) == id_set.test_labels, found)


def judge_corrupted(
    net: Net,
    meta: Mapping[str, Any],
    folder: Path,
    size: int,
    scores: Sequence[str],
    module: Abnormality | None = None,
    on_images: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Misclassification metrics on corrupted ID test images at ``size`` px, in the layout of CIFAR-10-C.

    ``folder`` holds labels.npy (int [5 n]) and one <corruption>.npy (uint8 [5 n, H, W, 3]) each, severities 1 to 5
    one after another; images of classes that the checkpoint held out are left out. Group "corrupted-<severity>"
    holds the corruptions and their mean, "corrupted" the mean of each over the severities and the mean of all.
    Raises MinerError for what is missing and for arrays that do not fit together.
    """
    labels = corrupted_labels(folder, meta)
    scorer = Scorer(net, len(meta["classes"]), scores, module, on_images)
    rows: list[Row] = []
    for path in corruptions(folder):
        array = npy_images(path)
        if len(array) != len(labels):
            raise MinerError(f"{path}: {len(array)} images, labels.npy has {len(labels)} labels; fetch it again")
        for severity, part in enumerate(np.split(np.arange(len(labels)), SEVERITIES), 1):
            part = part[labels[part] >= 0]
            shares, _, of_score = scorer.classified(ImageSet(path.stem, (fit_all(array[part], size),)))
            rows += _classified_rows(f"{CORRUPTED}-{severity}", path.stem, shares, labels[part], of_score)
    overall = [row._replace(group=CORRUPTED) for row in rows]
    return [*rows, *group_means(rows), *_means(overall), *group_means(overall)]


def corruptions(folder: Path) -> list[Path]:
    """The files of ``folder`` with corrupted images. Raises MinerError when there are none."""
    paths = [path for path in sorted(folder.glob("*.npy")) if path.name != "labels.npy"]
    if not paths:
        raise MinerError(f"{folder}: no corruption in it; the layout of CIFAR-10-C has gaussian_noise.npy and others")
    return paths


def corrupted_labels(folder: Path, meta: Mapping[str, Any]) -> np.ndarray:
    """labels.npy of a folder of corruptions in the checkpoint's numbering, int64 [5 n]; -1 where it held the class out.

    Raises MinerError when there is none, when it is no such array, and for labels that the checkpoint does not know.
    """
    path = folder / "labels.npy"
    if not path.is_file():
        raise MinerError(f"{path}: missing; the layout of CIFAR-10-C has it beside gaussian_noise.npy and others")
    labels = npy(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0 or len(labels) % SEVERITIES:
        raise MinerError(f"{path}: {labels.dtype} {list(labels.shape)}; [5 n] whole numbers are needed")
    left_out = list(meta.get("hold_out") or ())
    place = np.full(len(meta["classes"]) + len(left_out), -1)
    if labels.min() < 0 or labels.max() >= len(place):
        raise MinerError(f"{path}: labels {labels.min()} to {labels.max()}; the checkpoint knows {len(place)} classes")
    own = np.setdiff1d(np.arange(len(place)), left_out)
    place[own] = np.arange(len(own))
    return place[labels.astype(np.int64)]


def open_id(meta: Mapping[str, Any], spec: str, size: int) -> tuple[IdSet, ImageSet | None]:
    """The ID set ``spec`` as a checkpoint knows it: without the classes it held out, whose test images come second.

    A set that has only the checkpoint's classes is taken as it is. Raises as ``load_id`` and ``check_classes`` do.
    """
    id_set, left_out = load_id(spec, size), tuple(meta.get("hold_out") or ())
    rest = None
    if left_out and len(id_set.classes) == len(meta["classes"]) + len(left_out):
        id_set, rest = hold_out(id_set, left_out)
    check_classes(meta, id_set)
    return id_set, rest


def check_classes(meta: Mapping[str, Any], id_set: IdSet) -> None:
    """MinerError unless the checkpoint has as many classes as ``id_set``."""
    have, want = len(meta["classes"]), len(id_set.classes)
    if have != want:
        raise MinerError(f"the checkpoint has {have} classes, ID set {id_set.name} has {want}; pass --id with its own")


def group_means(rows: Sequence[Row]) -> list[Row]:
    """The unweighted mean over the sets of each group, as a set called "mean". The spread of draws has none."""
    return _means(row._replace(set=MEAN) for row in rows if not row.metric.endswith("_std"))


def _means(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in their value alone become one with the mean."""
    values: dict[Row, list[float]] = {}
    for row in rows:
        values.setdefault(row._replace(value=0.0), []).append(row.value)
    return [row._replace(value=float(np.mean(found))) for row, found in values.items()]


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_sets(sets: Sequence[tuple[str, ImageSet]]) -> None:
    seen = set()
    for group, images in sets:
        if len(images) < MINIMUM:
            raise MinerError(f"{group} set {images.name}: {len(images)} images; at least {MINIMUM} are needed")
        if (group, images.name) in seen:
            raise MinerError(f"{group}: two sets are called {images.name}; rename one")
        seen.add((group, images.name))


def _classified_rows(
    group: str, name: str, shares: np.ndarray, labels: np.ndarray, of_score: Mapping[str, np.ndarray]
) -> list[Row]:
    """Metrics of probabilities [n, K] against labels [n], and of each score [n] as the confidence in them."""
    told = metrics.misclassification(shares, labels)
    rows = [Row(NO_SCORE, group, name, MISCLASSIFICATION, metric, told[metric]) for metric in OF_PROBABILITIES]
    correct = shares.argmax(axis=1) == labels
    for which, confidence in of_score.items():
        told = metrics.misclassification(shares, labels, confidence)
        ranking = (metric for metric in told if metric not in OF_PROBABILITIES)
        rows += [Row(which, group, name, MISCLASSIFICATION, metric, told[metric]) for metric in ranking]
        rejecting = {f"accuracy_at_{p}_rejected": metrics.accuracy_at(p / 100, confidence, correct) for p in (10, 20)}
        rejecting["rejected_for_99_accuracy"] = metrics.rejection_for(0.99, confidence, correct)
        rows += [Row(which, group, name, REJECTION, metric, value) for metric, value in rejecting.items()]
    return rows


def _feature_rows(name: str, features: np.ndarray, labels: np.ndarray) -> list[Row]:
    try:
        found = metrics.feature_uniformity(features, labels)
    except MinerError:  # a collapsed net has features of length zero; the other figures still say something
        found = dict.fromkeys(("intra", "inter", "fsu"), float("nan"))
    return [Row(NO_SCORE, ID, name, FEATURES, metric, value) for metric, value in found.items()]
