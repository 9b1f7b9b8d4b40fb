"""The plots of a comparison: forest of paired differences, bars by set or method, curves over gamma."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipelines import page as paper
from pipelines.compare_stats import Difference
from pipelines.page import BLUE, GREY, INK, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, ORANGE, "#3a8f5c", "#8a5aa8", "#b8433f", "#c9a227", "#3aa0a8", "#8c6d4f", "#d47fb0", "#5b6875")
OF = {"none": GREY, "full": INK, "random": "#8795a3", "mined": BLUE}
NAME, LINES = 26, 3  # most characters of a line of a name beside an axis, and lines


class Series(NamedTuple):
    """Mean and std ``[n]`` of what one colour shows; NaN where there is none."""

    name: str
    mean: Sequence[float]
    std: Sequence[float]


def colours(selectors: Sequence[str]) -> dict[str, str]:
    """A colour a selector, the same in every plot."""
    others = [name for name in selectors if name not in OF]
    return OF | {name: COLOURS[1 + i % (len(COLOURS) - 1)] for i, name in enumerate(others)}


def wrapped(name: str) -> str:
    """A long selector on several lines."""
    lines = textwrap.wrap(name.replace(":", ": ").replace(",", ", "), NAME, break_long_words=True)
    return "\n".join(lines[:LINES]) + ("…" if len(lines) > LINES else "")


def forest(title: str, xlabel: str, rows: Mapping[str, Mapping[str, Difference]], scale: float) -> str:
    """A row a name, a colour a gamma: the mean difference, its bootstrap (thick) and t interval (thin).

    Filled where neither interval holds zero. A t interval that leaves the axis is cut off there.
    """
    labels = list(dict.fromkeys(label for found in rows.values() for label in found))
    colour = dict(zip(labels, COLOURS, strict=False))
    step = 0.8 / max(len(labels), 1)
    ends = [scale * x for found in rows.values() for d in found.values() for x in (d.mean, *d.bootstrap)]
    reach = max([abs(x) for x in ends if np.isfinite(x)] + [0.1])

    def draw(axes: "Axes") -> None:
        axes.axvline(0, color=INK, linewidth=0.8)
        for i, found in enumerate(rows.values()):
            for j, label in enumerate(labels):
                if label in found:
                    _interval(axes, found[label], -i - step * (j - (len(labels) - 1) / 2), colour[label], scale)
        limit = 1.6 * reach
        axes.set_xlim(-limit, limit)
        _rows(axes, list(rows))
        axes.set_xlabel(xlabel)
        axes.grid(axis="x", color=GREY, linewidth=0.5, alpha=0.5)
        for label in labels:
            axes.plot([], [], color=colour[label], marker="o", markersize=4, label=label)
        _legend(axes, len(labels))

    tallest = max(wrapped(name).count("\n") for name in rows)
    return paper.plot(title, 0.95 + len(rows) * max(0.16 + 0.12 * len(labels), 0.14 * (tallest + 1)), draw)


def _interval(axes: "Axes", found: Difference, y: float, colour: str, scale: float) -> None:
    if found.n > 1:
        axes.plot([scale * x for x in found.t], [y, y], color=colour, linewidth=0.9)
        axes.plot([scale * x for x in found.bootstrap], [y, y], color=colour, linewidth=2.6)
    face = colour if found.shown else "white"
    axes.plot([scale * found.mean], [y], marker="o", markersize=4.5, color=colour, markerfacecolor=face, zorder=3)


def bars(
    title: str, xlabel: str, names: Sequence[str], series: Sequence[Series], colour: Mapping[str, str], low: float = 0.0
) -> str:
    """Horizontal bars in %, a group a name and a colour a series, from ``low``; whiskers are standard deviations."""
    height = 0.84 / max(len(series), 1)
    found = [value for one in series for value in one.mean if np.isfinite(value)]
    top = max([*(v + s for one in series for v, s in zip(one.mean, np.nan_to_num(one.std), strict=True)), *found])

    def draw(axes: "Axes") -> None:
        for j, one in enumerate(series):
            y = -np.arange(len(names)) - height * (j - (len(series) - 1) / 2)
            mean, std = np.array(one.mean), np.nan_to_num(np.array(one.std))
            axes.barh(y, mean - low, left=low, height=0.88 * height, color=colour[one.name], label=wrapped(one.name))
            axes.errorbar(mean, y, xerr=std, fmt="none", ecolor=INK, elinewidth=0.7)
        axes.set_xlim(low, min(100.0, top + 0.03 * (top - low)))
        _rows(axes, names)
        axes.set_xlabel(xlabel)
        axes.grid(axis="x", color=GREY, linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
        _legend(axes, len(series))

    return paper.plot(title, 0.9 + 0.16 * -(-len(series) // 3) + len(names) * (0.14 + 0.085 * len(series)), draw)


def over_gamma(
    title: str, ylabel: str, gammas: Sequence[float], series: Sequence[Series], colour: Mapping[str, str], none: float
) -> str:
    """A curve a series over gamma (a logarithmic axis), NaN left out; ``none`` is a dotted line where it is known."""

    def draw(axes: "Axes") -> None:
        if np.isfinite(none):
            axes.axhline(none, color=GREY, linestyle=":", label="none")
        for one in series:
            mean, std = np.array(one.mean), np.nan_to_num(np.array(one.std))
            known = np.isfinite(mean)
            x = np.array(gammas)[known]
            axes.errorbar(
                x, mean[known], std[known], color=colour[one.name], marker="o", markersize=4, capsize=2,
                linewidth=1.3, label=wrapped(one.name),
            )  # fmt: skip
        _gamma_axis(axes, gammas)
        axes.set_ylabel(ylabel)
        _legend(axes, len(series) + 1)

    return paper.plot(title, 2.8 + 0.16 * -(-len(series) // 3), draw)


def overlaps(title: str, gammas: Sequence[float], curves: Mapping[str, Sequence[float]]) -> str:
    """Overlap (IoU) of the heaviest images over gamma, a curve a kind of pair, and what chance gives."""

    def draw(axes: "Axes") -> None:
        for (name, y), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot(gammas, y, color=colour, linewidth=1.4, label=name)
        axes.plot(gammas, [g / (2 - g) for g in gammas], color=INK, linewidth=0.9, linestyle=":", label="chance")
        _gamma_axis(axes, [0.001, 0.01, 0.1, 1.0])
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("overlap (IoU)")
        _legend(axes, len(curves) + 1)

    return paper.plot(title, 2.9, draw)


def _gamma_axis(axes: "Axes", ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("γ")
    axes.grid(color=GREY, linewidth=0.5, alpha=0.5)


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(-np.arange(len(names)), [wrapped(name) for name in names], fontsize=8)
    axes.set_ylim(-len(names) + 0.45, 0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _legend(axes: "Axes", entries: int) -> None:
    figure: Any = axes.figure
    if entries > 1:
        figure.legend(loc="outside upper left", ncols=min(entries, 3), fontsize=8, handlelength=1.4)
