"""ID sets (folders of tars, torchvision names, the demo), and whole-batch augmentation of uint8 images."""

import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

from miner.errors import MinerError, UsageError, disk_full
from miner.files import read_ranges
from miner.images import decode
from miner.tars import read_samples

PADDING = 4
NEVER_MIRRORED = ("mnist", "svhn", "demo")  # a mirrored digit is no digit (paper's recipe)


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


Half = tuple[np.ndarray, np.ndarray]


def load_id(spec: str, size: int = 32) -> IdSet:
    """Load the ID set ``spec`` at ``size`` px: a folder of tars, a torchvision name, or "demo".

    A folder holds train-*.tar and test-*.tar (or .tar.gz; images with .cls labels) and classes.json, a list
    of names or of objects with a "name". Raises MinerError naming what is missing or cannot be read, and
    UsageError for a ``spec`` that is neither a folder nor a known name.
    """
    if spec == "demo":
        classes, train, test = _load_demo(size)
    elif spec in _TORCHVISION:
        classes, train, test = _load_torchvision(spec, size)
    elif os.path.isdir(spec):
        classes, train, test = _load_folder(Path(spec), size)
    else:
        known = ", ".join(_TORCHVISION)
        raise UsageError(f"ID set {spec!r}: no such folder; give a folder of tars, demo, or one of {known}")
    name = Path(spec).resolve().name if os.path.isdir(spec) else spec
    digest = hashlib.blake2b(digest_size=16)
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array).data)
    return IdSet(name, classes, *train, *test, name not in NEVER_MIRRORED, digest.hexdigest())


def tensor(array: np.ndarray) -> Tensor:
    """``array`` as a tensor on the CPU; a read-only one (a memory map, an object of Ray) is copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def normalise(images: Tensor) -> Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S] in [-2, 2] and channels_last layout: (x/255 - 0.5)/0.25."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(63.75).sub_(2.0)


def augment(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Random crops of the zero-padded (4 px) images and, with ``flip``, mirroring at p = 0.5; uint8 as given.

    ``generator`` is a CPU generator wherever the images are, so every device sees the same views.
    """
    n, size = images.shape[:2]
    shifts = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator).to(images.device)
    mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)
    rows = torch.arange(n, device=images.device)
    crops = windows[rows, shifts[0], shifts[1]].permute(0, 2, 3, 1)
    return torch.where(mirrored[:, None, None, None], crops.flip(2), crops) if flip else crops


def _load_folder(folder: Path, size: int) -> tuple[tuple[str, ...], Half, Half]:
    classes = _read_classes(folder / "classes.json")
    train, test = (_load_split(folder, split, size, len(classes)) for split in ("train", "test"))
    return classes, train, test


def _read_classes(path: Path) -> tuple[str, ...]:
    """Class names in label order from a list of names or of objects {"index": i, "name": ...}."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
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
    tars = sorted({*folder.glob(f"{split}-*.tar"), *folder.glob(f"{split}-*.tar.gz")})
    unpacked = {path.with_suffix("") for path in tars if path.suffix == ".gz"} & set(tars)
    tars = [path for path in tars if path.suffix != ".gz" or path.with_suffix("") not in unpacked]
    if not tars:
        raise MinerError(f"{folder}: no {split}-*.tar or {split}-*.tar.gz in it; an ID set needs train and test tars")
    halves = [_load_tar(path, size, classes) for path in tars]
    return np.concatenate([half[0] for half in halves]), np.concatenate([half[1] for half in halves])


def _load_tar(path: Path, size: int, classes: int) -> Half:
    """Images and labels of one tar in its order; a .tar.gz is unpacked into the temporary folder first."""
    if path.suffix != ".gz":
        return _decode_tar(path, path, size, classes)
    with tempfile.NamedTemporaryFile(suffix=".tar") as plain:
        try:
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, plain)
            plain.flush()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise MinerError(f"{path}: broken gzip ({error}); fetch it again") from None
        except OSError as error:
            raise disk_full(error, plain.name) or error from None
        return _decode_tar(Path(plain.name), path, size, classes)


def _decode_tar(tar: Path, source: Path, size: int, classes: int) -> Half:
    """Images and labels of the plain tar ``tar``; errors name ``source``, the file that the user knows."""
    try:
        samples = read_samples(tar)
    except MinerError as error:
        raise MinerError(str(error).replace(str(tar), str(source))) from None
    images = np.empty((len(samples), size, size, 3), np.uint8)
    labels = np.empty(len(samples), np.int64)
    encoded = read_ranges(str(tar), [(sample.offset, sample.size) for sample in samples])
    for row, (sample, data) in enumerate(zip(samples, encoded, strict=True)):
        if sample.label is None or not 0 <= sample.label < classes:
            wrong = "no .cls label" if sample.label is None else f"label {sample.label}"
            raise MinerError(f"{source}: {sample.key}: {wrong}; classes.json has labels 0 to {classes - 1}")
        try:
            images[row] = decode(data, size)
        except ValueError as error:
            raise MinerError(f"{source}: {sample.key}: does not decode ({error}); remove this image") from None
        labels[row] = sample.label
    return images, labels


def _load_demo(size: int) -> tuple[tuple[str, ...], Half, Half]:
    from miner.demo import digits  # here, because it draws with scikit-learn, which is slow to import

    train_images, train_labels, test_images, test_labels, classes = digits(size)
    return tuple(classes), (train_images, train_labels), (test_images, test_labels)


def _svhn(root: str, train: bool) -> Any:
    return torchvision.datasets.SVHN(root, "train" if train else "test", download=True)


def _torchvision(name: str) -> Callable[[str, bool], Any]:
    return lambda root, train: getattr(torchvision.datasets, name)(root, train, download=True)


_TORCHVISION: dict[str, Callable[[str, bool], Any]] = {
    "cifar10": _torchvision("CIFAR10"),
    "cifar100": _torchvision("CIFAR100"),
    "svhn": _svhn,
    "mnist": _torchvision("MNIST"),
}


def _load_torchvision(name: str, size: int) -> tuple[tuple[str, ...], Half, Half]:
    """A set that torchvision downloads (and checks by its MD5) to $OUTLIER_DATASETS."""
    root = os.path.expanduser(os.environ.get("OUTLIER_DATASETS", "~/.cache/outlier-miner/datasets"))
    try:
        sets = [_TORCHVISION[name](root, train) for train in (True, False)]
    except (
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: no mirror answers, or a wrong MD5
        reason = str(error).strip().splitlines()[0]
        raise MinerError(
            f"{root}: cannot download {name} ({reason}); put it there yourself, or give a folder of tars"
        ) from None
    classes = tuple(getattr(sets[0], "classes", None) or map(str, range(10)))
    train, test = (_arrays(dataset, size) for dataset in sets)
    return classes, train, test


def _arrays(dataset: Any, size: int) -> Half:
    images = np.asarray(dataset.data)
    if images.ndim == 3:  # MNIST is grey
        images = np.repeat(images[..., None], 3, axis=3)
    elif images.shape[1] == 3:  # SVHN has its channels first
        images = images.transpose(0, 2, 3, 1)
    if images.shape[1] != size:
        resized = (Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR) for image in images)
        images = np.stack([np.asarray(image) for image in resized])
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return np.ascontiguousarray(images), np.asarray(labels, np.int64)
