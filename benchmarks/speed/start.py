"""Start-up: what a user waits for."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.speed.made import pixels, pool
from benchmarks.speed.timing import table

HELP = ("resample", "train", "evaluate", "shard", "status", "compare", "universal", "report", "agree", "abnormality")


def seconds(words: list[str]) -> float:
    """One run of a command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    return time.perf_counter() - started


def main(repeat: int) -> None:
    """Print the tables."""
    asked = {name: [seconds([f"pipelines.{name}", "--help"]) for _ in range(repeat)] for name in HELP}
    table("`--help`", ("command", "seconds"), [(name, float(np.median(values))) for name, values in asked.items()])
    whole, parts = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as where:
            run = Path(where) / "run"
            net = Path(where) / "net.safetensors"
            made = pool(Path(where), pixels(20_000, 32), 4).path
            words = ["pipelines.resample", f"--pool={made}", "--gamma=0.1", "--rounds=1", "--views=1", f"--out={run}"]
            _checkpoint(net)
            started = time.time()
            subprocess.run([sys.executable, "-m", *words, f"--checkpoint={net}"], check=True, capture_output=True)
            whole.append(time.time() - started)
            parts.append(json.loads((run / "summary.json").read_text())["seconds"])
    rows = [(name, float(np.median([part[name] for part in parts]))) for name in parts[0]]
    rows.append(("whole command", float(np.median(whole))))
    table("20,000 JPEGs mined with a ready classifier, one round", ("part", "seconds"), rows)


def _checkpoint(path: Path) -> None:
    from trainers import models
    from trainers.checkpoint import save_checkpoint
    from trainers.data import load_id

    classes = list(load_id("demo").classes)
    save_checkpoint(path, models.create("small", len(classes)), {"model": "small", "classes": classes})
