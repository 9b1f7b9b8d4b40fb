"""The leak guard: what is planted is found, what is not there is not, and what is bounded stays so."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from benchmarks.leaks import KINDS as PLANTED
from benchmarks.leaks import copied
from miner import aligned
from miner import audit as audit_module
from miner.audit import Audit, read_audit, write_audit
from miner.build import write_arrays_pool
from miner.copies import Copies, Pairs, best, kinds, threshold
from miner.errors import MinerError, UsageError
from miner.pool import Pool
from miner.progress import Display
from miner.subset import write_subset
from pipelines import audit_page
from pipelines.audit import AuditConfig, run, tally
from trainers.image_set import ImageSet

ROOT = Path(__file__).resolve().parent.parent
EACH = 8


def scenes(count: int, seed: int, side: int = 32) -> np.ndarray:
    """Pictures with edges and texture at several scales, all different: uint8 [count, side, side, 3]."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, side, side, 3))
    for cells, weight in ((3, 1.0), (7, 0.7), (16, 0.4)):
        noise = rng.normal(size=(count, cells, cells, 3)).astype(np.float32)
        grown = torch.nn.functional.interpolate(
            torch.from_numpy(noise).permute(0, 3, 1, 2), (side, side), mode="bicubic"
        )
        images += weight * grown.permute(0, 2, 3, 1).numpy()
    return np.clip(128 + 50 * images, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ID set of image folders, an OOD set, and a pool of 400 clean images and leaks of each kind, in two shards."""
    path, rng = tmp_path_factory.mktemp("audit"), np.random.default_rng(0)
    inside, outside, clean = scenes(600, 1), scenes(60, 2), scenes(400, 3)
    for split, part in (("train", inside[:300]), ("test", inside[300:])):
        for row, image in enumerate(part):
            name = path / "id" / split / "ab"[row % 2] / f"{row:04d}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(name)
    np.save(path / "ood.npy", outside)
    leaks = [copied(kind, inside[300 + EACH * k + i], rng) for k, kind in enumerate(PLANTED) for i in range(EACH)]
    images = np.concatenate([clean[:200], np.stack(leaks), outside[:3], inside[:2], clean[200:]])
    write_arrays_pool(str(path / "pool"), "planted", images, None, (), 2)
    return path


@pytest.fixture(scope="session")
def audited(folder: Path) -> Audit:
    asked = AuditConfig(
        str(folder / "pool"), id=str(folder / "id"), ood=(str(folder / "ood.npy"),), out=str(folder / "out")
    )
    with Display() as display:
        return run(asked, display)[0]


def test_every_kind_of_leak_is_found_and_nothing_else(audited: Audit) -> None:
    rows = set(audited.table["row"].to_pylist())
    leaks = set(range(200, 200 + EACH * len(PLANTED) + 5))
    assert rows - leaks == set()
    missed = sorted(leaks - rows)
    hard = range(200 + EACH * PLANTED.index("cropped hard"), 200 + EACH * (PLANTED.index("cropped hard") + 1))
    assert all(row in hard for row in missed)
    assert len(missed) <= EACH // 4


def test_pairs_name_the_right_image_and_what_was_done(audited: Audit, folder: Path) -> None:
    counts = tally(audited)
    assert counts["ood"] == [3, 0, 0, 0, 0]
    assert counts["id train"] == [2, 0, 0, 0, 0]
    assert counts["id test"][:3] == [EACH, EACH, EACH]
    pool = Pool.open(str(folder / "pool"))
    index = pool.index(["uid", "key"])
    expected = {"exact": "exact", "re-encoded": "re-encoded", "flipped": "flipped", "cropped": "cropped"}
    # Folders a and b come one after the other, so that rows of the set are those of the sorted paths.
    order = sorted(range(300), key=lambda row: (row % 2, row))
    for pair in audited.table.to_pylist():
        assert pair["uid"] == index["uid"][pair["row"]].as_py()
        assert pair["key"] == index["key"][pair["row"]].as_py()
        leak = pair["row"] - 200
        if pair["set"] != "id test":
            continue
        kind = PLANTED[leak // EACH]
        assert pair["kind"] == expected.get(kind, "cropped" if "hard" in kind else "flipped+cropped")
        assert order[pair["set_row"]] == leak
        assert pair["detail"] > audited.about["threshold"]


def test_the_page_needs_nothing_and_shows_the_pairs(audited: Audit, folder: Path) -> None:
    html = (folder / "out" / "audit.html").read_text(encoding="utf-8")
    assert (
        html.count('<figure class="tile"')
        == min(len(audited.table.filter(pc.equal(audited.table["set"], "id test"))), 48) + 5
    )
    assert "<script" not in html
    assert "http" not in html
    assert f"{audited.about['threshold']:.3f}" in html


def test_an_audit_is_kept_and_not_done_twice(audited: Audit, folder: Path) -> None:
    path = folder / "out" / "audit.parquet"
    before = path.stat().st_mtime_ns
    words = [
        str(folder / "pool"),
        "--id",
        str(folder / "id"),
        "--ood",
        str(folder / "ood.npy"),
        "--out",
        str(folder / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.audit", *words, "--fail"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: planted: ")
    assert "take them out of the pool" in done.stderr
    assert "turned upside down" in done.stdout
    assert path.stat().st_mtime_ns == before
    found = read_audit(path)
    assert found.table.equals(audited.table)
    assert found.about == audited.about
    path.with_name("cut.parquet").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MinerError, match="run pipelines"):
        read_audit(path.with_name("cut.parquet"))
    write_audit(found, path.with_name("again.parquet"))
    assert path.with_name("again.parquet").read_bytes() == path.read_bytes()


def test_an_interrupted_audit_goes_on_where_it_was(
    audited: Audit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = AuditConfig(str(folder / "pool"), id=str(folder / "id"), ood=(str(folder / "ood.npy"),), out=str(tmp_path))
    calls, part_way, pairs = list[int](), list[bool](), audit_module._pairs

    def counted(*args: Any) -> pa.Table:
        calls.append(len(args[5]))
        if len(calls) == 2 and not part_way:
            part_way.append(True)
            raise KeyboardInterrupt
        return pairs(*args)

    monkeypatch.setattr(audit_module, "_pairs", counted)
    monkeypatch.setattr(audit_module, "SAVE", -1.0)
    with Display() as display, pytest.raises(KeyboardInterrupt):
        run(asked, display)
    assert not (tmp_path / "audit.parquet").exists()
    part = read_audit(tmp_path / ".audit.part.parquet")
    assert 0 < part.about["checked"] == part.about["next"] < audited.about["checked"]
    calls.clear()
    with Display() as display:
        found, _, _ = run(asked, display)
    assert sum(calls) == audited.about["checked"] - part.about["checked"]
    assert found.table.equals(audited.table)
    assert found.about | {"seconds": 0} == audited.about | {"seconds": 0}
    assert not (tmp_path / ".audit.part.parquet").exists()


def interrupted(*args: Any) -> str:
    raise KeyboardInterrupt


def test_a_subset_is_audited_like_its_pool(
    audited: Audit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool.open(str(folder / "pool"))
    index = pool.index(["uid", "key", "shard", "row", "label"]).slice(195, 30)
    rank = pa.array(np.arange(30, dtype=np.uint64))
    nulls = {"nn_id_row": pa.nulls(30, pa.int32()), "nn_id_cosine": pa.nulls(30, pa.float32())}
    chosen = pa.table(
        {**{n: index[n] for n in index.column_names}, "weight": np.ones(30, np.float32), "rank": rank, **nulls}
    )
    write_subset(pool, chosen, tmp_path / "subset", {"gamma": 0.1}, lambda count: None)
    asked = AuditConfig(str(tmp_path / "subset"), id=str(folder / "id"), out=str(tmp_path / "out"))
    with Display() as display:
        found = run(asked, display)[0]
    expected = [row for row in audited.table["uid"].to_pylist() if row in set(index["uid"].to_pylist())]
    assert sorted(found.table["uid"].to_pylist()) == sorted(expected)
    assert len(expected) == 25
    monkeypatch.setattr(audit_module, "SAVE", -1.0)
    again = replace(asked, out=str(tmp_path / "again"))
    page_of = audit_page.page_of
    monkeypatch.setattr(audit_page, "page_of", interrupted)  # all is done but the page: nothing may count twice
    with Display() as display, pytest.raises(KeyboardInterrupt):
        run(again, display)
    monkeypatch.setattr(audit_page, "page_of", page_of)
    with Display() as display:
        assert run(again, display)[0].table.equals(found.table)


def test_flags_that_make_no_sense(folder: Path) -> None:
    with Display() as display:
        for asked, why in (
            (AuditConfig(str(folder / "pool")), "--id: name the ID set"),
            (AuditConfig(str(folder / "pool"), id="demo", alarms=1.0), "--alarms 1"),
            (AuditConfig(str(folder / "pool"), id="demo", size=4), "--size 4"),
            (AuditConfig(str(folder / "pool"), id="demo", exclude=True), "no finished run"),
        ):
            with pytest.raises(UsageError, match=why):
                run(asked, display)


def test_thumbnails_are_cuts_of_the_grid() -> None:
    x = aligned.pixels(torch.from_numpy(scenes(3, 4)))
    windows = aligned.grid()
    each = aligned.standard(aligned.cut(x, windows[None].expand(3, -1, -1), aligned.THUMB))
    torch.testing.assert_close(aligned.thumbnails(x), each, atol=1e-5, rtol=0)
    assert windows[0].tolist() == [1.0, 0.5, 0.5]
    whole = aligned.cut(x, windows[None, :1].expand(3, -1, -1), aligned.SIDE)
    torch.testing.assert_close(whole[:, 0], x, atol=1e-3, rtol=0)
    box = (3.0, 5.0, 3.0 + 24.0, 5.0 + 24.0)  # PIL's bilinear resize of a box is the same filter
    window = torch.tensor([[[24 / 32, 15 / 32, 17 / 32]]])
    cut = aligned.cut(x[:1], window, 32)[0, 0].permute(1, 2, 0).numpy()
    pil = np.asarray(Image.fromarray(scenes(3, 4)[0]).resize((32, 32), Image.Resampling.BILINEAR, box=box))
    assert np.abs(cut - pil)[2:-2, 2:-2].max() < 2


def test_alignment_finds_the_window() -> None:
    images = scenes(40, 5)
    x = aligned.pixels(torch.from_numpy(images))
    window = torch.tensor([0.8, 0.55, 0.45]).expand(40, 3)
    ours = aligned.cut(x, window[:, None], aligned.SIDE)[:, 0]
    near = window + torch.tensor([0.04, -0.03, 0.03])
    found, agreement = aligned.align(x, ours, near, aligned.SIDE, 4)
    assert (found - window).abs().max() < 0.01
    assert agreement.min() > 0.99


def test_images_of_one_colour_are_copies_of_nothing() -> None:
    flat = np.full((4, 32, 32, 3), 90, np.uint8)
    images = np.concatenate([scenes(60, 6), flat])
    copies = Copies({"a": ImageSet("a", (images,), origin={"fingerprint": "a"})}, 1)
    found = copies.find(flat + np.uint8(1))
    assert best(found, 4).max() == 0
    assert best(copies.find(images[:8]), 8).min() > 0.99
    assert best(copies.find(images[:8], np.arange(8)), 8).max() < 0.9  # not themselves


def test_threshold_and_kinds() -> None:
    values = np.arange(1000, dtype=np.float32) / 1000
    for alarms in (0.001, 0.01, 0.5):
        assert (values > threshold(values, alarms)).mean() == pytest.approx(alarms)
    assert threshold(values[:10], 0.001) == pytest.approx(0.009)
    window = np.array([[1, 0.5, 0.5], [0.98, 0.5, 0.5], [0.8, 0.4, 0.5], [0.7, 0.4, 0.5]], np.float32)
    zeros = np.zeros(4, np.float32)
    pairs = Pairs(np.arange(4), np.arange(4), zeros, zeros, window, np.array([False, True, False, True]))
    assert kinds(pairs) == ["re-encoded", "flipped", "cropped", "flipped+cropped"]


def test_symmetric_and_few_id_images_leave_a_threshold_that_finds_and_spares() -> None:
    inside = scenes(150, 8)
    inside[100:140, 16:] = inside[100:140, 15::-1]  # upside down what they were: their own copies
    sets = {"train": ImageSet("train", (inside[:100],)), "test": ImageSet("test", (inside[100:],))}
    for test in (sets["test"], ImageSet("test", (inside[140:],))):
        copies = Copies(sets | {"test": test}, 1)
        limit, told = audit_module._calibrated(copies, 1, 0.001, Display())
        assert audit_module.FLOOR <= limit < 0.95
        assert told["clean_images"] == len(test)
        assert (best(copies.find(scenes(200, 9)), 200) <= limit).all()


def test_leaks_of_cifar10_in_tiny_imagenet() -> None:
    """The benchmark in small, on real images; benchmarks.leaks has the figures."""
    if "OUTLIER_DATA" not in os.environ:
        pytest.skip("set OUTLIER_DATA to a folder of the real image sets to run this")
    from trainers.sets import open_images

    data = Path(os.environ["OUTLIER_DATA"])
    test, clean = (data / "cifar10" / "test-000000.tar", data / "tinyimagenet" / "test-000000.tar")
    assert test.exists(), f"OUTLIER_DATA={data} has no {test}"
    assert clean.exists(), f"OUTLIER_DATA={data} has no {clean}"
    inside, pool = (
        open_images(str(test), 32)[0].take(np.arange(1000)),
        open_images(str(clean), 32)[0].take(np.arange(500)),
    )
    copies = Copies({"test": ImageSet("test", (inside,), origin={"fingerprint": "t"})}, 1)
    limit = threshold(best(copies.find(np.ascontiguousarray(inside[:, ::-1])), len(inside)), 0.001)
    assert (best(copies.find(pool), len(pool)) > limit).mean() <= 0.01
    rng = np.random.default_rng(0)
    for number, kind in enumerate(PLANTED[1:]):
        rows = np.arange(40 * number, 40 * (number + 1))
        pairs = copies.find(np.stack([copied(kind, inside[row], rng) for row in rows]))
        right = pairs.where((pairs.row == rows[pairs.query]) & (pairs.detail > limit))
        recall = len(np.unique(right.query)) / len(rows)
        assert recall >= (0.85 if "hard" in kind else 0.95), kind
