"""The command that makes and checks pools: Ray or not, full disks, one-line errors; real tars."""

import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miner import cache
from miner.build import finish, prepare, run_job
from miner.pool import Pool
from miner.recipe import Recipe

RNG = np.random.default_rng(1)


def jpeg(side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (side, side + 4, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, count in (("cat", 7), ("dog", 6), ("elk", 3)):
        os.makedirs(tmp_path / "photos" / name)
        for i in range(count):
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(jpeg())
    return tmp_path / "photos"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pipelines.shard", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_any_number_of_workers_writes_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    made = []
    for workers in (1, 2):
        out = tmp_path / f"w{workers}" / "pool"
        flags = [
            "--source",
            "folder",
            "--input",
            photos,
            "--out",
            out,
            "--per-shard",
            4,
            "--workers",
            workers,
        ]
        done = command(*flags)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        made.append(contents(out))
    assert sorted(made[0]) == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
        "000003.tar",
        "index.parquet",
        "pool.json",
    ]
    assert made[0] == made[1]
    assert f"pool pool: {out}\n16 images in 4 shards, 3 classes" in done.stdout
    assert f"next: python -m pipelines.resample --pool {out} --gamma" in done.stdout
    raw = bytearray((out / "000002.tar").read_bytes())
    raw[600] ^= 1
    (out / "000002.tar").write_bytes(raw)
    failed = command("--verify", "--out", out, "--workers", 1)
    assert failed.returncode == 1
    assert failed.stderr == f"error: {out}/000002.tar: its bytes changed since the pool was made (shard 000002.tar)\n"


def test_command_errors_are_one_line(tmp_path: Path) -> None:
    done = command("--source", "tars", "--input", tmp_path / "none", "--name", "x", "--out", tmp_path / "pool")
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {tmp_path}/none: no such file or folder; check --input\n",
    )
    done = command("--input", tmp_path, "--name", "../x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --name '../x': ")


def test_a_full_disk_stops_cleanly_and_the_same_command_goes_on(photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pipelines.cli import run\n"
        "from miner.build import finish, prepare, run_job; from miner.recipe import Recipe\n"
        "def main():\n"
        "    recipe = Recipe('folder', (sys.argv[1],), per_shard=8); plan = prepare(recipe, sys.argv[2])\n"
        "    [run_job(sys.argv[2], job) for job in plan.jobs]; finish(recipe, sys.argv[2], 'p', plan)\n"
        "run(main)"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    words = [sys.executable, "-c", code, str(photos), str(tmp_path / "pool")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/pool/000000.tar: disk full")
    assert os.listdir(tmp_path / "pool") == ["shards"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    Pool.open(str(tmp_path / "pool")).verify()


def test_real_tars_are_adopted_and_decode(tmp_path: Path) -> None:
    root = os.environ.get("OUTLIER_DATA")
    if root is None:
        pytest.skip("OUTLIER_DATA names no folder of real tars")
    recipe = Recipe("tars", (os.path.join(root, "tinyimagenet64"),), glob="train-*")
    folder = str(tmp_path / "pool")
    plan = prepare(recipe, folder)
    assert [run_job(folder, job) for job in plan.jobs] == [5000]
    pool = finish(recipe, folder, "real", plan)
    assert (pool.count, len(pool.classes)) == (5000, 120)
    assert pool.class_info[1]["cifar10_strict"] == "frog"
    assert np.bincount(pool.index(["label"])["label"].to_numpy(), minlength=120).min() >= 40
    samples = pool.read(0, range(0, 5000, 5))
    modes = {Image.open(io.BytesIO(data)).mode for data in samples}
    assert modes == {"RGB", "L"}
    pixels, bad = cache.open_shard(pool, 0, 32)
    assert (pixels.shape, bad) == ((5000, 32, 32, 3), {})
    assert 90 < pixels.mean() < 150
    pool.verify()
