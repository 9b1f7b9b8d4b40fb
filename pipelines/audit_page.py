"""The page of an audit: pairs side by side, for a person to judge."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from miner.audit import KINDS, Audit, Target
from miner.images import png
from pipelines import page
from pipelines.audit import tally, told
from pipelines.report import GAP, TILE, fitted, square
from trainers.image_set import ImageSet

SHOWN = 24  # pairs at either end of each set


def page_of(audit: Audit, target: Target, sets: Mapping[str, ImageSet]) -> str:
    """One HTML document that needs no network: counts, threshold, and for each set its surest and least sure pairs."""
    about = audit.about
    cards = [
        ("audited", about["target"]),
        ("images", f"{about['checked']:,}"),
        ("found", f"{audit.images:,}"),
        ("threshold", f"{about['threshold']:.3f}"),
    ]
    counts = [[name, *(f"{n:,}" for n in row)] for name, row in tally(audit).items()]
    body = f"<h1>{page.escape('Audit of ' + about['target'])}</h1>{page.facts(cards)}"
    body += page.section("counts", "Pairs", " ".join(told(audit)), page.table("", ["reference set", *KINDS], counts))
    for number, name in enumerate(sets):
        body += _sheet(f"set-{number}", name, audit, target, sets[name])
    return page.page(f"Audit of {about['target']}", body)


def _sheet(anchor: str, name: str, audit: Audit, target: Target, images: ImageSet) -> str:
    pairs = audit.table.filter(pc.equal(audit.table["set"], name)).sort_by(
        [("detail", "ascending"), ("row", "ascending")]
    )
    if not len(pairs):
        return page.section(anchor, name, "No pairs.", "")
    records = pairs.slice(0, SHOWN).to_pylist()
    rest = pairs.slice(max(SHOWN, len(pairs) - SHOWN)).to_pylist()[::-1]
    intro = f"{len(pairs):,} pairs; left the audited image, right the one of {name}. "
    body = "".join(_tile(record, target, images) for record in records)
    html = page.section(anchor, name, intro + "First the least sure ones.", f'<div class="sheet">{body}</div>')
    if rest:
        body = "".join(_tile(record, target, images) for record in rest)
        html += page.folded(f"the {len(rest)} surest", f'<div class="sheet">{body}</div>')
    return html


def _tile(record: dict[str, Any], target: Target, images: ImageSet) -> str:
    gap = np.full((TILE, GAP, 3), 255, np.uint8)
    there = square(images.take([record["set_row"]])[0])
    both = np.concatenate([fitted(target.encoded(record["row"])), gap, there], axis=1)
    caption = (
        record["kind"],
        f"detail {record['detail']:.2f}, pixels {record['correlation']:.2f}",
        f"scale {record['scale']:.2f} at {record['x']:.2f}, {record['y']:.2f}",
        f"{record['key']} = {record['set_key']}",
    )
    hover = f"{record['key']} · row {record['row']} · uid {record['uid']}"
    return page.tile(png(both), (both.shape[1], TILE), f"{record['key']} beside {record['set_key']}", hover, caption)
