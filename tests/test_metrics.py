"""OOD and misclassification metrics: hand values, scikit-learn, brute force, and the orientation of each."""

import math
from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score, roc_curve

from miner.errors import MinerError, UsageError
from trainers import metrics
from trainers.metrics import (
    MISD_METRICS,
    OOD_METRICS,
    RULES,
    UP,
    accuracy_at,
    accuracy_rejection,
    feature_uniformity,
    misclassification,
    ood,
    ood_repeated,
    rejection_for,
    risk_coverage,
)

CONFIDENCE = np.array([0.99, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.55])
CORRECT = np.array([1, 1, 0, 1, 1, 0, 1, 0], bool)
TOY_ID = -np.array([0.1, 0.2, 0.3, 0.4, 0.55, 0.6, 0.7, 0.8, 0.15, 0.25])
TOY_OOD = -np.array([0.5, 0.65, 0.9, 0.95, 0.58])


def two_classes(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, 2] whose largest is ``confidence``, always class 0, and labels that make it ``correct``."""
    return np.stack([confidence, 1 - confidence], axis=1), np.where(correct, 0, 1)


def judged(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    return misclassification(*two_classes(confidence, correct))


def tied(seed: int, n: int = 300, m: int = 170, levels: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping ID and OOD scores of few distinct values."""
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(1, 1.5, n) * levels / 8), np.round(rng.normal(0, 1, m) * levels / 8)


def perfect(n: int, errors: int) -> dict[str, float]:
    return judged(np.linspace(0.99, 0.51, n), np.arange(n) < n - errors)


# --- hand values -----------------------------------------------------------------------------------------------------


def test_misclassification_by_hand():
    found = judged(CONFIDENCE, CORRECT)
    assert found["aurc_x1000"] == pytest.approx(222.1726, abs=5e-5)
    assert found["aurc_tie_averaged_x1000"] == pytest.approx(222.1726, abs=5e-5)
    assert found["e_aurc_x1000"] == pytest.approx(140.9249, abs=5e-5)
    assert found["auroc_correct"] == pytest.approx(0.733333, abs=5e-7)
    assert found["aupr_error"] == pytest.approx(0.722222, abs=5e-7)
    assert found["aupr_success"] == pytest.approx(0.834762, abs=5e-7)
    assert average_precision_score(CORRECT, CONFIDENCE) == pytest.approx(0.852857, abs=5e-7)  # not what we report
    assert found["fpr95_errors_accepted"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 5 / 8
    assert found["mean_confidence"] == pytest.approx(CONFIDENCE.mean())
    risks = [0, 0, 1 / 3, 1 / 4, 1 / 5, 2 / 6, 2 / 7, 3 / 8]
    coverage, risk = risk_coverage(CONFIDENCE, CORRECT)
    np.testing.assert_allclose(risk, risks, rtol=1e-15)
    np.testing.assert_allclose(coverage, np.arange(1, 9) / 8)


@pytest.mark.parametrize("rule", RULES)
def test_fpr95_by_hand(rule):
    found = ood(TOY_ID, TOY_OOD, rule)
    assert found["fpr95_ood_detected"] == 0.4  # threshold -0.5: ID -0.55, -0.6, -0.7 and -0.8 are flagged
    assert found["fpr95_id_accepted"] == 0.6  # threshold -0.8 (or -0.7): OOD -0.5, -0.58 and -0.65 are accepted
    assert found["tnr95_id_accepted"] == 0.4


def test_first_and_closest_rule_differ_where_95_percent_is_not_met_exactly():
    inside = np.arange(50.0)  # 48 of 50 are the first share of at least 95 %; 47 is 0.94, 48 is 0.96: equally near
    outside = np.array([1.5, 2.5, 2.9, 0.5])
    assert ood(inside, outside, "first")["fpr95_id_accepted"] == 0.5  # at or above 2
    assert ood(inside, outside, "closest")["fpr95_id_accepted"] == 0.5  # the tie goes to the larger share
    inside = np.arange(31.0)  # 30 of 31 = 96.8 %, 29 of 31 = 93.5 %: closest falls short
    assert ood(inside, outside, "first")["fpr95_id_accepted"] == 0.75  # at or above 1
    assert ood(inside, outside, "closest")["fpr95_id_accepted"] == 0.5  # at or above 2


def test_exactly_95_percent_is_enough_for_either_rule():
    for n in (20, 40, 60, 140, 10_000):
        inside = np.arange(float(n))
        outside = np.array([n // 20 - 0.5, n // 20 + 0.5])  # one below, one above the score of the threshold
        for rule in RULES:
            assert ood(inside, outside, rule)["fpr95_id_accepted"] == 0.5
            assert ood(-outside, -inside, rule)["fpr95_ood_detected"] == 0.5


def test_uniformity_by_hand():
    features, labels = np.array([[1, 0], [1, 1], [0, 1], [-1, 1]]), np.array([0, 0, 1, 1])
    found = feature_uniformity(features, labels)
    assert found["intra"] == pytest.approx(1 - 1 / math.sqrt(2))
    assert found["inter"] == pytest.approx(1.0)
    assert found["fsu"] == pytest.approx(0.292893, abs=5e-7)


def test_calibration_by_hand():
    # the classes' shares 0.6 and 0.55 share the bin (8/15, 9/15]; as [lo, hi) they would not: 0.475
    edge = judged(np.array([0.6, 0.55]), np.array([True, False]))
    assert edge["ece"] == pytest.approx(0.075)
    found = misclassification(np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]), np.array([0, 2]))
    assert found["ece"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["brier"] == pytest.approx((0.09 + 0.04 + 0.01 + 0.04 + 0.25 + 0.49) / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    certain = misclassification(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 0]))
    assert (certain["ece"], certain["brier"], certain["nll"]) == (0, 0, 0)
    wrong = misclassification(np.array([[1.0, 0.0]]), np.array([1]))
    assert (wrong["ece"], wrong["brier"]) == (1, 2)
    assert 700 < wrong["nll"] < 710  # the smallest float64 instead of infinity


# --- against scikit-learn and brute force ----------------------------------------------------------------------------


def lowest_fpr(positive: np.ndarray, negative: np.ndarray, rule: str) -> float:
    """FPR of the point that ``rule`` picks on scikit-learn's full ROC curve."""
    scores = np.concatenate([positive, negative])
    fpr, tpr, _ = roc_curve(np.arange(len(scores)) < len(positive), scores, drop_intermediate=False)
    if rule == "first":
        return fpr[np.argmax(tpr >= 0.95 - 1e-12)]
    near = np.abs(tpr - 0.95) < np.abs(tpr - 0.95).min() + 1e-12
    return fpr[tpr == tpr[near].max()].min()


@pytest.mark.parametrize("seed", range(5))
def test_ood_metrics_equal_scikit_learns(seed):
    inside, outside = tied(seed, n=300 + seed, m=170 + seed, levels=20 + 20 * seed)
    is_id = np.repeat([True, False], [len(inside), len(outside)])
    scores = np.concatenate([inside, outside])
    for rule in RULES:
        found = ood(inside, outside, rule)
        assert tuple(found) == OOD_METRICS
        assert found["auroc"] == pytest.approx(roc_auc_score(is_id, scores), abs=1e-12)
        assert found["aupr_id"] == pytest.approx(average_precision_score(is_id, scores), abs=1e-12)
        assert found["aupr_ood"] == pytest.approx(average_precision_score(~is_id, -scores), abs=1e-12)
        assert found["fpr95_id_accepted"] == pytest.approx(lowest_fpr(inside, outside, rule), abs=1e-12)
        assert found["fpr95_ood_detected"] == pytest.approx(lowest_fpr(-outside, -inside, rule), abs=1e-12)
        assert found["tnr95_id_accepted"] == 1 - found["fpr95_id_accepted"]
        assert 0 < found["tie_share"] < 1


def test_trapezoid_is_the_area_under_the_points_by_hand():
    # OOD positive, by falling -score: ID is flagged second. Points (recall, precision): (0, 1), (1/2, 1), (1/2, 1/2),
    # (1, 2/3), then lower precision at recall 1.
    found = ood(np.array([2.0, 4.0]), np.array([1.0, 3.0]))
    assert found["aupr_ood_trapezoid"] == pytest.approx(0.5 + 0.5 * (1 / 2 + 2 / 3) / 2)
    assert found["aupr_ood"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    lopsided = ood(np.array([4.0]), np.array([3.0, 5.0, 6.0]))
    assert lopsided["aupr_id"] == pytest.approx(1 / 3)
    assert lopsided["aupr_id_trapezoid"] == pytest.approx((0 + 1 / 3) / 2)


def test_tie_share_bounds_the_auroc():
    inside, outside = tied(7)
    pairs = inside[:, None] - outside
    found = ood(inside, outside)
    assert found["tie_share"] == pytest.approx((pairs == 0).mean(), abs=1e-12)
    assert found["auroc"] - found["tie_share"] / 2 == pytest.approx((pairs > 0).mean(), abs=1e-12)
    assert found["auroc"] + found["tie_share"] / 2 == pytest.approx((pairs >= 0).mean(), abs=1e-12)
    assert ood(np.array([0.5, 0.5]), np.array([0.1]))["tie_share"] == 0  # ties on one side cost nothing
    constant = ood(np.ones(9), np.ones(4))
    assert (constant["auroc"], constant["tie_share"]) == (0.5, 1.0)
    assert (constant["fpr95_ood_detected"], constant["fpr95_id_accepted"]) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_misclassification_equals_scikit_learn_and_loops(seed):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 1.2, (400, 5)), 0)  # whole logits tie often
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.where(rng.random(400) < 0.3, rng.integers(0, 5, 400), logits.argmax(axis=1))
    found = misclassification(shares, labels)
    assert tuple(found) == MISD_METRICS
    top, correct = shares.max(axis=1), shares.argmax(axis=1) == labels
    assert len(np.unique(top)) < 200
    assert found["auroc_correct"] == pytest.approx(roc_auc_score(correct, top), abs=1e-12)
    assert found["aupr_error"] == pytest.approx(average_precision_score(~correct, -top), abs=1e-12)
    assert found["fpr95_errors_accepted"] == pytest.approx(lowest_fpr(top[correct], top[~correct], "closest"))
    assert found["nll"] == pytest.approx(log_loss(labels, shares), rel=1e-12)
    brier = sum(
        (share - (k == label)) ** 2 for row, label in zip(shares, labels, strict=True) for k, share in enumerate(row)
    )
    assert found["brier"] == pytest.approx(brier / 400)
    ece = 0.0
    for lo in range(15):
        inside = (top > lo / 15) & (top <= (lo + 1) / 15)
        ece += abs(correct[inside].sum() - top[inside].sum()) / 400
    assert found["ece"] == pytest.approx(ece)
    assert misclassification(shares.astype(np.float32), labels)["nll"] == pytest.approx(found["nll"], abs=1e-6)


# --- orientation -----------------------------------------------------------------------------------------------------


def test_no_metric_is_called_plain_fpr95_and_the_table_has_them_all():
    for name in (*OOD_METRICS, *MISD_METRICS):
        assert not name.endswith("95")
    assert set(UP) == {*OOD_METRICS, *MISD_METRICS}
    table = {line.split()[0] for line in metrics.__doc__.splitlines() if line.startswith("  ")}
    assert table >= {*OOD_METRICS, "auroc_correct", "aupr_success", "aupr_error", "fpr95_errors_accepted"}


def test_auroc_agrees_in_both_orientations_and_the_two_fpr95_do_not():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(2, 1, 2000), rng.normal(0, 3, 2000)
    found, swapped = ood(inside, outside), ood(-outside, -inside)  # swapped: what was OOD plays ID
    assert swapped["auroc"] == pytest.approx(found["auroc"], abs=1e-12)
    assert swapped["fpr95_id_accepted"] == found["fpr95_ood_detected"]
    assert swapped["fpr95_ood_detected"] == found["fpr95_id_accepted"]
    assert swapped["aupr_id"] == pytest.approx(found["aupr_ood"], abs=1e-12)
    assert swapped["aupr_id_trapezoid"] == pytest.approx(found["aupr_ood_trapezoid"], abs=1e-12)
    assert found["fpr95_ood_detected"] - found["fpr95_id_accepted"] > 0.2  # 99 % against 45 %


def test_higher_means_in_distribution():
    apart, upside_down = (
        ood(np.array([3.0, 2.0]), np.array([1.0, 0.0])),
        ood(np.array([1.0, 0.0]), np.array([3.0, 2.0])),
    )
    for name in OOD_METRICS:
        if name != "tie_share":
            assert apart[name] == (1.0 if UP[name] else 0.0)
            assert (upside_down[name] < apart[name]) if UP[name] else (upside_down[name] > apart[name])


def test_better_confidence_is_better_by_every_metric_with_a_direction():
    good, bad = perfect(100, 20), judged(np.linspace(0.51, 0.99, 100), np.arange(100) < 30)
    for name in MISD_METRICS:
        if UP[name] is not None:
            assert (good[name] > bad[name]) if UP[name] else (good[name] < bad[name]), name


# --- the 1:5 protocol ------------------------------------------------------------------------------------------------


def test_one_to_five_is_seeded_and_repeatable():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 500), rng.normal(0, 1, 900)
    found = ood_repeated(inside, outside, seed=3)
    assert found == ood_repeated(inside, outside, seed=3)
    assert found != ood_repeated(inside, outside, seed=4)
    assert set(found) == {*OOD_METRICS, *(f"{name}_std" for name in OOD_METRICS)}
    for name in ("auroc", "aupr_ood", "fpr95_ood_detected", "fpr95_id_accepted"):
        assert 0 < found[f"{name}_std"] < 0.2
    assert found["auroc"] == pytest.approx(ood(inside, outside)["auroc"], abs=0.05)


def test_one_to_five_draws_a_fifth_and_measures_their_spread():
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(0, 1, 5003), rng.normal(0, 1, 4000)
    found = ood_repeated(inside, outside, seed=0)
    assert found["aupr_ood"] == pytest.approx(1 / 6, abs=0.01)  # chance at 1:5
    # OOD ranked last: its only threshold passes everything, and the precision there is its share
    assert ood_repeated(np.zeros(100), np.ones(1000), seed=0)["aupr_ood"] == pytest.approx(20 / 120)
    assert ood_repeated(np.zeros(100), np.ones(1000), seed=0, ratio=1)["aupr_ood"] == pytest.approx(100 / 200)
    one, two = (ood_repeated(inside, outside, seed=0, repeats=repeats) for repeats in (1, 2))
    assert math.isnan(one["auroc_std"])
    second = 2 * two["auroc"] - one["auroc"]  # the first draw is the same in both
    assert two["auroc_std"] == pytest.approx(abs(one["auroc"] - second) / math.sqrt(2))


def test_a_small_ood_set_is_taken_whole():
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(1, 1, 500), rng.normal(0, 1, 100)
    found = ood_repeated(inside, outside, seed=0, rule="first")
    assert {name: found[name] for name in OOD_METRICS} == ood(inside, outside, "first")
    assert all(found[f"{name}_std"] == 0 for name in OOD_METRICS)
    one_left_out = ood_repeated(np.full(500, 50.0), np.arange(101.0), seed=0)  # none is drawn twice
    assert 0 < one_left_out["auroc_std"] < 0.01
    assert one_left_out["auroc"] == pytest.approx(0.5, abs=0.006)


# --- risk, coverage, rejection ---------------------------------------------------------------------------------------


def test_aurc_is_the_mean_risk_and_the_area_of_the_curve():
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(0.51, 1, 300), rng.random(300) < 0.8
    coverage, risk = risk_coverage(confidence, correct)
    aurc = judged(confidence, correct)["aurc_x1000"]
    assert aurc == pytest.approx(1000 * risk.mean())
    assert aurc == pytest.approx(1000 * (np.diff(coverage, prepend=0) * risk).sum())
    rejected, accuracy = accuracy_rejection(confidence, correct)
    np.testing.assert_allclose(1 - rejected, coverage[::-1])
    np.testing.assert_allclose(1 - accuracy, risk[::-1], atol=1e-12)
    assert (rejected[0], accuracy[0]) == (0, correct.mean())
    assert (accuracy[-1] == 1.0) == correct[confidence.argmax()]


@pytest.mark.parametrize(
    ("n", "errors", "exact", "asymptotic"),
    [(8, 3, 103.42, 81.25), (10_000, 500, 1.2739, 1.2714), (10_000, 2500, 34.251, 34.238)],
)
def test_e_aurc_subtracts_the_optimum_of_a_large_sample(n, errors, exact, asymptotic):
    found = perfect(n, errors)
    optimum = sum(k / (n - errors + k) for k in range(1, errors + 1)) / n
    assert found["aurc_x1000"] == pytest.approx(1000 * optimum)
    assert found["aurc_x1000"] == pytest.approx(exact, rel=5e-5)
    assert found["aurc_x1000"] - found["e_aurc_x1000"] == pytest.approx(asymptotic, rel=5e-5)
    assert found["e_aurc_x1000"] > 0  # though the ranking is perfect


def test_tie_averaged_aurc_is_the_mean_over_all_orders():
    confidence = np.array([0.9, 0.7, 0.7, 0.7, 0.6, 0.6, 0.6])
    correct = np.array([1, 0, 1, 1, 0, 0, 1], bool)
    orders = [list(order) for order in permutations(range(7))]
    aurcs = [1000 * risk_coverage(confidence[order], correct[order])[1].mean() for order in orders]
    assert max(aurcs) - min(aurcs) > 50  # the published AURC hangs on the order of the data
    for order in (orders[0], orders[-1], orders[1234]):
        averaged = judged(confidence[order], correct[order])["aurc_tie_averaged_x1000"]
        assert averaged == pytest.approx(np.mean(aurcs), rel=1e-12)


def test_tie_averaged_aurc_on_saturated_confidences():
    rng = np.random.default_rng(5)
    confidence = np.minimum(np.round(rng.uniform(0.6, 1.4, 400), 1), 1.0)  # half of them exactly 1
    correct = rng.random(400) < confidence**2
    found = judged(confidence, correct)["aurc_tie_averaged_x1000"]
    drawn = []
    for _ in range(1500):
        order = rng.permutation(400)
        drawn.append(1000 * risk_coverage(confidence[order], correct[order])[1].mean())
    error = np.std(drawn) / math.sqrt(len(drawn))
    assert 0 < error < 0.5
    assert abs(np.mean(drawn) - found) < 4 * error
    # and correct first, wrong first are as far apart as ties allow
    best, worst = (judged(confidence[o], correct[o])["aurc_x1000"] for o in (np.argsort(~correct), np.argsort(correct)))
    assert best < min(drawn) < found < max(drawn) < worst


def test_without_ties_the_average_is_the_aurc_itself():
    rng = np.random.default_rng(6)
    found = judged(rng.uniform(0.5, 1, 1000), rng.random(1000) < 0.7)
    assert found["aurc_tie_averaged_x1000"] == pytest.approx(found["aurc_x1000"], rel=1e-12)


def test_rejection_by_hand():
    assert rejection_for(0.8, CONFIDENCE, CORRECT) == 3 / 8  # 5 kept, 4 of them correct
    assert rejection_for(1.0, CONFIDENCE, CORRECT) == 6 / 8
    assert rejection_for(5 / 8, CONFIDENCE, CORRECT) == 0
    assert math.isnan(rejection_for(0.9, -CONFIDENCE, CORRECT))
    assert accuracy_at(0, CONFIDENCE, CORRECT) == 5 / 8
    assert accuracy_at(0.1, CONFIDENCE, CORRECT) == 5 / 8  # ceil(7.2) = 8 are kept
    assert accuracy_at(0.25, CONFIDENCE, CORRECT) == 4 / 6
    assert accuracy_at(0.99, CONFIDENCE, CORRECT) == 1


def test_the_kept_are_rounded_up_in_whole_numbers():
    for n, percent in product((7, 50, 100, 1000), range(100)):
        confidence = np.arange(n, 0, -1.0)
        kept = math.ceil((1 - Fraction(percent, 100)) * n)
        # only the most confident is correct, so the accuracy tells how many were kept
        assert accuracy_at(percent / 100, confidence, np.arange(n) == 0) == pytest.approx(1 / kept, rel=1e-12)


def test_another_confidence_ranks_but_leaves_accuracy_and_calibration():
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(0.51, 1, 200), rng.random(200) < 0.7
    shares, labels = two_classes(confidence, correct)
    plain, same = misclassification(shares, labels), misclassification(shares, labels, 10 * np.log(confidence))
    assert same == pytest.approx(plain)
    oracle = misclassification(shares, labels, correct.astype(float))
    assert (oracle["auroc_correct"], oracle["aupr_error"], oracle["fpr95_errors_accepted"]) == (1, 1, 0)
    assert oracle["aurc_x1000"] < plain["aurc_x1000"]
    for name in ("accuracy", "ece", "nll", "brier", "mean_confidence"):
        assert oracle[name] == plain[name]


def test_nothing_wrong_or_nothing_right_leaves_nothing_to_rank():
    right, wrong = judged(CONFIDENCE, np.ones(8, bool)), judged(CONFIDENCE, np.zeros(8, bool))
    for name in ("auroc_correct", "aupr_success", "aupr_error", "fpr95_errors_accepted"):
        assert math.isnan(right[name])
        assert math.isnan(wrong[name])
    assert (right["accuracy"], right["aurc_x1000"], right["e_aurc_x1000"]) == (1, 0, 0)
    assert (wrong["accuracy"], wrong["aurc_x1000"]) == (0, 1000)
    assert math.isnan(wrong["e_aurc_x1000"])


# --- feature-space uniformity ----------------------------------------------------------------------------------------


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_uniformity_equals_the_mean_over_pairs_and_skips_single_samples():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 5 + [1] * 2 + [3] * 9 + [7])  # class 7 has one sample, labels have gaps
    features = rng.uniform(0, 2, (17, 6))
    classes = [features[labels == k] for k in (0, 1, 3)]
    intra = np.mean([np.mean([cosine_distance(a, b) for a, b in permutations(rows, 2)]) for rows in classes])
    means = [rows.mean(axis=0) for rows in classes]
    inter = np.mean([cosine_distance(a, b) for a, b in permutations(means, 2)])
    found = feature_uniformity(features, labels)
    assert found == pytest.approx({"intra": intra, "inter": inter, "fsu": intra / inter})
    assert feature_uniformity(features.astype(np.float32), labels) == pytest.approx(found, rel=1e-5)


def test_uniformity_does_not_change_with_scale_and_rotation():
    rng = np.random.default_rng(1)
    features, labels = rng.normal(0.5, 1, (60, 5)), rng.integers(0, 4, 60)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    found = feature_uniformity(features, labels)
    assert feature_uniformity(1e3 * features, labels) == pytest.approx(found, rel=1e-9)
    assert feature_uniformity(features @ rotation, labels) == pytest.approx(found, rel=1e-9)
    assert feature_uniformity(features + 1, labels)["fsu"] != pytest.approx(found["fsu"], rel=1e-2)


def test_collapsed_classes_have_no_spread():
    features, labels = np.array([[1.0, 0], [2, 0], [0, 1], [0, 3]]), np.array([0, 0, 1, 1])
    assert feature_uniformity(features, labels) == pytest.approx({"intra": 0, "inter": 1, "fsu": 0})
    same = feature_uniformity(np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]]), labels)  # equal means: no division by 0
    assert same["inter"] == pytest.approx(0, abs=1e-12)
    assert same["fsu"] == pytest.approx(1e8, rel=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = np.array([0.1, 0.2, 0.3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    broken = np.array([0.1, bad, 0.3])
    with pytest.raises(MinerError, match=r"^ID scores: 1 of 3 are not finite"):
        ood(broken, GOOD)
    with pytest.raises(MinerError, match=r"^OOD scores: 1 of 3 are not finite"):
        ood_repeated(GOOD, broken, seed=0, ratio=1)
    with pytest.raises(MinerError, match=r"^confidence: 1 of 3 are not finite"):
        risk_coverage(broken, np.ones(3, bool))
    shares, labels = two_classes(np.array([0.9, 0.8, 0.7]), np.array([True, True, False]))
    with pytest.raises(MinerError, match=r"^confidence: 1 of 3 are not finite"):
        misclassification(shares, labels, broken)
    shares[1, 0] = bad
    with pytest.raises(MinerError, match=r"^probabilities: 1 of 6 are not finite"):
        misclassification(shares, labels)
    with pytest.raises(MinerError, match=r"^features: 1 of 4 are all zero or not finite"):
        feature_uniformity(np.array([[1.0, bad], [1, 1], [0, 1], [1, 0]]), np.array([0, 0, 1, 1]))


def test_empty_and_misshapen_input_is_refused():
    with pytest.raises(MinerError, match=r"^OOD scores: \[0\] of them"):
        ood(GOOD, np.array([]))
    with pytest.raises(MinerError, match=r"^ID scores: \[3, 1\] of them"):
        ood(GOOD[:, None], GOOD)
    with pytest.raises(MinerError, match=r"^confidence: \[3\] of them; \[2\] are needed"):
        accuracy_rejection(GOOD, np.ones(2, bool))
    shares, labels = two_classes(np.array([0.9, 0.8]), np.array([True, False]))
    with pytest.raises(MinerError, match=r"probabilities \[2, 2\], labels \[1\]"):
        misclassification(shares, labels[:1])
    with pytest.raises(MinerError, match="labels 0 to 2: the net has classes 0 to 1"):
        misclassification(shares, np.array([0, 2]))
    with pytest.raises(MinerError, match=r"features \[3\], labels \[3\]"):
        feature_uniformity(GOOD, np.array([0, 0, 1]))
    with pytest.raises(MinerError, match="1 classes with two samples"):
        feature_uniformity(np.eye(3), np.array([0, 0, 1]))
    with pytest.raises(MinerError, match="features: 1 of 4 are all zero"):
        feature_uniformity(np.array([[0.0, 0], [1, 1], [0, 1], [1, 0]]), np.array([0, 0, 1, 1]))
    with pytest.raises(MinerError, match="class means: 1 of 2 are all zero"):
        feature_uniformity(np.array([[1.0, 0], [-1, 0], [0, 1], [1, 0]]), np.array([0, 0, 1, 1]))


def test_a_softmax_over_the_reject_class_too_is_refused():
    exponentials = np.exp(np.array([[2, 0, -1, 0.5], [0.5, 1.5, 0, 1]]))
    late = (exponentials / exponentials.sum(axis=1, keepdims=True))[:, :3]
    with pytest.raises(MinerError, match="cut the reject output off before softmax"):
        misclassification(late, np.array([0, 2]))
    early = exponentials[:, :3] / exponentials[:, :3].sum(axis=1, keepdims=True)
    assert misclassification(early, np.array([0, 2]))["mean_confidence"] == pytest.approx(
        (0.843795 + 0.628532) / 2, abs=1e-6
    )


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="rule 'last': unknown; choose one of first, closest"):
        ood(GOOD, GOOD, "last")
    for settings in ({"repeats": 0}, {"ratio": 0}, {"ratio": 4}):
        with pytest.raises(UsageError, match="of 3 ID scores"):
            ood_repeated(GOOD, GOOD, seed=0, **settings)
    for target in (0, 1.1, math.nan):
        with pytest.raises(UsageError, match="target accuracy"):
            rejection_for(target, CONFIDENCE, CORRECT)
    for rejected in (-0.1, 1, math.nan):
        with pytest.raises(UsageError, match="rejected share"):
            accuracy_at(rejected, CONFIDENCE, CORRECT)
