"""Take images out of a finished run, and cut its weights table and all its subsets again, without mining.

python -m pipelines.exclude runs/imagenet --uids takedown.txt
python -m pipelines.exclude runs/imagenet --classes n02123045 "tiger cat"
python -m pipelines.exclude runs/imagenet --audit runs/imagenet/audit.parquet

What was taken out stays out of further subsets of the run. Every subset is filled up from the ranking to floor(gamma N)
images, N being what it was. Stopped? The same command finishes it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from pipelines import cli

if TYPE_CHECKING:
    import pyarrow as pa

    from miner.files import Place


@dataclass(frozen=True)
class ExcludeConfig:
    """Take images out of a finished run."""

    run: Annotated[str, Positional, arg(metavar="RUN")]
    """Run directory that pipelines.resample left, or its URL."""
    uids: Path | None = None
    """Text file of uids, one a line: opt-outs, take-downs."""
    classes: tuple[str, ...] = ()
    """Classes of the pool: names, or WordNet ids where the pool's class_info has them (`wnid`). Of two classes of one
    name both go."""
    audit: str | None = None
    """An audit.parquet of pipelines.audit, whose images go."""
    reason: str = "opt-out"
    """What the weights table says, in `excluded_by`, of the images of --uids."""


def listed(path: Path) -> list[str]:
    """The uids of a text file; MinerError for a line that is none."""
    from miner.errors import MinerError
    from miner.files import read_whole

    try:
        lines = read_whole(path).decode("ascii", "replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise MinerError(f"{path}: no such file; give a text file of uids, one a line") from None
    found = []
    for number, line in enumerate(lines, 1):
        uid = line.strip().lower()
        if uid and (len(uid) != 32 or not set(uid) <= set("0123456789abcdef")):
            raise MinerError(f"{path}: line {number} is no uid of 32 hexadecimal digits: {line[:60]!r}")
        found += [uid] if uid else []
    return found


def of_classes(names: tuple[str, ...], table: "pa.Table", pool_path: str) -> dict[str, str]:
    """{uid: reason} of the images of classes of the pool. UsageError for a class that it does not have."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from miner.errors import UsageError
    from miner.pool import Pool

    pool = Pool.open(pool_path)
    info = pool.class_info if isinstance(pool.class_info, list) else []
    by_name: dict[str, list[int]] = {}  # ImageNet has two cranes
    for label, name in enumerate(pool.classes):
        by_name.setdefault(name.casefold(), []).append(label)
    by_name |= {str(x["wnid"]): [label] for label, x in enumerate(info) if isinstance(x, dict) and x.get("wnid")}
    reasons: dict[str, str] = {}
    for name in names:
        labels = by_name.get(name.casefold())
        if labels is None:
            raise UsageError(f"--classes {name}: no class of {pool.path} has this name or WordNet id")
        uids = table["uid"].filter(pc.is_in(table["label"], pa.array(labels, pa.int32())))
        reasons |= dict.fromkeys(uids.to_pylist(), f"class:{pool.classes[labels[0]]}")
    return reasons


def of_audit(table: "pa.Table") -> dict[str, str]:
    """{uid: reason} of the pairs of an audit; of several sets the one with the surest pair."""
    ordered = table.sort_by([("detail", "ascending"), ("set", "descending")])
    return {
        uid: f"audit:{name}" for uid, name in zip(ordered["uid"].to_pylist(), ordered["set"].to_pylist(), strict=True)
    }


def exclude_and_report(run: "Place", reasons: dict[str, str]) -> dict[str, Any]:
    """Exclude, and draw the run's report again if it has one; the new summary."""
    from miner.exclude import exclude, still_held
    from pipelines.report import write_report

    summary = exclude(run, reasons)
    if (run / "report.html").exists():
        write_report(run)
    for name, count in still_held(run).items():
        print(f"{run / name}: an export, left as it is: {count:,} of its images are excluded; export it again")
    return summary


def closing(summary: dict[str, Any]) -> str:
    """What is excluded now, and how large the subsets are."""
    excluded = ", ".join(f"{count:,} {reason}" for reason, count in summary["excluded"].items() if count) or "none"
    subsets = ", ".join(f"{name} {subset['count']:,} images" for name, subset in summary["subsets"].items())
    return f"excluded now: {excluded}\n{subsets}"


def main() -> None:
    """Parse, exclude, say what is left."""
    import tyro

    config = tyro.cli(ExcludeConfig, prog="python -m pipelines.exclude", description=__doc__)
    from miner.audit import read_audit
    from miner.errors import UsageError
    from miner.exclude import summary_of
    from miner.files import place
    from miner.weights import load_weights

    run = place(config.run)
    if not (config.uids or config.classes or config.audit):
        raise UsageError("nothing to exclude: give --uids, --classes or --audit")
    reasons: dict[str, str] = {}
    if config.classes:
        reasons |= of_classes(config.classes, load_weights(run), summary_of(run)["pool_path"])
    if config.audit:
        reasons |= of_audit(read_audit(place(config.audit)).table)
    if config.uids:
        reasons |= dict.fromkeys(listed(config.uids), config.reason)
    print(closing(exclude_and_report(run, reasons)))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.run(main)
