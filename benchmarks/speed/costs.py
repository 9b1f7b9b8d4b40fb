"""What --dry-run predicts, beside the runs themselves: three sizes, and one or two trainers and pool actors.

Pool and ID set (50,000 images) are drawn; the first run also trains the classifier, for one epoch, which the others
then start from. Every repetition predicts and mines in turn, so that other work on the machine slows down both.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.speed import made
from benchmarks.speed.timing import table
from miner.errors import MinerError

ID, CLASSES, SHARDS = 50_000, 10, 6
MOST = 60_000
PARTS = re.compile(r"^  (\w+) +([\d,.]+) s  ", re.MULTILINE)
MEMORY = re.compile(r"^  memory +([\d,.]+) GiB", re.MULTILINE)


@dataclass
class Case:
    """A run, and what was predicted of it and what it took: seconds by part, GiB; one entry a repetition."""

    name: str
    images: int
    flags: tuple[str, ...]
    predicted: list[dict[str, float]] = field(default_factory=list)
    took: list[dict[str, float]] = field(default_factory=list)


CASES = (
    Case("5,000 images, two rounds of two views, classifier trained", 5_000, ("--rounds=2", "--views=2")),
    Case("20,000 images, one round of six views", 20_000, ()),
    Case("60,000 images, one round of two views", 60_000, ("--views=2",)),
)
CREWS = tuple(
    Case(f"{t} trainer(s), {p} pool actor(s)", 20_000, ("--views=3", f"--trainers={t}", f"--pool-actors={p}"))
    for t, p in ((1, 1), (1, 2), (2, 1), (2, 2))
)


def main(repeat: int) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        _id_set(folder / "id")
        pixels = made.pixels(MOST, 32)
        for count in sorted({case.images for case in (*CASES, *CREWS)}):
            (folder / str(count)).mkdir()
            made.pool(folder / str(count), pixels[:count], SHARDS)
        for number in range(repeat):
            for case in (*CASES, *CREWS):
                checkpoint = folder / "net.safetensors"
                flags = ["--pretrain.epochs=1"] if case is CASES[0] else [f"--checkpoint={checkpoint}"]
                _once(case, folder, [*case.flags, *flags])
                print(f"{number}: {case.name}: predicted {case.predicted[-1]}, took {case.took[-1]}", flush=True)
    for case in CASES:
        _tell(case)
    rows = [(case.name, *_total(case)) for case in (*CASES, *CREWS)]
    table("whole runs", ("", "predicted s", "took s", "error", "largest error"), rows)


def _id_set(folder: Path) -> None:
    """Drawn images as train-*.tar and test-*.tar; their classes are of no account."""
    folder.mkdir()
    images = made.pixels(ID + 1000, 32, seed=100)
    for split, some in (("train", images[:ID]), ("test", images[ID:])):
        for path in made.tars(folder / split, some, 5, CLASSES):
            Path(path).rename(folder / f"{split}-{Path(path).name}")
        (folder / split).rmdir()
    (folder / "classes.json").write_text(json.dumps([str(label) for label in range(CLASSES)]))


def _once(case: Case, folder: Path, flags: list[str]) -> None:
    """Predict, mine, forget what was mined."""
    pool, out = folder / str(case.images) / "pool", folder / "run"
    words = [sys.executable, "-m", "pipelines.resample", f"--pool={pool}", f"--id={folder / 'id'}", f"--out={out}"]
    words += ["--exclude-near-id=0.999", *flags]  # drawn alike: a stricter guard would leave nothing
    told = _run([*words, "--dry-run"])
    predicted = {name: float(value.replace(",", "")) for name, value in PARTS.findall(told)}
    predicted["GiB"] = float(MEMORY.findall(told)[0])
    _run(words)
    summary = json.loads((out / "summary.json").read_text())
    used = sum(row.get("peak_rss_bytes", 0) - row.get("file_bytes", 0) for row in summary["memory"])
    case.predicted.append(predicted)
    case.took.append(summary["seconds"] | {"GiB": round(used / 2**30, 2)})
    if not (folder / "net.safetensors").exists():
        shutil.copy(out / "classifier.safetensors", folder / "net.safetensors")
    shutil.rmtree(out)
    shutil.rmtree(pool / "cache")


def _run(words: list[str]) -> str:
    """What a command prints; MinerError with its last words when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MinerError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def _tell(case: Case) -> None:
    """Medians of one case's parts."""
    rows = []
    for name in case.took[0]:
        told, took = (statistics.median(one[name] for one in found) for found in (case.predicted, case.took))
        rows.append((name, told, took, f"{told / took - 1:+.0%}" if took >= 0.5 else "-"))
    table(case.name, ("part", "predicted", "took", "error"), rows)


def _total(case: Case) -> tuple[float, float, str, str]:
    """Medians of predicted and taken seconds, the median error, and the largest of all repetitions."""
    pairs = [(a["total"], b["total"]) for a, b in zip(case.predicted, case.took, strict=True)]
    errors = [told / took - 1 for told, took in pairs]
    told, took = (statistics.median(values) for values in zip(*pairs, strict=True))
    return told, took, f"{statistics.median(errors):+.0%}", f"{max(errors, key=abs):+.0%}"
