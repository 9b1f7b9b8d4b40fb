"""Metrics of out-of-distribution and misclassification detection, each with its orientation in its name.

Every score is HIGHER = MORE IN-DISTRIBUTION, every confidence HIGHER = MORE LIKELY CORRECT. There is no bare "fpr95":

  metric                  positive  threshold on the score          value
  auroc                   ID = OOD  none                            P(ID score > OOD score), ties half; one for both
  aupr_ood                OOD       none                            average precision (steps; OE)
  aupr_id                 ID        none                            average precision (Energy OOD)
  aupr_ood_trapezoid      OOD       none                            trapezoid under the PR points (OpenOOD)
  aupr_id_trapezoid       ID        none                            trapezoid under the PR points (OpenOOD, MixOE)
  fpr95_ood_detected      OOD       95 % of OOD at or below it      share of ID at or below it: ID flagged (OE, OpenOOD)
  fpr95_id_accepted       ID        95 % of ID at or above it       share of OOD at or above it: OOD accepted (Energy)
  tnr95_id_accepted       ID        95 % of ID at or above it       1 - fpr95_id_accepted (MixOE)
  tie_share               -         none                            (ID, OOD) pairs of equal score; see ``ood``
  auroc_correct           correct   none                            P(confidence of a correct > of a wrong), ties half
  aupr_success            correct   none                            trapezoid (OpenMix, CRL)
  aupr_error              wrong     none                            average precision (OpenMix, CRL)
  fpr95_errors_accepted   correct   95 % of correct at or above it  share of errors at or above it: errors accepted

Where no threshold passes exactly 95 % of the positives, rule "first" takes the highest one that passes at least 95 %,
"closest" the one whose share is nearest to 95 % (of two as near, the one that passes more). Either sits on the score
of a positive, the highest for its recall: the smallest FPR there. (OE's own code takes the largest at equal recall:
up to the negatives between two neighbouring positives more.)
"""

import math

import numpy as np
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from miner.errors import MinerError, UsageError

RULES = ("first", "closest")
_OOD_UP: dict[str, bool | None] = {
    "auroc": True,
    "aupr_ood": True,
    "aupr_id": True,
    "aupr_ood_trapezoid": True,
    "aupr_id_trapezoid": True,
    "fpr95_ood_detected": False,
    "fpr95_id_accepted": False,
    "tnr95_id_accepted": True,
    "tie_share": False,
}
_MISD_UP: dict[str, bool | None] = {
    "accuracy": True,
    "aurc_x1000": False,
    "aurc_tie_averaged_x1000": False,
    "e_aurc_x1000": False,
    "auroc_correct": True,
    "aupr_success": True,
    "aupr_error": True,
    "fpr95_errors_accepted": False,
    "ece": False,
    "nll": False,
    "brier": False,
    "mean_confidence": None,  # best where it equals the accuracy
}
OOD_METRICS, MISD_METRICS = tuple(_OOD_UP), tuple(_MISD_UP)  # in the order in which they are printed
UP = _OOD_UP | _MISD_UP  # True where larger is better, False where smaller is, None where neither


def ood(id_scores: np.ndarray, ood_scores: np.ndarray, rule: str = "first") -> dict[str, float]:
    """All of ``OOD_METRICS``, each in [0, 1], from scores [n] and [m] that are higher for in-distribution.

    ``tie_share`` is what ties leave open: AUROC lies within auroc ± tie_share / 2, as one breaks them (MixOE's code
    breaks them against itself). Raises MinerError for an empty set and for scores that are not finite, UsageError
    for a ``rule`` other than "first" and "closest" (see the module's table).
    """
    inside, outside = _checked("ID scores", id_scores), _checked("OOD scores", ood_scores)
    scores = np.concatenate([inside, outside])
    is_id = np.arange(len(scores)) < len(inside)
    accepted = _fpr95(inside, outside, rule)
    return {
        "auroc": float(roc_auc_score(is_id, scores)),
        "aupr_ood": float(average_precision_score(~is_id, -scores)),
        "aupr_id": float(average_precision_score(is_id, scores)),
        "aupr_ood_trapezoid": _trapezoid(~is_id, -scores),
        "aupr_id_trapezoid": _trapezoid(is_id, scores),
        "fpr95_ood_detected": _fpr95(-outside, -inside, rule),
        "fpr95_id_accepted": accepted,
        "tnr95_id_accepted": 1 - accepted,
        "tie_share": _tied_pairs(inside, outside),
    }


def ood_repeated(
    id_scores: np.ndarray, ood_scores: np.ndarray, seed: int, repeats: int = 10, ratio: int = 5, rule: str = "closest"
) -> dict[str, float]:
    """The 1:ratio protocol of OE: ``ood`` of all n ID scores against n // ratio OOD scores, drawn ``repeats`` times.

    Returns the mean of each metric and, as "<name>_std", the standard deviation of these draws (ddof 1, NaN for one
    draw): the spread of the OOD sample, not of training. Draws are without replacement, from (``seed``, repeat).
    A set of at most n // ratio scores is taken whole, once, with a spread of 0. Raises as ``ood`` does.
    """
    inside, outside = _checked("ID scores", id_scores), _checked("OOD scores", ood_scores)
    if repeats < 1 or ratio < 1 or len(inside) < ratio:
        raise UsageError(
            f"{repeats} repeats at 1:{ratio} of {len(inside)} ID scores: needs a repeat, {ratio} ID scores"
        )
    count = len(inside) // ratio
    if len(outside) <= count:
        whole = ood(inside, outside, rule)
        return whole | {f"{name}_std": 0.0 for name in whole}
    generators = [np.random.default_rng([seed, repeat]) for repeat in range(repeats)]
    draws = [ood(inside, generator.choice(outside, count, replace=False), rule) for generator in generators]
    values = {name: np.array([draw[name] for draw in draws]) for name in OOD_METRICS}
    spread = {f"{name}_std": float(v.std(ddof=1)) if repeats > 1 else math.nan for name, v in values.items()}
    return {name: float(v.mean()) for name, v in values.items()} | spread


def misclassification(
    probabilities: np.ndarray, labels: np.ndarray, confidence: np.ndarray | None = None
) -> dict[str, float]:
    """All of ``MISD_METRICS`` for probabilities [n, K] over the K classes (no reject output) and labels int [n].

    A prediction is the largest probability; ``confidence`` [n] ranks the predictions, by default with that
    probability. Fractions in [0, 1] except AURC and E-AURC (x1000) and NLL (nats). ECE (15 bins of equal width
    (lo, hi]), NLL, Brier (sum over classes) and mean_confidence are always those of the probabilities. FPR95 by rule
    "closest". Without any error or without any correct prediction the AUROC, AUPRs and FPR95 are NaN, E-AURC is NaN
    without any correct one. Definitions: Moon et al. 2020 (CRL), as used by OpenMix.

    Raises MinerError for values that are not finite or not probabilities, and for labels outside 0..K-1.
    """
    shares, labels = _distributions(probabilities, labels)
    top = shares.max(axis=1)
    correct = shares.argmax(axis=1) == labels
    ranking = top if confidence is None else _checked("confidence", confidence, len(labels))
    of_label = shares[np.arange(len(labels)), labels]
    return {
        "accuracy": float(correct.mean()),
        **_aurc(ranking, correct),
        **_errors_found(ranking, correct),
        "ece": _ece(top, correct),
        "nll": float(-np.log(np.maximum(of_label, np.finfo(np.float64).tiny)).mean()),
        "brier": float(((shares**2).sum(axis=1) - 2 * of_label + 1).mean()),
        "mean_confidence": float(top.mean()),
    }


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage i/n, risk = share of errors among the i most confident) for i = 1..n, float64 [n] each.

    Ties keep the order of the data. The mean of the risks is AURC. Raises MinerError for values that are not finite.
    """
    hits = _by_confidence(confidence, correct)
    kept = np.arange(1, len(hits) + 1)
    return kept / len(hits), np.cumsum(~hits) / kept


def accuracy_rejection(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share rejected, accuracy of the kept): ascending from 0 to (n - 1)/n, least confident first; float64 [n] each.

    The mirror of ``risk_coverage``, in its order of ties. Raises MinerError for values that are not finite.
    """
    hits = _by_confidence(confidence, correct)
    kept = np.arange(len(hits), 0, -1)
    return (len(hits) - kept) / len(hits), np.cumsum(hits)[::-1] / kept


def rejection_for(accuracy_target: float, confidence: np.ndarray, correct: np.ndarray) -> float:
    """Smallest share to reject for the kept to reach ``accuracy_target``, NaN if none; UsageError outside (0, 1]."""
    if not 0 < accuracy_target <= 1:
        raise UsageError(f"target accuracy {accuracy_target}: must be above 0 and at most 1")
    rejected, reached = accuracy_rejection(confidence, correct)
    enough = reached >= accuracy_target
    return float(rejected[enough.argmax()]) if enough.any() else math.nan


def accuracy_at(rejected: float, confidence: np.ndarray, correct: np.ndarray) -> float:
    """Accuracy in [0, 1] of the ceil((1 - rejected) n) most confident; UsageError unless 0 <= ``rejected`` < 1."""
    if not 0 <= rejected < 1:
        raise UsageError(f"rejected share {rejected}: must be at least 0 and below 1")
    accuracies = accuracy_rejection(confidence, correct)[1]
    # 0.29 * 100 is 28.999..., and means 29
    return float(accuracies[min(math.floor(rejected * len(accuracies) + 1e-9), len(accuracies) - 1)])


def feature_uniformity(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Feature-space uniformity of penultimate features [n, D] grouped by true label int [n]: intra, inter, fsu.

    intra: mean cosine distance of two samples of a class, averaged over classes; inter: mean cosine distance of two
    class means (of the raw features); fsu = intra / max(inter, 1e-8) (OpenMix). Classes of one sample are left out.
    Raises MinerError with fewer than two classes left, for features that are not finite, and for a feature or class
    mean that is all zero: it has no direction.
    """
    rows, labels = np.asarray(features, np.float64), np.asarray(labels)
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise MinerError(f"features {list(rows.shape)}, labels {list(labels.shape)}: [n, D] and [n] are needed")
    units = _unit("features", rows)
    within, means = [], []
    for label, n in zip(*np.unique(labels, return_counts=True), strict=True):
        if n < 2:
            continue
        members = labels == label
        # over the pairs i != j: |sum of the units|^2 holds every pair's cosine, and n ones of i = j
        within.append(1 - ((units[members].sum(axis=0) ** 2).sum() - n) / (n * (n - 1)))
        means.append(rows[members].mean(axis=0))
    if len(means) < 2:
        raise MinerError(f"features: {len(means)} classes with two samples or more; uniformity needs at least two")
    classes, total = len(means), _unit("class means", np.stack(means)).sum(axis=0)
    intra = float(np.mean(within))
    inter = float(1 - ((total**2).sum() - classes) / (classes * (classes - 1)))
    return {"intra": intra, "inter": inter, "fsu": intra / max(inter, 1e-8)}


def _checked(what: str, values: np.ndarray, count: int | None = None) -> np.ndarray:
    """``values`` as float64 [n]; MinerError when there are none, a wrong number, or one that is not finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) == 0 or (count is not None and len(array) != count):
        raise MinerError(f"{what}: {list(array.shape)} of them; [{count or 'n'}] are needed, at least one")
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
        raise MinerError(f"{what}: {bad} of {len(array)} are not finite; the classifier diverged, train it anew")
    return array


def _distributions(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 [n, K] rows that sum to one (a softmax over K + 1 cut to K does not) and int64 labels, or MinerError."""
    shares, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if shares.ndim != 2 or shares.size == 0 or labels.shape != shares.shape[:1]:
        raise MinerError(f"probabilities {list(shares.shape)}, labels {list(labels.shape)}: [n, K] and [n] are needed")
    _checked("probabilities", shares.ravel())
    if shares.min() < 0 or np.abs(shares.sum(axis=1) - 1).max() > 1e-4:
        raise MinerError("probabilities: each row must be >= 0 and sum to 1; cut the reject output off before softmax")
    if labels.min() < 0 or labels.max() >= shares.shape[1]:
        raise MinerError(f"labels {labels.min()} to {labels.max()}: the net has classes 0 to {shares.shape[1] - 1}")
    return shares, labels.astype(np.int64)


def _fpr95(positive: np.ndarray, negative: np.ndarray, rule: str) -> float:
    """Share of ``negative`` at or above the threshold that passes 95 % of ``positive`` (see the module's table)."""
    if rule not in RULES:
        raise UsageError(f"rule {rule!r}: unknown; choose one of {', '.join(RULES)}")
    thresholds, counts = np.unique(positive, return_counts=True)
    passed = counts[::-1].cumsum()[::-1]  # falls as the threshold rises
    gaps = 100 * passed - 95 * len(positive)  # whole numbers, so that 95 % is met exactly or not at all
    at = np.count_nonzero(gaps >= 0) - 1 if rule == "first" else int(np.abs(gaps).argmin())
    return float((negative >= thresholds[at]).mean())


def _trapezoid(positive: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(positive, scores)
    return float(auc(recall, precision))


def _tied_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the len(a) len(b) pairs whose two values are equal."""
    ordered = np.sort(b)
    equal = np.searchsorted(ordered, a, "right") - np.searchsorted(ordered, a, "left")
    return float(equal.mean() / len(b))


def _by_confidence(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """``correct`` as bool [n], most confident first; ties keep their order."""
    hits = np.asarray(correct).astype(bool)
    return hits[np.argsort(-_checked("confidence", confidence, len(hits)), kind="stable")]


def _aurc(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """AURC as published (ties in the order of the data), its mean over all orders of the ties, and E-AURC."""
    aurc = risk_coverage(confidence, correct)[1].mean()
    error = 1 - correct.mean()
    best = error + (1 - error) * math.log1p(-error) if error < 1 else math.nan  # of a perfect ranking, for large n
    values, group = np.unique(-confidence, return_inverse=True)
    # the expected place of an error within its tied group is uniform: each member carries the group's mean error
    mean_errors = np.bincount(group, ~correct, len(values)) / np.bincount(group, minlength=len(values))
    averaged = (np.cumsum(mean_errors[np.sort(group)]) / np.arange(1, len(group) + 1)).mean()
    return {
        "aurc_x1000": float(1000 * aurc),
        "aurc_tie_averaged_x1000": float(1000 * averaged),
        "e_aurc_x1000": float(1000 * (aurc - best)),
    }


def _errors_found(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    if correct.all() or not correct.any():
        return dict.fromkeys(("auroc_correct", "aupr_success", "aupr_error", "fpr95_errors_accepted"), math.nan)
    return {
        "auroc_correct": float(roc_auc_score(correct, confidence)),
        "aupr_success": _trapezoid(correct, confidence),
        "aupr_error": float(average_precision_score(~correct, -confidence)),
        "fpr95_errors_accepted": _fpr95(confidence[correct], confidence[~correct], "closest"),
    }


def _ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean over samples of |accuracy - mean confidence| of their bin (lo, hi]."""
    place = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    return float(np.abs(np.bincount(place, correct - confidence)).sum() / len(confidence))


def _unit(what: str, rows: np.ndarray) -> np.ndarray:
    """Rows of length one; MinerError for rows that have no direction."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    wrong = np.count_nonzero(~((lengths > 0) & np.isfinite(lengths)))
    if wrong:
        raise MinerError(f"{what}: {wrong} of {len(rows)} are all zero or not finite: they have no direction")
    return rows / lengths
