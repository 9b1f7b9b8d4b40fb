"""The training loop and its job: every method learns, resumes to the last bit, and refuses what would fool its user."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, silent, start_and_kill
from safetensors.torch import save_file

from miner import demo
from miner.errors import MinerError, UsageError
from miner.run_dir import RunDir
from pipelines.train import defaults
from trainers import models, training
from trainers.checkpoint import load_checkpoint, load_net, open_checkpoint, save_checkpoint
from trainers.config import PretrainConfig, TrainConfig
from trainers.data import IdSet
from trainers.fit import Loop, World, fit, mean_energies, pretrain
from trainers.image_set import ImageSet
from trainers.recipes import METHODS, Objective, Recipe, default_recipe, preset
from trainers.stream import Stream
from trainers.train import predict, uniformity
from trainers.training import train


@pytest.fixture(scope="module")
def digits(digits) -> IdSet:
    return replace(digits, train_images=digits.train_images[:640], train_labels=digits.train_labels[:640])


@pytest.fixture(scope="module")
def background() -> ImageSet:
    return ImageSet("drawn", (demo.pool_arrays()[0][:2000],))


@pytest.fixture(scope="module")
def start(digits, tmp_path_factory) -> Path:
    """A classifier of the demo digits, six epochs old."""
    net = models.create("small", 10, seed=1)
    pretrain(net, digits, PretrainConfig(epochs=6, batch=64, lr=0.1), 0, CPU, silent)
    path = tmp_path_factory.mktemp("start") / "net.safetensors"
    save_checkpoint(path, net, {"model": "small", "classes": list(digits.classes)})
    return path


def tuned(method: str, digits: IdSet, background: ImageSet, start: Path, **changed) -> tuple[models.Net, list[dict]]:
    recipe = replace(default_recipe(method, scratch=False), epochs=3, batch=64, batch_outliers=64, lr=0.02, **changed)
    net, _ = load_net(start, "small", digits.classes, recipe.objective.reject)
    records: list[dict] = []
    others = background if recipe.objective.outliers else None
    fit(
        net,
        digits,
        others,
        recipe,
        0,
        CPU,
        silent,
        on_epoch=lambda epoch, state, record: records.append(record),
    )
    return net, records


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_its_loss_and_keeps_the_digits(method, digits, background, start):
    net, records = tuned(method, digits, background, start)
    assert records[-1]["loss"] < records[0]["loss"]
    terms = {name: value for name, value in records[-1].items() if name not in ("loss", "lr")}
    assert sum(terms.values()) == pytest.approx(records[-1]["loss"])
    guesses = predict(net, torch.from_numpy(digits.test_images))[:, :10].argmax(1).numpy()
    assert (guesses == digits.test_labels).mean() > 0.8


def test_oe_makes_unseen_outliers_uniform_and_openmix_rejects_them(digits, background, start):
    unseen = torch.from_numpy(demo.pool_arrays()[0][5000:5400])
    plain, _ = tuned("ce", digits, background, start)
    exposed, _ = tuned("oe", digits, background, start)
    assert uniformity(predict(exposed, unseen)).mean() < 0.5 * uniformity(predict(plain, unseen)).mean()
    first, _ = load_net(start, "small", digits.classes, reject=True)
    mixed, _ = tuned("openmix", digits, background, start)
    rejected = [predict(net, unseen).softmax(1)[:, -1].mean().item() for net in (first, mixed)]
    assert rejected[1] > rejected[0] + 0.3


def test_energies_move_to_their_sides_of_the_margins(digits, background, start):
    plain, _ = tuned("ce", digits, background, start)
    inside, outside = mean_energies(plain, digits, background, 0)
    bound, _ = tuned("energy", digits, background, start)
    now_inside, now_outside = mean_energies(bound, digits, background, 0)
    assert now_outside - now_inside > outside - inside
    assert now_outside > outside


def test_methods_of_one_seed_see_the_same_id_images(digits, background):
    rows = []
    for method in ("ce", "oe", "mixoe"):
        net = models.create("small", 10)
        recipe = Recipe(METHODS[method], epochs=1, batch=64, batch_outliers=64)
        loop = Loop(net, digits, background, recipe, 3, CPU, World())
        given = []
        loop.step = lambda e, s, r, g, given=given, step=loop.step: (given.append(r), step(e, s, r, g))[1]  # type: ignore[method-assign]
        generator = torch.Generator().manual_seed(3)
        loop.epoch(0, generator, _Silent())
        rows.append((torch.cat(given), generator.get_state()))
    for other, state in rows[1:]:
        assert torch.equal(rows[0][0], other)
        assert torch.equal(rows[0][1], state)


class _Silent:
    def add(self, step: int, images: int, loss: float) -> None:
        pass


# Streams of outliers


def stream(n: int, recipe: Recipe, seed: int = 0, per_epoch: int = 5) -> Stream:
    pixels = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 8, 8, 3))
    made = Stream(ImageSet("numbers", (np.ascontiguousarray(pixels),)), recipe, seed, per_epoch, 10)
    made.begin(0, models.create("small", 10))
    return made


def ids(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_shuffled_outliers_come_once_before_any_comes_twice():
    shuffled = stream(40, Recipe(METHODS["oe"], batch_outliers=16))
    drawn = [i for epoch in range(2) for step in range(5) for i in ids(shuffled.take(epoch, step))]
    for lap in range(4):
        assert sorted(drawn[lap * 40 : (lap + 1) * 40]) == list(range(40))
    assert drawn[:40] != drawn[40:80]
    again = stream(40, Recipe(METHODS["oe"], batch_outliers=16))
    again.begin(1, models.create("small", 10))
    assert ids(again.take(1, 2)) == drawn[7 * 16 : 8 * 16]  # any step at once, without those before it
    assert shuffled.seen.all()


def test_fewer_outliers_than_a_batch_repeat_within_it():
    few = ids(stream(3, Recipe(METHODS["oe"], batch_outliers=6)).take(0, 0))
    assert sorted(few) == [0, 0, 1, 1, 2, 2]


def test_orders_and_budget():
    window = stream(40, Recipe(METHODS["oe"], batch_outliers=16, outlier_order="window"))
    first, second = ids(window.take(0, 0)), ids(window.take(0, 1))
    assert second == [(first[-1] + 1 + i) % 40 for i in range(16)]
    assert ids(window.take(1, 0)) != first
    sequential = stream(40, Recipe(METHODS["oe"], batch_outliers=16, outlier_order="sequential"))
    assert ids(sequential.take(0, 0)) == ids(sequential.take(3, 0)) == list(range(16))
    budget = stream(40, Recipe(METHODS["oe"], batch_outliers=16, outlier_budget=8))
    assert len({i for step in range(5) for i in ids(budget.take(0, step))}) == 8
    assert int(budget.seen.sum()) == 8


def test_hard_mining_takes_the_most_confident(digits, background, start):
    net, _ = load_net(start, "small", digits.classes)
    recipe = Recipe(METHODS["oe-m"], batch=8, batch_outliers=16, hard_from=1000)
    mined = Stream(background, recipe, 0, 5, 10)
    mined.begin(0, net)
    assert mined.hard is not None
    assert len(mined.hard) == 80
    msp = predict(net, torch.from_numpy(background.take(np.arange(len(background))))).softmax(1).amax(1)
    assert msp[mined.hard].min() > msp.median()
    before = set(mined.hard.tolist())
    mined.begin(1, net)
    assert before != set(mined.hard.tolist())


# The job: run directories, resume, refusals


@pytest.fixture(scope="module", autouse=True)
def drawn(background, tmp_path_factory) -> Path:
    """Outliers as the literature hands them around: one uint8 array."""
    path = tmp_path_factory.mktemp("outliers") / "300K_random_images.npy"
    np.save(path, background.take(np.arange(len(background))))
    job.outliers = str(path)  # type: ignore[attr-defined]
    return path


def job(out: Path, start: Path | None = None, **changed) -> TrainConfig:
    recipe = replace(default_recipe("oe", scratch=False), epochs=4, batch=64, batch_outliers=64)
    config = TrainConfig(outliers=job.outliers, checkpoint=start, threads=1, out=out, recipe=recipe)
    return replace(config, **changed)


def test_a_run_leaves_all_that_is_needed_to_use_it(tmp_path):
    summary = train(job(tmp_path / "run", long_tail=0.5))
    net, meta = open_checkpoint(tmp_path / "run")
    assert torch.equal(load_net(tmp_path / "run", "small", meta["classes"])[0].head.weight, net.head.weight)
    assert not net.training
    assert meta["method"] == "oe"
    assert meta["outliers"]["fingerprint"]
    assert meta["outliers"]["count"] == 2000
    assert meta["recipe"]["objective"]["expose"] == 0.5
    assert meta["recipe"]["forward_mode"] == "joint"
    assert meta["long_tail"] == 0.5
    assert meta["accuracy"] == summary["accuracy"] > 0.6
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outliers_seen"] == summary["outliers_seen"] > 0
    assert summary["mirrored"] is False
    assert (tmp_path / "run" / "outliers.parquet").exists()
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert summary["seconds"] == pytest.approx(sum(line["seconds"] for line in lines), abs=1e-3)


def test_killed_and_resumed_is_the_same_to_the_last_digit(tmp_path):
    whole = train(job(tmp_path / "whole"))
    command = [sys.executable, "-m", "pipelines.train", "--outliers", job.outliers, "--threads", "1", "--epochs", "4"]
    command += [
        "--batch",
        "64",
        "--batch-outliers",
        "64",
        "--lr",
        "0.05",
        "--warmup",
        "0",
        "--out",
        str(tmp_path / "cut"),
    ]
    mark = tmp_path / "cut" / "epochs" / "000001" / "COMMITTED"
    start_and_kill(command, Path(__file__).parent.parent, tmp_path / "log", mark.exists, 600)
    assert not (tmp_path / "cut" / "summary.json").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stderr
    found = json.loads((tmp_path / "cut" / "summary.json").read_text())
    skipped = ("seconds",)
    for name in whole.keys() - set(skipped):
        assert found[name] == whole[name], name
    states = [load_checkpoint(tmp_path / run / "checkpoint.safetensors")[0] for run in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_finished_run_and_other_settings(tmp_path, capfd):
    first = train(job(tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = train(job(tmp_path / "run"))
    assert {name: again[name] for name in first} == json.loads(json.dumps(first))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    record = tmp_path / "run" / "outliers.parquet"
    record.write_bytes(before[record][:100])  # pipelines.evaluate says: train again
    train(job(tmp_path / "run"))
    assert record.read_bytes() == before[record]
    with open(tmp_path / "run" / "epochs" / "000003" / "state.safetensors", "ab") as state:
        state.write(b"x")
    repaired = train(job(tmp_path / "run"))
    said = capfd.readouterr().err
    assert "state.safetensors: changed since it was committed; going back behind epoch 4" in said
    assert "going on after epoch 3" in said
    assert (repaired["loss"], repaired["accuracy"]) == (first["loss"], first["accuracy"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert repaired["seconds"] == pytest.approx(sum(line["seconds"] for line in lines), abs=1e-3)
    with pytest.raises(MinerError, match=r"run: holds a run with other settings \(seed: 0 there, 1 now\)"):
        train(job(tmp_path / "run", seed=1))
    with pytest.raises(MinerError, match="no run to resume"):
        train(job(tmp_path / "none", resume=True))


def test_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ORPHANED", 0.3)
    with RunDir(tmp_path / "run").locked(), pytest.raises(MinerError, match="run: another process is at work here"):
        train(job(tmp_path / "run"))


def test_outliers_among_the_test_images_are_refused(tmp_path, digits, capfd):
    np.save(tmp_path / "leak.npy", np.concatenate([demo.pool_arrays()[0][:500], digits.test_images[:3]]))
    config = job(tmp_path / "run", outliers=str(tmp_path / "leak.npy"))
    with pytest.raises(MinerError, match=r"3 of 503 .*ID test set.*--allow-overlap"):
        train(config)
    np.save(tmp_path / "leak.npy", np.concatenate([demo.pool_arrays()[0][:50], digits.train_images[5:7]]))
    with pytest.raises(MinerError, match=r"2 of 52 .*ID training set.*--allow-overlap"):
        train(config)
    ood = demo.held_out()["rings"]
    np.save(tmp_path / "ood.npy", ood)
    np.save(tmp_path / "leak.npy", np.concatenate([demo.pool_arrays()[0][:50], ood[:1]]))
    with pytest.raises(MinerError, match=r"1 of 51 .*OOD set.*--allow-overlap"):
        train(replace(config, ood=(str(tmp_path / "ood.npy"),)))
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "ood.npy", ood[1:50])  # of the same name, and innocent
    np.save(tmp_path / "few.npy", np.concatenate([demo.pool_arrays()[0][:299], digits.train_images[5:6]]))
    train(job(tmp_path / "few", outliers=str(tmp_path / "few.npy")))  # a pool that holds an ID image is no ID set
    assert "note: 1 of 300 outliers are ID training images" in capfd.readouterr().err
    both = (str(tmp_path / "ood.npy"), str(tmp_path / "other" / "ood.npy"))
    with pytest.raises(MinerError, match=r"1 of 51 .*OOD set"):
        train(replace(config, ood=both))
    summary = train(replace(config, ood=(str(tmp_path / "ood.npy"),), allow_overlap=True))
    assert summary["outliers_seen"] == 51
    said = capfd.readouterr().err
    assert "fewer than a batch of 64" in said


def test_a_run_of_another_command_is_left_alone(tmp_path):
    RunDir(tmp_path / "mined").begin({"seed": 0}, resume=False)
    (tmp_path / "mined" / "classifier.safetensors").write_bytes(b"precious")
    before = (tmp_path / "mined" / "config.json").read_bytes()
    with pytest.raises(MinerError, match=r"config.json: belongs to another command; choose another --out"):
        train(job(tmp_path / "mined"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(MinerError, match=r"config.json: damaged"):
        train(job(tmp_path / "torn"))
    assert (tmp_path / "mined" / "config.json").read_bytes() == before
    assert (tmp_path / "mined" / "classifier.safetensors").read_bytes() == b"precious"


def test_wrong_checkpoints_and_missing_outliers(tmp_path, start):
    torch.save({}, tmp_path / "net.pt")
    with pytest.raises(MinerError, match="a pickle"):
        train(job(tmp_path / "run", start=tmp_path / "net.pt"))
    save_checkpoint(tmp_path / "three", models.create("small", 3), {"model": "small", "classes": ["a", "b", "c"]})
    with pytest.raises(MinerError, match="made for 3 classes, the ID set has 10"):
        train(job(tmp_path / "run", start=tmp_path / "three"))
    save_file(models.create("small", 100).state_dict(), tmp_path / "hundred.safetensors")  # and says nothing else
    openmix = replace(default_recipe("openmix", False), epochs=1)
    with pytest.raises(MinerError, match="has 100 outputs, the ID set 10 classes"):
        train(job(tmp_path / "run", start=tmp_path / "hundred.safetensors", method="openmix", recipe=openmix))
    with pytest.raises(UsageError, match="name some with --outliers"):
        train(job(tmp_path / "run", id=str(tmp_path), outliers=None))
    with pytest.raises(UsageError, match="name one"):
        train(job(tmp_path / "run", outliers="demo"))


def test_a_loss_that_is_not_finite_is_one_line(digits, background):
    net = models.create("small", 10)
    recipe = Recipe(Objective(expose=0.5), epochs=2, batch=64, batch_outliers=64, lr=1e30)
    with pytest.raises(MinerError, match=r"training, epoch 1, step \d: the loss is not finite \(ce .*expose .*--lr\)"):
        fit(net, digits, background, recipe, 0, CPU, silent)


def test_sizes_and_workers_that_do_not_fit(digits, background):
    net = models.create("small", 10)
    small = ImageSet("small", (np.zeros((5, 16, 16, 3), np.uint8),))
    with pytest.raises(MinerError, match=r"outliers are \[16, 16, 3\], ID images \[32, 32, 3\]"):
        fit(net, digits, small, default_recipe("oe", False), 0, CPU, silent)
    with pytest.raises(MinerError, match="needs outliers, and there are none"):
        fit(net, digits, None, default_recipe("oe", False), 0, CPU, silent)
    with pytest.raises(UsageError, match="workers 3: must divide batch 128"):
        fit(net, digits, background, default_recipe("oe", False), 0, CPU, silent, world=World(0, 3))


def test_the_schedule_reaches_its_ends(digits, background):
    net = models.create("small", 10)
    seen: dict[str, list[float]] = {}
    for name, recipe in {
        "cosine": Recipe(METHODS["ce"], epochs=2, batch=64, lr=0.1, lr_min=1e-6, warmup=0.2),
        "steps": Recipe(METHODS["ce"], epochs=3, batch=64, lr=0.1, milestones=(1, 2)),
    }.items():
        loop = Loop(net, digits, None, recipe, 0, CPU, World())
        seen[name] = []
        for number in range(loop.per_epoch * recipe.epochs):
            loop._set_lr(number // loop.per_epoch, number)
            seen[name].append(loop.optimizer.param_groups[0]["lr"])
    assert seen["cosine"][3] == pytest.approx(0.1)
    assert seen["cosine"][-1] == pytest.approx(1e-6)
    assert seen["cosine"][0] == pytest.approx(0.025)
    assert [seen["steps"][i] for i in (0, 10, 20)] == pytest.approx([0.1, 0.01, 0.001])


def test_flags_start_from_the_method_or_the_preset():
    tuned, scratch = (defaults(["--method", "openmix", *more]) for more in (["--checkpoint", "net.safetensors"], []))
    assert tuned.recipe == default_recipe("openmix", scratch=False)
    assert scratch.recipe == default_recipe("openmix", scratch=True) != tuned.recipe
    paper = defaults(["--preset=oe-cifar-tune", "--seed", "3"])
    assert (paper.method, paper.recipe) == ("oe", preset("oe-cifar-tune")[1])
    assert paper.run_dir == Path("runs/oe-cifar-tune-demo-s0")
    with pytest.raises(UsageError, match="is a recipe of --method openmix, not oe"):
        defaults(["--preset", "openmix-cifar", "--method", "oe"])
    assert defaults(["--method", "typo"]).method == "oe"  # and tyro refuses the word
