"""The memory of a mining, of every process of it, over time.

    python -m benchmarks.memory --rows 10_000_000

Draws a pool of that many images of 8 x 8 pixels, one `.npy` file that is its own cache of decoded pixels, has it
adopted (`python -m pipelines.shard`) and mined (`python -m pipelines.resample`, the default rule with leak guard and
strata) for the demo's digits by a classifier that is trained for a minute. Both commands are watched from outside,
once a second: pages that processes share count once, by share (PSS).

Prints, and writes to OUT/memory.json and OUT/memory.png: peaks by process, the peak of the total, the most that lay in
Ray's object store, bytes spilled to disk, images a second. Ends with an error when the total passed --limit-gib or
anything was spilled. The pool goes when it is done.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from miner import memory
from miner.errors import MinerError
from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
SIZE, CHUNK = 8, 1 << 16  # pixels a side; images drawn at once
PARTS = {"Rss": "rss", "Pss": "pss", "Pss_Anon": "anon", "Pss_File": "file", "Pss_Shmem": "shared"}
MINE = ("--id", "demo", "--size", str(SIZE), "--views", "1")
CURVES = 6  # processes that are drawn by name


def draw_pool(path: Path, rows: int, seed: int) -> None:
    """``rows`` images as one uncompressed .npy, a chunk at a time: blurred blobs of two colours, grain over them."""
    rng = np.random.default_rng(seed)
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, SIZE, SIZE, 3)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            coarse = rng.integers(0, 224, (count, 2, 2, 3), np.uint8)
            images = coarse.repeat(SIZE // 2, 1).repeat(SIZE // 2, 2)
            images += rng.integers(0, 32, images.shape, np.uint8)
            file.write(images.tobytes())


def train_classifier(path: Path, epochs: int) -> None:
    """A classifier of the demo's digits at ``SIZE`` px, trained for a few epochs."""
    import torch

    from trainers import models
    from trainers.checkpoint import save_checkpoint
    from trainers.config import PretrainConfig
    from trainers.data import load_id
    from trainers.fit import pretrain

    digits = load_id("demo", SIZE)
    net = models.create("small", len(digits.classes), 0)
    settings = PretrainConfig(epochs=epochs, batch=64, lr=0.1)
    report = pretrain(net, digits, settings, 0, torch.device("cpu"), lambda told: None)
    facts = {"id": "demo", "size": SIZE, "id_fingerprint": digits.fingerprint, "accuracy": report["accuracy"]}
    save_checkpoint(path, net, facts | {"model": "small", "classes": list(digits.classes)})
    print(f"classifier: {report['accuracy']:.1%} of the test digits right", flush=True)


# --- watching ------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A command and everything below it: ``samples`` [(seconds, phase, {pid: parts})], bytes; names by pid."""

    started: float = field(default_factory=time.monotonic)
    samples: list[tuple[float, str, dict[int, dict[str, int]]]] = field(default_factory=list)
    peak_rss: dict[int, int] = field(default_factory=dict)  # the kernel's own, between two samples too
    names: dict[int, str] = field(default_factory=dict)

    def look(self, root: int, phase: str) -> None:
        """One sample."""
        found = {}
        for pid, command in memory.below(root):
            with contextlib.suppress(OSError, ValueError, ProcessLookupError):
                found[pid] = parts_of(pid)
                self.peak_rss[pid] = memory.usage(pid)["peak_rss_bytes"]
                self.names[pid] = "driver" if pid == root else named(command)
        self.samples.append((time.monotonic() - self.started, phase, found))

    def totals(self, part: str = "pss") -> list[int]:
        """Bytes of all processes together, by sample."""
        return [sum(parts[part] for parts in found.values()) for _, _, found in self.samples]

    def series(self, pid: int, part: str) -> list[int]:
        """Bytes of one process, by sample."""
        return [found.get(pid, {}).get(part, 0) for _, _, found in self.samples]

    def peaks(self) -> list[dict[str, Any]]:
        """A row a process, the largest first; short-lived helpers of the same kind together."""
        rows: dict[str, dict[str, Any]] = {}
        for pid, name in self.names.items():
            row = rows.setdefault(name, {"who": name, "processes": 0, "peak_rss": 0} | dict.fromkeys(PARTS.values(), 0))
            row["processes"] += 1
            row["peak_rss"] = max(row["peak_rss"], self.peak_rss[pid])
            for part in PARTS.values():
                row[part] = max(row[part], *self.series(pid, part))
        return sorted(rows.values(), key=lambda row: -row["pss"])

    def phases(self) -> Iterator[tuple[str, float, float, int]]:
        """(phase, first second, last second, peak of the total) in order."""
        totals, start = self.totals(), 0
        for i, (_, phase, _) in enumerate(self.samples):
            if i + 1 == len(self.samples) or self.samples[i + 1][1] != phase:
                yield phase, self.samples[start][0], self.samples[i][0], max(totals[start : i + 1])
                start = i + 1


def parts_of(pid: int) -> dict[str, int]:
    """Memory of a process now, bytes, by PARTS. Raises OSError when it is gone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = dict(line.split(":", 1) for line in lines)
    return {ours: int(fields[name].split()[0]) << 10 for name, ours in PARTS.items()}


def named(command: str) -> str:
    """What a process is called in the table until the run's summary names it."""
    for part, name in (("ray::PoolShards", "pool actor"), ("ray::Trainer", "trainer"), *memory.RAY.items()):
        if part in command:
            return name if name in ("pool actor", "trainer") else f"ray: {name}"
    return "other"


def watch(words: Sequence[str], log: Path, status: Path | None, interval: float) -> Watched:
    """Run a command to its end, with a look every ``interval`` seconds. MinerError with its last lines if it fails."""
    seen = Watched()
    with open(log, "wb") as sink, subprocess.Popen(words, cwd=ROOT, stdout=sink, stderr=sink) as process:
        try:
            while process.poll() is None:
                phase = ""
                if status is not None:
                    with contextlib.suppress(OSError, ValueError, KeyError):
                        phase = json.loads(status.read_text())["phase"]
                seen.look(process.pid, phase or "start")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(interval)
        finally:
            process.terminate()
            process.wait()  # after Ctrl-C, too: it still writes
    if process.returncode:
        raise MinerError(f"{' '.join(words)}: exit code {process.returncode}\n{log.read_text()[-2000:]}")
    return seen


# --- the two commands, and what is told of them ----------------------------------------------------------------------


def measure(settings: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Pool, classifier, adoption, mining; figures of both commands."""
    out, python = settings.out, (sys.executable, "-m")
    draw_pool(work / "images.npy", settings.rows, 0)
    train_classifier(work / "classifier.safetensors", settings.epochs)
    source = ("--source", "npy", "--input", str(work / "images.npy"), "--out", str(work / "pool"))
    adopted = watch([*python, "pipelines.shard", *source], out / "adopt.log", None, settings.interval)
    tell(adopted, "adoption", settings.rows)
    run = work / "run"
    words = [*python, "pipelines.resample", "--pool", str(work / "pool"), "--out", str(run), *MINE]
    words += ["--checkpoint", str(work / "classifier.safetensors"), *settings.flags]
    mined = watch(words, out / "mine.log", run / "status.json", settings.interval)
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mined.names |= {row["pid"]: row["who"] for row in summary["memory"] if row["who"].partition("-")[0] in NAMED}
    tell(mined, "mining", settings.rows)
    plot(mined, out / "memory.png", settings.rows)
    figures = {
        "rows": settings.rows,
        "adoption": told(adopted),
        "mining": told(mined),
        "object_store": summary["object_store"]
        | {"peak": max(max(mined.series(pid, "shared")) for pid in mined.names)},
        "images_per_s": [record["score_images_per_s"] for record in records if "score_images_per_s" in record],
        "seconds": summary["seconds"],
    }
    (out / "memory.json").write_text(json.dumps(figures, indent=1))
    return figures


NAMED = ("pool", "trainer")


def told(seen: Watched) -> dict[str, Any]:
    """Peaks of one command in JSON types, bytes."""
    return {
        "total": max(seen.totals()),
        "anonymous": max(seen.totals("anon")),
        "seconds": round(seen.samples[-1][0], 1),
        "processes": seen.peaks(),
        "phases": [{"phase": name, "from": a, "to": b, "peak": top} for name, a, b, top in seen.phases()],
    }


def tell(seen: Watched, what: str, rows: int) -> None:
    """Print one command's peaks, MB of 10^6 bytes."""
    heads = ("peak rss", "peak pss", "anonymous", "files", "shared")
    print(
        f"\n{what}: {rows:,} images, {seen.samples[-1][0]:.0f} s\n" + f"{'MB':<24}" + "".join(f"{h:>11}" for h in heads)
    )
    for row in seen.peaks():
        cells = [row[name] / 1e6 for name in ("peak_rss", "pss", "anon", "file", "shared")]
        name = row["who"] + (f" (largest of {row['processes']})" if row["processes"] > 1 else "")
        print(f"{name:<24}" + "".join(f"{cell:>11,.0f}" for cell in cells))
    peaks = [max(seen.totals(part)) / 1e6 for part in ("pss", "anon", "file", "shared")]
    print(f"{'peak of the total':<24}{'':>11}" + "".join(f"{peak:>11,.0f}" for peak in peaks))
    for name, start, stop, top in seen.phases():
        print(f"  {name:<28}{start:>8.0f} to {stop:>6.0f} s   total at most {top / 1e6:>7,.0f}")
    sys.stdout.flush()


def plot(seen: Watched, path: Path, rows: int) -> None:
    """The total and its largest processes over time, and the phases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds = [at for at, _, _ in seen.samples]
    largest = sorted(seen.names, key=lambda pid: -max(seen.series(pid, "pss")))[:CURVES]
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    stack = [np.array(seen.series(pid, "pss")) / 1e9 for pid in largest]
    rest = np.array(seen.totals()) / 1e9 - sum(stack)
    axes.stackplot(seconds, *stack, rest, labels=[*(seen.names[pid] for pid in largest), "the rest"], alpha=0.8)
    axes.plot(seconds, np.array(seen.totals("anon")) / 1e9, "k--", lw=1, label="anonymous, all")
    for number, (name, start, stop, _) in enumerate(seen.phases()):
        axes.axvline(start, color="grey", lw=0.5)
        if stop - start > seconds[-1] / 60:
            axes.text(start, (1.01, 1.05)[number % 2], name, transform=axes.get_xaxis_transform(), fontsize=7)
    axes.set(xlabel="seconds", ylabel="GB, shared pages once")
    axes.set_title(f"mining {rows:,} images", pad=24)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse and measure; MinerError when the figures are worse than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=5, help="of the classifier")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--limit-gib", type=float, default=6.0)
    parser.add_argument("--work", help="where pool and run lie meanwhile; default: $TMPDIR")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument("flags", nargs="*", help="after --: further flags of pipelines.resample")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="memory-", dir=settings.work))
    try:
        figures = measure(settings, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    store, top = figures["object_store"], max(figures[what]["total"] for what in ("adoption", "mining"))
    print(f"\nobject store: at most {store['peak'] / 1e6:,.0f} MB; {store}")
    print(f"images/s in sweeps: {figures['images_per_s']}; seconds: {figures['seconds']}")
    print(f"peak of the total: {top / 2**30:.2f} GiB of {settings.limit_gib:g}; {settings.out}/memory.png")
    if top > settings.limit_gib * 2**30:
        raise MinerError(f"{top / 2**30:.2f} GiB in all, more than --limit-gib {settings.limit_gib:g}")
    if store.get("spilled"):
        raise MinerError(f"{store['spilled']:,} bytes were spilled to disk")


if __name__ == "__main__":
    cli.run(main)
