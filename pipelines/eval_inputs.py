"""What an evaluation starts from: flags that make sense, sound checkpoints, their sets, and no image seen before."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from miner.errors import MinerError, UsageError
from pipelines.judge import corrupted_labels, corruptions, open_id
from trainers.abnormality import Abnormality, load_abnormality
from trainers.checkpoint import RUN_FILES, open_checkpoint
from trainers.data import IdSet
from trainers.image_set import ImageSet
from trainers.models import Net
from trainers.noise import NOISE
from trainers.overlap import refuse_overlap
from trainers.read import npy_images
from trainers.scores import NAMES
from trainers.sets import open_images

if TYPE_CHECKING:
    from pipelines.evaluate import EvaluateConfig

HELD_OUT = "held-out"
Groups = list[tuple[str, ImageSet]]
Cache = dict[tuple[Any, ...], Any]


@dataclass(frozen=True)
class Job:
    """One checkpoint and what it is to be judged on: (group, set) pairs at ``size`` px, names of scores."""

    name: str
    path: Path
    net: Net
    meta: dict[str, Any]
    size: int
    id_set: IdSet
    sets: Groups
    scores: tuple[str, ...]
    module: Abnormality | None

    @property
    def images(self) -> int:
        """How many there are to score."""
        return len(self.id_set.test_images) + sum(len(images) for _, images in self.sets)


def check(config: "EvaluateConfig") -> tuple[str, ...]:
    """The scores to compute; UsageError for values that make no sense, before anything is read."""
    if not config.checkpoints:
        raise UsageError("no checkpoint given; name a run directory or a .safetensors file")
    for flag, values, known in (("--scores", config.scores, NAMES), ("--noise", config.noise, NOISE)):
        for value in values:
            if value not in known:
                raise UsageError(f"{flag} {value}: unknown; choose from {', '.join(known)}")
    numbers = {"--repeats": (config.repeats, 1), "--seed": (config.seed, 0), "--size": (config.size, 8)}
    for flag, (number, least) in numbers.items():
        if number is not None and number < least:
            raise UsageError(f"{flag} {number}: must be at least {least}")
    scores = tuple(dict.fromkeys((*config.scores, *(("abnormality",) if config.abnormality else ()))))
    if not scores:
        raise UsageError("--scores: give one or more")
    if "abnormality" in scores and config.abnormality is None:
        raise UsageError("score abnormality: pass --abnormality FILE, a module trained on the checkpoint")
    if config.abnormality and len(set(config.checkpoints)) > 1:
        raise UsageError("--abnormality: a module belongs to one checkpoint; evaluate that one alone")
    return scores


def prepare(config: "EvaluateConfig", say: Callable[[str], None]) -> list[Job]:
    """Open and check everything, so that nothing fails after hours of scoring.

    Raises UsageError for flags that make no sense, MinerError for checkpoints, sets and modules that cannot be used
    and for test images that a checkpoint was trained with; ``say`` hears what is merely worth knowing.
    """
    scores = check(config)
    paths = list(dict.fromkeys(config.checkpoints))
    opened = [open_checkpoint(path) for path in paths]
    results_folder(config)
    specs = [_id_spec(path, meta, config.id) for path, (_, meta) in zip(paths, opened, strict=True)]
    if len(set(specs)) > 1:
        raise UsageError(f"the checkpoints are for different ID sets ({', '.join(dict.fromkeys(specs))}); pass --id")
    if "reject" in scores and not any(meta.get("reject") for _, meta in opened):
        raise UsageError("score reject: no checkpoint here has a reject class; train one with openmix or background")
    if config.corrupted:
        corrupted_images(config.corrupted)
    cache: Cache = {}
    jobs = []
    for path, name, (net, meta) in zip(paths, _names(paths), opened, strict=True):
        if config.corrupted:
            corrupted_labels(config.corrupted, meta)
        size = config.size or int(meta.get("size") or 32)
        id_set, rest = _id_set(path, meta, specs[0], size, cache)
        sets = _sets(config, specs[0], size, rest, cache)
        inside = ImageSet(id_set.name, (id_set.test_images,))
        refuse_seen(path if path.is_dir() else path.parent, [("id", inside), *sets], config.allow_overlap, say)
        if list(meta["classes"]) != list(id_set.classes):
            say(f"{path}: its classes have other names than those of {id_set.name}; taken to be in the same order")
        own = tuple(score for score in scores if score != "reject" or meta.get("reject"))
        module = load_abnormality(config.abnormality, net) if config.abnormality else None
        jobs.append(Job(name, path, net, meta, size, id_set, sets, own, module))
    return jobs


def results_folder(config: "EvaluateConfig") -> Path:
    """Where the results go; made here, and MinerError when nothing can be written there."""
    first = config.checkpoints[0]
    folder = config.out or (first if first.is_dir() else first.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MinerError(f"{folder}: results cannot be written ({error.strerror}); choose another --out") from None
    return folder


def corrupted_images(folder: Path) -> int:
    """How many images a folder of corruptions holds. MinerError as ``pipelines.judge.corruptions``."""
    return sum(len(npy_images(path)) for path in corruptions(folder))


def refuse_seen(run: Path, sets: Groups, allow: bool, say: Callable[[str], None]) -> None:
    """MinerError when test images were among the training outliers of ``run`` (its outliers.parquet, if it has one).

    With ``allow``, ``say`` is told how many instead; also when they cannot be compared: the outliers' pixels were
    recorded at another size than that of ``sets``.
    """
    path = run / "outliers.parquet"
    if not path.exists():
        return
    try:
        table = pq.read_table(path, columns=["key", "pixels"])
        size = int(table.schema.metadata[b"size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MinerError(f"{path}: damaged ({str(error).splitlines()[0]}); train again") from None
    now = sets[0][1].size
    if size != now:
        say(f"{path}: made at {size} px; whether test images were among the outliers cannot be told at {now} px")
        return
    try:
        count = refuse_overlap(table, {f"{group} set {images.name}": images for group, images in sets}, allow)
    except MinerError as error:
        raise MinerError(f"{run} was trained with test images: {error}") from None
    if count:
        say(f"{run}: {count} of its {len(table)} training outliers are also test images")


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names of checkpoints: their run's, or their file's; whole paths where two would be alike."""
    runs = [
        path if path.is_dir() else path.parent if path.name in RUN_FILES else path.with_suffix("") for path in paths
    ]
    short = [run.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _id_spec(path: Path, meta: dict[str, Any], asked: str | None) -> str:
    spec = asked or meta.get("id")
    if not spec:
        raise MinerError(f"{path}: does not say which ID set it was trained on; pass --id")
    return str(spec)


def _id_set(path: Path, meta: dict[str, Any], spec: str, size: int, cache: Cache) -> tuple[IdSet, ImageSet | None]:
    key = ("id", size, len(meta["classes"]), tuple(meta.get("hold_out") or ()))
    if key not in cache:
        try:
            cache[key] = open_id(meta, spec, size)
        except MinerError as error:
            raise type(error)(f"{path}: {error}") from None
    found: tuple[IdSet, ImageSet | None] = cache[key]
    return found


def _sets(config: "EvaluateConfig", id_spec: str, size: int, rest: ImageSet | None, cache: Cache) -> Groups:
    """(group, set) of near, far and noise sets; two of one name in a group are numbered."""
    far = config.ood or (("demo",) if id_spec == "demo" else ())
    found: Groups = []
    for group, specs in (("near", config.near), ("far", far), ("noise", config.noise)):
        names: list[str] = []
        for images in (images for spec in dict.fromkeys(specs) for images in _open(spec, size, config, rest, cache)):
            names.append(images.name)
            again = names.count(images.name)
            found.append((group, images if again == 1 else replace(images, name=f"{images.name} ({again})")))
    return found


def _open(spec: str, size: int, config: "EvaluateConfig", rest: ImageSet | None, cache: Cache) -> list[ImageSet]:
    if spec == HELD_OUT:
        if rest is None:
            raise UsageError(f"{HELD_OUT}: a checkpoint left no class of its ID set out; train with --hold-out")
        return [rest]
    if (spec, size) not in cache:
        cache[spec, size] = open_images(spec, size, config.seed)
    found: list[ImageSet] = cache[spec, size]
    return found
