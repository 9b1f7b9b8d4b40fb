"""ID sets from image folders, long-tailed, and with classes held out; MixOE's splits against its own lists."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from miner.errors import MinerError, UsageError
from miner.images import png
from trainers.data import IdSet, load_id, make_id_set
from trainers.overlap import overlap
from trainers.splits import hold_out, long_tail, parse_hold_out

# Held-out labels of MixOE's benches, split by split, as its repository lists them.
MIXOE = {
    ("aircraft", 0): "9 21 36 44 47 64 67 83 87 96",
    ("aircraft", 1): "1 5 9 12 16 37 64 72 75 79",
    ("aircraft", 2): "7 15 22 34 40 43 49 72 75 82",
    ("car", 0): "9 21 25 28 29 31 32 34 36 39 47 53 58 67 70 72 77 79 81 82 87 88 99 103 114 115 117 127 128 133 140 "
    "142 147 148 151 153 162 165 172 174 176 184 186 189 192 195",
    ("car", 1): "1 3 7 8 20 22 24 25 30 37 43 49 50 57 60 61 63 68 71 72 79 86 96 101 115 121 128 129 131 133 134 137 "
    "139 140 141 142 144 146 149 156 157 166 172 178 187 192",
    ("car", 2): "4 7 15 22 31 33 37 38 39 43 46 47 49 50 51 52 58 63 67 69 72 75 80 88 95 102 103 104 107 116 121 124 "
    "132 136 148 162 167 168 170 177 179 181 182 185 190 194",
    ("butterfly", 0): "9 17 21 25 28 29 31 32 34 36 38 39 47 53 58 67 70 72 77 79 81 82 87 88 99 103 114 115 117 127 "
    "128 132 133 140 142 147 148 151 157 165 166 169 172 173 174 176 188 190 192 193",
    ("butterfly", 1): "1 3 7 8 20 22 24 25 26 30 37 43 49 50 52 57 60 61 63 68 71 72 76 79 86 96 101 115 121 128 129 "
    "131 133 134 137 139 140 141 142 144 146 149 156 157 169 175 178 190 192 196",
    ("butterfly", 2): "4 7 15 22 31 33 37 38 39 43 46 47 49 50 51 52 58 63 67 69 72 75 80 88 95 102 103 104 107 116 "
    "117 121 124 132 136 145 148 150 155 162 167 168 170 177 183 185 186 189 194 198",
    ("bird", 0): "9 21 25 29 31 32 36 39 47 58 67 70 72 77 79 81 82 87 88 99 103 115 117 127 140 142 147 148 151 163 "
    "165 167 172 174 175 177 185 192 193 195 197 202 208 209 211 213 216 225 230 236 239 242 244 247 251",
    ("bird", 1): "1 7 8 20 22 25 30 37 49 50 57 60 61 63 68 71 72 79 86 96 101 115 121 128 129 131 133 134 137 139 "
    "140 141 142 144 146 149 156 157 175 178 192 198 200 203 204 209 212 215 222 225 227 235 237 242 250",
    ("bird", 2): "4 7 15 22 31 33 37 38 39 43 46 47 49 50 51 52 58 63 67 69 72 75 80 88 95 102 103 104 107 116 121 "
    "124 132 148 162 167 168 170 174 177 194 195 196 198 204 210 211 213 218 234 237 238 242 247 252",
}
CLASSES = {"aircraft": 100, "car": 196, "butterfly": 200, "bird": 255}


def of_classes(count: int, per_class: int = 1) -> IdSet:
    """A set of 1 px images that carry their label, ``per_class`` of each class in turn."""
    labels = np.tile(np.arange(count), per_class)
    images = np.repeat((labels % 256).astype(np.uint8), 3).reshape(-1, 1, 1, 3)
    return make_id_set("made", tuple(map(str, range(count))), (images, labels), (images, labels), flip=True)


# --- image folders ---


@pytest.fixture
def folder(tmp_path: Path, digits: IdSet) -> Path:
    """train/CLASS and test/CLASS with 12 and 6 digits of the classes zero, one and two."""
    halves = {"train": (digits.train_images, digits.train_labels), "test": (digits.test_images, digits.test_labels)}
    for split, (images, labels) in halves.items():
        for label, name in enumerate(("b zero", "c one", "a two")):
            inner = tmp_path / split / name / ("inner" if split == "train" else "")
            inner.mkdir(parents=True)
            for row in np.flatnonzero(labels == label)[: 4 if split == "train" else 2]:
                (inner / f"{row:05d}.png").write_bytes(png(images[row]))
    return tmp_path


def test_an_image_folder_is_an_id_set(folder: Path, digits: IdSet) -> None:
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "c one" / "notes.txt").write_text("skip me")
    loaded = load_id(str(folder))
    assert loaded.classes == ("a two", "b zero", "c one")
    assert loaded.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert loaded.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    for label, digit in enumerate((2, 0, 1)):
        first = digits.train_images[digits.train_labels == digit][:4]
        assert np.array_equal(loaded.train_images[loaded.train_labels == label], first)
    assert (loaded.name, loaded.flip, loaded.train_labels.dtype) == (folder.name, True, np.int64)
    assert load_id(str(folder), size=16).test_images.shape == (6, 16, 16, 3)


def test_an_image_folder_that_is_not_whole_is_one_line(folder: Path) -> None:
    bad = folder / "test" / "a two" / "x.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(MinerError, match=r"test/a two/x\.jpg: does not decode .*remove this image"):
        load_id(str(folder))
    for path in (folder / "test" / "a two").iterdir():
        path.unlink()
    with pytest.raises(MinerError, match=r"test/a two: no images in it; add some or remove this class"):
        load_id(str(folder))
    (folder / "test" / "a two").rename(folder / "test" / "z")
    with pytest.raises(MinerError, match=r"class 'a two' is in one of train and test only"):
        load_id(str(folder))
    (folder / "test").rename(folder / "val")
    with pytest.raises(MinerError, match=r"no test folder beside train"):
        load_id(str(folder))


def test_one_class_is_no_id_set(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
    with pytest.raises(MinerError, match=r"train: 1 class folders in it; an ID set needs two or more"):
        load_id(str(tmp_path))


def test_a_fingerprint_is_that_of_all_pixels_and_labels(digits: IdSet) -> None:
    """Runs and checkpoints on disk hold it: another way of hashing would disown them all."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels):
        digest.update(array.tobytes())
    assert digits.fingerprint == digest.hexdigest()


# --- long tail ---


def test_long_tail_counts_are_those_of_cifar10_lt() -> None:
    whole = of_classes(10, per_class=5000)
    tail = long_tail(whole, 0.01)
    counts = np.bincount(tail.train_labels).tolist()
    assert counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert len(tail.train_images) == sum(counts) == 12_406
    assert np.array_equal(tail.train_images[:, 0, 0, 0], tail.train_labels)
    assert np.array_equal(tail.test_labels, whole.test_labels)
    assert tail.fingerprint != whole.fingerprint
    assert long_tail(whole, 1.0).fingerprint == whole.fingerprint


def test_long_tail_keeps_the_first_images_of_a_class_in_their_order(digits: IdSet) -> None:
    tail = long_tail(digits, 0.1)
    largest = int(np.bincount(digits.train_labels).max())
    for label in (0, 5, 9):
        own = digits.train_images[digits.train_labels == label]
        kept = tail.train_images[tail.train_labels == label]
        assert len(kept) == min(len(own), int(largest * 0.1 ** (label / 9)))
        assert np.array_equal(kept, own[: len(kept)])
    assert (tail.train_labels[:20] != 0).any()  # not sorted by class
    assert (tail.classes, tail.flip) == (digits.classes, digits.flip)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 100.0, float("nan")])
def test_a_ratio_that_is_none_is_refused(digits: IdSet, ratio: float) -> None:
    with pytest.raises(UsageError, match=r"--long-tail .*: smallest class over largest, in \(0, 1\]; 0\.01"):
        long_tail(digits, ratio)


def test_a_ratio_that_empties_a_class_is_refused(digits: IdSet) -> None:
    with pytest.raises(UsageError, match=r"--long-tail 0\.001: class '7' keeps no image; the least is 0\.0075"):
        long_tail(digits, 0.001)


# --- classes held out ---


def test_holding_out_numbers_the_others_anew(digits: IdSet) -> None:
    smaller, held = hold_out(digits, [7, 2])
    assert smaller.classes == tuple("01345689")
    kept = ~np.isin(digits.train_labels, [2, 7])
    assert np.array_equal(smaller.train_images, digits.train_images[kept])
    names = np.array(smaller.classes)[smaller.train_labels]
    assert np.array_equal(names, np.array(digits.classes)[digits.train_labels[kept]])
    kept = ~np.isin(digits.test_labels, [2, 7])
    assert np.array_equal(np.array(smaller.classes)[smaller.test_labels], digits.test_labels[kept].astype(str))
    assert np.array_equal(held.take(np.arange(len(held))), digits.test_images[~kept])
    assert (held.name, len(held), held.key(0)) == ("held-out", 100, f"test {np.flatnonzero(~kept)[0]}")
    assert held.origin["labels"] == [2, 7]
    assert smaller.fingerprint != digits.fingerprint
    assert overlap(held, {"held-out": held})[0] == (held.key(0), "held-out", held.key(0))


@pytest.mark.parametrize("labels", [[], [3, 3], [10], [-1], list(range(9))])
def test_labels_that_cannot_be_held_out_are_refused(digits: IdSet, labels: list[int]) -> None:
    with pytest.raises(UsageError, match=r"--hold-out .*: distinct labels from 0 to 9, two classes must stay"):
        hold_out(digits, labels)


def test_held_out_classes_without_test_images_are_an_error(digits: IdSet) -> None:
    rest = digits.test_labels != 4
    less = dataclasses.replace(digits, test_images=digits.test_images[rest], test_labels=digits.test_labels[rest])
    with pytest.raises(MinerError, match=r"demo: no test image of the classes held out \(4\)"):
        hold_out(less, [4])


@pytest.mark.parametrize(("bench", "split"), MIXOE)
def test_mixoe_splits_are_the_published_ones(bench: str, split: int) -> None:
    labels = parse_hold_out(f"mixoe:{bench}:{split}", of_classes(CLASSES[bench]))
    assert " ".join(map(str, labels)) == MIXOE[bench, split]


def test_mixoe_wants_its_number_of_classes_and_its_names(digits: IdSet) -> None:
    with pytest.raises(UsageError, match=r"mixoe:bird:0: has 255 classes, the ID set made 555"):
        parse_hold_out("mixoe:bird:0", of_classes(555))
    with pytest.raises(UsageError, match=r"mixoe:boat:0: the benches of MixOE are aircraft, car, butterfly, bird"):
        parse_hold_out("mixoe:boat:0", digits)


def test_labels_as_text_and_drawn_ones(digits: IdSet) -> None:
    assert parse_hold_out("7,3,5", digits) == (3, 5, 7)
    drawn = parse_hold_out("random:4:1", digits)
    assert drawn == parse_hold_out("random:4:1", digits) == tuple(sorted(set(drawn)))
    assert len(drawn) == 4
    assert len({parse_hold_out(f"random:4:{seed}", digits) for seed in range(20)}) > 15
    assert len(hold_out(digits, drawn)[0].classes) == 6


@pytest.mark.parametrize("text", ["", "cat", "3,", "3;5", "-1", "random:4", "mixoe:car", "mixoe:car:3", "random:x:1"])
def test_other_texts_are_refused_with_the_forms(digits: IdSet, text: str) -> None:
    with pytest.raises(UsageError, match=r"give labels \(3,5,7\), random:COUNT:SEED or mixoe:BENCH:SPLIT"):
        parse_hold_out(text, digits)


@pytest.mark.parametrize("text", ["random:0:1", "random:9:1", "random:4:4294967296"])
def test_drawing_too_many_classes_is_refused(digits: IdSet, text: str) -> None:
    with pytest.raises(UsageError, match="1 to 8 of 10 classes, and a seed below"):
        parse_hold_out(text, digits)
