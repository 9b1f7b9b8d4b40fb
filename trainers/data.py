"""ID sets (folders of tars or images, torchvision names, the demo), and whole-batch augmentation of uint8 images."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miner.errors import MinerError, UsageError
from miner.files import read_json
from miner.images import decode
from trainers.read import ID_TORCHVISION, Half, image_files, read_image, tar_files, tar_images, torchvision_set

PADDING = 4
# Words of the names of sets that are never mirrored: a mirrored digit or letter is none (paper's recipe).
NEVER_MIRRORED = {"mnist", "emnist", "kmnist", "qmnist", "notmnist", "svhn", "usps", "digits"}


@dataclass(frozen=True)
class IdSet:
    """An in-distribution set: images uint8 [n, S, S, 3], labels int64 [n] that index ``classes``.

    ``flip`` allows mirroring; ``fingerprint`` is the BLAKE2b-128 of all pixels and labels, 32 hex characters.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    flip: bool
    fingerprint: str


def load_id(spec: str, size: int = 32) -> IdSet:
    """Load the ID set ``spec`` at ``size`` px: a folder of tars or of images, a torchvision name, or "demo".

    A folder holds train-*.tar and test-*.tar (or .tar.gz; images with .cls labels) and classes.json, a list
    of names or of objects with a "name"; or train/CLASS/ and test/CLASS/ with jpg, png and webp images, where the
    sorted folder names are the classes. Raises MinerError naming what is missing or cannot be read, and
    UsageError for a ``spec`` that is neither a folder nor a known name.
    """
    if spec == "demo":
        classes, train, test = _load_demo(size)
    elif spec in ID_TORCHVISION:
        (classes, train), (_, test) = (torchvision_set(spec, half, size) for half in (True, False))
    elif os.path.isdir(spec):
        folder = Path(spec)
        images = (folder / "train").is_dir() and not tar_files(folder, "train-*")
        classes, train, test = _load_images(folder, size) if images else _load_folder(folder, size)
    else:
        known = ", ".join(ID_TORCHVISION)
        raise UsageError(f"ID set {spec!r}: no such folder; give a folder of tars or images, demo, or one of {known}")
    name = Path(spec).resolve().name if os.path.isdir(spec) else spec
    return make_id_set(name, classes, train, test, flip=name != "demo" and not _of_characters(name))


def _of_characters(name: str) -> bool:
    """Whether a set's name says digits or letters: MNIST, svhn-32, my_emnist; not fashion-mnist, nor PathMNIST."""
    words = set(re.findall("[a-z]+", name.lower()))
    return bool(words & NEVER_MIRRORED) and "fashion" not in words


def make_id_set(name: str, classes: tuple[str, ...], train: Half, test: Half, flip: bool) -> IdSet:
    """An ID set of these halves (images, labels), with its fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array).data)
    return IdSet(name, classes, *train, *test, flip, digest.hexdigest())


def tensor(array: np.ndarray) -> Tensor:
    """``array`` as a tensor on the CPU; a read-only one (a memory map, an object of Ray) is copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def normalise(images: Tensor) -> Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S] in [-2, 2] and channels_last layout: (x/255 - 0.5)/0.25."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(63.75).sub_(2.0)


def draw_views(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What ``augment`` draws for n images: shifts int64 [2, n] and whether each is mirrored, bool [n]."""
    shifts = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator)
    return shifts, torch.rand(n, generator=generator) < 0.5


def crop(images: Tensor, shifts: Tensor, mirrored: Tensor, flip: bool) -> Tensor:
    """The views of uint8 images [n, S, S, 3] that ``draw_views`` drew; mirroring with ``flip`` only."""
    size, device = images.shape[1], images.device
    padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)
    down, right = shifts.to(device)
    crops = windows[torch.arange(len(images), device=device), down, right].permute(0, 2, 3, 1)
    return torch.where(mirrored.to(device)[:, None, None, None], crops.flip(2), crops) if flip else crops


def augment(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Random crops of the zero-padded (4 px) images and, with ``flip``, mirroring at p = 0.5; uint8 as given.

    ``generator`` is a CPU generator wherever the images are, so every device sees the same views.
    """
    return crop(images, *draw_views(len(images), generator), flip)


def _load_folder(folder: Path, size: int) -> tuple[tuple[str, ...], Half, Half]:
    classes = _read_classes(folder / "classes.json")
    train, test = (_load_split(folder, split, size, len(classes)) for split in ("train", "test"))
    return classes, train, test


def _read_classes(path: Path) -> tuple[str, ...]:
    """Class names in label order from a list of names or of objects {"index": i, "name": ...}."""
    try:
        entries = read_json(str(path))
        names = tuple(str(entry["name"] if isinstance(entry, dict) else entry) for entry in entries)
        ordered = all(entry.get("index", i) == i for i, entry in enumerate(entries) if isinstance(entry, dict))
    except FileNotFoundError:
        raise MinerError(f"{path}: missing; write the class names there, a JSON list in label order") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MinerError(f"{path}: not a JSON list of class names ({error})") from None
    if len(names) < 2 or not isinstance(entries, list) or not ordered:
        raise MinerError(f"{path}: must be a JSON list of at least two class names, in label order")
    return names


def _load_split(folder: Path, split: str, size: int, classes: int) -> Half:
    tars = tar_files(folder, f"{split}-*")
    if not tars:
        raise MinerError(f"{folder}: no {split}-*.tar or {split}-*.tar.gz in it; an ID set needs train and test tars")
    halves = [_load_tar(path, size, classes) for path in tars]
    return np.concatenate([half[0] for half in halves]), np.concatenate([half[1] for half in halves])


def _load_tar(path: Path, size: int, classes: int) -> Half:
    """Images and labels of one tar in its order."""
    images, labels = [], []
    for sample, data in tar_images(path):
        if sample.label is None or not 0 <= sample.label < classes:
            wrong = "no .cls label" if sample.label is None else f"label {sample.label}"
            raise MinerError(f"{path}: {sample.key}: {wrong}; classes.json has labels 0 to {classes - 1}")
        images.append(_decode(data, size, f"{path}: {sample.key}"))
        labels.append(sample.label)
    return np.stack(images), np.array(labels, np.int64)


def _decode(data: bytes, size: int, where: str) -> np.ndarray:
    try:
        return decode(data, size)
    except ValueError as error:
        raise MinerError(f"{where}: does not decode ({error}); remove this image") from None


def _load_images(folder: Path, size: int) -> tuple[tuple[str, ...], Half, Half]:
    """Image folders train/CLASS and test/CLASS, the images of a class in the order of their paths."""
    if not (folder / "test").is_dir():
        raise MinerError(f"{folder}: no test folder beside train; an ID set needs train/CLASS/ and test/CLASS/")
    names = [sorted(_folders(folder / split)) for split in ("train", "test")]
    if names[0] != names[1]:
        only = sorted(set(names[0]) ^ set(names[1]))[0]
        raise MinerError(f"{folder}: class {only!r} is in one of train and test only; both need the same folders")
    if len(names[0]) < 2:
        raise MinerError(f"{folder}/train: {len(names[0])} class folders in it; an ID set needs two or more")
    train, test = (_load_classes(folder / split, names[0], size) for split in ("train", "test"))
    return tuple(names[0]), train, test


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]


def _load_classes(folder: Path, names: list[str], size: int) -> Half:
    images, labels = [], []
    for label, name in enumerate(names):
        files = image_files(folder / name)
        if not files:
            raise MinerError(f"{folder / name}: no images in it; add some or remove this class from train and test")
        images += [_decode(read_image(path), size, str(path)) for path in files]
        labels += [label] * len(files)
    return np.stack(images), np.array(labels, np.int64)


def _load_demo(size: int) -> tuple[tuple[str, ...], Half, Half]:
    from miner.demo import digits  # here, because it draws with scikit-learn, which is slow to import

    train_images, train_labels, test_images, test_labels, classes = digits(size)
    return tuple(classes), (train_images, train_labels), (test_images, test_labels)
