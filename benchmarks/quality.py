"""How much work does a good ranking take, and which shortcuts keep it?

python -m benchmarks.quality --pool POOL --id DATA/cifar10 --checkpoint NET.safetensors --out runs/quality
python -m benchmarks.quality --pool POOL --id DATA/cifar10 --ood DATA/textures DATA/scene15 --out runs/quality

Work is counted in forwards of one image; a training step's image, forward and backward, counts three. The first command
prints how many it takes until the weights of each rule agree with those of a run that has converged, beside what the
released recipe costs (50 passes over the ID set, an outlier beside each image, and two backward passes: ten forwards an
ID image). The second compares ways of doing less with the default, down to the detector, by ``pipelines.compare``.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from benchmarks.speed.timing import machine, table
from miner.config import Config, Data
from miner.files import read_json
from miner.guard import NO_CLASS, class_means, class_sums
from miner.ranking import spearman
from miner.run_dir import RunDir
from miner.weights import load_weights
from pipelines import cli
from pipelines.compare_config import Compare
from pipelines.compare_selectors import MINED, mining_config, slug

GOAL = 0.95
RELEASED_PASSES, RELEASED_FORWARDS = 50, 10  # over ID; an ID image and its outlier: 2 forwards and 2 x 2 backwards
PARTS = ("restore", "game", "rank", "export")  # of a run's seconds: what mining takes, once Ray and pixels are there
SIDE = 32  # px
SHIFTS = range(-2, 3)  # px, either way: with mirroring 50 views
WAYS = (MINED, "mined:views=1", "mined:views=2", "mined:views=3", "mined:rounds=5", "mined:rounds=5,converged=0.999")
RULES = ("mined:views=1", "hedge", "paper", "equilibrium", "reference")


@dataclass(frozen=True)
class Quality:
    """What is measured."""

    pool: str
    """Background pool."""
    id: str
    """ID set."""
    checkpoint: Path | None = None
    """Classifier of the first table. Without one only the second is made."""
    rules: tuple[str, ...] = RULES
    """Rules of the first table, as selectors of pipelines.compare."""
    rounds: int = 12
    """Rounds after which a run counts as converged. Those of `reference` are the released recipe, cut in so many."""
    sample: int = 3000
    """Images of the pool that views are compared on, and that `reference` is played on, which would take days
    otherwise: each is drawn as often as the released recipe would draw it from the whole pool, and the work is counted
    as if it were the whole pool."""
    draws: tuple[int, ...] = (0, 1)
    """Seeds of the runs of each rule; all start from --checkpoint."""
    ood: tuple[str, ...] = ()
    """Natural OOD sets that judge the second table's detectors. Without them only the first is made."""
    ways: tuple[str, ...] = WAYS
    """Ways of mining, as selectors of pipelines.compare; the first is what the others are compared with."""
    model: str = "small"
    """Classifier."""
    seeds: tuple[int, ...] = (0, 1)
    """Repetitions of the second table: classifier, mining and fine-tuning."""
    images: int = 200_000
    """Images forwarded and back in each fine-tuning."""
    gamma: float = 0.1
    """Share of the pool that a subset keeps."""
    out: Path = Path("runs/quality")
    """Where everything goes."""


class Course(NamedTuple):
    """A run, round by round: all that it had cost by then, and its weights, NaN where excluded."""

    forwards: np.ndarray  # int64 [R]
    seconds: np.ndarray  # float64 [R]
    weights: np.ndarray  # float32 [R, N]


# --- until the weights have converged ------------------------------------------------------------------------------


def course(config: Quality, selector: str, draw: int) -> Course:
    """The run of a rule with one seed, played now if it was not before."""
    from miner.mining import Mining
    from miner.progress import Display

    class Watched(Mining):
        """A mining that keeps the weights of every round."""

        def play(self, game: Any, first: int) -> None:
            def on_round(record: dict[str, Any]) -> None:
                parts = self.crew.each("ranking_columns")
                weight, keep = (np.concatenate([part[name] for part in parts]) for name in ("weight", "eligible"))
                found.append((record, np.where(keep, weight, np.nan).astype(np.float32)))

            game.play(first, on_round)

    path = config.out / f"{slug(selector)}-{draw}"
    kept = path.with_suffix(".npz")
    if kept.exists():
        return Course(**np.load(kept))
    shutil.rmtree(path, ignore_errors=True)  # a run that was cut off has forgotten its first rounds
    data = Data(config.pool, config.id, config.model, str(config.checkpoint), seed=draw)  # type: ignore[arg-type]
    asked, factor = mining_config(selector, data, (config.gamma,), path), 1.0
    asked = replace(asked, game=replace(asked.game, rounds=config.rounds))
    if asked.game.rule == "reference":
        asked, factor = released(config, asked)
    found: list[tuple[dict[str, Any], np.ndarray]] = []  # ``play`` fills it
    with Display() as display:
        Watched(asked, display).run_all()
    records = [record for record, _ in found]
    seconds = np.cumsum([record["seconds"] for record in records])
    work = (factor * forwards(records, asked, id_images(config))).astype(np.int64)
    made = Course(work, seconds, np.stack([weight for _, weight in found]))
    np.savez(kept, **made._asdict())
    return made


def released(config: Quality, asked: Config) -> tuple[Config, float]:
    """The released recipe on a sample of the pool, and its forwards on the whole of it for one on the sample."""
    from miner.build import write_arrays_pool
    from miner.pool import Pool, resolve

    pool, folder = Pool.open(resolve(config.pool)), config.out / "sample"
    if not (folder / "pool.json").exists():
        rows = np.sort(np.random.default_rng(0).permutation(pool.count)[: config.sample])
        folder.mkdir()
        write_arrays_pool(str(folder), "sample", pixels(pool)[rows], None, ())
    share = config.sample / pool.count
    steps = round(share * RELEASED_PASSES * (id_images(config) // asked.game.batch) / config.rounds)
    data, game = replace(asked.data, pool=str(folder)), replace(asked.game, steps=steps)
    return replace(asked, data=data, game=game), RELEASED_FORWARDS / 6 / share


def forwards(records: list[dict[str, Any]], config: Config, id_images: int) -> np.ndarray:
    """Forwards that a run had taken when it updated the weights in each round, int64 ``[R]``; the guard's, too."""
    game = config.game
    scored = np.array([record.get("scored", 0) * game.views for record in records])
    trained = np.array([record.get("train_steps", 0) * 6 * game.batch for record in records])
    before = trained if game.rule == "reference" else np.append(0, trained[:-1])  # training follows an update
    return np.cumsum(scored + before) + (id_images if config.selection.exclude_near_id else 0)


def id_images(config: Quality) -> int:
    """Number of ID training images."""
    from trainers.data import load_id

    return len(load_id(config.id).train_labels)


def agreements(run: Course, end: np.ndarray) -> np.ndarray:
    """Spearman's rho of the weights after each round with ``end`` float32 ``[N]``, over what neither excludes."""
    return np.array([rho(weight, end) for weight in run.weights])


def rho(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho of two columns, over what neither excludes (NaN)."""
    keep = ~np.isnan(one) & ~np.isnan(other)
    return spearman(one[keep], other[keep])


def reached(run: Course, rhos: np.ndarray) -> tuple[object, ...]:
    """Rounds, forwards and seconds until GOAL is reached for good, or that it is not and how near it comes."""
    late = np.flatnonzero(~(rhos >= GOAL))
    first = late[-1] + 1 if len(late) else 0
    if first == len(rhos):
        return f"never ({np.nanmax(rhos):.2f} after {np.nanargmax(rhos) + 1})", int(run.forwards[-1]), "–"
    return int(first + 1), int(run.forwards[first]), float(run.seconds[first])


def converging(config: Quality) -> None:
    """Print the first table."""
    recipe = RELEASED_PASSES * RELEASED_FORWARDS * (id_images(config) // 128 * 128)
    rows: list[tuple[object, ...]] = []
    for rule in config.rules:
        runs = [course(config, rule, draw) for draw in config.draws]
        for draw, end in zip(config.draws, runs, strict=True):
            rounds, work, seconds = reached(runs[0], agreements(runs[0], end.weights[-1]))
            rows.append((rule, f"seed {draw}", rounds, work, seconds, recipe / work))
    head = ("rule", "end of", "rounds", "forwards", "seconds", "released recipe, times as much")
    table(f"Spearman {GOAL} of the weights; the released recipe: {recipe:,} forwards", head, rows)


def views_alone(config: Quality) -> None:
    """Print how well the losses of one to six views, at theta_0, agree with those of 44 other views: on a sample."""
    from miner.pool import Pool, resolve
    from trainers.actor import Trainer
    from trainers.checkpoint import load_net
    from trainers.data import load_id

    id_set, game = load_id(config.id), mining_config(MINED, Data(), (config.gamma,)).game
    trainer = Trainer(config.model, id_set, 0, game)
    trainer.net.load_state_dict(load_net(str(config.checkpoint), config.model, id_set.classes)[0].state_dict())
    spared = np.flatnonzero(~np.isnan(course(config, config.rules[0], config.draws[0]).weights[0]))
    spared = np.sort(np.random.default_rng(0).permutation(spared)[: config.sample])
    pool = Pool.open(resolve(config.pool))
    label = pc.fill_null(pool.index(["label"])["label"], NO_CLASS).to_numpy()[spared]
    images = pixels(pool)[spared]

    def losses(images: np.ndarray, views: int = 1) -> np.ndarray:
        trainer.views = views
        return np.asarray(trainer.score(np.ascontiguousarray(images), False)["loss"], np.float64)

    means = [losses(images, count) for count in range(1, game.views + 1)]
    wide = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    shifted = [wide[:, 2 + y : 2 + y + SIDE, 2 + x : 2 + x + SIDE] for x in SHIFTS for y in SHIFTS]
    total = sum(losses(view) + losses(view[:, :, ::-1]) for view in shifted)
    others = (total - game.views * means[-1]) / (2 * len(shifted) - game.views)
    rows = []
    for views, mean in enumerate(means, 1):
        figures = [spearman(smooth(mean, label, share), smooth(others, label, share)) for share in (game.smooth, 0.0)]
        rows.append((views, views * pool.count, *figures))
    table("One sweep at theta_0 against 44 other views", ("views", "forwards", "rho, smoothed", "rho, not"), rows)


def smooth(loss: np.ndarray, label: np.ndarray, share: float) -> np.ndarray:
    """Losses of which ``share`` is the class's mean, as a sweep smooths them."""
    known, smoothed = label != NO_CLASS, loss.copy()
    means = class_means([class_sums(loss, label)])
    smoothed[known] = (1 - share) * loss[known] + share * means[label[known]]
    return smoothed


def pixels(pool: Any) -> np.ndarray:
    """All images of a pool, uint8 ``[N, 32, 32, 3]``."""
    from miner import cache

    return np.concatenate([cache.open_shard(pool, shard, SIDE)[0] for shard in range(len(pool.shards))])


# --- less work -------------------------------------------------------------------------------------------------------


def less(config: Quality) -> None:
    """Print the second table."""
    from pipelines.compare_run import Comparison

    settings = Compare(
        pool=(config.pool,), id=(config.id,), ood=config.ood, selectors=config.ways, gamma=(config.gamma,),
        models=(config.model,), seeds=config.seeds, images=config.images, jobs=1, out=config.out / "compare",
    )  # fmt: skip
    comparison = Comparison(settings)
    comparison.run()
    comparison.complain()
    found = comparison.results.to_pylist()
    rows = []
    for way in config.ways:
        cells = [figures(config, comparison, found, way, seed) for seed in config.seeds]
        rows.append((way, *(spread(values) for values in zip(*cells, strict=True))))
    head = ("way", "forwards", "seconds", "Spearman", f"IoU at {config.gamma:g}", "AUROC over the first, points")
    table(f"Less work: shares of what {config.ways[0]} takes", head, rows)


def figures(config: Quality, comparison: Any, found: list[dict[str, Any]], way: str, seed: int) -> list[float]:
    """One way's figures beside those of the first way, with one seed."""

    def of(selector: str) -> tuple[Any, np.ndarray, float]:
        mine = next(m for m in comparison.matrix.mines if (m.selector, m.seed) == (selector, seed))
        wanted = {"selector": selector, "seed": seed, "group": "far", "set": "mean", "protocol": "full"}
        wanted |= {"metric": "auroc", "score": "msp"}
        value = next(row["value"] for row in found if wanted.items() <= row.items())
        run = comparison.out / mine.name
        parts = read_json(run / "summary.json")["seconds"]
        work = forwards(RunDir(run).metrics(), comparison.mining(mine), id_images(config))[-1]
        return load_weights(run), np.array([work, sum(parts[name] for name in PARTS)]), value

    (one, paid, value), (first, full, best) = of(way), of(config.ways[0])
    a, b = (t["rank"].fill_null(len(t)).to_numpy() < int(config.gamma * len(t)) for t in (one, first))
    weights = [np.where(t["excluded_by"].is_null().to_numpy(), t["weight"].to_numpy(), np.nan) for t in (one, first)]
    return [*(paid / full), rho(*weights), float((a & b).sum() / (a | b).sum()), 100 * (value - best)]


def spread(values: tuple[float, ...]) -> str:
    """Mean and, of several, half the range."""
    half = f" ± {np.ptp(values) / 2:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{half}"


def main() -> None:
    """Print the tables asked for."""
    import tyro

    config = tyro.cli(Quality, prog="python -m benchmarks.quality", description=__doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    if config.checkpoint:
        converging(config)
        views_alone(config)
    if config.ood:
        less(config)


if __name__ == "__main__":
    cli.run(main)
