"""What came out beside what was published: the mean over all test sets, noise among them, as the paper has it."""

from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq

from benchmarks.paper.steps import Paper, Result, results

METRICS = ("fpr95_ood_detected", "auroc", "aupr_ood")
PUBLISHED = {  # table 2, WRN-40-4, ILSVRC-12: FPR95, AUROC, AUPR of six sets, in %
    ("cifar10", "none", 0.0): (31.45, 90.72, 62.77),
    ("cifar10", "full", 1.0): (2.21, 99.41, 95.06),
    ("cifar10", "random", 0.1): (2.85, 99.14, 92.92),
    ("cifar10", "reference", 0.1): (1.94, 99.37, 94.16),
    ("cifar100", "none", 0.0): (54.81, 76.71, 33.98),
    ("cifar100", "full", 1.0): (8.51, 97.03, 81.16),
    ("cifar100", "random", 0.1): (11.08, 96.08, 76.17),
    ("cifar100", "reference", 0.1): (6.40, 97.76, 83.75),
}


def figures(result: Result) -> list[float]:
    """FPR95 (ID flagged), AUROC and AUPR (OOD) in % by the 1:5 protocol, unweighted mean over the OOD sets."""
    columns = ["score", "group", "set", "protocol", "metric", "value"]
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for row in pq.read_table(result.path / "results.parquet", columns=columns).to_pylist():
        if (row["score"], row["protocol"]) == ("msp", "1:5") and row["set"] != "mean" and row["metric"] in values:
            values[row["metric"]].append(100 * row["value"])
    return [float(np.mean(values[metric])) for metric in METRICS]


def table(config: Paper) -> str:
    """Markdown: a row for each ID set, model, selector and gamma; mean ± standard deviation over seeds."""
    rows: dict[tuple[str, str, str, float], list[list[float]]] = {}
    for result in results(config):
        key = (result.id, result.model, result.selector, result.gamma)
        rows.setdefault(key, []).append(figures(result))
    head = "| ID | model | background | gamma | FPR95 ↓ | AUROC ↑ | AUPR ↑ | published |"
    lines = [head, "|---" * head.count(" | ") + "|---|"]
    for (id_name, model, selector, gamma), found in rows.items():
        theirs = PUBLISHED.get((id_name, selector, gamma)) if (config.scale, model) == ("paper", "wrn-40-4") else None
        told = " / ".join(f"{value:.2f}" for value in theirs) if theirs else "–"
        cells = " | ".join(spread(values) for values in zip(*found, strict=True))
        lines.append(f"| {id_name} | {model} | {selector} | {gamma:g} | {cells} | {told} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (ddof 1); the value alone where there is one."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")
