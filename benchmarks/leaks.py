"""Are leaks found? Copies of ID test images are planted in a pool, and looked for in several ways.

python -m benchmarks.leaks --data DATA --pool POOL --checkpoint runs/ce

DATA holds cifar10/, a folder of tars; POOL is a pool without CIFAR-10 images, of which --images are taken. 200 copies
of each kind are planted: the same pixels, JPEG of quality 70 to 90, mirrored, cropped (75 to 95 % of the side,
somewhere, scaled back; "hard": 60 to 75 %), cropped and mirrored; all but the first are such JPEGs too. Every way gets
its threshold in the same manner: at most --alarms of the ID test images, turned upside down, exceed it against all ID
images. A leak is found when its score exceeds that and the ID image named is the right one; a clean image whose score
exceeds it is a false alarm.

    exact          decoded pixels
    phash          64 signs of the lowest DCT coefficients, Hamming distance
    features       cosine of penultimate features of --checkpoint (FAISS, exact), image and mirror image
    looks          the same with means and deviations of its maps at every depth, whitened
    thumbnails     correlation of 8 x 8 px, image and mirror image
    pipelines.audit

Prints Markdown. About 15 minutes on two cores.
"""

import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import cli

KINDS = ("exact", "re-encoded", "flipped", "cropped", "cropped hard", "cropped, flipped")
Look = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Benchmark:
    """What is planted where."""

    data: Path
    """Folder with cifar10/."""
    pool: str
    """Pool of clean images."""
    checkpoint: Path | None = None
    """Classifier whose features are compared too: a run directory or .safetensors. Without one they are left out."""
    images: int = 10_000
    """Clean images taken from the pool, evenly."""
    each: int = 200
    """Leaks of each kind."""
    alarms: float = 0.001
    """Share of clean ID test images that may exceed the threshold."""
    seed: int = 0
    """Of what is planted."""
    out: Path | None = None
    """Where the audit of the planted pool is kept (audit.parquet, audit.html). Default: nowhere."""


def encoded(image: np.ndarray, quality: int) -> np.ndarray:
    """The pixels after a JPEG of this quality, as PIL makes it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def crop(image: np.ndarray, rng: np.random.Generator, least: float, most: float) -> np.ndarray:
    """A square of this share of the side, anywhere, scaled back to the image's size."""
    side = len(image)
    part = side * rng.uniform(least, most)
    x, y = rng.uniform(0, side - part, 2)
    how = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((side, side), how, box=(x, y, x + part, y + part)))


def copied(kind: str, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy of one of KINDS."""
    if kind == "exact":
        return image
    if kind.startswith("cropped"):
        image = crop(image, rng, *((0.6, 0.75) if "hard" in kind else (0.75, 0.95)))
    if "flipped" in kind:
        image = np.ascontiguousarray(image[:, ::-1])
    return encoded(image, int(rng.integers(70, 91)))


def mirrored(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[:, :, ::-1])


def unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12), np.float32)


def phash(images: np.ndarray) -> np.ndarray:
    """Signs (-1, 1) of the 8 x 8 lowest DCT coefficients of grey images about their median, over 8: [n, 64]."""
    from scipy.fft import dctn

    low = dctn(images.astype(np.float32) @ np.float32([0.299, 0.587, 0.114]), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    return np.where(low > np.median(low[:, 1:], axis=1, keepdims=True), 1, -1).astype(np.float32) / 8


def thumbnails(images: np.ndarray) -> np.ndarray:
    small = images.reshape(len(images), 8, images.shape[1] // 8, 8, -1, 3).mean(axis=(2, 4)).reshape(len(images), -1)
    return unit(small - small.mean(axis=1, keepdims=True))


def net_ways(checkpoint: Path, sample: np.ndarray) -> dict[str, Look]:
    """Features and looks of the net; looks are whitened on ``sample``."""
    import torch

    from miner.neighbors import fit_strata
    from trainers.checkpoint import open_checkpoint
    from trainers.data import normalise

    net = open_checkpoint(checkpoint)[0]

    @torch.inference_mode()
    def described(images: np.ndarray, which: int) -> np.ndarray:
        parts = [net.described(normalise(torch.tensor(images[i : i + 256])))[which] for i in range(0, len(images), 256)]
        return torch.cat(parts).numpy()

    fitted = fit_strata(described(sample, 1), 1, 0, 1)
    return {
        "features": lambda images: unit(described(images, 0)),
        "looks": lambda images: unit((described(images, 1) - fitted.centre) @ fitted.axes),
    }


def by_vectors(look: Look, references: np.ndarray, *queries: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(best similarity, its reference) of each image of ``queries``, as it is or mirrored.

    Those of the second ``queries`` are the first references, upside down, and not to be found as themselves.
    """
    import faiss

    vectors = look(references)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    found = []
    for number, images in enumerate(queries):
        both = [index.search(look(view), 2) for view in (images, mirrored(images))]
        near, row = (np.concatenate(parts, axis=1) for parts in zip(*both, strict=True))
        if number == 1:
            near[row == np.arange(len(images))[:, None]] = -1
        best = near.argmax(axis=1)[:, None]
        found.append((np.take_along_axis(near, best, 1)[:, 0], np.take_along_axis(row, best, 1)[:, 0]))
    return found


def figures(above: np.ndarray, right: np.ndarray, kind: np.ndarray) -> list[str]:
    """Recall of each kind (``above`` the threshold and the ``right`` ID image), and the share of clean images above."""
    recalls = [f"{(above & right)[kind == number].mean():.3f}" for number in range(len(KINDS))]
    return [*recalls, f"{above[kind < 0].mean():.2%}"]


def main() -> None:
    """Plant, look, print."""
    import tyro

    config = tyro.cli(Benchmark, prog="python -m benchmarks.leaks", description=__doc__)
    from miner.copies import threshold
    from miner.pool import resolve
    from trainers.data import load_id
    from trainers.sets import open_images

    rng = np.random.default_rng(config.seed)
    id_set = load_id(str(config.data / "cifar10"))
    pool = open_images(resolve(config.pool), 32)[0]
    clean = pool.take(np.linspace(0, len(pool) - 1, config.images).astype(int))
    source = rng.permutation(len(id_set.test_images))[: config.each * len(KINDS)]
    leaks = [copied(KINDS[i // config.each], id_set.test_images[row], rng) for i, row in enumerate(source)]
    images = np.concatenate([np.stack(leaks), clean])
    kind = np.concatenate([np.arange(len(leaks)) // config.each, np.full(len(clean), -1)])
    truth = np.concatenate([source, np.full(len(clean), -1)])
    print("| way | " + " | ".join(KINDS) + " | false alarms | threshold | s |")
    print("|---" * (len(KINDS) + 4) + "|", flush=True)
    audit, rows = audited(config, images)
    for way, found in rows.items():
        limit = audit.about["threshold"] if way == "pipelines.audit" else 1.0
        cells = [*figures(found >= -1, found == truth, kind), f"{limit:.3f}", f"{audit.about['seconds']:.0f}"]
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)
    references = np.concatenate([id_set.test_images, id_set.train_images])
    nothing = np.ascontiguousarray(id_set.test_images[:, ::-1])
    ways: dict[str, Look] = {"phash": phash, "thumbnails": thumbnails}
    if config.checkpoint is not None:
        ways |= net_ways(config.checkpoint, id_set.train_images[:5000])
    for way, look in ways.items():
        started = time.monotonic()
        (score, row), (quiet, _) = by_vectors(look, references, images, nothing)
        limit = threshold(quiet, config.alarms)
        cells = [*figures(score > limit, row == truth, kind), f"{limit:.3f}", f"{time.monotonic() - started:.0f}"]
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)
    print(json.dumps(audit.about, indent=2))


def audited(config: Benchmark, images: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """The audit of a pool of these images, and, by way, the ID test image each is named: -1 another one, -2 none."""
    import pyarrow.compute as pc

    from miner.build import write_arrays_pool
    from miner.progress import Display
    from pipelines.audit import AuditConfig, run

    with tempfile.TemporaryDirectory() as folder, Display() as display:
        write_arrays_pool(folder, "planted", images, None, ())
        out = str(config.out or Path(folder) / "audit")
        asked = AuditConfig(folder, id=str(config.data / "cifar10"), alarms=config.alarms, out=out)
        audit = run(asked, display)[0]
    rows = {}
    for way in ("exact", "pipelines.audit"):
        table = audit.table if way != "exact" else audit.table.filter(pc.equal(audit.table["kind"], "exact"))
        found = np.full(len(images), -2)
        found[table["row"].to_numpy()] = -1
        inside = table.filter(pc.equal(table["set"], audit.about["clean"]))
        found[inside["row"].to_numpy()] = inside["set_row"].to_numpy()
        rows[way] = found
    return audit, rows


if __name__ == "__main__":
    cli.run(main)
