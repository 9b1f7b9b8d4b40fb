"""One self-contained page: the HTML and plots (matplotlib, inline SVG) that ``pipelines.report`` puts in it.

Nothing is fetched and no script runs. The same values give the same bytes.
"""

import base64
import io
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, BLUE, ORANGE = "#1f2933", "#b8c2cc", "#2f6fb0", "#d9772b"
WIDTH = 4.8  # inches; with 9 pt letters a plot stays readable on a phone
_RC: Any = {
    "svg.hashsalt": "outlier-miner",  # else element ids are random
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class name may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
_CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6875; --line: #dde3e9; --card: #fff;
  --back: #f5f7f9; --accent: #2f6fb0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --soft: #9aa7b4; --line: #333c46; --card: #1d242b; --back: #14191e;
    --accent: #7db4ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 2px; }
p { margin: 2px 0 12px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin: 16px 0; }
dl div, .box, .plot { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
dl div { padding: 8px 12px; min-width: 0; }
dt { color: var(--soft); font-size: .78rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.boxes { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.box { padding: 8px 12px; overflow-x: auto; max-width: 100%; }
.boxes .box { flex: 1 1 auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 2px 0 4px; }
th, td { padding: 3px 12px 3px 0; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; color: var(--soft); border-top: 0; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th:last-child, td:last-child { padding-right: 0; }
.sheet { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 12px 10px; }
.tile { margin: 0; min-width: 0; font-size: .76rem; line-height: 1.35; color: var(--soft); }
.tile img { display: block; width: 100%; height: auto; border-radius: 4px; image-rendering: pixelated; }
.tile b { display: block; margin-top: 3px; color: var(--ink); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.tile span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 12px;
  align-items: start; }
.plot { margin: 0; padding: 8px; background: #fff; }
.plot svg { display: block; width: 100%; height: auto; max-width: 620px; margin: 0 auto; }
.plot figcaption { color: #1f2933; font-size: .87rem; font-weight: 600; padding: 0 4px 6px; }
summary { cursor: pointer; color: var(--accent); margin: 12px 0 8px; }
@media (max-width: 1000px) { .sheet { grid-template-columns: repeat(6, minmax(0, 1fr)); } }
@media (max-width: 720px) { .sheet { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  dl { grid-template-columns: repeat(2, 1fr); } .tile b, .tile span { white-space: normal; } }
@media (max-width: 520px) { .sheet { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # else a browser asks the server for one
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def section(name: str, title: str, intro: str, body: str) -> str:
    """A titled part of the page; ``name`` is its anchor, ``body`` is HTML."""
    return f'\n<section id="{name}"><h2>{escape(title)}</h2><p>{escape(intro)}</p>{body}</section>'


def folded(title: str, body: str, open_: bool = False) -> str:
    """``body`` (HTML) behind a line that opens it."""
    return f"<details{' open' * open_}><summary>{escape(title)}</summary>{body}</details>"


def grid(plots: Sequence[str]) -> str:
    """Plots beside each other, as many as fit."""
    return f'<div class="plots">{"".join(plots)}</div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Cards of a term and its value."""
    cards = (f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>" for term, value in pairs)
    return f"<dl>{''.join(cards)}</dl>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A boxed table; the first column holds names, the others figures."""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="box"><table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def tile(png: bytes, size: tuple[int, int], alt: str, hover: str, caption: Sequence[str]) -> str:
    """One picture, ``size`` (width, height) px, above its caption, whose first line is its name."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    name, *lines = (escape(line) for line in caption)
    rest = "".join(f'<span title="{line}">{line}</span>' for line in lines)
    return (
        f'<figure class="tile" title="{escape(hover)}">'
        f'<img src="{source}" width="{size[0]}" height="{size[1]}" alt="{escape(alt)}">'
        f'<figcaption><b title="{name}">{name}</b>{rest}</figcaption></figure>'
    )


def number(value: float | None) -> str:
    """Three significant digits, whole numbers from 1,000 on, a dash for what is not known."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- plots --------------------------------------------------------------------------------------------------


def histogram(weight: np.ndarray, chosen: np.ndarray, chosen_name: str) -> str:
    """Weights ``[n]`` above 0 in logarithmic bins, the ``chosen`` ones (bool ``[n]``) in front."""
    positive = weight > 0
    low, high = np.log10(weight[positive].min()), np.log10(weight[positive].max())
    if high - low < 0.1:  # equal weights: one bin in the middle
        low, high = low - 0.5, high + 0.5
    bins = np.logspace(low, high, 51)
    bins[0], bins[-1] = bins[0] * (1 - 1e-6), bins[-1] * (1 + 1e-6)

    def draw(axes: "Axes") -> None:
        axes.hist(weight[positive], bins.tolist(), color=GREY, label="eligible images")
        axes.hist(weight[positive & chosen], bins.tolist(), color=BLUE, label=chosen_name)
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.set_xlabel("weight (pool mean = 1)")
        axes.set_ylabel("images")
        axes.legend(loc="upper right")
        _plain_ticks(axes, "both")

    return plot("Histogram of the weights", 3.1, draw)


def ratio_bars(names: Sequence[str], ratio: np.ndarray, title: str) -> str:
    """Horizontal bars from 1 on a logarithmic axis, the first name on top."""
    ratio = np.maximum(ratio, 1e-6)
    places = -np.arange(len(names))

    def draw(axes: "Axes") -> None:
        colours = [BLUE if value >= 1 else ORANGE for value in ratio]
        axes.barh(places, ratio - 1, left=1.0, color=colours, height=0.75)
        axes.axvline(1.0, color=INK, linewidth=0.8)
        axes.set_xscale("log")
        span = max(float(np.abs(np.log10(ratio)).max()), 0.1)
        axes.set_xlim(10 ** min(np.log10(ratio.min()), -0.25 * span), 10 ** max(np.log10(ratio.max()), 0.25 * span))
        axes.set_xlabel("mean weight (pool mean = 1)")
        _plain_ticks(axes, "x")
        _names(axes, names, places)

    return plot(title, _height(len(names)), draw)


def share_bars(names: Sequence[str], pool: np.ndarray, subset: np.ndarray, subset_name: str, title: str) -> str:
    """Two horizontal bars a class, its share of the pool and of the subset, both in [0, 1]."""
    places = -np.arange(len(names))

    def draw(axes: "Axes") -> None:
        axes.barh(places + 0.2, 100 * pool, height=0.36, color=GREY, label="pool")
        axes.barh(places - 0.2, 100 * subset, height=0.36, color=BLUE, label=subset_name)
        axes.set_xlabel("share, %")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
        _names(axes, names, places)

    return plot(title, _height(len(names)), draw)


def lines(x: Sequence[int], curves: dict[str, list[float]], ylabel: str, title: str) -> str:
    """A value or several by round; rounds where one is not known are left out of its curve."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        for (name, y), colour in zip(curves.items(), (BLUE, GREY, ORANGE), strict=False):
            axes.plot(x, y, color=colour, marker="o", markersize=4, label=name)
        axes.set_xlabel("round")
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=GREY, linewidth=0.5, alpha=0.6)
        if len(curves) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)

    return plot(title, 2.6, draw)


def plot(title: str, height: float, draw: Any) -> str:
    """The SVG of one axes, in a figure element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), rc_context(_RC):
        # The browser's font may have what matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        return f'<figure class="plot"><figcaption>{escape(title)}</figcaption>{_svg(figure, title)}</figure>'


def _svg(figure: "Figure", title: str) -> str:
    """``figure`` as an inline element: no prologue, no links, no ids that plots would share."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _height(bars: int) -> float:
    return 0.75 + 0.19 * bars


def _names(axes: "Axes", names: Sequence[str], places: np.ndarray) -> None:
    axes.set_yticks(places, [name if len(name) <= 24 else name[:23] + "…" for name in names])
    axes.set_ylim(places[-1] - 0.6, 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _plain_ticks(axes: "Axes", which: str) -> None:
    """0.01 and 1000 instead of powers; on a short axis also the ticks between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in ("x", "y") if which == "both" else (which,):
        axis = getattr(axes, f"{name}axis")
        low, high = sorted(axis.get_view_interval())
        wide = high / max(low, 1e-30) > 100
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
