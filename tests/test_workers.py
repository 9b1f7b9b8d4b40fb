"""Several processes that train together: the loss of one process, its accuracy, and resume to the last bit."""

import json
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from miner.errors import MinerError, UsageError
from miner.rays import connect
from miner.run_dir import RunDir
from trainers.config import TrainConfig
from trainers.recipes import default_recipe
from trainers.training import train

EPOCHS = 6
# Ray Data, which Ray Train loads, warns of its own settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


@pytest.fixture(scope="module", autouse=True)
def own_ray():
    connect(None, 2)
    yield
    ray.shutdown()


def config(out: Path, workers: int, **changed) -> TrainConfig:
    recipe = replace(default_recipe("oe", scratch=True), epochs=EPOCHS, **changed)
    return TrainConfig(recipe=recipe, threads=1, workers=workers, out=out)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A run of two processes that nobody interrupts."""
    run = tmp_path_factory.mktemp("pair") / "run"
    summary = train(config(run, 2))
    assert summary == json.loads((run / "summary.json").read_text())
    assert (summary["workers"], summary["images"], summary["outliers_seen"]) == (2, EPOCHS * 2560, EPOCHS * 1280)
    return run


def test_two_processes_learn_what_one_does(pair, tmp_path):
    alone = train(config(tmp_path / "alone", 1))
    together = json.loads((pair / "summary.json").read_text())
    assert together["accuracy"] == pytest.approx(alone["accuracy"], abs=0.06)
    assert losses(pair)[-1] < 0.6 * losses(pair)[0]
    # Not nearer: BatchNorm normalises each half of a batch by itself.
    assert losses(pair) == pytest.approx(losses(tmp_path / "alone"), rel=0.05)
    assert together["id_fingerprint"] == json.loads((tmp_path / "alone/summary.json").read_text())["id_fingerprint"]


STEPS = """
import json, os, sys
from dataclasses import replace
import torch, torch.distributed as dist
from torch import nn
from miner import demo
from trainers import models
from trainers.data import load_id
from trainers.fit import World, fit
from trainers.image_set import ImageSet
from trainers.recipes import Recipe, METHODS

torch.set_num_threads(1)
whole = load_id("demo")
digits = replace(whole, train_images=whole.train_images[:64], train_labels=whole.train_labels[:64])
outliers = ImageSet("drawn", (demo.pool_arrays()[0][:500],))


def run(reduction, world):
    net = models.create("small", 10, seed=1)
    for name, part in list(net.body.named_children()):
        if isinstance(part, nn.BatchNorm2d):
            net.body[int(name)] = nn.Identity()
    recipe = Recipe(METHODS["oe"], epochs=4, batch=64, batch_outliers=32, lr=0.1, reduction=reduction)
    found = []
    keep = lambda epoch, state, record: found.append(record["loss"])
    fit(net, digits, outliers, recipe, 0, torch.device("cpu"), lambda _: None, on_epoch=keep, world=world)
    return found


rules = ("per-group-mean", "whole-batch-mean")
alone = [run(rule, World()) for rule in rules]
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
both = [run(rule, World(rank, 2)) for rule in rules]
if rank == 0:
    print(json.dumps([alone, both]))
dist.destroy_process_group()
"""


def test_without_batchnorm_every_step_is_that_of_one_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", STEPS, tmp_path / "meet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, both = json.loads(done.stdout)
    for one, two in zip(alone, both, strict=True):
        assert len(one) == 4
        assert one[-1] < one[0]
        assert two[0] == pytest.approx(one[0], rel=1e-6)  # the first step, before any update
        assert two == pytest.approx(one, rel=1e-4)  # forwards in bfloat16 where the CPU has it


def fill_disk_after_an_epoch(run: Path) -> None:
    """From then on the first worker, whose id TensorBoard put into its file's name, can write only small files."""
    while not (run / "epochs/000000/COMMITTED").exists():
        time.sleep(0.02)
    (log,) = (run / "tensorboard").iterdir()
    resource.prlimit(int(log.name.split(".")[-2]), resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_workers_error_is_one_line_and_resume_is_exact(pair, tmp_path):
    run = tmp_path / "run"
    disk = threading.Thread(target=fill_disk_after_an_epoch, args=(run,), daemon=True)
    disk.start()
    with pytest.raises(MinerError, match=r"000\d/state.safetensors: disk full .* run the same command") as caught:
        train(config(run, 2))
    disk.join(10)
    assert len(str(caught.value).splitlines()) == 1
    assert 1 <= len(losses(run)) < EPOCHS
    assert not (run / "summary.json").exists()
    train(replace(config(run, 2), resume=True))
    assert (run / "checkpoint.safetensors").read_bytes() == (pair / "checkpoint.safetensors").read_bytes()
    assert losses(run) == losses(pair)


def test_numbers_that_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match="--workers 3: must divide batch 256 and 256 outliers"):
        train(config(tmp_path / "run", 3))
    with RunDir(tmp_path / "run").locked(), pytest.raises(MinerError, match="run: another process is at work here"):
        train(config(tmp_path / "run", 2))
    with pytest.raises(UsageError, match="--workers 4: one CPU each is needed, and there are 2"):
        train(config(tmp_path / "run", 4))
