"""Judge trained classifiers: OOD detection, misclassification detection and corruptions, in tables and plots.

python -m pipelines.evaluate runs/oe --ood textures/ svhn --near cifar100

Leaves results.parquet (every figure, one a row), results.md and results.html. Several checkpoints are compared
side by side. Near, far (--ood) and noise sets are averaged apart. Every metric tells its orientation by its name.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from pipelines import cli

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from pipelines.eval_tables import Evaluated, Table


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge trained classifiers on ID, OOD and corrupted images."""

    checkpoints: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN-OR-CHECKPOINT...")]
    """Run directories (of pipelines.train or pipelines.resample) or .safetensors checkpoints."""
    ood: tuple[str, ...] = ()
    """Far OOD test sets: folders of tars or images, .tar, .npy, pools, svhn, dtd, places365, lsun, cifar100, ...
    Default: none, but for a checkpoint of the demo the demo's nine held-out families."""
    near: tuple[str, ...] = ()
    """Near OOD test sets, like --ood. `held-out`: the test images of the classes that the checkpoint left out."""
    noise: tuple[str, ...] = ("gaussian", "uniform", "rademacher", "blob")
    """Noise sets. `--noise` alone: none."""
    scores: tuple[str, ...] = ("msp", "maxlogit", "energy")
    """msp, maxlogit, energy, neg-entropy, ce-to-uniform, odin, objectosphere, reject (checkpoints that have a reject
    class), abnormality (with --abnormality)."""
    id: str | None = None
    """In-distribution set, whose test images are used. Default: the one that the checkpoint names."""
    size: int | None = None
    """Pixels a side at which images are scored. Default: what the checkpoint was trained at, else 32."""
    corrupted: Path | None = None
    """Corrupted ID test images in the layout of CIFAR-10-C: labels.npy and a .npy a corruption, five severities."""
    abnormality: Path | None = None
    """Abnormality module (.safetensors) of the checkpoint; adds the score `abnormality`."""
    repeats: int = 10
    """Draws of the 1:5 protocol of Outlier Exposure."""
    seed: int = 0
    """Seed of these draws and of the noise."""
    allow_overlap: bool = False
    """Go on although test images were among the outliers that a checkpoint was trained with."""
    out: Path | None = None
    """Where the results go. Default: the run directory, or beside the checkpoint; of several, the first one's."""


def evaluate(config: EvaluateConfig) -> "list[Evaluated]":
    """Judge every checkpoint of ``config``, in its order. Writes nothing, but makes the folder of --out.

    Everything is opened and checked first; raises as ``pipelines.eval_inputs.prepare`` and ``pipelines.judge`` do.
    """
    import torch

    from miner.progress import Display
    from pipelines.eval_inputs import corrupted_images, prepare
    from pipelines.eval_tables import Evaluated
    from pipelines.judge import judge, judge_corrupted
    from trainers.train import place

    results = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Display() as display:
        for job in prepare(config, display.say):
            place(job.net, device)
            display.phase(job.name, job.images)
            net, meta, scores, module = job.net, job.meta, job.scores, job.module
            basis = (config.seed, config.repeats, module, display.advance)
            found = judge(net, meta, job.id_set, job.sets, scores, *basis)
            if config.corrupted:
                display.phase(f"{job.name}, corrupted", corrupted_images(config.corrupted))
                more = judge_corrupted(net, meta, config.corrupted, job.size, scores, module, display.advance)
                found = replace(found, rows=found.rows + more)
            results.append(Evaluated(job.name, job.path, job.meta, found))
    return results


def show(results: "Sequence[Evaluated]") -> None:
    """Print the summary; tables wider than the terminal go on below."""
    from rich.console import Console

    from pipelines.eval_tables import summary

    console = Console()
    for table in summary(results):
        console.print(table.title, style="bold", markup=False, highlight=False)
        for part in _fitting(table, console.width):
            console.print(part)


def _fitting(table: "Table", width: int) -> "Iterator[RichTable]":
    """The columns of ``table``, the first one repeated, in as many tables as it takes."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    step = max(len(table.parts), 1)
    under = " ".join(f"{part:>5}" for part in table.parts)
    heads = [f"{name}\n{under}" if under else name for name in table.head[1:]]
    cells = [
        [" ".join(f"{text:>5}" for text in row[i : i + step]) for i in range(1, len(row), step)] for row in table.rows
    ]
    widths = [
        max(len(line) for text in column for line in text.split("\n")) for column in zip(heads, *cells, strict=True)
    ]
    space = width - max(len(row[0]) for row in table.rows) - 2
    start = 0
    while start < len(heads):
        stop = start + 1
        while stop < len(heads) and sum(widths[start : stop + 1]) + 2 * (stop + 1 - start) <= space:
            stop += 1
        made = RichTable("", box=box.SIMPLE_HEAD, pad_edge=False)
        for head in heads[start:stop]:
            made.add_column(Text(head), justify="right", no_wrap=True)
        for i, (row, own) in enumerate(zip(table.rows, cells, strict=True)):
            made.add_row(*map(Text, (row[0], *own[start:stop])), style="bold" if i in table.groups else None)
        yield made
        start = stop


def write(config: EvaluateConfig, results: "Sequence[Evaluated]") -> list[Path]:
    """Write results.parquet, results.md and results.html, each whole or not at all; returns their paths."""
    from miner.run_dir import write_file
    from pipelines.eval_inputs import results_folder
    from pipelines.eval_page import page
    from pipelines.eval_tables import report

    folder = results_folder(config)
    files = {
        "results.parquet": parquet(config, results),
        "results.md": report(results, config.repeats).encode(),
        "results.html": page(results, config.repeats).encode(),
    }
    for name, data in files.items():
        write_file(folder / name, data)
    return [folder / name for name in files]


def parquet(config: EvaluateConfig, results: "Sequence[Evaluated]") -> bytes:
    """Every figure: checkpoint, score, group, set, protocol, metric (strings), value (float64, in [0, 1] but for NLL,
    Brier, the features' figures and what ends in _x1000).

    Score "none": depends on none. Group: near, far, noise, id, corrupted-1 to -5, corrupted; set "mean": its mean.
    Protocol: full, 1:5 (with <metric>_std, the spread of the draws), misclassification, rejection, features.
    The schema's metadata "outlier-miner" holds the settings and the checkpoints' own metadata as JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"checkpoint": result.name, **row._asdict()} for result in results for row in result.judged.rows]
    columns = ("checkpoint", "score", "group", "set", "protocol", "metric")
    fields = [*(pa.field(name, pa.string(), False) for name in columns), pa.field("value", pa.float64(), False)]
    about = {"settings": asdict(config), "checkpoints": {r.name: {"path": str(r.path)} | r.meta for r in results}}
    metadata = {"outlier-miner": json.dumps(about, default=str)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields, metadata=metadata)), buffer)
    return buffer.getvalue().to_pybytes()


def main() -> None:
    """Parse, judge, show, write."""
    import tyro

    config = tyro.cli(EvaluateConfig, prog="python -m pipelines.evaluate", description=__doc__)
    results = evaluate(config)
    show(results)
    for path in write(config, results):
        print(path)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.run(main)
