"""Making pools: folders, adopted tars, raw layouts; resuming; the same bytes with any number of workers."""

import gzip
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from miner.build import finish, prepare, run_job
from miner.errors import MinerError, UsageError
from miner.pool import Pool
from miner.recipe import Recipe, class_names
from miner.tars import TarWriter

RNG = np.random.default_rng(1)


def jpeg(side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (side, side + 4, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def make(recipe: Recipe, folder: Path, name: str = "p") -> Pool:
    plan = prepare(recipe, str(folder))
    for job in plan.jobs:
        run_job(str(folder), job)
    return finish(recipe, str(folder), name, plan, "CC0")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name, count in (("n02 cat", 7), ("n01 dog", 5), ("deep", 3)):
        os.makedirs(root / name / "inner")
        for i in range(count):
            ext = ("jpg", "JPEG")[i % 2]
            (root / name / ("inner" if name == "deep" else "") / f"{name} v{i}.x.{ext}").write_bytes(jpeg())
    (root / "n01 dog" / "broken.png").write_bytes(b"no image at all")
    (root / "n01 dog" / "notes.txt").write_text("skip me")
    (root / "README").write_text("skip me")
    return root


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its file to the collector
def test_an_image_folder_becomes_tars_of_the_original_bytes(photos: Path, tmp_path: Path) -> None:
    pool = make(Recipe("folder", (str(photos),), per_shard=6), tmp_path / "pool")
    assert pool.classes == ("deep", "n01 dog", "n02 cat")
    assert [shard.count for shard in pool.shards] == [6, 6, 4]
    assert pool.licence == "CC0"
    rows = pool.index().to_pylist()
    assert [row["key"] for row in rows] == [f"{i:09d}" for i in range(16)]
    assert [row["label"] for row in rows] == [0] * 3 + [1] * 6 + [2] * 7
    assert [(row["width"], row["height"]) for row in rows] == [(28, 24)] * 3 + [(0, 0)] + [(28, 24)] * 12
    manifest = json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert manifest["source"]["skipped"] == {"not an image": 2, "over 16 MB": 0}
    urls = [shard.path for shard in pool.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    for row, sample in zip(rows, samples, strict=True):
        original = (photos / json.loads(sample["json"])["path"]).read_bytes()
        assert sample[row["ext"]] == original
        assert pool.read(row["shard"], [row["row"]]) == [original]
        assert (sample["__key__"], int(sample["cls"])) == (row["key"], row["label"])
    pool.verify()


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "flat")
    (tmp_path / "flat" / "a.jpg").write_bytes(jpeg())
    pool = make(Recipe("folder", (str(tmp_path / "flat"),)), tmp_path / "pool")
    assert pool.index()["label"].to_pylist() == [None]


def test_a_stopped_run_goes_on_to_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    recipe = Recipe("folder", (str(photos),), per_shard=6)
    folder = tmp_path / "pool"
    make(recipe, folder)
    whole = contents(folder)
    kept = (folder / "000000.tar").stat().st_ino
    (folder / "shards" / "000001.json").unlink()
    (folder / "000001.tar").write_bytes(b"half a tar")
    (folder / "000002.tar").unlink()
    (folder / "index.parquet").unlink()
    (folder / ".000001.tar.1-ab.tmp").write_bytes(b"left over")
    make(recipe, folder)
    assert contents(folder) == whole
    assert (folder / "000000.tar").stat().st_ino == kept


def test_other_arguments_or_a_changed_source_are_no_resume(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    make(Recipe("folder", (str(photos),), per_shard=6), folder)
    with pytest.raises(MinerError, match="other arguments; remove it or give another --out"):
        make(Recipe("folder", (str(photos),), per_shard=7), folder)
    (photos / "deep" / "inner" / "deep v0.x.jpg").write_bytes(jpeg(30))
    with pytest.raises(MinerError, match=r"photos: changed since .*pool was begun"):
        make(Recipe("folder", (str(photos),), per_shard=6), folder)
    before = sorted(os.listdir(photos))
    with pytest.raises(MinerError, match="not empty"):
        make(Recipe("folder", (str(photos),)), photos)
    assert sorted(os.listdir(photos)) == before


def tars(folder: Path, counts: tuple[int, ...] = (4, 3), first: int = 0) -> list[bytes]:
    os.makedirs(folder, exist_ok=True)
    images = []
    for number, count in enumerate(counts):
        with TarWriter(folder / f"train-{number:06d}.tar") as tar:
            for i in range(count):
                images.append(jpeg())
                key = f"{first + len(images):06d}"
                tar.write(f"{key}.jpg", images[-1])
                tar.write(f"{key}.cls", str(i % 2).encode())
    return images


def test_tars_are_adopted_in_place_and_gz_gives_the_same_fingerprint(tmp_path: Path) -> None:
    images = tars(tmp_path / "tars")
    classes = [{"index": 1, "name": "b", "wnid": "n1"}, {"index": 0, "name": "a", "cifar10_strict": None}]
    (tmp_path / "tars" / "classes.json").write_text(json.dumps(classes))
    os.makedirs(tmp_path / "packed")
    for path in (tmp_path / "tars").glob("*.tar"):
        (tmp_path / "packed" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    plain = make(Recipe("tars", (str(tmp_path / "tars"),)), tmp_path / "plain")
    packed = make(Recipe("tars", (str(tmp_path / "packed"),)), tmp_path / "unpacked")
    assert plain.fingerprint == packed.fingerprint
    assert [shard.path for shard in plain.shards] == [str(tmp_path / "tars" / f"train-00000{i}.tar") for i in (0, 1)]
    assert [shard.sha256 for shard in plain.shards] == [shard.sha256 for shard in packed.shards]
    assert not list((tmp_path / "plain").glob("*.tar"))
    assert plain.read(0, range(4)) + plain.read(1, range(3)) == images
    assert (plain.classes, packed.classes) == (("a", "b"), ())
    assert plain.class_info == classes
    assert plain.index(["label"])["label"].to_pylist() == [0, 1, 0, 1, 0, 1, 0]


def test_a_pool_may_lie_beside_its_tars_and_move_with_them(tmp_path: Path) -> None:
    images = tars(tmp_path / "tars")
    make(Recipe("tars", (str(tmp_path / "tars"),)), tmp_path / "tars")
    shutil.move(tmp_path / "tars", tmp_path / "moved")
    pool = Pool.open(str(tmp_path / "moved"))
    assert pool.read(1, [2]) == [images[6]]


def test_tars_side_by_side_with_their_gz_are_read_once(tmp_path: Path) -> None:
    tars(tmp_path / "tars")
    (tmp_path / "tars" / "train-000000.tar.gz").write_bytes(b"not even read")
    assert make(Recipe("tars", (str(tmp_path / "tars"),)), tmp_path / "pool").count == 7
    with pytest.raises(MinerError, match=r"no \.tar or \.tar\.gz matching --glob 'test-"):
        make(Recipe("tars", (str(tmp_path / "tars"),), glob="test-*"), tmp_path / "other")


def test_one_key_in_two_shards_names_both(tmp_path: Path) -> None:
    tars(tmp_path / "a")
    tars(tmp_path / "b", (1,))
    recipe = Recipe("tars", (str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(MinerError, match=r"a/train-000000\.tar and .*b/train-000000\.tar: both hold key '000001'"):
        make(recipe, tmp_path / "pool")
    assert not (tmp_path / "pool" / "pool.json").exists()


def test_a_label_without_a_class_is_an_error(tmp_path: Path) -> None:
    tars(tmp_path / "tars")
    (tmp_path / "tars" / "classes.json").write_text('["only one"]')
    with pytest.raises(MinerError, match="label 1, but only 1 classes"):
        make(Recipe("tars", (str(tmp_path / "tars"),)), tmp_path / "pool")


@pytest.mark.parametrize(
    "text",
    ['["a", "b"]', '{"1": "b", "0": "a"}', '{"0": {"name": "a"}, "1": {"name": "b"}}', '[{"name":"a"},"b"]'],
)
def test_class_files_of_every_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.json").write_text(text)
    assert class_names(str(tmp_path / "classes.json")) == (("a", "b"), json.loads(text))


@pytest.mark.parametrize("text", ["{", '{"0": "a", "2": "b"}', '{"x": "a"}', "[3]", "7", '[{"index": 0}]'])
def test_class_files_that_make_no_sense(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(MinerError, match=r"classes\.json: "):
        class_names(str(tmp_path / "classes.json"))


def test_gzip_bombs_and_cut_gzips_are_refused(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "t")
    path = tmp_path / "t" / "a.tar.gz"
    path.write_bytes(gzip.compress(bytes(80 << 20), 6))
    with pytest.raises(MinerError, match=r"a\.tar\.gz: expands past"):
        make(Recipe("tars", (str(path),)), tmp_path / "bomb")
    path.write_bytes(gzip.compress(os.urandom(10000))[:5000])
    with pytest.raises(MinerError, match=r"a\.tar\.gz: cut off or corrupt gzip"):
        make(Recipe("tars", (str(path),)), tmp_path / "cut")
    assert not list(tmp_path.glob("*/*.tar"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "empty")
    for recipe, error, text in (
        (Recipe("folder", (str(tmp_path / "nowhere"),)), MinerError, "nowhere: no such file or folder"),
        (Recipe("folder", (str(tmp_path / "empty"),)), MinerError, "empty: no images"),
        (Recipe("folder", ()), UsageError, "--input"),
        (Recipe("tars", (str(tmp_path / "empty"),), per_shard=0), UsageError, "--per-shard 0"),
        (Recipe("tars", (str(tmp_path / "empty"),), exclude_list="x"), UsageError, "--exclude-list"),
        (Recipe("tiny-images", (str(tmp_path / "empty"),)), UsageError, r"tiny_images\.bin"),
    ):
        with pytest.raises(error, match=text):
            make(recipe, tmp_path / "pool")
    assert os.listdir(tmp_path) == ["empty"]
