"""What ID sets and outlier sets are read from: tars and folders of encoded images, `.npy` arrays, torchvision."""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miner.errors import MinerError, disk_full
from miner.files import NPY_ERRORS, read_ranges, regular_size
from miner.images import fit
from miner.tars import IMAGES, MAX_IMAGE, Sample, expand, read_samples

CHUNK = 256  # images read from a tar at once
Half = tuple[np.ndarray, np.ndarray]  # images uint8 [n, S, S, 3], labels int64 [n]


def tar_files(folder: Path, stem: str) -> list[Path]:
    """The tars ``stem``.tar and ``stem``.tar.gz (a glob) of a folder, sorted; no packed one beside its plain one."""
    tars = sorted({*folder.glob(f"{stem}.tar"), *folder.glob(f"{stem}.tar.gz")})
    plain = set(tars)
    return [path for path in tars if path.suffix != ".gz" or path.with_suffix("") not in plain]


def tar_images(path: Path) -> Iterator[tuple[Sample, bytes]]:
    """The encoded images of a .tar or .tar.gz in its order; raises MinerError, naming ``path``, for an unsound one."""
    with _plain(path) as tar:
        try:
            samples = read_samples(tar)
        except MinerError as error:
            raise MinerError(str(error).replace(str(tar), str(path))) from None
        for start in range(0, len(samples), CHUNK):
            part = samples[start : start + CHUNK]
            yield from zip(part, read_ranges(str(tar), [(sample.offset, sample.size) for sample in part]), strict=True)


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """``path`` itself, or a .tar.gz unpacked into the temporary folder."""
    if path.suffix != ".gz":
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as plain:
        try:
            expand(path, plain)
            plain.flush()
        except OSError as error:
            raise disk_full(error, plain.name) or error from None
        yield Path(plain.name)


def image_files(folder: Path) -> list[Path]:
    """The jpg, jpeg, png and webp files in a folder and all folders below it, sorted; hidden ones stay out."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix[1:].lower() in IMAGES and path.is_file())


def read_image(path: Path) -> bytes:
    """The encoded image in a file; of one over 16 MB only a start, which does not decode."""
    with open(path, "rb") as file:
        return file.read(MAX_IMAGE)


def npy(path: Path) -> np.ndarray:
    """A `.npy` array, memory-mapped and read-only. Raises MinerError for a pickle, a cut-off or any other file."""
    regular_size(str(path))
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            raise MinerError(f"{path}: no plain array but a pickle, which can run code, or no .npy at all") from None
        raise MinerError(f"{path}: not a sound .npy file ({error}); fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise MinerError(f"{path}: an .npz archive; save its array alone as .npy")
    return array


def npy_images(path: Path) -> np.ndarray:
    """uint8 [N, H, W, 3] of a `.npy` file, memory-mapped. Raises MinerError for other types and shapes."""
    array = npy(path)
    if array.dtype != np.uint8:
        convert = "if its values are whole numbers from 0 to 255, save array.astype('uint8') instead"
        raise MinerError(f"{path}: {array.dtype} {array.shape}; images must be uint8 [N, H, W, 3]: {convert}")
    if array.ndim != 4 or array.shape[3] != 3 or min(array.shape) < 1:
        raise MinerError(f"{path}: shape {array.shape}; images must be uint8 [N, H, W, 3] with the channels last")
    return array


def fit_all(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, H, W, 3] as [n, size, size, 3]: ``images`` itself, or each one's centre square, bilinear."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack([fit(Image.fromarray(np.ascontiguousarray(image)), size) for image in images])


def _datasets() -> Any:
    from torchvision import datasets  # here: it takes seconds to import, and few commands need it

    return datasets


def _by_train(name: str) -> Callable[[str, bool], Any]:
    return lambda root, train: getattr(_datasets(), name)(root, train, download=True)


def _by_split(name: str) -> Callable[[str, bool], Any]:
    return lambda root, train: getattr(_datasets(), name)(root, "train" if train else "test", download=True)


def _places365(root: str, train: bool) -> Any:
    split = "train-standard" if train else "val"  # no labels of its test split are public
    return _datasets().Places365(f"{root}/places365", split, small=True, download=True)


ID_TORCHVISION: dict[str, Callable[[str, bool], Any]] = {
    "cifar10": _by_train("CIFAR10"),
    "cifar100": _by_train("CIFAR100"),
    "svhn": _by_split("SVHN"),
    "mnist": _by_train("MNIST"),
    "fashionmnist": _by_train("FashionMNIST"),
}
MNIST_LIKE = {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}  # folders of theirs
TORCHVISION = ID_TORCHVISION | {"dtd": _by_split("DTD"), "places365": _places365}


def datasets_folder() -> str:
    """Where sets are kept by name: $OUTLIER_DATASETS, else ~/.cache/outlier-miner/datasets."""
    return os.path.expanduser(os.environ.get("OUTLIER_DATASETS", "~/.cache/outlier-miner/datasets"))


def torchvision_set(name: str, train: bool, size: int) -> tuple[tuple[str, ...], Half]:
    """Class names, and images uint8 [n, size, size, 3] with labels int64 [n], of one of TORCHVISION's sets.

    torchvision downloads it (and checks its MD5) to ``datasets_folder()``. MinerError when that fails, and for a
    damaged file of MNIST's kind that lies there already.
    """
    root = datasets_folder()
    if name in MNIST_LIKE:
        _check_idx(Path(root, MNIST_LIKE[name], "raw"))
    try:
        dataset = TORCHVISION[name](root, train)
    except (OSError, RuntimeError) as error:  # RuntimeError: no mirror answers, or a wrong MD5
        reason = str(error).strip().splitlines()[0]
        raise MinerError(
            f"{root}: cannot download {name} ({reason}); put it there yourself, or give a folder of tars"
        ) from None
    classes = tuple(getattr(dataset, "classes", None) or map(str, range(10)))
    return classes, _arrays(dataset, size)


def _check_idx(folder: Path) -> None:
    """MinerError for a file of another length than its head says: torchvision looks at nothing but the names."""
    for path in sorted(folder.glob("*-ubyte")):
        with open(path, "rb") as file:
            head = file.read(16)
        ends = range(8, 8 + 4 * head[3], 4) if len(head) > 7 else range(0)  # a magic number, then the shape
        shape = [int.from_bytes(head[end - 4 : end], "big") for end in ends]
        if not 1 <= len(shape) <= 3 or path.stat().st_size != 4 + 4 * len(shape) + math.prod(shape):
            raise MinerError(f"{path}: cut off or damaged; replace it, or remove it to download it again")


def _arrays(dataset: Any, size: int) -> Half:
    if not hasattr(dataset, "data"):  # DTD and Places365 are folders of images
        pixels, labels = np.empty((len(dataset), size, size, 3), np.uint8), np.empty(len(dataset), np.int64)
        for row, (image, label) in enumerate(dataset):
            pixels[row], labels[row] = fit(image, size), label
        return pixels, labels
    images = np.asarray(dataset.data)
    if images.ndim == 3:  # MNIST is grey
        images = np.repeat(images[..., None], 3, axis=3)
    elif images.shape[1] == 3:  # SVHN has its channels first
        images = images.transpose(0, 2, 3, 1)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return np.ascontiguousarray(fit_all(images, size)), np.asarray(labels, np.int64)
