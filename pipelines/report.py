"""Write RUN/report.html: what a finished run kept, what it left out and why, with the images themselves.

    python -m pipelines.report runs/demo-hedge-s0

One file that needs no network. It is made from the run directory, the pool and the ID set alone.
"""

import os
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from miner.files import Place, place
from miner.images import decode, dimensions, png
from miner.ranking import spearman
from miner.run_dir import write_file
from pipelines import page
from pipelines.page import number

if TYPE_CHECKING:
    from pipelines.finished import Run  # brings torch along, for which --help should not wait

TILES = 24  # images a contact sheet
REMOVED = 16  # images on a sheet of what the leak guard left out
TILE = 64  # pixels a side of an image on a sheet
GAP = 4
BARS = 15  # classes at either end
SAMPLE = 1_000_000  # rows that the rank correlation looks at, at most


def write_report(run: str | os.PathLike[str] | Place) -> Place:
    """Write ``run``/report.html, atomically, and return its path. Raises MinerError as ``Run.open`` does."""
    from pipelines.finished import Run

    opened = Run.open(place(run))
    body = header(opened) + sheets(opened) + classes(opened) + weights(opened) + rounds(opened)
    target = opened.path / "report.html"
    write_file(target, page.page(f"{opened.summary['pool']} mined for {opened.summary['id']}", body).encode())
    return target


# --- what was run -------------------------------------------------------------------------------------------


def header(run: "Run") -> str:
    """What was mined for whom, how many images were kept and left out, and what it took."""
    s = run.summary
    accuracy = f"{s['accuracy']:.1%} of test images" if s["accuracy"] is not None else "accuracy not known"
    cards = [
        ("pool", s["pool"]),
        ("images in the pool", f"{s['images']:,}"),
        ("eligible", f"{int(run.eligible.sum()):,}"),
        ("ID set", s["id"]),
        ("classifier", f"{s['model']}, {accuracy}"),
        ("rule", s["rule"]),
        ("rounds", str(s["rounds"])),
        ("N, which γ is a share of", f"{s['n']:,}"),
    ]
    if run.pool.licence:
        cards.append(("licence", run.pool.licence))
    subsets = [
        [
            name,
            number(x["gamma"]),
            f"{x['count']:,}",
            number(x["effective_sample_size"]),
            f"{x['clipped_share']:.2%}",
        ]
        for name, x in s["subsets"].items()
    ]
    head = ["subset", "γ", "|S|", "effective sample size", "clipped"]
    out = [[reason, f"{n:,}", f"{n / max(s['images'], 1):.1%}"] for reason, n in s["excluded"].items()]
    seconds = [[phase, f"{value:,.1f}"] for phase, value in s["seconds"].items()]
    tables = page.table("Subsets", head, subsets)
    tables += page.table("Left out", ["reason", "images", "of the pool"], out)
    tables += page.table("Time", ["phase", "seconds"], seconds)
    if s["undecodable"]:
        tables += page.table("Did not decode (the first ones)", ["image"], [[line] for line in s["undecodable"]])
    title = page.escape(f"Pool {s['pool']}, mined for {s['id']}")
    return f'<h1>{title}</h1>{page.facts(cards)}<div class="boxes">{tables}</div>'


# --- images -------------------------------------------------------------------------------------------------


def sheets(run: "Run") -> str:
    """Contact sheets: heaviest, median and lightest eligible images, and what the leak guard left out."""
    rows = np.flatnonzero(run.eligible)
    order = rows[np.argsort(-run.weight[rows], kind="stable")]
    n = len(order)
    k = min(TILES, -(-n // 3))
    middle = (n - k) // 2
    pair = "Left: the pool's image. Right: the ID image nearest to it for the frozen classifier, named last."
    text = sheet(run, "heaviest", "Heaviest images", f"The largest weights, falling. {pair}", order[:k])
    text += sheet(run, "median", "Median images", "From the middle of the ranking by weight.", order[middle:][:k])
    text += sheet(run, "lightest", "Lightest images", "The smallest weights, rising.", order[::-1][:k])
    removed = np.flatnonzero(run.near_id)
    if len(removed):
        hard = removed[np.argsort(-np.nan_to_num(run.loss[removed], nan=-1.0), kind="stable")][:REMOVED]
        cosine = run.table["nn50_id_cosine"].to_numpy()[removed]
        near = removed[np.argsort(-np.nan_to_num(cosine, nan=-1.0), kind="stable")][:REMOVED]
        what = f"Of {len(removed):,} images near ID, those that would have been "
        text += sheet(
            run,
            "guard-hard",
            "Left out by the leak guard: highest loss",
            what + "the hardest outliers.",
            hard,
        )
        told = "Nearest by the cosine that the guard judges by, that of the 50th ID neighbour."
        text += sheet(run, "guard-near", "Left out by the leak guard: nearest to ID", told, near)
    return text


def sheet(run: "Run", name: str, title: str, intro: str, rows: np.ndarray) -> str:
    """One contact sheet of the table's ``rows``, in that order."""
    records = run.table.take(pa.array(rows)).to_pylist()
    tiles = [_tile(run, int(row), record) for row, record in zip(rows, records, strict=True)]
    return page.section(name, title, intro, f'<div class="sheet">{"".join(tiles)}</div>')


def _tile(run: "Run", row: int, record: dict[str, Any]) -> str:
    name = run.class_name(int(run.label[row]))
    image = fitted(run.pool.read(record["shard"], [record["row"]])[0])
    near, nearest = record["nn_id_row"], "no ID image"
    if near is not None:
        id_class = run.id_set.classes[run.id_set.train_labels[near]]
        nearest = f"{id_class}, cos {record['nn_id_cosine']:.2f}"
        gap = np.full((TILE, GAP, 3), 255, np.uint8)
        image = np.concatenate([image, gap, square(run.id_set.train_images[near])], axis=1)
    first = f"weight {number(record['weight'])}" if run.eligible[row] else f"50th cos {record['nn50_id_cosine']:.2f}"
    caption = (name, first, f"loss {number(float(run.loss[row]))}", nearest)
    hover = f"{record['key']} · shard {record['shard']} row {record['row']} · uid {record['uid']}"
    return page.tile(png(image), (image.shape[1], TILE), f"{name} beside {nearest}", hover, caption)


def fitted(data: bytes) -> np.ndarray:
    """The middle square of an encoded image, uint8 ``[TILE, TILE, 3]``; small ones keep hard edges."""
    return square(decode(data, max(1, min(TILE, *dimensions(data)))))


def square(image: np.ndarray) -> np.ndarray:
    how = Image.Resampling.BICUBIC if TILE % len(image) else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(image).resize((TILE, TILE), how))


# --- figures ------------------------------------------------------------------------------------------------


def classes(run: "Run") -> str:
    """Classes by mean weight (the paper's Figure 5) and by their share of the largest subset."""
    title, labelled = "Classes", run.label >= 0
    if not (run.eligible & labelled).any():
        return page.section("classes", title, "The pool has no labels.", "")
    size = int(run.label.max()) + 1
    name, chosen = run.largest()
    count, eligible, picked = (
        np.bincount(run.label[mask & labelled], minlength=size) for mask in (run.weight >= 0, run.eligible, chosen)
    )
    mean = np.bincount(run.label[labelled], run.weight[labelled], size) / np.maximum(eligible, 1)
    played = np.flatnonzero(eligible)
    plots = ""
    for part, what in _ends(played[np.argsort(-mean[played], kind="stable")], "Mean weight"):
        plots += page.ratio_bars([run.class_name(c) for c in part], mean[part], what)
    pool_share, share = count / count.sum(), picked / max(picked.sum(), 1)
    present = np.flatnonzero(count)
    for part, what in _ends(present[np.argsort(-(share - pool_share)[present], kind="stable")], "Share of classes"):
        plots += page.share_bars([run.class_name(c) for c in part], pool_share[part], share[part], name, what)
    gone = int((eligible[present] == 0).sum())
    intro = (
        f"Mean weight of a class's eligible images, and its share of {name} ({int(chosen.sum()):,} images) "
        f"beside its share of the whole pool. {len(present):,} classes"
        + (f", {gone:,} of them with no eligible image." if gone else ".")
        + (f" Shown: the {BARS} at either end." if len(present) > 2 * BARS else "")
    )
    return page.section("classes", title, intro, f'<div class="plots">{plots}</div>')


def _ends(order: np.ndarray, what: str) -> list[tuple[np.ndarray, str]]:
    """All classes, or the first and the last of many."""
    if len(order) <= 2 * BARS:
        return [(order, f"{what}, all classes")]
    return [
        (order[:BARS], f"{what}, most favoured classes"),
        (order[-BARS:], f"{what}, least favoured classes"),
    ]


def weights(run: "Run") -> str:
    """Histogram of the weights, and how closely they follow the loss."""
    name, chosen = run.largest()
    weight = run.weight[run.eligible]
    top = np.sort(weight)[::-1][: max(1, len(weight) // 100)].sum() / weight.sum()
    intro = f"The heaviest 1% of the eligible images carry {top:.1%} of the weight. "
    known = np.flatnonzero(run.eligible & np.isfinite(run.loss))
    known = known[:: 1 + len(known) // SAMPLE]
    rho = spearman(run.weight[known], run.loss[known])
    intro += f"Rank correlation of weight and loss (Spearman): {rho:.2f}." if np.isfinite(rho) else ""
    if (weight == 0).any():
        intro += f" {int((weight == 0).sum()):,} weights are too small for float32 and not drawn."
    plot = page.histogram(weight, chosen[run.eligible], name)
    return page.section("weights", "Weights", intro, f'<div class="plots">{plot}</div>')


def rounds(run: "Run") -> str:
    """L_out and effective sample size by round, drawn when there are two rounds or more, and as a table."""
    records = [record for record in run.rounds if "round" in record]
    if not records:
        return ""
    x = [record["round"] + 1 for record in records]
    plots = ""
    if len(records) > 1:
        means = {"weighted (L_out)": "l_out", "uniform (mean loss)": "mean_loss"}
        curves = {name: [record.get(key, np.nan) for record in records] for name, key in means.items()}
        curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
        sizes = [record["effective_sample_size"] for record in records]
        plots = page.lines(x, curves, "uniformity loss", "Loss by round")
        plots += page.lines(
            x, {"effective sample size": sizes}, "effective sample size", "Effective sample size by round"
        )
    columns = ("l_out", "mean_loss", "effective_sample_size", "train_cross_entropy", "seconds")
    rows = [[str(n), *(number(record.get(name)) for name in columns)] for n, record in zip(x, records, strict=True)]
    head = ["round", "L_out", "mean loss", "effective sample size", "cross-entropy", "seconds"]
    intro = "L_out is the loss of the background images under the round's new weights (paper Eq. 14)."
    body = f'<div class="plots">{plots}</div><details{" open" * (not plots)}><summary>Figures</summary>'
    return page.section("rounds", "Rounds", intro, f"{body}{page.table('', head, rows)}</details>")


def main() -> None:
    """Parse and write."""
    import tyro

    directory = tyro.conf.arg(metavar="RUN", help="Run directory that pipelines.resample left, or its URL.")

    def report(run: Annotated[str, tyro.conf.Positional, directory]) -> None:
        print(write_report(run))

    tyro.cli(report, prog="python -m pipelines.report", description=__doc__)


if __name__ == "__main__":
    from pipelines import cli

    cli.run(main)
