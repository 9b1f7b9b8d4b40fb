"""The command as users run it: flags, errors, the README's promises, and real images end to end."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from miner import load_subset, load_weights
from miner.build import write_arrays_pool
from miner.config import Config, Game
from miner.errors import MinerError, UsageError
from miner.inputs import check
from miner.pool import resolve
from miner.ranking import spearman
from miner.run_dir import RunDir, write_json
from miner.weights import ShardState, final_table, write_arrow
from pipelines import agree
from pipelines.agree import agreement, heaviest

ROOT = Path(__file__).resolve().parent.parent


def command(module: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands in a process of its own."""
    words = [sys.executable, "-m", f"pipelines.{module}", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, check=False)


def test_ci_runs_the_readme_test_command() -> None:
    block = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    assert block[1] == "python3 -m pipelines.setup && .venv/bin/python -m pytest"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gamma", "0"), "must lie in (0, 1]"),
        (("--gamma", "1.5"), "must lie in (0, 1]"),
        (("--views", "7"), "at most 6"),
        (("--smooth", "1.5"), "[0, 1]"),
        (("--exclude-near-id", "1"), "[0, 1)"),
        (("--rule", "dos", "--strata", "0"), "--rule dos --strata 0"),
        (("--rounds", "0"), "--rounds 0"),
        (("--pool", "imagenet"), "python -m pipelines.shard --input IMAGENET/train"),
        (("--pool", "tiny-images"), "withdrew"),
        (("--pool", "pipe:cat x"), "refused"),
    ],
)
def test_usage_errors_are_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = command("resample", *arguments, "--dry-run", "--out", tmp_path, env={"OUTLIER_POOLS": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_resume_of_nothing_is_an_error(tmp_path: Path) -> None:
    done = command("resample", "--resume", "--out", tmp_path / "none")
    assert done.returncode == 1
    assert "no run to resume" in done.stderr


def test_agreement_of_known_weights() -> None:
    weight = np.arange(100, dtype=float)
    assert agreement(weight, weight, 0.1) == (pytest.approx(1.0), 1.0)
    assert spearman(np.ones(5), np.ones(5)) == 1.0
    assert np.isnan(spearman(np.ones(5), weight[:5]))
    rho, iou = agreement(weight, -weight, 0.1)
    assert rho == pytest.approx(-1.0)
    assert iou == 0.0
    assert np.flatnonzero(heaviest(weight, 0.05)).tolist() == [95, 96, 97, 98, 99]


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 Tiny ImageNet images mined for CIFAR-10 without a guard, by the commands."""
    if "OUTLIER_DATA" not in os.environ:
        pytest.skip("set OUTLIER_DATA to a folder of the real image sets to run this")
    data = Path(os.environ["OUTLIER_DATA"])
    assert (data / "tinyimagenet" / "train-000000.tar").exists(), f"OUTLIER_DATA={data} has no tinyimagenet"
    home = tmp_path_factory.mktemp("real")
    source = ("--source", "tars", "--input", data / "tinyimagenet", "--glob", "train-000000*")
    made = command("shard", *source, "--out", home / "pool", "--workers", 1)
    assert made.returncode == 0, made.stderr
    run = home / "run"
    flags = ("--exclude-near-id", 0, "--strata", 0, "--rounds", 2, "--steps", 20, "--views", 1, "--pretrain.epochs", 2)
    where = ("--pool", home / "pool", "--id", data / "cifar10", "--out", run, "--gamma", 0.1, 0.01, "--threads", 1)
    done = command("resample", *where, *flags)
    assert done.returncode == 0, done.stderr
    assert str(run / "report.html") in done.stdout
    return run


def test_hard_images_show_id_classes(mined: Path) -> None:
    """The paper's Figure 5: without a guard the adversary finds the ID classes in the pool."""
    done = command("agree", mined, "--flag", "cifar10_strict")
    share = re.search(r"([\d.]+)% of the pool, ([\d.]+)% of the heaviest", done.stdout)
    assert share is not None, done.stderr
    assert float(share[1]) == pytest.approx(18.3, abs=0.2)
    assert float(share[2]) > 1.5 * float(share[1])


def test_subset_holds_the_pool_s_own_bytes(mined: Path) -> None:
    large, small = load_subset(mined / "subset-0.1"), load_subset(mined / "subset-0.01")
    assert (len(large), len(small)) == (500, 50)
    assert set(small.uids) < set(large.uids)
    large.verify()
    pool = Path(json.loads((mined / "summary.json").read_text())["pool_path"])
    shard = json.loads((pool / "pool.json").read_text())["shards"][0]["path"]
    with tarfile.open(shard) as original, tarfile.open(mined / "subset-0.01" / "outliers-000000.tar") as copy:
        names = [name for name in copy.getnames() if name.endswith(".jpg")]
        assert len(names) == 50
        for name in names:
            ours, theirs = copy.extractfile(name), original.extractfile(name)
            assert ours is not None
            assert theirs is not None
            assert ours.read() == theirs.read()


def test_neighbours_and_losses_are_in_the_table(mined: Path) -> None:
    table = load_weights(mined)
    assert table["visits"].to_pylist() == [2] * len(table)
    assert table["nn_id_row"].null_count == 0
    cosine = table["nn_id_cosine"].to_numpy()
    assert (table["nn50_id_cosine"].to_numpy() <= cosine).all()
    assert (cosine <= 1.0 + 1e-6).all()


def test_a_run_that_lost_nothing_yet_takes_corrected_flags(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.begin({"checkpoint": "typo"}, resume=False) == 0
    assert run.begin({"checkpoint": "right"}, resume=False) == 0
    run.round(0).mkdir(parents=True)
    run.commit(0)
    assert run.begin({"checkpoint": "right"}, resume=False) == 1
    with pytest.raises(MinerError, match="checkpoint: right there, typo now"):
        run.begin({"checkpoint": "typo"}, resume=False)


def test_a_classifier_is_trained_anew_only_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    settings = {"data": {"id": "cifar10", "pool": "a"}, "game": {"views": 6, "threads": 1}, "pool": "1", "id": "2"}
    run.begin(settings, resume=False)
    for name in ("classifier.safetensors", "frozen.safetensors"):
        (run.path / name).write_bytes(b"hours of work")
    other = settings | {"data": {"id": "cifar10", "pool": "b"}, "game": {"views": 2, "threads": 1}, "pool": "3"}
    with pytest.raises(MinerError, match="other settings"):
        run.begin(other, resume=True)
    assert (run.path / "frozen.safetensors").exists()
    run.begin(other, resume=False)
    assert (run.path / "classifier.safetensors").exists()
    assert not (run.path / "frozen.safetensors").exists()
    assert run.notes == []
    run.begin(other | {"game": {"views": 2, "threads": 2}}, resume=False)
    assert not (run.path / "classifier.safetensors").exists()
    assert run.notes == ["other settings (game.threads: 1 there, 2 now): its classifier is trained anew"]


def test_numbers_that_no_run_ends_with_are_refused() -> None:
    with pytest.raises(UsageError, match="--cap inf"):
        check(Config(game=Game(cap=float("inf"))))
    for game in (Game(converged=0.99), Game(converged=0.99, rounds=5, rule="ntom")):
        with pytest.raises(UsageError, match="this plays one"):
            check(Config(game=game))
    check(Config(game=Game(converged=0.99, rounds=5)))


def test_agreement_asks_for_a_share_and_for_sound_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    labels = np.array([-1, 0, 1, 0] * 10)
    pool = write_arrays_pool(str(tmp_path / "pool"), "p", images, labels, ("fox", "owl"), 1)
    manifest = json.loads((tmp_path / "pool" / "pool.json").read_text())
    write_json(tmp_path / "pool" / "pool.json", manifest | {"class_info": [{}, {"ours": True}]})
    state = ShardState.fresh("paper", 40)
    state["state"][:] = np.where(labels == 1, 2.0, 1.0)
    table = final_table(pool.shard_index(0), state, 1.0, np.arange(40, dtype=np.uint64), {"run_id": "r"})
    for name in ("a", "b"):
        (tmp_path / name / "weights").mkdir(parents=True)
        write_arrow(table, tmp_path / name / "weights" / "shard-000000.arrow")
        write_json(tmp_path / name / "summary.json", {"pool_path": pool.path, "subsets": {}})
    assert agree.shares(tmp_path / "a", load_weights(tmp_path / "a"), 0.25, "ours").endswith(
        "25.0% of the pool, 100.0% of the heaviest 25%"
    )
    done = command("agree", tmp_path / "a", tmp_path / "b", "--top", 2)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for top in (float("nan"), -0.5, 0.0, 0.01):
        with pytest.raises(UsageError, match="--top"):
            agree.checked(top, 40)
    (tmp_path / "a" / "summary.json").write_text("{")
    with pytest.raises(MinerError, match=r"summary\.json"):
        agree.shares(tmp_path / "a", table, 0.25, "ours")
    write_arrow(table.replace_schema_metadata({"run_id": "s"}), tmp_path / "a" / "weights" / "shard-000001.arrow")
    with pytest.raises(MinerError, match=r"shard-000001\.arrow: of another ranking"):
        load_weights(tmp_path / "a")


def test_an_image_folder_does_not_hide_the_pool_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "img").mkdir()
    made = tmp_path / "pools" / "img"
    write_arrays_pool(str(made), "img", np.zeros((2, 8, 8, 3), np.uint8), None, [], shard_count=1)
    monkeypatch.setenv("OUTLIER_POOLS", str(tmp_path / "pools"))
    monkeypatch.chdir(tmp_path)
    assert resolve("img") == str(made)
