"""The tables of an evaluation: cells first, and results.md; the terminal and the page have their own look."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.judge import (
    CORRUPTED,
    FEATURES,
    FULL,
    ID,
    MEAN,
    MISCLASSIFICATION,
    NO_SCORE,
    OF_PROBABILITIES,
    REJECTION,
    REPEATED,
    Judged,
)
from trainers.metrics import MISD_METRICS, OOD_METRICS, UP

TRIPLE = ("auroc", "aupr_ood", "fpr95_ood_detected")
HOW = (
    "Every score is higher for images taken to be in-distribution (ID), and every metric says which side it is about: "
    "AUROC is the same for either. AUPR (aupr_ood) is average precision with OOD as the positives. FPR95 "
    "(fpr95_ood_detected) is the share of ID images flagged at the threshold that detects 95 % of the OOD images; "
    "fpr95_id_accepted is the share of OOD images accepted where 95 % of ID images are, tnr95_id_accepted what is left "
    "of them. Group means are over sets, unweighted; near, far and noise sets are never pooled. In the table of "
    "errors, AUROC, AUPR-error and FPR95 are about correct against wrong predictions on the ID test set (FPR95: the "
    "share of errors accepted where 95 % of the correct ones are), AURC and E-AURC are times 1,000."
)
PROTOCOLS = (
    "Protocol full: all images of both sides, threshold at the first point of at least 95 %. Protocol 1:5 (Outlier "
    "Exposure): a fifth as many OOD images as ID ones, drawn at random {repeats} times, mean ± standard deviation of "
    "these draws (which says nothing of training seeds), threshold at the point closest to 95 %."
)
_ERRORS = (
    ("accuracy\n↑", MISCLASSIFICATION, "accuracy"),
    ("AURC\n↓", MISCLASSIFICATION, "aurc_x1000"),
    ("E-AURC\n↓", MISCLASSIFICATION, "e_aurc_x1000"),
    ("AUROC\n↑", MISCLASSIFICATION, "auroc_correct"),
    ("AUPR\nerror ↑", MISCLASSIFICATION, "aupr_error"),
    ("FPR95\n↓", MISCLASSIFICATION, "fpr95_errors_accepted"),
    ("10 %\nout ↑", REJECTION, "accuracy_at_10_rejected"),
    ("99 %\nat ↓", REJECTION, "rejected_for_99_accuracy"),
)
_REJECTING = ("accuracy_at_10_rejected", "accuracy_at_20_rejected", "rejected_for_99_accuracy")
_UP: dict[str, bool | None] = UP | {
    "accuracy_at_10_rejected": True,
    "accuracy_at_20_rejected": True,
    "rejected_for_99_accuracy": False,
}


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint: the name it has in tables, its path and metadata, and what was found."""

    name: str
    path: Path
    meta: dict[str, Any]
    judged: Judged

    def value(self, score: str, group: str, set_name: str, protocol: str, metric: str) -> float:
        """One figure; NaN where there is none, as for the reject score of a checkpoint without a reject class."""
        owner = NO_SCORE if metric in OF_PROBABILITIES or protocol == FEATURES else score
        return self.judged.values.get((owner, group, set_name, protocol, metric), math.nan)


@dataclass(frozen=True)
class Table:
    """Cells as text, the first one of a row its name; the rows numbered in ``groups`` hold a mean.

    With ``parts`` each column of ``head`` but the first is one cell for each of these names.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    groups: frozenset[int] = frozenset()
    parts: tuple[str, ...] = ()


def cell(value: float, metric: str, digits: int = 1) -> str:
    """A figure as its table shows it: fractions in %, the rest in its own unit; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if metric in ("nll", "brier", "intra", "inter", "fsu"):
        return f"{value:.3f}"
    return f"{value:.{digits}f}" if metric.endswith("_x1000") else f"{100 * value:.{digits}f}"


def arrow(metric: str) -> str:
    """The metric's name and which way is better."""
    return f"{metric} {'↑' if _UP[metric] else '↓'}" if _UP.get(metric) is not None else metric


def scores_of(results: Sequence[Evaluated]) -> list[str]:
    """The scores that any of them was judged by."""
    return list(dict.fromkeys(score for result in results for score in result.judged.id_scores))


def summary(results: Sequence[Evaluated]) -> list[Table]:
    """What a terminal shows."""
    return [*detection(results), errors(results), *corrupted(results)]


def detection(results: Sequence[Evaluated]) -> list[Table]:
    """AUROC, AUPR and FPR95 a set: a column a score, or for several checkpoints a table a score, side by side."""
    if not results[0].judged.sets:
        return []
    scores = scores_of(results)
    return [_detection(results, part) for part in ([scores] if len(results) == 1 else [[one] for one in scores])]


def _rows(result: Evaluated) -> list[tuple[str, str, str]]:
    """(group, set, label) of each row of a detection table: a group's mean, then its sets."""
    rows = []
    for group, names in result.judged.groups.items():
        rows.append((group, MEAN, f"{group} (mean of {len(names)})"))
        rows += [(group, name, f"  {name}") for name in names]
    return rows


def _means(rows: Sequence[tuple[str, str, str]]) -> frozenset[int]:
    return frozenset(i for i, (_, name, _) in enumerate(rows) if name == MEAN)


def _detection(results: Sequence[Evaluated], scores: Sequence[str]) -> Table:
    """AUROC, AUPR and FPR95 a set, a column for each checkpoint and score."""
    columns = [(r, score) for r in results for score in scores if score in r.judged.id_scores]
    rows = _rows(results[0])
    cells = [
        [label, *(cell(r.value(score, group, name, FULL, m), m) for r, score in columns for m in TRIPLE)]
        for group, name, label in rows
    ]
    what = scores[0] if len(results) > 1 else results[0].name
    title = f"OOD detection, {what} (in %: AUROC ↑; AUPR = aupr_ood ↑; FPR95 = fpr95_ood_detected ↓, ID flagged)"
    head = ["", *(r.name if len(results) > 1 else score for r, score in columns)]
    return Table(title, head, cells, _means(rows), ("AUROC", "AUPR", "FPR95"))


def errors(results: Sequence[Evaluated]) -> Table:
    """Accuracy and misclassification detection, a row for each checkpoint and score."""
    rows = []
    for r in results:
        for score in r.judged.id_scores:
            label = f"{r.name}, {score}" if len(results) > 1 else score
            where = (score, ID, r.judged.id_name)
            rows.append([label, *(cell(r.value(*where, how, metric), metric) for _, how, metric in _ERRORS)])
    name = results[0].judged.id_name
    title = f"Errors on the ID test set, {name} (AURC × 1,000, the rest in %; FPR95 = fpr95_errors_accepted)"
    return Table(title, ["", *(name for name, _, _ in _ERRORS)], rows)


def severities(result: Evaluated) -> list[str]:
    """The groups of corrupted sets, one a severity; none when none were given."""
    return sorted({row.group for row in result.judged.rows if row.group.startswith(f"{CORRUPTED}-")})


def corrupted(results: Sequence[Evaluated]) -> list[Table]:
    """Accuracy, AURC and AUROC a severity, mean over the corruptions; nothing without corrupted sets."""
    groups, score = severities(results[0]), scores_of(results)[0]
    if not groups:
        return []
    metrics = ("accuracy", "aurc_x1000", "auroc_correct")
    rows = []
    for group in (*groups, CORRUPTED):
        label = f"severity {group.rpartition('-')[2]}" if group != CORRUPTED else "mean of all"
        where = (score, group, MEAN, MISCLASSIFICATION)
        rows.append([label, *(cell(r.value(*where, metric), metric) for r in results for metric in metrics)])
    title = f"Corrupted ID test set, {score}, mean of the corruptions (accuracy ↑ and AUROC ↑ in %, AURC ↓ × 1,000)"
    head = ["", *(r.name for r in results)]
    return [Table(title, head, rows, frozenset([len(groups)]), ("acc.", "AURC", "AUROC"))]


# --- everything, for results.md and the page ------------------------------------------------------------------


def complete(result: Evaluated, score: str) -> list[Table]:
    """Every OOD metric of one checkpoint and score, by either protocol."""
    rows, tables = _rows(result), []
    for protocol in (FULL, REPEATED):
        cells = [[label, *_figures(result, score, group, name, protocol)] for group, name, label in rows]
        head = ["", *(arrow(metric) for metric in OOD_METRICS)]
        tables.append(Table(f"{result.name}, {score}, protocol {protocol}", head, cells, _means(rows)))
    return tables if rows else []


def _figures(result: Evaluated, score: str, group: str, name: str, protocol: str) -> list[str]:
    cells = []
    for metric in OOD_METRICS:
        text = cell(result.value(score, group, name, protocol, metric), metric, 2)
        spread = result.value(score, group, name, protocol, f"{metric}_std")
        cells.append(text if math.isnan(spread) else f"{text} ± {cell(spread, metric, 2)}")
    return cells


def errors_complete(results: Sequence[Evaluated]) -> list[Table]:
    """Every misclassification metric, feature uniformity, and each corruption's accuracy."""
    ranking = [metric for metric in MISD_METRICS if metric not in OF_PROBABILITIES]
    rows, own = [], []
    for r in results:
        where = (ID, r.judged.id_name)
        for score in r.judged.id_scores:
            cells = [cell(r.value(score, *where, MISCLASSIFICATION, metric), metric, 2) for metric in ranking]
            cells += [cell(r.value(score, *where, REJECTION, metric), metric, 2) for metric in _REJECTING]
            rows.append([f"{r.name}, {score}", *cells])
        cells = [cell(r.value("", *where, MISCLASSIFICATION, metric), metric, 2) for metric in OF_PROBABILITIES]
        cells += [cell(r.value("", *where, FEATURES, metric), metric) for metric in ("intra", "inter", "fsu")]
        own.append([r.name, *cells])
    tables = [
        Table("Classifiers", ["", *map(arrow, OF_PROBABILITIES), "π_intra", "π_inter", "FSU"], own),
        Table("Misclassification detection", ["", *map(arrow, [*ranking, *_REJECTING])], rows),
    ]
    return tables + [table for result in results for table in _each_corruption(result, scores_of(results)[0])]


def _each_corruption(result: Evaluated, score: str) -> list[Table]:
    names = list(dict.fromkeys(row.set for row in result.judged.rows if row.group == CORRUPTED))
    if not names:
        return []
    metrics = ("accuracy", "ece", "aurc_x1000", "auroc_correct", "fpr95_errors_accepted")
    rows = [
        [
            name,
            *(cell(result.value(score, CORRUPTED, name, MISCLASSIFICATION, metric), metric, 2) for metric in metrics),
        ]
        for name in names
    ]
    title = f"{result.name}, {score}, corruptions: mean of the five severities"
    return [Table(title, ["", *map(arrow, metrics)], rows, frozenset([names.index(MEAN)]))]


# --- results.md --------------------------------------------------------------------------------------------------


def columns_of(table: Table) -> list[str]:
    """One name for each cell of a row."""
    parts = table.parts or ("",)
    return [table.head[0], *(f"{name} {part}" for name in table.head[1:] for part in parts)]


def markdown(table: Table) -> str:
    """A pipe table under its title."""
    head = _plain(columns_of(table))
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for i, row in enumerate(table.rows):
        lines.append([f"**{text}**" for text in _plain(row)] if i in table.groups else _plain(row))
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{table.title}**\n\n{body}\n"


def _plain(row: Sequence[str]) -> list[str]:
    return [" ".join(text.split()).replace("|", "\\|") for text in row]


def report(results: Sequence[Evaluated], repeats: int) -> str:
    """results.md: the summary, how to read it, and every figure."""
    names = [[r.name, *about(r)] for r in results]
    head = ["checkpoint", "method", "model", "ID set", "classes", "outliers"]
    parts = [
        "# Evaluation",
        markdown(Table("Checkpoints", head, names)),
        HOW,
        "Figures are in % unless another unit is named.",
    ]
    parts += [markdown(table) for table in summary(results)]
    parts += ["## Every figure", PROTOCOLS.format(repeats=repeats)]
    parts += [markdown(table) for table in errors_complete(results)]
    parts += [markdown(t) for r in results for score in r.judged.id_scores for t in complete(r, score)]
    return "\n".join(f"{part}\n" if not part.endswith("\n") else part for part in parts)


def about(result: Evaluated) -> list[str]:
    """Method, model, ID set, number of classes and outliers of a checkpoint, as it tells them."""
    meta = result.meta
    outliers = meta.get("outliers", {})
    told = "none" if outliers is None else "–"
    if outliers:
        told = f"{outliers.get('name', outliers.get('kind'))}, {outliers.get('count', 0):,}"
    return [str(meta.get("method", "–")), meta["model"], result.judged.id_name, str(len(meta["classes"])), told]
