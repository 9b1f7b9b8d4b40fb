"""Leak guard: which images of a pool, subset or run are images of the ID set or of a test set, or copies of them?

python -m pipelines.audit runs/imagenet --ood svhn dtd
python -m pipelines.audit runs/imagenet --ood svhn dtd --exclude

Exact ones are found by decoded pixels; re-encoded, mirrored and cropped ones by thumbnails of all windows of the known
images (FAISS) and the correlation of aligned detail, above a threshold that is measured on ID test images and printed.
Leaves audit.parquet (one row a pair) and audit.html (the pairs side by side). Stopped? The same command goes on where
it was. With --exclude a run's weights table and subsets are cut again without them, and without mining: see
pipelines.exclude.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from pipelines import cli

if TYPE_CHECKING:
    from miner.audit import Audit, Target
    from miner.files import Place
    from miner.progress import Display
    from trainers.image_set import ImageSet


DOUBTFUL = 0.9  # thresholds above it miss copies
PART = ".audit.part.parquet"  # what an audit that was interrupted had found


@dataclass(frozen=True)
class AuditConfig:
    """Compare a pool, subset or run with ID train, ID test and OOD test sets."""

    target: Annotated[str, Positional, arg(metavar="RUN-POOL-OR-SUBSET")]
    """A finished run (its whole pool is audited), a pool (folder, URL or name) or a gamma-subset."""
    id: str | None = None
    """In-distribution set. Default: the run's; a pool or subset needs one."""
    ood: tuple[str, ...] = ()
    """OOD test sets, as in pipelines.evaluate: folders of tars or images, .tar, .npy, svhn, dtd, places365, ..."""
    size: int | None = None
    """Pixels a side at which images are decoded. Default: the run's, else 32."""
    alarms: float = 0.001
    """Share of ID test images, turned upside down and so copies of nothing, that may pass for copies."""
    exclude: bool = False
    """Take the images found out of the run's weights and cut its subsets again. A run only."""
    fail: bool = False
    """Exit with 1 when images were found (in a run: that it does not exclude), for the checks of a data project."""
    out: str | None = None
    """Where audit.parquet and audit.html go. Default: the run; for others runs/audit-<name>-<fingerprint>."""


def opened(config: AuditConfig) -> "tuple[Target, dict[str, ImageSet], str, Place, Place | None]":
    """(target, reference sets, name of the ID test images, where results go, the run if it is one).

    Raises UsageError for flags that make no sense, MinerError for what cannot be read.
    """
    from miner.audit import pool_target, subset_target
    from miner.errors import UsageError
    from miner.exclude import summary_of
    from miner.files import place, read_json
    from miner.pool import Pool, resolve
    from miner.subset import load_subset

    if not 0 < config.alarms < 1:
        raise UsageError(f"--alarms {config.alarms:g}: a share, must lie in (0, 1)")
    if config.size is not None and config.size < 8:
        raise UsageError(f"--size {config.size}: must be at least 8")
    path, told = place(config.target), dict[str, Any]()
    run = path if (path / "weights").exists() and (path / "summary.json").exists() else None
    if run is not None and (run / "config.json").exists():
        settings = read_json(run / "config.json")
        told = dict(settings.get("data") or {}) if isinstance(settings, dict) else told
    if config.exclude and run is None:
        raise UsageError(f"{config.target}: no finished run; --exclude cuts the subsets of a run again")
    spec, size = config.id or told.get("id"), config.size or int(told.get("size", 32))
    if not spec:
        raise UsageError("--id: name the ID set; only a run says which one it was mined for")
    if run is not None:
        target = pool_target(Pool.open(summary_of(run)["pool_path"]), size)
    elif (path / "subset.json").exists():
        target = subset_target(load_subset(path), size)
    else:
        target = pool_target(Pool.open(resolve(config.target)), size)
    sets, clean = references(str(spec), config.ood, size)
    aside = place(f"runs/audit-{target.name}-{target.fingerprint[:8]}")
    return target, sets, clean, place(config.out) if config.out else run or aside, run


def references(spec: str, ood: tuple[str, ...], size: int) -> "tuple[dict[str, ImageSet], str]":
    """ID train, ID test and the OOD sets by name, and the name of ID test; sets of one name are numbered."""
    from dataclasses import replace

    from trainers.data import load_id
    from trainers.image_set import ImageSet
    from trainers.sets import open_images

    inside = load_id(spec, size)
    sets = {}
    for part, pixels in (("train", inside.train_images), ("test", inside.test_images)):
        origin = {"kind": "id", "fingerprint": f"{inside.fingerprint}-{part}"}
        sets[f"{inside.name} {part}"] = ImageSet(f"{inside.name} {part}", (pixels,), origin=origin)
    for one in dict.fromkeys(ood):
        for images in open_images(one, size):
            name, number = images.name, 2
            while name in sets:
                name, number = f"{images.name} ({number})", number + 1
            sets[name] = replace(images, name=name)
    return sets, f"{inside.name} test"


def run(config: AuditConfig, display: "Display") -> "tuple[Audit, Place, Place | None]":
    """Audit, unless the very same audit lies there already, and write audit.parquet and audit.html.

    Returns the audit, where it lies, and the run that was audited, if it was one.
    """
    from miner.audit import audit, read_audit, settings, write_audit
    from miner.errors import MinerError
    from miner.run_dir import write_file
    from pipelines.audit_page import page_of

    target, sets, clean, out, of_run = opened(config)
    path = out / "audit.parquet"
    asked = settings(target, sets, config.alarms)
    if path.exists():
        try:
            before = read_audit(path)
            if asked.items() <= before.about.items():
                display.say(f"{path}: the same audit, done before")
                return before, out, of_run
        except MinerError:
            pass  # damaged: it is made again
    out.mkdir(parents=True, exist_ok=True)
    found = audit(target, sets, clean, config.alarms, display, kept=out / PART)
    write_file(out / "audit.html", page_of(found, target, sets).encode())
    write_audit(found, path)  # last: what it says is done
    (out / PART).unlink(missing_ok=True)
    return found, out, of_run


def show(audit: "Audit") -> None:
    """The table: pairs of each kind by reference set, and what the threshold means."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from miner.audit import KINDS

    about = audit.about
    table = Table("", *KINDS, box=box.SIMPLE_HEAD, pad_edge=False)
    for name, counts in tally(audit).items():
        table.add_row(Text(name), *(f"{count:,}" for count in counts))
    console = Console()
    console.print(table)
    for line in told(audit):
        print(line)
    for line in about["undecodable"][:3]:
        print(f"does not decode: {line}")


def tally(audit: "Audit") -> dict[str, list[int]]:
    """Pairs of each kind, by reference set."""
    from collections import Counter

    from miner.audit import KINDS

    pairs = Counter(zip(audit.table["set"].to_pylist(), audit.table["kind"].to_pylist(), strict=True))
    return {name: [pairs[name, kind] for kind in KINDS] for name in audit.about["sets"]}


def told(audit: "Audit") -> list[str]:
    """What was compared, and how the threshold came about, in sentences."""
    about = audit.about
    down, upright = (
        ", ".join(f"{float(q):.1%}: {v:.2f}" for q, v in about[name].items()) for name in ("upside_down", "as_they_are")
    )
    pace = about["seconds"] / max(about["checked"], 1) * 1e6
    doubts = []
    if about["threshold"] > DOUBTFUL:
        doubts.append(
            f"note: images of {about['clean']} look alike even upside down: copies that are cropped or much changed "
            "stay below so high a threshold; raise --alarms and look at the pairs"
        )
    if about["alarms"] * about["clean_images"] < 1:
        doubts.append(
            f"note: {about['clean_images']:,} images are too few to measure {about['alarms']:.2%} of false alarms on; "
            "look at the pairs"
        )
    return [
        *doubts,
        f"{about['target']}: {audit.images:,} of {about['checked']:,} images are in one of these sets or a copy",
        f"threshold: correlation of detail above {about['threshold']:.3f}, which {about['clean_above']:.2%} of "
        f"{about['clean_images']:,} images of {about['clean']} exceed when they are turned upside down",
        f"nearest neighbours of {about['clean']}, quantiles: upside down {down}; as they are {upright}",
        f"{about['id_copies']:.2%} of {about['clean']} exceed it as they are: near duplicates within the ID set itself",
        f"{about['seconds']:,.0f} s; {pace / 60:,.0f} minutes for 1,000,000 images on this machine",
    ]


def main() -> None:
    """Audit, show, and exclude if asked to."""
    import tyro

    config = tyro.cli(AuditConfig, prog="python -m pipelines.audit", description=__doc__)
    import pyarrow.compute as pc

    from miner.errors import MinerError
    from miner.progress import Display
    from miner.weights import load_weights

    with Display() as display:
        audit, out, of_run = run(config, display)
    show(audit)
    print(out / "audit.html")
    if config.exclude and of_run is not None and audit.images:
        from pipelines.exclude import closing, exclude_and_report, of_audit

        print(closing(exclude_and_report(of_run, of_audit(audit.table))))
    left = audit.images
    if of_run is not None:
        table = load_weights(of_run)
        found = pc.is_in(table["uid"], pc.unique(audit.table["uid"]))
        left = pc.sum(pc.and_(found, pc.is_null(table["excluded_by"]))).as_py() or 0
        print(f"{left:,} of the images found are still eligible in {of_run}")
    if left and config.fail:
        mend = "run again with --exclude" if of_run is not None else "take them out of the pool"
        raise MinerError(f"{audit.about['target']}: {left:,} images are known ones or copies of them; {mend}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.run(main)
