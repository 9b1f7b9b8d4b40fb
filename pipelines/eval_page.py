"""The page of an evaluation: ROC and PR curves, score histograms, risk-coverage and accuracy-rejection curves.

One self-contained file, like that of ``pipelines.report``. Curves of a group are means over its sets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from pipelines import eval_tables as tables
from pipelines import page as paper
from pipelines.eval_tables import Evaluated, Table
from pipelines.judge import FULL, MEAN, MISCLASSIFICATION
from pipelines.page import BLUE, GREY, INK, ORANGE
from trainers.metrics import accuracy_rejection, risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, ORANGE, "#3a8f5c", "#8a5aa8", "#b8433f", "#c9a227", "#3aa0a8", "#8c6d4f", "#d47fb0", "#5b6875")
OF_GROUP = {"near": ORANGE, "far": BLUE, "noise": "#3a8f5c"}
DASHES = ("-", "--", ":", "-.")
FLAGGED = np.linspace(0, 1, 201) ** 2  # finer where few ID images are flagged
RECALL = np.linspace(0.005, 1, 200)
BINS = 60
KEPT = 20  # images; the accuracy of fewer is noise
MOST = 8  # curves in one plot; of more, only those of the first score are drawn


def roc(id_scores: np.ndarray, ood_scores: np.ndarray) -> np.ndarray:
    """Shares of ID flagged (FLAGGED) and of OOD detected there, float64 [2, 201]."""
    flagged, detected, _ = roc_curve(*_ood_positive(id_scores, ood_scores))
    return np.stack([FLAGGED, np.interp(FLAGGED, flagged, detected)])


def precision_recall(id_scores: np.ndarray, ood_scores: np.ndarray) -> np.ndarray:
    """Recalls of OOD (RECALL) and the precision there, in steps as average precision has them, float64 [2, 200]."""
    precision, recall, _ = precision_recall_curve(*_ood_positive(id_scores, ood_scores))
    return np.stack([RECALL, precision[::-1][np.searchsorted(recall[::-1], RECALL - 1e-12)]])


def _ood_positive(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(id_scores) + len(ood_scores)) >= len(id_scores), -np.concatenate([id_scores, ood_scores])


@dataclass(frozen=True)
class Kind:
    """A plot of curves: its title, axes, and the metric that is the area under a curve."""

    title: str
    xlabel: str
    ylabel: str
    metric: str = ""  # of DETECTION
    curve: Callable[[np.ndarray, np.ndarray], np.ndarray] = roc


class Line(NamedTuple):
    """A curve (x, y) float64 [2, n] in [0, 1], and the numbers of its colour and dashes."""

    label: str
    xy: np.ndarray
    colour: int
    dash: int = 0


DETECTION = (
    Kind("ROC", "ID flagged, %", "OOD detected, %", "auroc", roc),
    Kind("Precision and recall", "recall of OOD, %", "precision, %", "aupr_ood", precision_recall),
)
RISK = Kind("Risk and coverage", "coverage, %", "errors among the kept, %")
REJECTION = Kind("Accuracy and rejection", "rejected, %", "accuracy of the kept, %")


def page(results: Sequence[Evaluated], repeats: int) -> str:
    """A whole HTML document."""
    names = ", ".join(result.name for result in results)
    head = ["", "method", "model", "ID set", "classes", "outliers", "accuracy"]
    rows = [[r.name, *tables.about(r), f"{r.judged.correct.mean():.1%}"] for r in results]
    body = f'<h1>{escape(f"Evaluation of {names}")}</h1><div class="boxes">{paper.table("", head, rows)}</div>'
    body += _detection(results) + _sets(results) + _errors(results) + _corrupted(results)
    full = tables.errors_complete(results)
    full += [table for r in results for score in r.judged.id_scores for table in tables.complete(r, score)]
    told = tables.PROTOCOLS.format(repeats=repeats)
    body += paper.section("all", "Every figure", told, _folded("Tables", _tables(full)))
    return paper.page(f"Evaluation of {names}", body)


def _folded(title: str, body: str, open_: bool = False) -> str:
    return f"<details{' open' * open_}><summary>{escape(title)}</summary>{body}</details>"


def _plots(plots: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(plots)}</div>'


def _tables(found: Sequence[Table]) -> str:
    return f'<div class="boxes" style="margin-bottom: 12px">{"".join(map(_table, found))}</div>'


def _table(table: Table) -> str:
    """A boxed table with its parts under their column, means in bold."""
    parts = table.parts
    span = f' colspan="{len(parts)}" style="text-align: center"' if parts else ""
    top = "<th></th>" + "".join(f'<th scope="col"{span}>{escape(name)}</th>' for name in table.head[1:])
    if parts:
        names = "".join(f'<th scope="col">{escape(name)}</th>' for name in parts) * (len(table.head) - 1)
        top += f"</tr><tr><th></th>{names}"
    body = ""
    for i, row in enumerate(table.rows):
        cells = [f"<b>{escape(text)}</b>" if i in table.groups else escape(text) for text in row]
        inset = ' style="padding-left: 1em"' if row[0].startswith(" ") else ""
        body += f"<tr><td{inset}>{cells[0]}</td>" + "".join(f"<td>{text}</td>" for text in cells[1:]) + "</tr>"
    caption = f"<caption>{escape(table.title)}</caption>"
    return f'<div class="box"><table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# --- parts of the page ------------------------------------------------------------------------------------------


def _compared(results: Sequence[Evaluated]) -> list[tuple[Evaluated, str, str, int, int]]:
    """What one plot compares: checkpoint, score, label, colour (a checkpoint's, or with one a score's) and dashes."""
    scores = tables.scores_of(results)
    both = [(i, r, score) for i, r in enumerate(results) for score in r.judged.id_scores]
    if len(both) > MOST:
        both = [(i, r, scores[0]) for i, r in enumerate(results)]
    if len(results) == 1:
        return [(r, score, score, scores.index(score), 0) for _, r, score in both]
    alone = len({score for _, _, score in both}) == 1
    return [(r, s, r.name if alone else f"{r.name}, {s}", i, scores.index(s)) for i, r, s in both]


def _curve(kind: Kind, result: Evaluated, score: str, group: str, names: Sequence[str]) -> np.ndarray:
    """The mean of the curves of a group's sets: the area under it is the mean of theirs."""
    judged = result.judged
    return np.mean([kind.curve(judged.id_scores[score], judged.sets[group, name][score]) for name in names], axis=0)


def _detection(results: Sequence[Evaluated]) -> str:
    """Tables, and for each group its mean ROC and PR curve."""
    plots = []
    for group, names in results[0].judged.groups.items():
        for kind in DETECTION:
            lines = []
            for r, score, label, *look in _compared(results):
                told = _with(label, r.value(score, group, MEAN, FULL, kind.metric))
                lines.append(Line(told, _curve(kind, r, score, group, names), *look))
            what = f"mean of {len(names)} sets" if len(names) > 1 else names[0]
            plots.append(_curves(kind, f"{kind.title}, {group} ({what})", lines))
    intro = (
        "Higher AUROC and AUPR and lower FPR95 are better. FPR95 is the share of ID images flagged where 95 % of the "
        "OOD images are detected. Group means are over sets, unweighted; so are their curves."
    )
    body = _folded("How every figure is meant", f"<p>{escape(tables.HOW)}</p>")
    body += _tables(tables.detection(results)) + _plots(plots)
    return paper.section("detection", "OOD detection", intro, body) if plots else ""


def _with(name: str, value: float) -> str:
    return f"{name}  {100 * value:.1f}"


def _sets(results: Sequence[Evaluated]) -> str:
    """Histograms and curves of each set, folded but for the first checkpoint and score."""
    body = ""
    for r in results:
        for score in r.judged.id_scores if r.judged.sets else ():
            plots = [_set_curves(r, score, group, kind) for group in r.judged.groups for kind in DETECTION]
            body += _folded(f"{r.name}, {score}", _plots([*plots, _strips(r, score)]), open_=not body)
    intro = "Scores are higher for ID. Each histogram is scaled to its peak; figures beside names are AUROC, AUPR in %."
    return paper.section("sets", "Set by set", intro, body) if body else ""


def _set_curves(result: Evaluated, score: str, group: str, kind: Kind) -> str:
    """A curve for each set of a group."""
    lines = []
    for i, name in enumerate(result.judged.groups[group]):
        label = _with(name, result.value(score, group, name, FULL, kind.metric))
        lines.append(Line(label, _curve(kind, result, score, group, [name]), i, i // len(COLOURS)))
    return _curves(kind, f"{kind.title}, {group} sets", lines)


def _errors(results: Sequence[Evaluated]) -> str:
    """Risk-coverage and accuracy-rejection curves."""
    risks, accuracies = [], []
    for r, score, label, *look in _compared(results):
        confidence, correct = r.judged.id_scores[score], r.judged.correct
        risks.append(Line(label, _thinned(*risk_coverage(confidence, correct)), *look))
        rejected, accuracy = accuracy_rejection(confidence, correct)
        kept = max(len(rejected) - KEPT, 1)
        accuracies.append(Line(label, _thinned(rejected[:kept], accuracy[:kept]), *look))
    plots = [_curves(RISK, RISK.title, risks), _curves(REJECTION, REJECTION.title, accuracies)]
    intro = (
        "The ID test images, ranked by the score as a confidence. Risk is the share of errors among the most confident "
        "images, its mean over all coverages AURC. 10 % out: accuracy when the least confident tenth is rejected. "
        "99 % at: the smallest share to reject for an accuracy of 99 %."
    )
    return paper.section("errors", "Errors and rejection", intro, _tables([tables.errors(results)]) + _plots(plots))


def _corrupted(results: Sequence[Evaluated]) -> str:
    """Accuracy and AUROC by severity, when corrupted sets were given."""
    groups, score = tables.severities(results[0]), tables.scores_of(results)[0]
    if not groups:
        return ""
    x = [int(group.rpartition("-")[2]) / 100 for group in groups]
    plots = []
    for metric, name in (("accuracy", "Accuracy"), ("auroc_correct", "AUROC of correct against wrong")):
        lines = []
        for i, r in enumerate(results):
            y = [r.value(score, group, MEAN, MISCLASSIFICATION, metric) for group in groups]
            lines.append(Line(r.name, np.array([x, y]), i))
        plots.append(_curves(Kind(name, "severity", f"{name}, %"), f"{name} by severity", lines))
    found = _tables(tables.corrupted(results))
    return paper.section("corrupted", "Corrupted ID images", "", found + _plots(plots))


# --- plots ----------------------------------------------------------------------------------------------------


def _thinned(x: np.ndarray, y: np.ndarray, points: int = 300) -> np.ndarray:
    """At most ``points`` of a curve, its ends among them."""
    return np.stack([x, y])[:, np.unique(np.linspace(0, len(x) - 1, points).astype(int))]


def _curves(kind: Kind, title: str, lines: Sequence[Line]) -> str:
    """The lines, drawn in %, above their legend."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        for line in lines:
            colour, dash = COLOURS[line.colour % len(COLOURS)], DASHES[line.dash % len(DASHES)]
            axes.plot(*(100 * line.xy), dash, color=colour, linewidth=1.4, label=line.label)
        axes.set_xlabel(kind.xlabel)
        axes.set_ylabel(kind.ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))  # severities are whole numbers
        if kind.metric:
            axes.set_ylim(-3, 103)
        axes.grid(color=GREY, linewidth=0.5, alpha=0.5)
        longest = max(len(line.label) for line in lines)
        figure: Any = axes.figure
        figure.legend(loc="outside lower center", ncols=1 if longest > 32 else 2, fontsize=8, handlelength=2.2)

    return paper.plot(title, 3.1 + 0.085 * len(lines), draw)


def _strips(result: Evaluated, score: str) -> str:
    """One strip a set: its histogram in front of that of the ID test set, on one axis."""
    inside = result.judged.id_scores[score]
    sets = list(result.judged.sets.items())
    low, high = np.percentile(np.concatenate([inside, *(of[score] for _, of in sets)]), [0.1, 99.9])
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    names = [_with(name, result.value(score, group, name, FULL, "auroc")) for (group, name), _ in sets]
    bars = _heights(inside, edges)

    def draw(axes: "Axes") -> None:
        for i, ((group, _), of) in enumerate(sets):
            axes.stairs(bars - i, edges, baseline=-i, color=GREY, fill=True)
            colour = OF_GROUP.get(group, INK)
            axes.stairs(_heights(of[score], edges) - i, edges, baseline=-i, color=colour, fill=True, alpha=0.35)
            axes.stairs(_heights(of[score], edges) - i, edges, baseline=-i, color=colour, linewidth=1)
        axes.set_yticks(-np.arange(len(sets)) + 0.25, [n if len(n) <= 26 else f"{n[:18]}… {n[-6:]}" for n in names])
        axes.set_ylim(-len(sets) + 0.9, 1.05)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{score} (grey: {result.judged.id_name} test set)")

    return paper.plot(f"Histograms of {score}, and AUROC", 0.8 + 0.4 * len(sets), draw)


def _heights(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return 0.85 * counts / max(counts.max(), 1)
