"""Outlier and OOD sets from real files of every kind; noise; exact duplicates across encodings."""

import gzip
import io
import json
import os
import resource
import shutil
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import ndimage, stats

from miner import demo
from miner.build import finish, prepare, run_job, write_arrays_pool
from miner.errors import MinerError, UsageError
from miner.images import png
from miner.pool import Pool
from miner.recipe import Recipe
from miner.subset import write_subset
from miner.tars import TarWriter
from trainers.data import load_id
from trainers.image_set import ImageSet
from trainers.noise import NOISE, draw_noise
from trainers.overlap import overlap, record, refuse_overlap, write_record
from trainers.sets import open_images, open_outliers

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)


def everything(images: ImageSet) -> np.ndarray:
    return images.take(np.arange(len(images)))


def opened(spec: object, size: int = 32) -> ImageSet:
    sets = open_images(str(spec), size)
    assert len(sets) == 1
    return sets[0]


def write_tar(path: Path, images: np.ndarray, first: int = 0) -> Path:
    """A tar of PNGs without labels."""
    with TarWriter(path) as tar:
        for row, image in enumerate(images, first):
            tar.write(f"{row:06d}.png", png(image))
    return path


def make_pool(recipe: Recipe, folder: Path) -> Pool:
    plan = prepare(recipe, str(folder))
    for job in plan.jobs:
        run_job(str(folder), job)
    return finish(recipe, str(folder), "made", plan, "")


def make_subset(folder: Path, rows: list[int]) -> Path:
    """A subset of these rows of a pool of IMAGES, in that rank order."""
    pool = write_arrays_pool(str(folder / "pool"), "tiny", IMAGES, None, [], shard_count=3)
    chosen = pool.index().take(pa.array(rows))
    n = len(rows)
    chosen = chosen.append_column("weight", pa.array(np.ones(n, np.float32)))
    chosen = chosen.append_column("rank", pa.array(np.arange(n), pa.uint64()))
    chosen = chosen.append_column("nn_id_row", pa.nulls(n, pa.int32()))
    chosen = chosen.append_column("nn_id_cosine", pa.nulls(n, pa.float32()))
    recipe = {"gamma": 0.2, "draw": "random", "pool": {"name": "tiny"}, "settings": {"game": {"rule": "hedge"}}}
    write_subset(pool, chosen, folder / "subset-0.2", recipe, lambda count: None)
    return folder / "subset-0.2"


# --- one set ---


def test_take_reads_across_parts_in_any_order_and_repeats() -> None:
    images = ImageSet("x", (IMAGES[:10], IMAGES[10:10], IMAGES[10:25], IMAGES[25:]))
    assert len(images) == 30
    rows = [29, 3, 10, 3, 24, 25, 9, 0]
    assert np.array_equal(images.take(rows), IMAGES[rows])
    assert images.take([]).shape == (0, 32, 32, 3)
    some = ImageSet("x", images.parts, [str(i) for i in (7, 20, 28)], rows=np.array([7, 20, 28]))
    assert len(some) == 3
    assert np.array_equal(some.take([2, 0, 2]), IMAGES[[28, 7, 28]])
    assert some.key(1) == "20"
    for wrong in ([3], [-1]):
        with pytest.raises(IndexError, match="3 images"):
            some.take(wrong)
    taken = images.take([0])
    taken[:] = 0  # a copy: the set keeps its pixels
    assert np.array_equal(images.take([0]), IMAGES[:1])


def test_digests_name_pixels_and_sort_whole() -> None:
    twice = np.concatenate([IMAGES, IMAGES[5:6]])
    digests = ImageSet("x", (twice[:7], twice[7:])).digests()
    assert digests.dtype == "S16"
    assert len(np.unique(digests)) == 30
    assert digests[5] == digests[30]


# --- kinds of files ---


def test_a_tar_packed_or_not_gives_its_images(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "cats.tar", IMAGES)
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    for path, name in ((tar, "cats"), (packed, "packed")):
        images = opened(path)
        assert (images.name, images.kind, images.key(3)) == (name, "natural", "000003")
        assert np.array_equal(everything(images), IMAGES)
        assert images.origin == {"kind": "tars", "path": str(path), "fingerprint": opened(tar).origin["fingerprint"]}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_tars_is_its_test_tars_where_it_has_some(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", IMAGES[:4])
    write_tar(tmp_path / "more.tar", IMAGES[4:9])
    images = opened(tmp_path)
    assert len(images) == 9
    assert images.name == tmp_path.name
    assert sorted(images.key(row) for row in (0, 5)) == ["more.tar/000000", "train-000000.tar/000000"]
    plain = write_tar(tmp_path / "test-000000.tar", IMAGES[9:20])
    with open(plain, "rb") as source, gzip.open(f"{plain}.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    assert np.array_equal(everything(opened(tmp_path)), IMAGES[9:20])
    plain.unlink()
    assert np.array_equal(everything(opened(tmp_path)), IMAGES[9:20])


def test_outliers_are_the_train_half_where_there_is_one(tmp_path: Path) -> None:
    for half, images in (("train", IMAGES[:8]), ("test", IMAGES[8:12])):
        write_tar(tmp_path / f"{half}-000000.tar", images)
        (tmp_path / "images" / half / "cat").mkdir(parents=True)
        for row, image in enumerate(images):
            (tmp_path / "images" / half / "cat" / f"{row}.png").write_bytes(png(image))
    for folder, first in ((tmp_path, "000000"), (tmp_path / "images", "train/cat/0.png")):
        outliers = open_outliers(str(folder), 32, 0)
        assert (outliers.name, outliers.key(0)) == (folder.name, first)
        assert np.array_equal(everything(outliers), IMAGES[:8])
        assert np.array_equal(everything(opened(folder)), IMAGES[8:12])
        assert outliers.origin["fingerprint"] != opened(folder).origin["fingerprint"]
        assert overlap(outliers, {"test": opened(folder)}) == []
    (tmp_path / "train-000000.tar").unlink()
    assert len(open_outliers(str(tmp_path), 32, 0)) == 4  # no train half: all there is


def test_broken_tars_are_one_line_with_the_name_of_the_users_file(tmp_path: Path) -> None:
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(os.urandom(3000)))
    with pytest.raises(MinerError, match=rf"^{packed}: not a sound"):
        open_images(str(packed), 32)
    packed.write_bytes(gzip.compress(os.urandom(3000))[:1000])
    with pytest.raises(MinerError, match=r"x\.tar\.gz: cut off or corrupt gzip"):
        open_images(str(packed), 32)


def test_an_npy_is_mapped_or_fitted(tmp_path: Path) -> None:
    path = tmp_path / "300K_random_images.npy"
    np.save(path, IMAGES)
    images = opened(path)
    assert (images.name, images.key(7), images.origin["kind"]) == ("300K_random_images", "7", "npy")
    assert isinstance(images.parts[0], np.memmap)
    assert not images.parts[0].flags.writeable
    assert np.array_equal(images.take([7, 0]), IMAGES[[7, 0]])
    assert opened(path, size=16).take([0]).shape == (1, 16, 16, 3)
    np.save(path, np.asfortranarray(IMAGES))
    assert np.array_equal(everything(opened(path)), IMAGES)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (IMAGES.astype(np.float64), r"float64 \(30, 32, 32, 3\); images must be uint8 .*array\.astype\('uint8'\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"shape \(30, 3, 32, 32\); .*channels last"),
        (IMAGES[..., 0], r"shape \(30, 32, 32\)"),
        (IMAGES[:0], r"shape \(0, 32, 32, 3\)"),
        (np.array([{"run": "me"}]), "a pickle, which can run code"),
    ],
)
def test_an_npy_of_another_type_is_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(MinerError, match=rf"x\.npy: .*{words}"):
        open_images(str(tmp_path / "x.npy"), 32)


def test_an_npy_that_is_none_or_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, IMAGES)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(MinerError, match=r"x\.npy: not a sound \.npy file"):
        open_images(str(path), 32)
    path.write_bytes(b"")
    with pytest.raises(MinerError, match=r"x\.npy: not a sound \.npy file"):
        open_images(str(path), 32)
    path.write_bytes(b"what is this?" * 10)
    with pytest.raises(MinerError, match=r"x\.npy: no plain array"):
        open_images(str(path), 32)
    np.savez(tmp_path / "x.npz", IMAGES)
    (tmp_path / "x.npz").rename(path)
    with pytest.raises(MinerError, match=r"x\.npy: an \.npz archive"):
        open_images(str(path), 32)


def test_an_image_folder_leaves_out_what_does_not_decode_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name, image in (("b/deep/z.PNG", IMAGES[1]), ("a.png", IMAGES[0]), (".hidden/no.png", IMAGES[2])):
        (tmp_path / name).write_bytes(png(image))
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[3]).save(buffer, "WEBP", lossless=True)
    (tmp_path / "b" / "q.webp").write_bytes(buffer.getvalue())
    (tmp_path / "b" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("skip me")
    images = opened(tmp_path)
    assert np.array_equal(everything(images), IMAGES[[0, 1, 3]])
    assert [images.key(row) for row in range(3)] == ["a.png", "b/deep/z.PNG", "b/q.webp"]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: 1 of 4 images do not decode and are left out (b/broken.jpg: ")
    assert said.count("\n") == 1
    for name in ("a.png", "b/deep/z.PNG", "b/q.webp"):
        (tmp_path / name).unlink()
    with pytest.raises(MinerError, match=r"none of its 1 images decodes \(b/broken\.jpg: .*give other images"):
        open_images(str(tmp_path), 32)


def test_a_folder_without_images_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(MinerError, match=r"no images \(jpg, png, webp\) and no tars in it; give a folder of"):
        open_images(str(tmp_path), 32)
    (tmp_path / "subset-0.01").mkdir()  # a run of pipelines.resample
    with pytest.raises(MinerError, match=r"give one of its subsets, .*subset-0\.01"):
        open_images(str(tmp_path), 32)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UsageError, match=r"x\.txt: images come as \.tar, \.tar\.gz or \.npy"):
        open_images(str(tmp_path / "x.txt"), 32)


def test_names_that_are_not_utf8_are_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    (tmp_path / latin).mkdir()
    (tmp_path / latin / "a.png").write_bytes(b"no image")
    for spec in (tmp_path, tmp_path / latin):
        with pytest.raises(MinerError, match=r"caf\\udce9(/a\.png)?: this name is not UTF-8"):
            open_images(str(spec), 32)


def test_a_name_that_is_nothing_lists_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLIER_POOLS", str(tmp_path))
    words = r"'svnh': no such file or folder, none of gaussian, .*svhn.*places365.*demo-pool, and no pool 'svnh' in"
    with pytest.raises(UsageError, match=words):
        open_images("svnh", 32)
    with pytest.raises(UsageError, match=r"^pipe:cat x: refused"):
        open_images("pipe:cat x", 32)


# --- subsets and pools ---


def test_a_subset_comes_in_rank_order_with_its_recipe(tmp_path: Path) -> None:
    folder = make_subset(tmp_path, [17, 2, 25])
    images = opened(folder)
    assert images.name == "subset-0.2"
    assert np.array_equal(everything(images), IMAGES[[17, 2, 25]])
    assert [images.key(row) for row in range(3)] == ["000000017", "000000002", "000000025"]
    expected = {"kind": "subset", "gamma": 0.2, "draw": "random", "rule": "hedge", "pool": {"name": "tiny"}}
    assert images.origin.items() >= expected.items()
    assert images.origin["fingerprint"] == json.loads((folder / "subset.json").read_text())["fingerprint"]
    json.dumps(images.origin)


def test_a_subset_that_changed_or_was_cut_off_is_refused(tmp_path: Path) -> None:
    folder = make_subset(tmp_path, [17, 2, 25])
    path = folder / "outliers-000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(MinerError, match=r"outliers-000000\.tar: its bytes changed"):
        open_images(str(folder), 32)
    (folder / "subset.json").unlink()
    with pytest.raises(MinerError, match=r"subset\.json: missing; .*cut off"):
        open_images(str(folder), 32)


def test_a_pool_is_mapped_and_found_by_folder_name_and_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLIER_POOLS", str(tmp_path))
    monkeypatch.setenv("OUTLIER_CACHE", str(tmp_path / "cache"))
    pool = write_arrays_pool(str(tmp_path / "noise"), "noise", IMAGES, None, [], shard_count=4)
    memory = fsspec.filesystem("memory")
    memory.put(pool.path, "/sets/noise", recursive=True)
    for spec in (pool.path, "noise", "memory://sets/noise", f"file://{pool.path}"):
        images = opened(spec)
        assert (images.name, len(images), images.key(29)) == ("noise", 30, "000000029")
        assert images.origin["fingerprint"] == pool.fingerprint
        assert all(isinstance(part, np.memmap) for part in images.parts)
        assert np.array_equal(images.take([29, 0, 8]), IMAGES[[29, 0, 8]])
    memory.rm("/sets", recursive=True)


def test_excluded_rows_of_a_pool_stay_out(tmp_path: Path) -> None:
    (tmp_path / "tiny_images.bin").write_bytes(IMAGES.transpose(0, 3, 2, 1).tobytes())
    (tmp_path / "list.txt").write_text("1\n12\n30\n")
    recipe = Recipe("tiny-images", (str(tmp_path / "tiny_images.bin"),), exclude_list=str(tmp_path / "list.txt"))
    pool = make_pool(recipe, tmp_path / "pool")
    images = opened(pool.path)
    kept = [row for row in range(30) if row not in (0, 11, 29)]
    assert np.array_equal(everything(images), IMAGES[kept])
    assert images.key(10) == pool.index(["key"])["key"][12].as_py()
    assert record(images)["key"].to_pylist() == pool.index(["key"])["key"].take(pa.array(kept)).to_pylist()


def test_what_does_not_decode_in_a_pool_stays_out_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", IMAGES[:3])
    with TarWriter(tmp_path / "in" / "b.tar") as tar:
        tar.write("cat.png", b"no png")
        tar.write("dog.png", png(IMAGES[3]))
    pool = make_pool(Recipe("tars", (str(tmp_path / "in"),)), tmp_path / "pool")
    images = opened(pool.path)
    assert np.array_equal(everything(images), IMAGES[:4])
    assert images.key(3) == "dog"
    assert "pool: 1 of 5 images do not decode and are left out (cat: " in capsys.readouterr().err


def test_more_shards_than_open_files_is_one_line(tmp_path: Path) -> None:
    pool = write_arrays_pool(str(tmp_path / "pool"), "many", IMAGES, None, [], shard_count=30)
    assert len(opened(pool.path).parts) == 30
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 15, hard))
    try:
        with pytest.raises(MinerError, match=r"pool: 30 shards need as many open files; raise ulimit -n"):
            open_images(pool.path, 32)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- named sets ---


def test_demo_gives_the_nine_held_out_families_and_its_pool() -> None:
    sets = open_images("demo", 32)
    drawn = demo.held_out()
    assert [images.name for images in sets] == list(demo.HELD_OUT)
    assert all(np.array_equal(everything(images), drawn[images.name]) for images in sets)
    pool = opened("demo-pool")
    assert len(pool) == 21_000
    test = ImageSet("ID test", (load_id("demo").test_images,))
    assert refuse_overlap(pool, {"ID test": test} | {images.name: images for images in sets}, allow=False) == 0


def test_dtd_is_its_test_split_of_the_first_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLIER_DATASETS", str(tmp_path))
    for name in ("labels", "images/dotted", "images/woven"):
        (tmp_path / "dtd" / "dtd" / name).mkdir(parents=True)
    names = ["dotted/dotted_0001.jpg", "dotted/dotted_0002.jpg", "woven/woven_0001.jpg"]
    for name, image in zip(names, IMAGES, strict=False):
        Image.fromarray(image.repeat(2, axis=1)).save(tmp_path / "dtd" / "dtd" / "images" / name)
    (tmp_path / "dtd" / "dtd" / "labels" / "test1.txt").write_text("\n".join(names[1:]) + "\n")
    images = opened("dtd")
    assert (images.name, len(images)) == ("dtd", 2)
    wide = np.asarray(Image.open(tmp_path / "dtd" / "dtd" / "images" / names[2]))
    assert np.array_equal(images.take([1])[0], wide[:, 16:48])  # centre square


def idx(array: np.ndarray) -> bytes:
    """The MNIST format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def test_mnist_like_sets_are_grey_and_enlarged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLIER_DATASETS", str(tmp_path))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for half, count in (("train", 8), ("t10k", 4)):
        (raw / f"{half}-images-idx3-ubyte").write_bytes(idx(IMAGES[:count, :28, :28, 0]))
        (raw / f"{half}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    images = opened("fashionmnist", size=28)
    assert np.array_equal(everything(images), IMAGES[:4, :28, :28, :1].repeat(3, axis=3))
    assert np.array_equal(everything(open_outliers("fashionmnist", 28, 0))[..., 0], IMAGES[:8, :28, :28, 0])
    id_set = load_id("fashionmnist")
    assert (id_set.train_images.shape, id_set.test_labels.tolist()) == ((8, 32, 32, 3), [0, 1, 2, 3])
    assert id_set.flip
    assert id_set.classes[0] == "T-shirt/top"
    whole = (raw / "t10k-images-idx3-ubyte").read_bytes()
    for cut in (whole[:-1], whole[:5], b""):
        (raw / "t10k-images-idx3-ubyte").write_bytes(cut)
        with pytest.raises(MinerError, match="t10k-images-idx3-ubyte: cut off or damaged; replace it"):
            load_id("fashionmnist")


def test_lsun_is_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLIER_DATASETS", str(tmp_path))
    with pytest.raises(MinerError, match=r"lsun: missing; LSUN has no download here"):
        open_images("lsun", 32)
    (tmp_path / "lsun").mkdir()
    (tmp_path / "lsun" / "1.png").write_bytes(png(IMAGES[0]))
    assert (opened("lsun").name, len(opened("lsun"))) == ("lsun", 1)


# --- noise ---


def normalised(pixels: np.ndarray) -> np.ndarray:
    return (pixels / 255 - 0.5) / 0.25


@pytest.mark.parametrize("name", NOISE)
def test_noise_repeats_with_its_seed(name: str) -> None:
    (one,), (two,), (other,) = open_images(name, 32), open_images(name, 32), open_images(name, 32, seed=1)
    assert (one.name, one.kind, len(one)) == (name, "noise", 2000)
    assert one.parts[0].shape == (2000, 32, 32, 3)
    assert np.array_equal(one.parts[0], two.parts[0])
    assert len(np.unique(np.concatenate([one.digests(), other.digests()]))) == 4000
    assert one.origin["fingerprint"] == two.origin["fingerprint"] != other.origin["fingerprint"]
    assert other.origin.items() >= {"kind": "noise", "seed": 1, "count": 2000}.items()


def test_gaussian_uniform_and_rademacher_noise_have_their_moments() -> None:
    values = {name: normalised(draw_noise(name, 32, 0, 500)) for name in NOISE[:3]}
    inside = stats.norm(0, 0.5)
    # Of N(0, 0.5²) clipped to [-1, 1]: the truncated part and two atoms.
    clipped = np.sqrt(inside.expect(np.square, lb=-1, ub=1) + 2 * inside.sf(1))
    for name, deviation in (("gaussian", clipped), ("uniform", 1 / np.sqrt(3)), ("rademacher", 1.0)):
        assert values[name].mean() == pytest.approx(0, abs=3e-3)
        assert values[name].std() == pytest.approx(deviation, abs=5e-3)
        assert np.abs(values[name]).max() == pytest.approx(1, abs=5e-3)
        neighbours = np.corrcoef(values[name][:, 1:].ravel(), values[name][:, :-1].ravel())[0, 1]
        assert abs(neighbours) < 5e-3
    assert np.unique(values["rademacher"]).size == 2
    assert (values["gaussian"] == values["gaussian"].max()).mean() == pytest.approx(inside.sf(0.988), abs=1e-3)


def test_blobs_are_blurred_coins_cut_at_three_quarters() -> None:
    blobs = draw_noise("blob", 24, 5, 3)
    coins = (np.random.default_rng([NOISE.index("blob"), 5]).random((3, 24, 24, 3)) < 0.7).astype(float)
    expected = np.stack([ndimage.gaussian_filter(coin, 1.5, mode="nearest", truncate=4.0) for coin in coins])
    expected[expected < 0.75] = 0
    assert np.abs(normalised(blobs) - (2 * expected - 1)).max() <= 1 / 127
    assert 0.1 < (blobs == 64).mean() < 0.9
    assert blobs[blobs > 64].min() >= 159


# --- duplicates ---


def test_duplicates_are_found_across_encodings_and_refused_with_examples(tmp_path: Path) -> None:
    outliers = opened(write_tar(tmp_path / "outliers.tar", IMAGES[:20]))
    np.save(tmp_path / "npy.npy", IMAGES[[25, 18, 3, 18]])
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[7]).save(buffer, "WEBP", lossless=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.webp").write_bytes(buffer.getvalue())
    (tmp_path / "folder" / "y.png").write_bytes(png(IMAGES[3]))
    others = {"svhn": opened(tmp_path / "npy.npy"), "textures": opened(tmp_path / "folder")}
    pairs = overlap(outliers, others)
    assert pairs == [
        ("000003", "svhn", "2"),
        ("000018", "svhn", "1"),
        ("000003", "textures", "y.png"),
        ("000007", "textures", "x.webp"),
    ]
    words = (
        r"^3 of 20 outliers are also in svhn and textures \(e\.g\. 000003 = 2, 000018 = 1, 000003 = y\.png, \.\.\.\); "
    )
    with pytest.raises(MinerError, match=words + "remove them or pass --allow-overlap$"):
        refuse_overlap(outliers, others, allow=False)
    assert refuse_overlap(outliers, others, allow=True) == 3
    assert refuse_overlap(outliers, {"other": ImageSet("other", (IMAGES[20:],))}, allow=False) == 0


def test_one_other_pixel_is_no_duplicate() -> None:
    changed = IMAGES[:5].copy()
    changed[2, 31, 31, 2] ^= 1
    found = overlap(ImageSet("a", (IMAGES[:5],)), {"b": ImageSet("b", (changed,))})
    assert [key for key, _, _ in found] == ["0", "1", "3", "4"]


def test_sets_of_different_sizes_cannot_be_compared(tmp_path: Path) -> None:
    small = opened(write_tar(tmp_path / "x.tar", IMAGES), size=16)
    with pytest.raises(MinerError, match="x: opened at 16 px, the outliers at 32"):
        overlap(ImageSet("a", (IMAGES,)), {"x": small})


def test_a_record_finds_the_same_duplicates_later(tmp_path: Path) -> None:
    outliers = opened(write_tar(tmp_path / "x.tar", IMAGES[:20]))
    table = record(outliers)
    assert table.column_names == ["key", "pixels"]
    assert {len(text) for text in table["pixels"].to_pylist()} == {32}
    pq.write_table(table, tmp_path / "outliers.parquet")
    again = pq.read_table(tmp_path / "outliers.parquet")
    others = {"test": ImageSet("test", (IMAGES[15:],))}
    assert overlap(again, others) == overlap(outliers, others)
    with pytest.raises(MinerError, match=r"5 of 20 outliers are also in test \(e\.g\. 000015 = 0, "):
        refuse_overlap(again, others, allow=False)


def test_a_record_is_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.overlap.ROWS", 4000)

    class Keys(list):  # drawn when asked for, as a pool's are
        def __len__(self) -> int:
            return 100_000

        def __getitem__(self, row):
            return f"n01440764/{row:08d}"

    pixels = np.arange(100_000, dtype=np.int32).view(np.uint8).reshape(-1, 2, 2, 1).repeat(3, axis=3)
    outliers = ImageSet("many", (pixels,), Keys())
    outliers.digests()
    tracemalloc.start()
    write_record(outliers, tmp_path / "outliers.parquet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(outliers)  # bytes; a row's two strings alone take 150
    written = pq.read_table(tmp_path / "outliers.parquet")
    assert written.equals(record(outliers), check_metadata=True)
    assert pq.read_metadata(tmp_path / "outliers.parquet").num_row_groups == 25
    assert overlap(written, {"x": ImageSet("x", (pixels[70_001:70_002],))}) == [("n01440764/00070001", "x", "0")]


# --- real images ---


def test_real_textures_from_their_tar_and_again_from_an_array(tmp_path: Path) -> None:
    if "OUTLIER_DATA" not in os.environ:
        pytest.skip("set OUTLIER_DATA to a folder of the real image sets to run this")
    folder = Path(os.environ["OUTLIER_DATA"]) / "textures"
    assert list(folder.glob("test-000000.tar*")), f"OUTLIER_DATA has no {folder}/test-000000.tar"
    textures = opened(folder)
    assert (textures.name, len(textures)) == ("textures", 1200)
    assert len(np.unique(textures.digests())) == 1200
    assert 20 < everything(textures).std() < 100
    np.save(tmp_path / "some.npy", textures.take([1100, 4]))
    assert overlap(opened(tmp_path / "some.npy"), {"textures": textures}) == [
        ("0", "textures", textures.key(1100)),
        ("1", "textures", textures.key(4)),
    ]
    assert opened(folder, size=64).size == 64
