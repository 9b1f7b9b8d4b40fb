"""Pools people have, in the very layouts in which they are distributed: found, adopted or converted, read, verified."""

import datetime
import io
import itertools
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from miner import cache
from miner.blocks import checked_rows
from miner.build import finish, prepare, run_job
from miner.config import Config, Data
from miner.errors import MinerError, UsageError
from miner.export import export
from miner.images import png
from miner.inputs import open_pool
from miner.pool import INDEX_SCHEMA, Pool, uid_of
from miner.recipe import Recipe
from miner.run_dir import write_json
from miner.shards import shard_job
from miner.source_uids import source_uids
from miner.sources import detect, plan
from pipelines import shard
from tests import exported

RNG = np.random.default_rng(3)


def encoded(form: str = "JPEG", mode: str = "RGB", side: int = 24) -> bytes:
    image = Image.fromarray(RNG.integers(0, 256, (side, side + 4, 3), np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def make(recipe: Recipe, folder: Path) -> Pool:
    planned = prepare(recipe, str(folder))
    for job in planned.jobs:
        run_job(str(folder), job)
    pool = finish(recipe, str(folder), "p", planned)
    pool.verify()
    return pool


def found(*paths: Path, glob: str = "*") -> Recipe:
    inputs = tuple(map(str, paths))
    return Recipe(detect(inputs, glob)[0], inputs, glob)


def images_of(pool: Pool) -> list[bytes]:
    return [data for shard, entry in enumerate(pool.shards) for data in pool.read(shard, range(entry.count))]


def names_of(pool: Pool) -> list[str | None]:
    parts = [source_uids(pool, shard) for shard in range(len(pool.shards))]
    return [name for part in parts if part is not None for name in part.to_pylist()]


def tar_of(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """As `tar cf` makes them: folders are members too."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for folder in sorted({os.path.dirname(name) for name in members} - {""}):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# --- img2dataset, DataComp, LAION ---


def img2dataset(folder: Path, digits: int, with_uid: bool) -> dict[str, bytes]:
    """Two shards as img2dataset writes them; uid -> bytes."""
    os.makedirs(folder)
    images = {}
    for number in range(2):
        rows = []
        with webdataset.TarWriter(str(folder / f"{number:0{digits}d}.tar")) as tar:
            for i in range(4):
                key, data, uid = f"{number:0{digits}d}{i:04d}", encoded(), RNG.bytes(16).hex()
                row = {"url": "https://x/y.jpg", "caption": "a dog", "key": key, "width": 28, "height": 24}
                row |= {"status": "success" if i < 3 else "failed_to_download", "error_message": None, "exif": "{}"}
                rows.append(row | ({"uid": uid} if with_uid else {}))
                if i < 3:
                    note = json.dumps(rows[-1], indent=4)
                    tar.write({"__key__": key, "jpg": data, "txt": "a dog", "json": note.encode()})
                    images[uid] = data
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:0{digits}d}.parquet")
        (folder / f"{number:0{digits}d}_stats.json").write_text('{"count": 4, "successes": 3}')
    return images


@pytest.mark.parametrize("digits", [5, 8])
def test_img2dataset_shards_stay_and_their_uids_are_kept(tmp_path: Path, digits: int) -> None:
    images = img2dataset(tmp_path / "shards", digits, True)
    assert detect((str(tmp_path / "shards"),)) == ("tars", "WebDataset tars (2 files)")
    pool = make(found(tmp_path / "shards"), tmp_path / "pool")
    assert images_of(pool) == list(images.values())
    assert names_of(pool) == list(images)
    assert pool.index(["uid"])["uid"].to_pylist() == [uid_of(data) for data in images.values()]
    assert pool.index(["label"])["label"].null_count == 6
    assert [shard.path for shard in pool.shards] == [str(tmp_path / "shards" / f"{i:0{digits}d}.tar") for i in (0, 1)]
    assert sorted(os.listdir(pool.path)) == ["index.parquet", "pool.json", "shards", "sources.parquet"]


def test_a_datacomp_list_can_name_images_as_their_source_does(tmp_path: Path) -> None:
    """CommonPool's own uids, by which DataComp's resharder picks from CommonPool's own shards."""
    images = img2dataset(tmp_path / "shards", 8, True)
    pool = make(found(tmp_path / "shards"), tmp_path / "pool")
    subset = exported.write_chosen(pool, tmp_path / "subset", [4, 0, 5])
    export(subset, "datacomp", tmp_path / "list", pool=pool)
    pairs = np.load(tmp_path / "list" / "uids.npy", mmap_mode="r")
    wanted = sorted(list(images)[row] for row in (4, 0, 5))
    assert [f"{high:016x}{low:016x}" for high, low in pairs.tolist()] == wanted
    img2dataset(tmp_path / "unnamed", 8, False)
    with pytest.raises(MinerError, match="had no uids of its own"):
        export(subset, "datacomp", tmp_path / "none", pool=make(found(tmp_path / "unnamed"), tmp_path / "pool-unnamed"))
    img2dataset(tmp_path / "others", 8, True)
    with pytest.raises(MinerError, match="no uid of its source for 3 of 3"):
        export(subset, "datacomp", tmp_path / "none", pool=make(found(tmp_path / "others"), tmp_path / "pool-others"))


def test_a_pool_without_names_has_no_file_of_names_and_a_false_one_is_refused(tmp_path: Path) -> None:
    img2dataset(tmp_path / "with", 5, True)
    img2dataset(tmp_path / "without", 5, False)
    pools = [make(found(tmp_path / name), tmp_path / f"pool-{name}") for name in ("with", "without")]
    assert source_uids(pools[1], 0) is None
    Path(pools[1].path, "sources.parquet").write_bytes(Path(pools[0].path, "sources.parquet").read_bytes())
    with pytest.raises(MinerError, match=r"sources\.parquet: not the names of this pool's images"):
        source_uids(pools[1], 0)
    Path(pools[1].path, "sources.parquet").write_bytes(b"PAR1")
    with pytest.raises(MinerError, match=r"sources\.parquet: damaged"):
        source_uids(pools[1], 0)


# --- Hugging Face Parquet ---


def parquet(path: Path, images: list[bytes | None], names: list[str], labels: list[int], group: int = 3) -> None:
    """As `datasets` writes it: the features stand in the schema's metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    cells = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    os.makedirs(path.parent, exist_ok=True)
    pq.write_table(pa.table([pa.array(cells, kind), pa.array(labels)], schema=schema), path, row_group_size=group)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its file to the collector
def test_hugging_face_parquet_is_written_to_tars_byte_for_byte(tmp_path: Path) -> None:
    images = [encoded("PNG"), *(encoded() for _ in range(8)), encoded("WEBP"), b"\xff\xd8\xff broken", encoded()]
    parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", images[:7], ["cat", "dog"], [0, 1] * 3 + [-1])
    parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", images[7:], ["cat", "dog"], [1] * 5)
    (tmp_path / "hub" / "README.md").write_text("---\n---")
    recipe = Recipe(*detect((str(tmp_path / "hub"),))[:1], (str(tmp_path / "hub"),), per_shard=4)
    assert recipe.source == "parquet"
    pool = make(recipe, tmp_path / "pool")
    assert images_of(pool) == images
    assert pool.classes == ("cat", "dog")
    assert [shard.count for shard in pool.shards] == [4, 3, 4, 1]
    index = pool.index().to_pylist()
    assert [row["label"] for row in index] == [0, 1, 0, 1, 0, 1, None, 1, 1, 1, 1, 1]
    assert [row["ext"] for row in index] == ["png"] + ["jpg"] * 8 + ["webp"] + ["jpg"] * 2
    assert [row["key"] for row in index] == [f"{i:09d}" for i in range(12)]
    sample = next(iter(webdataset.WebDataset([pool.shards[3].path], shardshuffle=False)))
    assert json.loads(sample["json"]) == {"path": "4.jpg"}
    assert cache.open_shard(pool, 2, 16)[1].keys() == {3}  # the broken one is quarantined
    again = make(recipe, tmp_path / "again")
    assert [Path(shard.path).read_bytes() for shard in again.shards] == [
        Path(shard.path).read_bytes() for shard in pool.shards
    ]


def test_parquet_rows_without_an_image_are_counted(tmp_path: Path) -> None:
    images = [encoded(), None, b"GIF89a", b"\xff\xd8\xff" + bytes(16 << 20), encoded()]
    path = tmp_path / "a.parquet"
    parquet(path, images, ["x"], [0] * 5)
    with pq.ParquetFile(path) as file:
        table = file.read()
    table = table.set_column(0, table.schema.field(0), pa.array(
        [{"bytes": data, "path": None} for data in images], table.schema.field(0).type))  # fmt: skip
    pq.write_table(table, path)
    pool = make(found(path), tmp_path / "pool")
    assert [row["key"] for row in pool.index().to_pylist()] == ["000000000", "000000004"]
    skipped = json.loads((tmp_path / "pool" / "pool.json").read_text())["source"]["skipped"]
    assert skipped == {"without bytes": 1, "not a JPEG, PNG or WEBP": 1, "over 16 MB": 1}
    parts = make(Recipe("parquet", (str(path),), per_shard=1), tmp_path / "parts")  # three of five without an image
    assert (parts.fingerprint, [entry.name for entry in parts.shards]) == (
        pool.fingerprint,
        ["000000.tar", "000004.tar"],
    )
    assert images_of(parts) == [images[0], images[4]]
    assert json.loads((tmp_path / "parts" / "pool.json").read_text())["source"]["skipped"] == skipped
    whole = (tmp_path / "parts" / "index.parquet").read_bytes()
    make(Recipe("parquet", (str(path),), per_shard=1), tmp_path / "parts")
    assert (tmp_path / "parts" / "index.parquet").read_bytes() == whole
    parquet(tmp_path / "none.parquet", [None, None], ["x"], [0, 0])
    with pytest.raises(MinerError, match=r"none\.parquet: no images in it \(2 without bytes\)"):
        make(Recipe("parquet", (str(tmp_path / "none.parquet"),), per_shard=1), tmp_path / "none")


@pytest.mark.parametrize("path", [b"a.jpg", datetime.datetime(2026, 1, 1)])
def test_a_path_in_parquet_that_is_no_text_is_left_out(tmp_path: Path, path: object) -> None:
    data = encoded()
    pq.write_table(pa.table({"image": [{"bytes": data, "path": path}]}), tmp_path / "a.parquet")
    pool = make(found(tmp_path / "a.parquet"), tmp_path / "pool")
    assert images_of(pool) == [data]
    assert b"path" not in Path(pool.shards[0].path).read_bytes()


def test_parquet_of_other_kinds_is_refused(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cell = pa.array([{"bytes": encoded(), "path": None}], kind)
    tables = {
        "text": pa.table({"text": ["a"]}),
        "two": pa.table({"left": cell, "right": cell}),
        "label": pa.table({"image": cell, "label": [2**40]}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "two.parquet").read_bytes()[:-20])
    for name, error, text in (
        ("text", MinerError, "no image column"),
        ("two", UsageError, "image columns left, right; keep one"),
        ("label", MinerError, "row 0: label 1099511627776, but only 1000000 classes"),
        ("cut", MinerError, "not a sound Parquet file"),
    ):
        with pytest.raises(error, match=rf"{name}\.parquet: {text}"):
            make(Recipe("parquet", (str(tmp_path / f"{name}.parquet"),)), tmp_path / f"pool-{name}")
    parquet(tmp_path / "label.parquet", [encoded()], ["a"], [1])
    with pytest.raises(MinerError, match=r"label\.parquet: row 0: label 1, but only 1 classes"):
        make(found(tmp_path / "label.parquet"), tmp_path / "pool")
    parquet(tmp_path / "c" / "0.parquet", [encoded()], ["a"], [0])
    parquet(tmp_path / "c" / "1.parquet", [encoded()], ["b"], [0])
    with pytest.raises(MinerError, match=r"1\.parquet: other classes"):
        plan(Recipe("parquet", (str(tmp_path / "c"),)))


# --- ImageNet-1k ---

WNIDS = ("n01440764", "n01443537", "n02105855")


def imagenet() -> dict[str, dict[str, bytes]]:
    """The train set's layout with its known traps: a PNG called .JPEG, CMYK JPEGs; and a broken image."""
    classes = {wnid: {f"{wnid}_{i * 7}.JPEG": encoded() for i in range(3)} for wnid in WNIDS}
    classes["n02105855"]["n02105855_2933.JPEG"] = encoded("PNG")
    classes["n01440764"]["n01440764_13258.JPEG"] = encoded("JPEG", "CMYK")
    classes["n01440764"]["n01440764_999.JPEG"] = encoded()[:200]
    return classes


def packed(classes: dict[str, dict[str, bytes]]) -> bytes:
    return tar_of({f"{wnid}.tar": tar_of(members) for wnid, members in classes.items()})


def test_imagenet_is_read_where_it_lies(tmp_path: Path) -> None:
    classes = imagenet()
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(packed(classes))
    assert detect((str(path),)) == ("imagenet", "one tar of images a class, as ImageNet is distributed (1 file)")
    pool = make(found(path), tmp_path / "pool")
    members = {name: data for inner in classes.values() for name, data in inner.items()}
    assert images_of(pool) == list(members.values())
    assert names_of(pool) == list(members)
    rows = pool.index().to_pylist()
    assert [row["key"] + ".JPEG" for row in rows] == list(members)
    assert [pool.classes[row["label"]] for row in rows] == [name[:9] for name in members]
    assert pool.classes == WNIDS
    assert [(shard.name, shard.path) for shard in pool.shards] == [(wnid, str(path)) for wnid in WNIDS]
    assert sorted(os.listdir(pool.path)) == ["index.parquet", "pool.json", "shards", "sources.parquet"]
    pixels, bad = cache.open_shard(pool, 0, 16)
    assert list(bad) == [rows.index(row) for row in rows if row["key"] == "n01440764_999"]
    reference = Image.open(io.BytesIO(members["n01440764_13258.JPEG"])).convert("RGB")
    middle = reference.resize((16, 16), Image.Resampling.BILINEAR, box=(2, 0, 26, 24))
    assert np.array_equal(pixels[3], np.asarray(middle))
    assert cache.open_shard(pool, 2, 16)[1] == {}  # the PNG that is called .JPEG
    raw = bytearray(path.read_bytes())
    raw[rows[4]["offset"] + 40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(MinerError, match="its bytes changed since the pool was made"):
        Pool.open(pool.path).verify()


def test_the_tars_of_imagenets_classes_by_themselves(tmp_path: Path) -> None:
    classes = imagenet()
    os.makedirs(tmp_path / "train")
    for wnid, members in classes.items():
        (tmp_path / "train" / f"{wnid}.tar").write_bytes(tar_of(members))
    whole = tmp_path / "whole.tar"
    whole.write_bytes(packed(classes))
    one, other = make(found(tmp_path / "train"), tmp_path / "one"), make(found(whole), tmp_path / "other")
    assert one.classes == WNIDS
    assert one.fingerprint == other.fingerprint


def test_broken_tars_of_tars_name_file_and_class(tmp_path: Path) -> None:
    classes = imagenet()
    sound = packed(classes)
    inner = {wnid: tar_of(members) for wnid, members in classes.items()}
    linked = io.BytesIO()
    with tarfile.open(fileobj=linked, mode="w") as tar:
        link = tarfile.TarInfo("n9.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    twice = tar_of({"a/n01440764.tar": inner[WNIDS[0]], "b/n01440764.tar": inner[WNIDS[0]]})
    doubled = inner[WNIDS[0]][:2048] + inner[WNIDS[0]]
    for name, data, text in (
        ("cut", sound[: len(sound) // 2], r"cut\.tar: .*cut off"),
        ("inner", tar_of({"n01440764.tar": inner[WNIDS[0]][:1500]}), r"inner\.tar: n01440764\.tar: .*cut off"),
        ("noend", tar_of({"n01440764.tar": inner[WNIDS[0]][:2048]}), r"noend\.tar: n01440764\.tar: .*cut off"),
        ("none", tar_of({"n01440764.tar": tar_of({"a.txt": b"x"})}), r"n01440764\.tar: 0 images, not some"),
        ("link", linked.getvalue(), r"link\.tar: member 'n9\.tar'.*refused: a link"),
        ("twice", twice, r"two tars of class 'n01440764'"),
        ("double", tar_of({"n01440764.tar": doubled}), r"double\.tar: key 'n01440764_0' comes twice"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        with pytest.raises(MinerError, match=text):
            make(Recipe("imagenet", (str(path),)), tmp_path / f"pool-{name}")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_that_no_subset_could_hold_are_refused_when_tars_are_adopted(tmp_path: Path, form: int) -> None:
    fits, long = "d" * 100 + "/" + "k" * 95, "d" * 100 + "/" + "k" * 96
    (tmp_path / "fits.tar").write_bytes(tar_of({f"{fits}.jpg": encoded(), f"{fits}.cls": b"0"}, form))
    subset = exported.write_chosen(
        make(Recipe("tars", (str(tmp_path / "fits.tar"),)), tmp_path / "pool"), tmp_path, [0]
    )
    assert checked_rows(subset)["key"].to_pylist() == [fits]
    (tmp_path / "long.tar").write_bytes(tar_of({f"{long}.jpg": encoded()}, form))
    with pytest.raises(MinerError, match=r"long\.tar: key 'd*/k*': too long a key .*; rename it"):
        make(Recipe("tars", (str(tmp_path / "long.tar"),)), tmp_path / "refused")
    (tmp_path / "n1.tar").write_bytes(tar_of({f"{'k' * 96}.jpg": encoded()}, form))
    with pytest.raises(MinerError, match=r"n1\.tar: member 'k*\.jpg': too long a key .*take --source folder"):
        make(Recipe("imagenet", (str(tmp_path / "n1.tar"),)), tmp_path / "other")


def test_dots_in_the_names_of_a_class_tar_do_not_become_keys(tmp_path: Path) -> None:
    (tmp_path / "n1.tar").write_bytes(tar_of({f"n1_{i}.v2.JPEG": encoded() for i in range(3)}))
    pool = make(found(tmp_path / "n1.tar"), tmp_path / "pool")
    assert pool.index(["key"])["key"].to_pylist() == ["n1_0_v2", "n1_1_v2", "n1_2_v2"]
    assert names_of(pool) == ["n1_0.v2.JPEG", "n1_1.v2.JPEG", "n1_2.v2.JPEG"]
    checked_rows(exported.write_chosen(pool, tmp_path / "subset", [2, 0]))
    config = Config(data=Data(pool=pool.path))
    assert open_pool(config).count == 3
    old = pool.index().set_column(1, INDEX_SCHEMA.field("key"), pa.array(["n1_0", "n1_1.v2", "n1_2"]))
    pq.write_table(old, tmp_path / "pool" / "index.parquet")  # as such pools were made before
    with pytest.raises(
        MinerError, match=r"n1\.tar: key 'n1_1\.v2': a key must not hold a dot .*make the pool .* again"
    ):
        open_pool(config)


# --- image folders ---


def test_an_image_folder_is_chosen_from_and_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints/cat1.jpg", "cat/1.jpg", "cat/.old/2.jpg", "cat/3.png", "dog/4.jpg", "empty/a.txt"):
        os.makedirs(tmp_path / "photos" / os.path.dirname(name), exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded())
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", ".")
    for number, (glob, classes, count) in enumerate(
        (("*", ("cat", "dog"), 3), ("*.jpg", ("cat", "dog"), 2), ("cat/*", ("cat",), 2))
    ):
        pool = make(found(tmp_path / "photos", glob=glob), tmp_path / f"pool-{number}")
        assert (pool.classes, pool.count) == (classes, count)
    packed = make(found(tmp_path / "photos.tar"), tmp_path / "packed")
    assert (packed.classes, packed.count) == (("cat", "dog"), 3)
    with pytest.raises(MinerError, match=r"photos: no images .* that match --glob 'ca\?'"):
        make(found(tmp_path / "photos", glob="ca?"), tmp_path / "none")


def test_flags_without_effect_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "n1.tar"
    path.write_bytes(tar_of({"n1_0.JPEG": encoded()}))
    for source in ("tars", "imagenet"):
        with pytest.raises(UsageError, match=f"--per-shard: --source {source} makes one shard of each tar"):
            plan(Recipe(source, (str(path),), per_shard=5))
        with pytest.raises(UsageError, match="--glob: chooses in folders"):
            plan(Recipe(source, (str(path),), "n*"))


def test_names_that_are_not_utf8_are_refused_at_once(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    for name in (f"folder/{latin}/1.jpg", "tars/x.tar"):
        os.makedirs(tmp_path / os.path.dirname(name))
        (tmp_path / name).write_bytes(encoded())
    (tmp_path / "tars" / "x.tar").write_bytes(tar_of({"1.jpg": encoded()}))
    with pytest.raises(MinerError, match=r"folder/caf\\udce9/1\.jpg: this name is not UTF-8; rename it"):
        plan(found(tmp_path / "folder"))
    (tmp_path / "tars" / "classes.json").write_text('["\\ud800"]')
    with pytest.raises(MinerError, match=r"classes\.json: not JSON .*surrogates not allowed"):
        plan(found(tmp_path / "tars"))
    os.rename(tmp_path / "tars" / "x.tar", tmp_path / "tars" / f"{latin}.tar")
    with pytest.raises(MinerError, match=r"tars/caf\\udce9\.tar: this name is not UTF-8"):
        plan(Recipe("tars", (str(tmp_path / "tars"),)))
    with pytest.raises(MinerError, match=r"config\.json: cannot hold a name that is not UTF-8: .*caf\\udce9"):
        write_json(tmp_path / "config.json", {"pool": latin})


# --- Places365, and other folders in one tar ---

PLACES = ("a/abbey", "a/apartment_building/outdoor", "a/apartment_building/indoor", "z/zoo")


def places(root: str) -> dict[str, bytes]:
    return {f"{root}/{name}/{i:08d}.jpg": encoded() for name in PLACES for i in range(1, 4)}


@pytest.mark.parametrize("root", ["data_256", "data_large", "./data_256"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_places365_as_distributed(tmp_path: Path, root: str, form: int) -> None:
    images = places(root)
    path = tmp_path / "train_256_places365standard.tar"
    path.write_bytes(tar_of(images, form))
    recipe = Recipe("places365", (str(path),), per_shard=5)
    assert detect(recipe.inputs)[0] == "places365"
    pool = make(recipe, tmp_path / "pool")
    assert pool.classes == tuple(f"/{name}" for name in sorted(PLACES))
    assert [shard.count for shard in pool.shards] == [5, 5, 2]
    assert images_of(pool) == list(images.values())
    labels = pool.index(["label"])["label"].to_pylist()
    assert [root + pool.classes[label] for label in labels] == [os.path.dirname(name) for name in images]
    assert names_of(pool) == [name.removeprefix("./") for name in images]
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "disk", filter="data")
    unpacked = make(found(tmp_path / "disk" / root), tmp_path / "unpacked")
    assert (unpacked.classes, unpacked.fingerprint) == (pool.classes, pool.fingerprint)


def test_places365_easyformat_asks_for_a_split(tmp_path: Path) -> None:
    images = {
        f"places365_standard/{split}/{name}/{i:08d}.jpg": encoded()
        for split, name, i in itertools.product(("train", "val"), ("airfield", "apartment_building-outdoor"), (1, 2))
    }
    path = tmp_path / "places365standard_easyformat.tar"
    path.write_bytes(tar_of(images | {"places365_standard/train.txt": b"..."}))
    with pytest.raises(UsageError, match=r"holds train, val, no classes; choose: --glob 'places365_standard/train/\*'"):
        make(found(path), tmp_path / "pool")
    pool = make(found(path, glob="places365_standard/train/*"), tmp_path / "pool")
    assert pool.classes == ("airfield", "apartment_building-outdoor")
    assert images_of(pool) == list(images.values())[:4]
    os.makedirs(tmp_path / "disk" / "train" / "a")
    with pytest.raises(UsageError, match=r"disk: holds train, no classes; choose: --input .*disk/train$"):
        make(found(tmp_path / "disk"), tmp_path / "other")


def test_an_archive_that_changed_after_planning_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.tar"
    images = places("data_256")
    path.write_bytes(tar_of(images))
    job = plan(Recipe("places365", (str(path),))).jobs[0]
    path.write_bytes(tar_of(dict(list(images.items())[:-1])))
    with pytest.raises(MinerError, match=r"p\.tar: "):
        shard_job(str(tmp_path), job)


# --- ImageNet32, ImageNet64 ---


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_downsampled_imagenet(tmp_path: Path, side: int, save: object) -> None:
    planes = RNG.integers(0, 256, (11, 3, side, side), np.uint8)
    labels = np.arange(1, 12) % 4 + 1
    os.makedirs(tmp_path / "i")
    for number, rows in (("10", slice(8, 11)), ("1", slice(0, 5)), ("2", slice(5, 8))):
        batch = {"data": planes[rows].reshape(-1, 3 * side * side), "labels": labels[rows]}
        save(tmp_path / "i" / f"train_data_batch_{number}.npz", mean=np.zeros(3 * side * side), **batch)  # type: ignore
    wnids = [f"n0211978{i}" for i in range(4)]
    (tmp_path / "i" / "map_clsloc.txt").write_text("".join(f"{w} {i} kit_fox\n" for i, w in enumerate(wnids, 1)))
    recipe = Recipe("npz", (str(tmp_path / "i"),), per_shard=4)
    assert detect(recipe.inputs) == ("npz", "batches of downsampled ImageNet (.npz) (3 files)")
    pool = make(recipe, tmp_path / "pool")
    assert [shard.count for shard in pool.shards] == [4, 1, 3, 3]
    pixels = np.concatenate([cache.open_shard(pool, shard, side)[0] for shard in range(4)])
    assert np.array_equal(pixels, planes.transpose(0, 2, 3, 1))
    assert np.array_equal(np.load(pool.shards[0].path, mmap_mode="r", allow_pickle=False), pixels[:4])
    index = pool.index().to_pylist()
    assert [row["label"] for row in index] == (labels - 1).tolist()
    assert pool.classes == tuple(wnids)
    assert index[10]["uid"] == uid_of(pixels[10].tobytes())
    assert images_of(pool)[6] == png(pixels[6])
    assert not (tmp_path / "pool" / "cache").exists()  # raw shards of that size are their own cache


class Touchy:
    """Unpickling this makes a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_batches_that_are_not_downsampled_imagenets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    import pickle

    os.makedirs(tmp_path / "old")
    (tmp_path / "old" / "train_data_batch_1").write_bytes(pickle.dumps({"data": Touchy(), "labels": [1]}))
    with pytest.raises(MinerError, match=r"train_data_batch_1: a pickled batch, .*fetch the \.npz release"):
        make(found(tmp_path / "old"), tmp_path / "pool")
    data, one = np.zeros((2, 3072), np.uint8), np.ones(2, int)
    arrays: dict[str, dict[str, np.ndarray]] = {
        "object": {"data": np.array([Touchy(), Touchy()], object), "labels": one},
        "labels": {"data": data, "labels": np.array([Touchy(), Touchy()], object)},
        "zero": {"data": data, "labels": one - 1},
        "short": {"data": data, "labels": one[:1]},
        "float": {"data": data.astype(np.float32), "labels": one},
        "odd": {"data": data[:, :3071], "labels": one},
        "other": {"images": data},
    }
    for name, content in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **content)  # type: ignore[arg-type]
    (tmp_path / "cut.npz").write_bytes((tmp_path / "zero.npz").read_bytes()[:-40])
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("data.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 3072)})
        file.write(bytes(5 << 20))
    for name, text in (
        ("object", "refused, not plain numbers"),
        ("labels", "refused, not plain numbers"),
        ("zero", "labels count from 1"),
        ("short", "wanted 2 integers"),
        ("float", "data is float32"),
        ("odd", r"wanted uint8 \[N, 3 x S x S\]"),
        ("other", "no array `data`"),
        ("cut", "not a sound"),
        ("bomb", "bytes where its header says"),
    ):
        with pytest.raises(MinerError, match=rf"{name}\.npz: .*{text}"):
            make(Recipe("npz", (f"{name}.npz",)), tmp_path / f"pool-{name}")
    assert not (tmp_path / "unpickled").exists()


# --- what all of them share ---


@pytest.mark.parametrize("source", ["parquet", "npz", "imagenet", "places365"])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(tmp_path: Path, source: str) -> None:
    if source == "parquet":
        parquet(path := tmp_path / "a.parquet", [encoded() for _ in range(7)], ["x"], [0] * 7)
    elif source == "npz":
        path = tmp_path / "train_data_batch_1.npz"
        np.savez(path, data=RNG.integers(0, 256, (7, 192), np.uint8), labels=np.ones(7, int))
    else:
        path = tmp_path / "x.tar"
        path.write_bytes(packed(imagenet()) if source == "imagenet" else tar_of(places("data_256")))
    recipe, folder = Recipe(source, (str(path),), per_shard=None if source == "imagenet" else 3), tmp_path / "pool"
    make(recipe, folder)
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    kept = (folder / "shards" / "000000.parquet").stat().st_ino
    (folder / "shards" / "000001.json").unlink()
    for name in set(whole) & {"000001.tar", "000001.npy"}:
        (folder / name).write_bytes(b"half a shard")
    for name in ("index.parquet", "pool.json"):
        (folder / name).unlink()
    make(recipe, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == whole
    assert (folder / "shards" / "000000.parquet").stat().st_ino == kept


def test_the_command_finds_the_source_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", [encoded(), None], ["x"], [0, 0])
    shard.make(shard.Config(input=(str(tmp_path / "hub"),), out=str(tmp_path / "pool"), workers=1))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "found Hugging Face Parquet files: --source parquet"
    assert "skipped 1: without bytes" in said
    assert "1 images in 1 shards, 1 classes" in "\n".join(said)


# --- what lies there ---


def test_what_lies_there_is_found_or_asked_for(tmp_path: Path) -> None:
    for name in ("mixed/a.npy", "mixed/b.parquet", "folder/cat/1.jpg", "tiny/tiny_images.bin", "odd/x.bin"):
        os.makedirs(tmp_path / os.path.dirname(name), exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"mixed: holds Hugging Face Parquet files and arrays .*choose with --source"):
        detect((str(tmp_path / "mixed"),))
    assert detect((str(tmp_path / "mixed"),), "*.npy")[0] == "npy"
    assert detect((str(tmp_path / "folder"),))[0] == "folder"
    assert detect((str(tmp_path / "tiny"),))[0] == "tiny-images"
    with pytest.raises(UsageError, match=r"x\.bin: neither a folder nor"):
        detect((str(tmp_path / "odd" / "x.bin"),))
    with pytest.raises(UsageError, match=r"mixed: nothing in it that makes a pool \(--glob 'train-\*'\)"):
        detect((str(tmp_path / "mixed"),), "train-*")
    with pytest.raises(MinerError, match="nowhere: no such file"):
        detect((str(tmp_path / "nowhere"),))
    with pytest.raises(UsageError, match="--input"):
        detect(())


def test_a_webdataset_with_folders_in_its_keys_is_no_image_folder(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"train/1.jpg": encoded(), "train/1.cls": b"0"}))
    assert detect((str(path),))[0] == "tars"
    path.write_bytes(tar_of({"train/cat/1.jpg": encoded(), "train/dog/1.jpg": encoded()}))
    assert detect((str(path),))[0] == "folder"
    path = tmp_path / "train.tar"  # keys that begin with the tar's name, as in a class tar of ImageNet
    path.write_bytes(
        tar_of({"train_0.jpg": encoded(), "train_0.cls": b"1", "train_1.jpg": encoded(), "train_1.cls": b"0"})
    )
    assert make(found(path), tmp_path / "pool").index(["label"])["label"].to_pylist() == [1, 0]
    path.write_bytes(tar_of({"ILSVRC2012_val_00000001.JPEG": encoded(), "ILSVRC2012_val_00000002.JPEG": encoded()}))
    assert detect((str(path),))[0] == "tars"
