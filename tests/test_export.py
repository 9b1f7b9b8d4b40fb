"""Exports, each read by the loader of those for whom it is: the same images come, by uid and by pixels."""

import ast
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from miner import subset as subsets
from miner.export import Format, export
from miner.pool import uid_of
from miner.subset import Subset, load_subset
from tests import exported
from tests.exported import CHOSEN, PIXELS, SIDE

STYLES: tuple[Format, ...] = ("webdataset", "manifest", "imglist", "npy", "datacomp", "parquet")
pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's packages warn of is theirs


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hugging Face and mlcroissant keep what they unpack in folders of this test, and ask nobody."""
    caches = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(caches / "hf"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(caches / "hf" / "datasets"))
        patch.setenv("CROISSANT_CACHE", str(caches / "croissant"))
        yield


@pytest.fixture(scope="module")
def rows() -> list[int]:
    return np.random.default_rng(1).permutation(len(PIXELS))[:CHOSEN].tolist()


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> Subset:
    """A subset of two tars and a half."""
    folder = tmp_path_factory.mktemp("run")
    pool = exported.write_pool(folder / "made", range(len(PIXELS)), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subsets, "PER_TAR", 8)
        return exported.write_chosen(pool, folder / "subset-0.25", rows)


@pytest.fixture(scope="module")
def exports(subset: Subset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for style in STYLES:
        export(subset, style, folder / style, size=SIDE)
    return {style: folder / style for style in STYLES}


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_tars_are_those_of_the_subset_and_we_read_them(subset: Subset, exports: dict[str, Path]) -> None:
    there = load_subset(exports["webdataset"])
    there.verify()
    names = ["subset.json", "manifest.parquet", "sizes.json", *(tar["name"] for tar in subset.recipe["tars"])]
    assert len(names) == 6
    for name in names:
        assert (exports["webdataset"] / name).read_bytes() == (Path(str(subset.path)) / name).read_bytes()
    assert there.uids == subset.uids


def test_torch_reads_what_was_chosen(rows: list[int], exports: dict[str, Path]) -> None:
    loader = DataLoader(load_subset(exports["webdataset"]), batch_size=7)
    images = torch.cat([image for image, _ in loader]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, PIXELS[rows])
    assert {label for _, labels in loader for label in labels.tolist()} == {-1}


@contextmanager
def webdataset_from(folder: Path | None) -> Iterator[ModuleType]:
    """The package webdataset out of this folder, or the installed one; other tests keep theirs."""

    def forget() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "webdataset"}

    kept = forget()
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.syspath_prepend(str(folder))
        yield importlib.import_module("webdataset")
    forget()
    sys.modules.update(kept)


@pytest.mark.parametrize("version", ["0.2.86", "1."])
def test_webdataset_reads_the_tars(
    version: str, subset: Subset, rows: list[int], exports: dict[str, Path], tmp_path: Path
) -> None:
    """Most users are on 0.2.86; it cannot be installed beside a newer one, so it gets a folder of its own."""
    old = version == "0.2.86"
    if old:
        uv = [shutil.which("uv") or sys.executable, *(() if shutil.which("uv") else ("-m", "uv"))]
        words = [*uv, "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), "--python", sys.executable]
        subprocess.run([*words, f"webdataset=={version}"], check=True)
    with webdataset_from(tmp_path if old else None) as webdataset:
        assert webdataset.__version__.startswith(version)
        assert str(webdataset.__file__).startswith(str(tmp_path)) == old
        urls = sorted(map(str, exports["webdataset"].glob("outliers-*.tar")))
        samples = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "json", "cls")
        items = list(samples)
    assert [fact["uid"] for _, fact, _ in items] == subset.uids
    assert np.array_equal(np.stack([image for image, _, _ in items]), PIXELS[rows])
    assert [label for _, _, label in items] == [row % 3 for row in rows]


def test_hugging_face_reads_tars_by_name_and_by_card(subset: Subset, exports: dict[str, Path]) -> None:
    import datasets

    folder = exports["webdataset"]
    named = datasets.load_dataset("webdataset", data_files={"train": str(folder / "*.tar")}, split="train")
    assert [fact["uid"] for fact in named["json"]] == subset.uids
    assert named[0]["png"].size == (SIDE, SIDE)
    stream = datasets.load_dataset(str(folder), split="train", streaming=True)  # as the card says
    assert [item["json"]["uid"] for item in stream] == subset.uids


def test_hugging_face_reads_parquet_with_images(subset: Subset, rows: list[int], exports: dict[str, Path]) -> None:
    import datasets

    folder = exports["parquet"]
    files = sorted(path.name for path in (folder / "data").iterdir())
    assert files == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    named = datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train")
    by_card = datasets.load_dataset(str(folder), split="train")
    for found in (named, by_card):
        assert isinstance(found.features["image"], datasets.Image)
        assert found["uid"] == subset.uids
        assert np.array_equal(np.stack([np.asarray(image) for image in found["image"]]), PIXELS[rows])
    raw = pq.read_table(folder / "data" / files[0])["image"].to_pylist()
    assert [uid_of(image["bytes"]) for image in raw] == subset.uids[:8]


@pytest.mark.parametrize("style", ["manifest", "imglist", "npy", "datacomp"])
def test_hugging_face_finds_something_to_show_in_every_export(style: str, exports: dict[str, Path]) -> None:
    import datasets

    found = datasets.load_dataset(str(exports[style]), split="train")
    assert len(found) == CHOSEN
    assert ("image" if style == "imglist" else "uid") in found.features


def test_pytorch_ood_and_openood_read_the_imglist(subset: Subset, rows: list[int], exports: dict[str, Path]) -> None:
    from pytorch_ood.dataset.img import ImageListDataset

    folder = exports["imglist"]
    images = ImageListDataset(str(folder), str(folder / "imglist.txt"))
    assert len(images) == CHOSEN
    assert [label for _, label in images] == [-1] * CHOSEN
    assert np.array_equal(np.stack([np.asarray(image) for image, _ in images]), PIXELS[rows])
    for uid, line in zip(subset.uids, (folder / "imglist.txt").read_text().splitlines(), strict=True):
        name, rest = line.split(" ", 1)  # OpenOOD's ImglistDataset: what follows is a literal, an int is the label
        assert ast.literal_eval(rest) == -1
        data = (folder / name).read_bytes()
        assert uid_of(data) == uid
        assert Image.open(io.BytesIO(data)).convert("RGB").size == (SIDE, SIDE)


def test_npy_is_like_300k_random_images(rows: list[int], exports: dict[str, Path]) -> None:
    images = np.load(exports["npy"] / "outliers.npy", mmap_mode="r")
    assert images.dtype == np.uint8
    assert np.array_equal(images, PIXELS[rows])


def test_npy_of_another_size_is_scaled(subset: Subset, tmp_path: Path) -> None:
    export(subset, "npy", tmp_path / "small", size=8)
    assert np.load(tmp_path / "small" / "outliers.npy").shape == (CHOSEN, 8, 8, 3)


def test_datacomp_keeps_by_its_rule_what_was_chosen(subset: Subset, exports: dict[str, Path]) -> None:
    """The rule of its resharder: uid as two halves, multiplicity by searchsorted left and right."""
    pairs = np.load(exports["datacomp"] / "uids.npy", mmap_mode="r")
    assert pairs.dtype == np.dtype("u8,u8")
    asked = [*subset.uids, uid_of(b"another"), "0" * 32, "f" * 32]
    for uid in asked:
        key = np.array([divmod(int(uid, 16), 2**64)], np.dtype("u8,u8"))[0]
        count = np.searchsorted(pairs, key, "right") - np.searchsorted(pairs, key, "left")
        assert count == (uid in subset.uids)


def test_open_clip_learns_the_number_of_samples_from_sizes_json(exports: dict[str, Path]) -> None:
    for style in ("webdataset", "manifest"):
        sizes = json.loads((exports[style] / "sizes.json").read_text())
        shards = [f"outliers-{i:06d}.tar" for i in range(3)]
        assert sum(int(sizes[os.path.basename(shard)]) for shard in shards) == CHOSEN


@pytest.mark.parametrize("style", STYLES)
def test_croissant_is_valid_and_its_records_iterate(
    style: str, subset: Subset, rows: list[int], exports: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    import mlcroissant

    caplog.set_level(logging.WARNING)
    dataset = mlcroissant.Dataset(jsonld=str(exports[style] / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert "not standard" not in caplog.text
    told = json.loads((exports[style] / "croissant.json").read_text())
    assert told["conformsTo"].endswith("/1.1")
    assert told["prov:wasDerivedFrom"]["prov:label"] == "tiny"
    records = list(dataset.records("manifest"))
    assert [record["manifest/uid"].decode() for record in records] == subset.uids
    if style not in ("webdataset", "imglist", "parquet"):
        return
    name = "key" if style == "webdataset" else "uid"
    expected = dict(zip(subset.manifest[name].to_pylist(), rows, strict=True))
    images = list(dataset.records("images"))
    found = {image[f"images/{name}"].decode(): np.asarray(image["images/image"]) for image in images}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(pixels, PIXELS[expected[key]]) for key, pixels in found.items())


ALWAYS = {"manifest.parquet", "subset.json", "README.md", "croissant.json"}
LAYOUT = {
    "webdataset": {"outliers-000000.tar", "outliers-000001.tar", "outliers-000002.tar", "sizes.json"},
    "manifest": {"sizes.json"},
    "imglist": {"imglist.txt", "images"},
    "npy": {"outliers.npy"},
    "datacomp": {"uids.npy"},
    "parquet": {"data"},
}


@pytest.mark.parametrize("style", STYLES)
def test_the_layout_changes_on_purpose_only(style: str, exports: dict[str, Path]) -> None:
    """Others find files by these names: see docs/formats.md, and say in CHANGELOG.md what has changed."""
    assert {path.name for path in exports[style].iterdir()} == ALWAYS | LAYOUT[style]
