"""The same command on a Ray cluster of several nodes, joined by --address."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from miner import demo, load_subset
from miner.build import write_arrays_pool

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--gamma=0.1", "--rounds=2", "--steps=3", "--batch=32", "--strata=5", "--pretrain.epochs=1")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    images, labels = demo.pool_arrays()
    write_arrays_pool(str(folder), "some", images[:600], labels[:600], demo.FAMILIES, shard_count=3)
    return folder


@pytest.fixture
def address() -> Iterator[str]:
    """A head and a second node on this machine, one CPU slot each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield str(cluster.address)
    cluster.shutdown()


def mine(pool: Path, out: Path, *flags: str) -> None:
    words = [sys.executable, "-m", "pipelines.resample", f"--pool={pool}", f"--out={out}", *FLAGS, *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cluster_gives_the_bytes_of_one_machine(pool: Path, address: str, tmp_path: Path) -> None:
    mine(pool, tmp_path / "here")
    mine(pool, tmp_path / "there", f"--address={address}", "--pool-actors=3", "--trainers=2")
    here, there = (tmp_path / run / "subset-0.1" for run in ("here", "there"))
    files = sorted(path.name for path in here.iterdir())
    assert "manifest.parquet" in files
    for name in files:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert len(np.unique(load_subset(there).uids)) == 60


def test_an_address_where_nothing_answers_is_one_line(pool: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pipelines.resample", f"--pool={pool}", f"--out={tmp_path}", "--address=127.0.0.1:1"]
    done = subprocess.run([*words, *FLAGS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --address 127.0.0.1:1: cannot join Ray")
