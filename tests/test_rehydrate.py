"""From a manifest back to tars, on another pool; taking images out; what is refused, and what stays as it is."""

import hashlib
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.speed.export import read_bytes
from miner import subset as subsets
from miner.errors import MinerError, UsageError
from miner.export import MARK, export
from miner.pool import Pool
from miner.sources import Recipe
from miner.subset import Subset, load_subset
from pipelines import export as command
from pipelines.export import Config, find_subset, make, read_uids
from tests import exported
from tests.exported import CHOSEN, COUNT, PIXELS

ROWS = np.random.default_rng(1).permutation(COUNT)[:CHOSEN].tolist()
UIDS = [exported.uid(row) for row in range(COUNT)]
OTHER_ORDER = np.random.default_rng(2).permutation(COUNT).tolist()


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Subset:
    folder = tmp_path_factory.mktemp("run")
    pool = exported.write_pool(folder / "made", range(COUNT), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subsets, "PER_TAR", 8)
        return exported.write_chosen(pool, folder / "subset-0.25", ROWS)


@pytest.fixture(scope="module")
def manifest(subset: Subset, tmp_path_factory: pytest.TempPathFactory) -> Subset:
    """The subset without its pixels, on another machine."""
    folder = tmp_path_factory.mktemp("shared") / "manifest-0.25"
    export(subset, "manifest", folder)
    assert not list(folder.glob("*.tar"))
    return load_subset(folder)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """The same images in another order, other shards, under other keys."""
    return exported.write_pool(tmp_path_factory.mktemp("elsewhere"), OTHER_ORDER, 7, first=500_000)


def content(subset: Subset) -> dict[str, str]:
    """SHA-256 of the tars and of what describes them."""
    names = [tar["name"] for tar in subset.recipe["tars"]] + ["subset.json", "manifest.parquet", "sizes.json"]
    return {name: hashlib.sha256(Path(str(subset.path / name)).read_bytes()).hexdigest() for name in names}


# --- rehydrate ---


def test_a_pool_in_other_shards_gives_the_same_tars(
    subset: Subset, manifest: Subset, elsewhere: Pool, tmp_path: Path
) -> None:
    assert {shard.sha256 for shard in elsewhere.shards}.isdisjoint(subset.manifest["sha256"].to_pylist())
    done = export(manifest, "webdataset", tmp_path / "back", pool=elsewhere)
    back = load_subset(done.folder)
    back.verify()
    assert content(back) == content(subset)
    assert done.lost == done.removed == 0


def test_only_the_bytes_of_the_subset_are_read(manifest: Subset, tmp_path: Path) -> None:
    """Besides the index of uids, and of the places of images in the shards that have some, and the manifest."""
    images = np.random.default_rng(3).integers(0, 256, (COUNT, 160, 160, 3), np.uint8)
    pool = exported.write_pool(tmp_path / "made", range(COUNT), 3, images=images)
    chosen = exported.write_chosen(pool, tmp_path / "subset-0.25", ROWS)
    export(chosen, "manifest", tmp_path / "manifest")
    there = exported.write_pool(tmp_path / "other", OTHER_ORDER, 5, images=images)
    listed = load_subset(tmp_path / "manifest")
    export(listed, "webdataset", tmp_path / "warm", pool=there)  # imports what it needs
    pool = Pool.open(there.path)
    before = read_bytes()
    done = export(listed, "webdataset", tmp_path / "back", pool=pool)
    index = 2 * (Path(pool.path) / "index.parquet").stat().st_size
    read = read_bytes() - before - index - 3 * (tmp_path / "manifest" / "manifest.parquet").stat().st_size
    images_size = int(np.sum(done.rows["tar_size"].to_numpy()))
    assert 0.9 * images_size < read <= 1.1 * images_size < 0.5 * sum(shard.bytes for shard in pool.shards)


def test_a_raw_pool_gives_the_same_tars(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    pool = exported.adopt(Recipe("npy", (str(tmp_path / "a.npy"),), per_shard=16), tmp_path / "pool")
    chosen = exported.write_chosen(pool, tmp_path / "subset-0.25", ROWS)
    export(chosen, "manifest", tmp_path / "manifest")
    np.save(tmp_path / "b.npy", PIXELS[OTHER_ORDER])
    other = exported.adopt(Recipe("npy", (str(tmp_path / "b.npy"),), per_shard=25), tmp_path / "other")
    export(load_subset(tmp_path / "manifest"), "webdataset", tmp_path / "back", pool=other)
    assert content(load_subset(tmp_path / "back")) == content(chosen)


@pytest.mark.parametrize("style", ["imglist", "npy", "parquet"])
def test_any_format_comes_straight_from_the_pool(
    style: str, subset: Subset, manifest: Subset, elsewhere: Pool, tmp_path: Path
) -> None:
    export(subset, style, tmp_path / "a", size=16)
    export(manifest, style, tmp_path / "b", size=16, pool=elsewhere)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) >= 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def spoil(pool: Pool, uid: str) -> Pool:
    """The pool after a byte of one image changed."""
    row = next(row for row in pool.index().to_pylist() if row["uid"] == uid)
    with open(pool.shards[row["shard"]].path, "r+b") as file:
        file.seek(row["offset"] + 60)
        byte = file.read(1)[0]
        file.seek(row["offset"] + 60)
        file.write(bytes([byte ^ 1]))
    return Pool.open(pool.path)


def test_what_is_missing_or_differs_is_listed_and_nothing_is_exported(manifest: Subset, tmp_path: Path) -> None:
    out, (absent, changed) = tmp_path / "back", manifest.uids[:2]
    poor = exported.write_pool(tmp_path / "poor", [row for row in OTHER_ORDER if row != ROWS[0]], 4)
    worn = spoil(exported.write_pool(tmp_path / "worn", OTHER_ORDER, 4), changed)
    for pool, told in ((poor, f"{absent}: not in the pool"), (worn, f"{changed}: its bytes in the pool are no longer")):
        for _ in range(2):  # the same command may run again
            with pytest.raises(MinerError, match=rf"missing\.csv: 1 of 20 images, the first {told}"):
                export(manifest, "webdataset", out, pool=pool)
            assert sorted(path.name for path in out.iterdir()) == [MARK, "missing.csv"]
            with pytest.raises(MinerError, match="cut off"):
                load_subset(out)


def test_a_good_export_survives_the_wrong_pool(manifest: Subset, elsewhere: Pool, tmp_path: Path) -> None:
    out = tmp_path / "back"
    export(manifest, "webdataset", out, pool=elsewhere)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wrong = exported.write_pool(tmp_path / "wrong", range(10), 2, images=PIXELS // 2)
    for allowed in (False, True):
        with pytest.raises(MinerError, match="20 of 20 images"):
            export(manifest, "webdataset", out, pool=wrong, allow_missing=allowed)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "missing.csv"} == before
    load_subset(out).verify()
    export(manifest, "webdataset", out, pool=elsewhere)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_rest_can_be_had_when_asked_for(subset: Subset, manifest: Subset, tmp_path: Path) -> None:
    absent, changed = manifest.uids[:2]
    pool = exported.write_pool(tmp_path, [row for row in OTHER_ORDER if row != ROWS[0]], 4)
    done = export(manifest, "webdataset", tmp_path / "back", pool=spoil(pool, changed), allow_missing=True)
    back = load_subset(tmp_path / "back")
    back.verify()
    assert back.uids == manifest.uids[2:]
    lines = (tmp_path / "back" / "missing.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["uid", absent, changed]
    assert (done.lost, done.removed, back.recipe["removed"]) == (2, 0, 2)
    same = [tar["sha256"] for tar in subset.recipe["tars"]][1:]
    assert [tar["sha256"] for tar in back.recipe["tars"]][1:] == same  # tars that lack nothing are what they were


def test_a_pool_that_has_none_ends_with_one_line(manifest: Subset, tmp_path: Path) -> None:
    pool = exported.write_pool(tmp_path, range(10), 2, images=PIXELS // 2)
    with pytest.raises(MinerError, match=r"20 of 20 images.*nothing is left"):
        export(manifest, "webdataset", tmp_path / "back", pool=pool, allow_missing=True)


# --- taking images out ---


def test_images_taken_out_are_nowhere(subset: Subset, tmp_path: Path) -> None:
    gone = {subset.uids[2], subset.uids[11], "e" * 32}
    export(subset, "imglist", tmp_path / "out")
    done = export(subset, "imglist", tmp_path / "out", removed=frozenset(gone))  # over the older one
    assert (done.removed, done.lost) == (2, 0)
    names = " ".join(path.name for path in (tmp_path / "out").rglob("*"))
    text = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".txt", ".json", ".md"))
    there = pq.read_table(tmp_path / "out" / "manifest.parquet")["uid"].to_pylist()
    assert there == [uid for uid in subset.uids if uid not in gone]
    assert not any(uid in names + text for uid in gone)
    assert "classes" not in json.loads((tmp_path / "out" / "subset.json").read_text())


def test_a_manifest_alone_loses_images_and_still_gives_the_tars(
    subset: Subset, manifest: Subset, elsewhere: Pool, tmp_path: Path
) -> None:
    gone = frozenset([subset.uids[2], subset.uids[3]])
    export(subset, "webdataset", tmp_path / "with", removed=gone)
    export(manifest, "manifest", tmp_path / "list", removed=gone)
    listed = load_subset(tmp_path / "list")
    assert [tar["sha256"] is None for tar in listed.recipe["tars"]] == [True, False, False]
    export(listed, "webdataset", tmp_path / "back", pool=elsewhere)
    load_subset(tmp_path / "with").verify()
    assert content(load_subset(tmp_path / "back")) == content(load_subset(tmp_path / "with"))


def test_a_tar_that_loses_everything_is_not_written(subset: Subset, tmp_path: Path) -> None:
    export(subset, "webdataset", tmp_path / "out", removed=frozenset(subset.uids[8:16]))
    back = load_subset(tmp_path / "out")
    back.verify()
    assert [tar["name"] for tar in back.recipe["tars"]] == ["outliers-000000.tar", "outliers-000002.tar"]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    with pytest.raises(MinerError, match="nothing is left"):
        export(subset, "webdataset", tmp_path / "none", removed=frozenset(subset.uids))
    assert not (tmp_path / "none").exists()


# --- what is refused, and what is left alone ---


def test_a_manifest_alone_has_no_pixels(manifest: Subset, tmp_path: Path) -> None:
    with pytest.raises(MinerError, match=r"--rehydrate .* --pool NAME"):
        export(manifest, "npy", tmp_path / "out")
    with pytest.raises(MinerError, match="--rehydrate"):
        manifest[0]
    assert not (tmp_path / "out").exists()
    export(manifest, "datacomp", tmp_path / "uids")  # needs none


def test_folders_that_are_no_exports_stay_as_they_are(subset: Subset, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(MinerError, match="not empty and no export"):
        export(subset, "npy", tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    shutil.copytree(str(subset.path), tmp_path / "subset-0.1")  # a mined subset is no export either
    with pytest.raises(MinerError, match="not empty and no export"):
        export(subset, "npy", tmp_path / "subset-0.1")
    with pytest.raises(UsageError, match="is the subset itself"):
        export(subset, "webdataset", Path(str(subset.path)))
    load_subset(tmp_path / "subset-0.1").verify()


def test_a_killed_export_leaves_no_subset_and_is_done_again(
    subset: Subset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(subset, "imglist", out)

    def full(rows: pa.Table, *rest: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("miner.export.recorded", full)
        with pytest.raises(OSError, match="No space"):
            export(subset, "parquet", out)
    assert not (out / "subset.json").exists()
    assert not (out / "imglist.txt").exists()
    export(subset, "parquet", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "croissant.json",
        "data",
        "manifest.parquet",
        "subset.json",
    ]


@pytest.mark.parametrize("style", ["webdataset", "imglist", "npy", "parquet"])
def test_a_full_disk_is_one_line_and_leaves_no_subset(style: str, subset: Subset, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(MinerError, match="disk full"):
            export(subset, style, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "subset.json").exists()
    export(subset, style, tmp_path / "out")
    assert (tmp_path / "out" / "subset.json").exists()


def test_a_tar_that_changed_is_noticed(subset: Subset, tmp_path: Path) -> None:
    shutil.copytree(str(subset.path), tmp_path / "in")
    with open(tmp_path / "in" / "outliers-000001.tar", "r+b") as file:
        file.seek(subset.manifest["tar_offset"][9].as_py() + 60)
        file.write(b"?")
    with pytest.raises(MinerError, match=rf"1 of 20 images, the first {subset.uids[9]}: other bytes than the manifest"):
        export(load_subset(tmp_path / "in"), "npy", tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("uid", "../../../../../etc/cron.d/a-b-c-d", "column uid"),
        ("uid", None, "column uid"),  # the uid of another row
        ("ext", "png/../../x", "column ext"),
        ("ext", "sh", "column ext"),
        ("key", "a.b", "column key"),
        ("key", "../x", "leaves the archive"),
        ("key", "/x", "leaves the archive"),
        ("sha256", "no hash", "column sha256"),
        ("tar_size", -1, "column tar_size"),
        ("tar_size", 1 << 40, "column tar_size"),
        ("tar_offset", 512, "column tar_offset"),
        ("tar", "outliers-000002.tar", "its tars are not"),
        ("label", 10**9, "column label"),
    ],
)
def test_a_manifest_made_elsewhere_writes_nowhere_else(
    column: str, value: object, told: str, manifest: Subset, elsewhere: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "in" / "list"
    shutil.copytree(str(manifest.path), folder)
    rows = manifest.manifest.to_pylist()
    rows[1][column] = rows[0][column] if value is None else value
    with open(folder / "manifest.parquet", "wb") as sink:
        pq.write_table(pa.Table.from_pylist(rows, schema=manifest.manifest.schema), sink)
    recipe = json.loads((folder / "subset.json").read_text())
    recipe["manifest_sha256"] = hashlib.sha256((folder / "manifest.parquet").read_bytes()).hexdigest()
    (folder / "subset.json").write_text(json.dumps(recipe))
    before = set(tmp_path.rglob("*"))
    for style in ("webdataset", "imglist"):
        if column == "key" and style == "imglist":
            continue  # names files by uid
        with pytest.raises(MinerError, match=told):
            export(load_subset(folder), style, tmp_path / "in" / "out", pool=elsewhere)
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "in" / "out")}
    assert after == before


def test_names_of_strangers_do_no_harm_in_a_card(subset: Subset, tmp_path: Path) -> None:
    import yaml

    folder = tmp_path / "in"
    shutil.copytree(str(subset.path), folder)
    recipe = json.loads((folder / "subset.json").read_text())
    evil = 'x"\n---\n<script>alert(1)</script> | [a](http://b) `c`\nlicense: mit'
    recipe["pool"] = {"name": evil, "fingerprint": evil, "licence": evil}
    recipe["gamma"] = {"a": 1}
    (folder / "subset.json").write_text(json.dumps(recipe))
    export(load_subset(folder), "webdataset", tmp_path / "out")
    _, head, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["license"] == "other"
    assert told["license_details"] == evil
    assert text.count("\n---\n") == 0
    for line in text.splitlines():
        assert "<script>" not in line.replace("`", "\0").split("\0")[0::2][0]


# --- the command ---


def test_the_command_finds_a_run_s_subset(subset: Subset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(str(subset.path), run / "subset-0.25")
    assert find_subset(str(run), None) == run / "subset-0.25"
    shutil.copytree(str(subset.path), run / "subset-0.1")
    assert find_subset(str(run), 0.1) == run / "subset-0.1"
    assert find_subset(str(run / "subset-0.1" / "manifest.parquet"), None) == run / "subset-0.1"
    for gamma in (None, 0.5):
        with pytest.raises(UsageError, match=r"has subset-0\.1, subset-0\.25"):
            find_subset(str(run), gamma)
    with pytest.raises(MinerError, match="neither a subset"):
        find_subset(str(tmp_path), None)
    with pytest.raises(UsageError, match="chooses one of a run's subsets"):
        find_subset(str(run / "subset-0.1"), 0.25)


def test_the_command_s_default_place_is_beside_the_subset_and_no_subset_of_the_run(
    subset: Subset, tmp_path: Path
) -> None:
    shutil.copytree(str(subset.path), tmp_path / "run" / "subset-0.25")
    done = make(Config(source=str(tmp_path / "run"), format="manifest"))
    assert done.folder == tmp_path / "run" / "manifest-0.25"
    assert [path.name for path in (tmp_path / "run").glob("subset-*")] == ["subset-0.25"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "give a run or a subset"),
        (["{list}", "--format", "npy"], 1, "--rehydrate"),
        (["--rehydrate", "{list}"], 2, "--pool go together"),
        (["{list}", "--size", "64"], 2, "for --format npy only"),
        (["{list}", "--allow-missing"], 2, "--allow-missing is for --rehydrate"),
        (["{list}", "--format", "datacomp", "--remove", "{bad}"], 1, "line 2"),
        (["{list}", "--format", "datacomp", "--remove", "{uids}", "--out", "{out}"], 0, "removed: 1 images"),
    ],
)
def test_the_command_ends_with_a_code_and_one_line(
    words: list[str],
    code: int,
    told: str,
    manifest: Subset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.txt").write_text(f"{UIDS[0]}\nnothing\n")
    (tmp_path / "uids.txt").write_text(f"{manifest.uids[0]}\n\n{'0' * 32}\n")
    names = {"list": manifest.path, "out": tmp_path / "out"} | {n: tmp_path / f"{n}.txt" for n in ("bad", "uids")}
    monkeypatch.setattr(sys, "argv", ["export", *(word.format(**names) for word in words)])
    with pytest.raises(SystemExit) as stopped:
        command.cli.run(command.main)
    assert stopped.value.code == code
    out, err = capfd.readouterr()
    assert told in (out if code == 0 else err)
    assert len(err.splitlines()) == (code != 0)


def test_lists_of_uids_may_have_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "uids.txt").write_text(f"\n{UIDS[0]}\r\n{UIDS[1]}")
    assert read_uids(str(tmp_path / "uids.txt")) == {UIDS[0], UIDS[1]}


def test_an_export_may_lie_at_a_url(subset: Subset, elsewhere: Pool) -> None:
    url = "memory://export-test/list"
    try:
        export(subset, "imglist", subsets.place(url))
        export(subset, "manifest", subsets.place(url), removed=frozenset([subset.uids[0]]))
        there = fsspec.filesystem("memory").find("/export-test/list")
        assert sorted(os.path.basename(path) for path in there) == [
            "README.md",
            "croissant.json",
            "manifest.parquet",
            "sizes.json",
            "subset.json",
        ]
        export(load_subset(url), "webdataset", subsets.place("memory://export-test/back"), pool=elsewhere)
        back = load_subset("memory://export-test/back")
        back.verify()
        assert back.uids == subset.uids[1:]
        export(back, "npy", subsets.place("memory://export-test/npy"))  # from tars at a URL
    finally:
        fsspec.filesystem("memory").rm("/export-test", recursive=True)
