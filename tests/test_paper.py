"""The paper-scale experiment: its commands, as each command itself understands them, what is skipped, its table."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro

from benchmarks.paper import __main__ as paper
from benchmarks.paper.steps import OOD, Paper, Step, steps
from benchmarks.paper.table import table
from miner import inputs
from miner.build import write_arrays_pool
from miner.config import Config
from miner.errors import MinerError, UsageError
from pipelines import shard, train
from pipelines.evaluate import EvaluateConfig
from trainers.config import TrainConfig

THETA = "O/theta0/cifar10-wrn-40-4-s3"
COMMON = f"--id D/cifar10 --model wrn-40-4 --seed 3 --checkpoint {THETA}/checkpoint.safetensors"
PLAIN = "--exclude-near-id 0 --strata 0 --views 1 --smooth 0"
OF_PAPER = f"--batch 128 --alpha 0.5 --lr 0.001 --draw eq20 {PLAIN}"
SETS = "--ood D/textures D/lsun D/svhn D/places365 --noise gaussian uniform --scores msp --repeats 5"
MINED = {
    "random": f"--rule uniform --rounds 1 --draw random {PLAIN}",
    "reference": f"--rule reference --rounds 50 --steps 390 {OF_PAPER}",
    "paper": f"--rule paper --rounds 50 --steps 390 --eta 1 {OF_PAPER}",
    "mined": "",
}


@pytest.fixture
def config(tmp_path: Path) -> Paper:
    """One ID set and model of the whole experiment, over folders that are there, but empty."""
    for name in ("D/cifar10", "D/cifar100", *(f"D/{name}" for name in OOD), "I"):
        (tmp_path / name).mkdir(parents=True)
    one = Paper(data=tmp_path / "D", ilsvrc=tmp_path / "I", out=tmp_path / "O", seeds=(3,))
    return replace(one, ids=("cifar10",), models=("wrn-40-4",))


def parsed(words: Sequence[str]) -> object:
    """The settings that a command makes of its flags; its own parser exits when one is wrong."""
    module, *flags = words
    if module == "pipelines.train":
        return tyro.cli(TrainConfig, args=flags, default=train.defaults(flags))
    kinds = {"pipelines.shard": shard.Config, "pipelines.resample": Config, "pipelines.evaluate": EvaluateConfig}
    return tyro.cli(kinds[module], args=flags)


def tuned(selector: str, images: str) -> list[str]:
    run = f"O/tuned/cifar10-wrn-40-4-{selector}-s3"
    return [
        f"pipelines.train --preset oe-resample {COMMON} --outliers {images} --out {run}",
        f"pipelines.evaluate {run} {SETS}",
    ]


def test_the_dry_run_prints_these_commands(config, tmp_path, capsys):
    paper.show(config, steps(config))
    wanted = [
        "pipelines.shard --source folder --input I --name ilsvrc --out O/pool",
        f"pipelines.train --preset msp-resample --id D/cifar10 --model wrn-40-4 --seed 3 --out {THETA}",
        f"pipelines.evaluate {THETA} {SETS}",
        *tuned("full", "O/pool"),
    ]
    for selector, flags in MINED.items():
        run = f"O/mined/cifar10-wrn-40-4-{selector}-s3"
        wanted.append(f"pipelines.resample --pool O/pool {COMMON} --gamma 0.1 0.01 --out {run} {flags}".strip())
        for gamma in ("0.1", "0.01"):
            wanted += tuned(f"{selector}-g{gamma}", f"{run}/subset-{gamma}")
    text = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith("#")] == [f"python -m {command}" for command in wanted]
    assert "# train-cifar10-wrn-40-4-s3-msp-resample: about 15.0 M forward passes" in lines  # 3 * 100 * 49,920
    assert "# mine-cifar10-wrn-40-4-reference-s3: about 15.0 M forward passes" in lines  # 6 * 50 * 49,920
    assert "# mine-cifar10-wrn-40-4-paper-s3: about 78.7 M forward passes" in lines  # 50 sweeps, 49 trainings
    assert not (tmp_path / "O").exists()


def test_every_command_understands_its_flags(config):
    found = {step.name: parsed(step.words) for step in steps(config)}
    assert found["pool"].name == "ilsvrc"
    start, end = (found[f"train-cifar10-wrn-40-4-{name}"] for name in ("s3-msp-resample", "full-s3-oe-resample"))
    for kind, method, epochs, milestones, lr in (
        (start, "ce", 100, (30, 60, 90), 0.1),
        (end, "oe", 50, (30,), 0.001),
    ):
        recipe = kind.recipe
        assert (kind.method, recipe.epochs, recipe.milestones, recipe.lr) == (method, epochs, milestones, lr)
        assert (recipe.batch, recipe.batch_outliers, recipe.weight_decay, recipe.nesterov) == (128, 128, 5e-4, False)
    assert end.recipe.objective.expose == 0.5
    assert end.checkpoint == str(start.run_dir / "checkpoint.safetensors")
    for selector in MINED:
        mining = found[f"mine-cifar10-wrn-40-4-{selector}-s3"]
        inputs.check(mining)
        assert mining.data.checkpoint == end.checkpoint
        assert mining.selection.gamma == (0.1, 0.01)
        assert mining.draw == {"random": "random", "mined": "rank"}.get(selector, "eq20")
        assert mining.guarded == (selector == "mined")
        assert selector == "mined" or (mining.game.views, mining.game.smooth) == (1, 0)
    game = found["mine-cifar10-wrn-40-4-reference-s3"].game
    assert (game.rule, game.rounds * game.steps, game.lr, game.alpha) == ("reference", 50 * 390, 0.001, 0.5)
    judged = found["evaluate-cifar10-wrn-40-4-s3"]
    assert (judged.repeats, judged.scores, judged.noise) == (5, ("msp",), ("gaussian", "uniform"))


def test_the_whole_experiment_and_the_small_one(config):
    everything = steps(replace(config, ids=(), models=()))
    assert len(everything) == 1 + 4 * (2 + 2 + 4 * (1 + 2 * 2))
    assert len({step.name for step in everything}) == len({step.leaves for step in everything}) == len(everything)
    small = steps(Paper(data=config.data, ilsvrc=config.ilsvrc, out=config.out, scale="small"))
    settings = [parsed(step.words) for step in small]
    recipes = [one.recipe for one in settings if isinstance(one, TrainConfig)]
    assert [(r.epochs, r.milestones) for r in recipes] == [(10, (3, 6, 9)), *[(5, (3,))] * 5]
    assert [one.game.rounds for one in settings if isinstance(one, Config)][:3] == [1, 5, 5]
    assert small[0] == everything[0]


def test_what_is_done_is_skipped_and_never_mixed_up(config, tmp_path, capfd):
    (tmp_path / "in.json").write_text("[1]")
    step = Step(
        "some", ("json.tool", f"{tmp_path}/in.json", f"{tmp_path}/out.json"), (tmp_path / "out.json",), 2_000_000
    )
    paper.run(config, step)
    assert capfd.readouterr().out == f"{paper.command(step)}\n"
    assert not paper.done(config, replace(step, leaves=(*step.leaves, tmp_path / "more")))  # half done: it goes on
    (tmp_path / "out.json").write_text("kept")
    paper.run(config, step)
    assert capfd.readouterr().out == "# some: done\n"
    assert (tmp_path / "out.json").read_text() == "kept"
    paper.show(config, [step, replace(step, name="other")])
    out = capfd.readouterr().out
    assert "# some: done\n" in out
    assert "# other: about 2.0 M forward passes\n" in out
    assert "# to do: about 2.0 M" in out
    with pytest.raises(UsageError, match=r"done/some\.txt: another command made it; choose another --out"):
        paper.run(config, replace(step, words=("json.tool",)))
    failing = replace(step, name="failing", words=("json.tool", "--wrong"))
    with pytest.raises(MinerError, match="failing: ended with exit code 2; run the same command again to go on"):
        paper.run(config, failing)
    assert not paper.done(config, failing)


def test_a_given_pool_is_mined_as_it_is(config, tmp_path):
    write_arrays_pool(str(tmp_path / "pool"), "two", np.zeros((2, 8, 8, 3), np.uint8), None, [], shard_count=1)
    found = {step.name: step for step in steps(replace(config, ilsvrc=None, pool=str(tmp_path / "pool")))}
    assert "pool" not in found
    random = found["mine-cifar10-wrn-40-4-random-s3"]
    assert (parsed(random.words).data.pool, random.forwards) == (str(tmp_path / "pool"), 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ilsvrc": None}, "--ilsvrc, --pool: give one of them"),
        ({"pool": "p"}, "--ilsvrc, --pool: give one of them"),
        ({"ilsvrc": Path("nowhere")}, "--ilsvrc nowhere: no such folder"),
        ({"ood": ("imagenet",)}, r"D/imagenet: missing, and torchvision has no imagenet; .* --ood"),
        ({"ilsvrc": None, "pool": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_at_once(config, changed, said):
    with pytest.raises(UsageError, match=said):
        steps(replace(config, **changed))


def test_sets_without_a_folder_come_from_torchvision(config, tmp_path, monkeypatch):
    monkeypatch.setenv("OUTLIER_DATASETS", str(tmp_path))
    with pytest.raises(UsageError, match="has no lsun"):
        steps(replace(config, data=tmp_path))
    (tmp_path / "lsun").mkdir()
    judged = parsed(steps(replace(config, data=Path("none")))[2].words)
    assert judged.ood == ("dtd", "lsun", "svhn", "places365")


def test_the_table_is_the_mean_over_sets_beside_the_papers(config):
    config = replace(config, selectors=("none", "reference"), gammas=(0.1,), seeds=(0, 1))
    sets = [("far", "textures", 0.2), ("noise", "gaussian", 0.4), ("far", "mean", 0.9)]
    metrics = ("auroc", "aupr_ood", "fpr95_ood_detected", "auroc_std")
    names = ("score", "group", "set", "protocol", "metric", "value")
    for name in ("theta0/cifar10-wrn-40-4-s{}", "tuned/cifar10-wrn-40-4-reference-g0.1-s{}"):
        for seed in config.seeds:
            told = {"1:5": 0.1 * seed, "full": 0.5}
            rows = [("msp", g, s, p, m, v + more) for g, s, v in sets for p, more in told.items() for m in metrics]
            run = config.out / name.format(seed)
            run.mkdir(parents=True)
            pq.write_table(
                pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), run / "results.parquet"
            )
    lines = table(config).splitlines()
    mean = "35.00 ± 7.07"
    assert lines[2] == f"| cifar10 | wrn-40-4 | none | 0 | {mean} | {mean} | {mean} | 31.45 / 90.72 / 62.77 |"
    assert lines[3] == f"| cifar10 | wrn-40-4 | reference | 0.1 | {mean} | {mean} | {mean} | 1.94 / 99.37 / 94.16 |"
    assert len(lines) == 4
    assert lines[1].count("|") == lines[0].count("|")
    assert "31.45" not in table(replace(config, scale="small"))
