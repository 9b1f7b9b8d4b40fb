"""The report: one page that needs nothing else, with the right images in the right order."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from miner.build import write_arrays_pool
from miner.errors import MinerError
from miner.pool import Pool
from miner.ranking import spearman
from miner.run_dir import write_json
from miner.weights import ShardState, final_table, load_weights, write_arrow
from pipelines.report import GAP, REMOVED, TILE, TILES, write_report
from trainers.data import load_id

NASTY = "<script>alert('x')</script>"
CLASSES = ("fog", NASTY, 'R&D "$x_1$ $', "猫", "never eligible")
VOID = {"meta", "link", "img", "br"}


def make_run(folder: Path, count: int, labelled: bool = True, guard: bool = True, rounds: int = 2) -> Path:
    """A finished run of ``count`` pool images, its tables made as miner.mining makes them."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 4, count) if labelled else None
    if labels is not None:
        labels[0] = 4
    pool = write_arrays_pool(str(folder / "pool"), "odd <pool>", images, labels, CLASSES if labelled else ())
    id_set = load_id("demo", 32)
    run = folder / "run"
    first = 0
    for number, shard in enumerate(pool.shards):
        state = ShardState.fresh("paper", shard.count)
        state.apply_losses(0, rng.gamma(2.0, size=shard.count).astype(np.float32))
        state["state"][:] = rng.lognormal(sigma=2.0, size=shard.count)
        if guard:
            state["nn_id_row"][:] = rng.integers(0, len(id_set.train_images), shard.count)
            state["nn_id_cosine"][:] = rng.random(shard.count)
            state["nn50_id_cosine"][:] = state["nn_id_cosine"] * 0.9
            state.exclude(np.arange(0, shard.count, 4), "near-id")
            state["loss"][~state.eligible] = np.nan  # later sweeps do not score them
        rank = np.arange(first, first + shard.count, dtype=np.uint64)
        table = final_table(pool.shard_index(number), state, 0.5, rank, {})
        (run / "weights").mkdir(parents=True, exist_ok=True)
        write_arrow(table, run / "weights" / f"shard-{number:06d}.arrow")
        first += shard.count
    settings = {"data": {"id": "demo", "size": 32}, "pool": pool.fingerprint, "id": id_set.fingerprint}
    write_json(run / "config.json", settings)
    write_json(run / "summary.json", summary(pool, count, rounds))
    record = {"l_out": 1.5, "effective_sample_size": 9.0, "seconds": 1.0}  # ``reference`` has no mean_loss
    lines = [json.dumps({"round": r} | record) for r in range(rounds)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def summary(pool: Pool, count: int, rounds: int) -> dict[str, Any]:
    """What miner.mining leaves in summary.json."""
    return {
        "pool": pool.name,
        "pool_path": pool.path,
        "images": count,
        "n": count,
        "id": "demo",
        "model": "small",
        "accuracy": None,
        "rule": "paper",
        "rounds": rounds,
        "excluded": {"exclude-list": 0, "duplicate": 0, "decode": 1, "near-id": count // 4, "id-duplicate": 0},
        "undecodable": ["000000.tar: <broken>"],
        "subsets": {
            f"subset-{gamma:g}": {
                "gamma": gamma,
                "count": max(1, int(gamma * count)),
                "clipped_share": 0.25,
                "effective_sample_size": 12.0,
            }
            for gamma in (0.1, 0.5)
        },
        "seconds": {"game": 1.5, "total": 2.5},
    }


class Page(HTMLParser):
    """Collects what the tests ask for; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.section = ""
        self.tiles: dict[str, list[dict[str, str]]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = found["id"] or ""
        if tag == "figure" and found["class"] == "tile":
            self.tiles.setdefault(self.section, []).append({"title": found["title"] or "", "text": ""})
        if tag == "img":
            self.tiles[self.section][-1]["src"] = found["src"] or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "figcaption" in self.open and self.tiles.get(self.section):
            self.tiles[self.section][-1]["text"] += data + "\n"

    def uids(self, section: str) -> list[str]:
        return [tile["title"].rpartition(" ")[2] for tile in self.tiles[section]]


def pixels(tile: dict[str, str]) -> np.ndarray:
    data = base64.b64decode(tile["src"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("report"), 160)
    write_report(made)
    return made


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_and_nothing_runs(html: str) -> None:
    page = Page(html)
    names = [tag for tag, _ in page.tags]
    assert names.count("svg") == 5
    assert not {"script", "iframe", "object", "base"} & set(names)
    links = [a[k] or "" for _, a in page.tags for k in ("src", "href", "xlink:href", "srcset") if k in a]
    assert len(links) > 3 * TILES
    assert [link for link in links if not link.startswith(("data:", "#"))] == []
    assert not re.search(r"https?:|@import|@font-face|\bon\w+=", html)
    anchors = [a["id"] for _, a in page.tags if "id" in a]
    used = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert used
    assert used <= set(anchors)
    assert len(html) < 5e6


def test_names_are_escaped_and_shown(html: str) -> None:
    text = "".join(Page(html).text)
    for name in CLASSES:
        shown = name if len(name) <= 24 else name[:23] + "…"  # a plot cuts long ones
        assert text.count(shown) >= 2  # in the plots
    assert NASTY in text
    assert "odd <pool>" in text
    assert "000000.tar: <broken>" in text
    assert "<script" not in html


def test_sheets_are_ordered_by_weight(run: Path, html: str) -> None:
    page, table = Page(html), load_weights(run)
    weight = dict(zip(table["uid"].to_pylist(), table["weight"].to_pylist(), strict=True))
    eligible = np.sort(table["weight"].to_numpy()[pc.is_null(table["excluded_by"]).to_numpy()])[::-1]
    heaviest, median, lightest = ([weight[u] for u in page.uids(name)] for name in ("heaviest", "median", "lightest"))
    assert heaviest == eligible[:TILES].tolist()
    assert lightest == eligible[::-1][:TILES].tolist()
    assert len(median) == TILES
    assert min(median) <= np.median(eligible) <= max(median)
    for tile, value in zip(page.tiles["heaviest"], heaviest, strict=True):
        assert f"weight {value:.3g}" in tile["text"]


def test_a_tile_is_the_pool_image_beside_its_nearest_id_image(run: Path, html: str) -> None:
    page, table, id_set = Page(html), load_weights(run), load_id("demo", 32)
    pool = Pool.open(json.loads((run / "summary.json").read_text())["pool_path"])
    for name in ("heaviest", "guard-near"):
        for uid, tile in zip(page.uids(name), page.tiles[name], strict=True):
            record = table.filter(pc.equal(table["uid"], uid)).to_pylist()[0]
            stored = Image.open(io.BytesIO(pool.read(record["shard"], [record["row"]])[0]))
            shown, near = pixels(tile), record["nn_id_row"]
            assert shown.shape == (TILE, 2 * TILE + GAP, 3)
            assert (shown[::2, :TILE:2] == np.asarray(stored)).all()
            assert (shown[::2, TILE + GAP :: 2] == id_set.train_images[near]).all()
            id_class = id_set.classes[id_set.train_labels[near]]
            assert f"{id_class}, cos {record['nn_id_cosine']:.2f}" in tile["text"]
            assert CLASSES[record["label"]] in tile["text"]


def test_the_guard_shows_the_hardest_and_the_nearest(run: Path, html: str) -> None:
    page, table = Page(html), load_weights(run)
    out = table.filter(pc.fill_null(pc.equal(table["excluded_by"].cast(pa.string()), "near-id"), False))
    for section, column in (("guard-hard", "loss_mean"), ("guard-near", "nn50_id_cosine")):
        expected = out.sort_by([(column, "descending")])["uid"].to_pylist()[:REMOVED]
        assert page.uids(section) == expected


def test_the_same_run_gives_the_same_page(run: Path, html: str) -> None:
    assert write_report(run).read_text(encoding="utf-8") == html


def test_a_small_pool_without_labels_neighbours_or_training(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, 10, False, False, 1)).read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "The pool has no labels." in text
    assert "no ID image" in text
    assert [len(page.tiles[name]) for name in ("heaviest", "median", "lightest")] == [4, 4, 4]
    assert pixels(page.tiles["heaviest"][0]).shape == (TILE, TILE, 3)
    assert set(page.tiles) == {"heaviest", "median", "lightest"}


def test_equal_weights(tmp_path: Path) -> None:
    made = make_run(tmp_path, 12)
    for path in (made / "weights").iterdir():
        table = pa.ipc.open_file(path).read_all()
        weight = pc.if_else(pc.is_null(table["excluded_by"]), 1.0, 0.0).cast(pa.float32())
        place = table.schema.get_field_index("weight")
        write_arrow(table.set_column(place, table.schema.field(place), weight), path)
    text = "".join(Page(write_report(made).read_text(encoding="utf-8")).text)
    assert "Spearman" not in text  # a constant has no rank correlation
    assert "Histogram of the weights" in text


def test_an_unfinished_run_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/summary.json: missing" in done.stderr


def test_another_pool_or_a_damaged_summary_is_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path, 10)
    other = write_arrays_pool(str(tmp_path / "other"), "p", np.zeros((10, 8, 8, 3), np.uint8), None, ())
    told = json.loads((made / "summary.json").read_text())
    write_json(made / "summary.json", told | {"pool_path": other.path})
    with pytest.raises(MinerError, match="the pool p changed since it was mined"):
        write_report(made)
    (made / "summary.json").write_text('{"pool": ')
    with pytest.raises(MinerError, match=r"summary\.json: damaged"):
        write_report(made)
    assert not (made / "report.html").exists()


def test_spearman_with_ties() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 200), rng.random(200)
    b += 0.1 * a
    ranks = [(v[:, None] > v).sum(axis=1) + 0.5 * (v[:, None] == v).sum(axis=1) for v in (a, b)]
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1])
    assert np.isnan(spearman(np.ones(5), np.arange(5)))
    assert np.isnan(spearman(np.zeros(0), np.zeros(0)))
