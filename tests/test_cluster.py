"""The same command on Ray clusters of several nodes: a node that dies, a line that is cut in the middle of a round."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from benchmarks.chaos import phase_of, processes, result
from miner import demo, load_subset
from miner.build import write_arrays_pool

ROOT = Path(__file__).resolve().parent.parent
# Steps enough that a round outlasts the heartbeat by which tests know where it is.
FLAGS = (
    "--gamma=0.1",
    "--rounds=3",
    "--steps=160",
    "--eta=0.1",
    "--batch=32",
    "--strata=5",
    "--views=2",
    "--pretrain.epochs=1",
)
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
CLUSTER = {"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    images, labels = demo.pool_arrays()
    write_arrays_pool(str(folder), "some", images[:900], labels[:900], demo.FAMILIES, shard_count=5)
    return folder


@pytest.fixture(scope="module")
def here(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one machine that all others must equal."""
    out = tmp_path_factory.mktemp("here") / "run"
    done = subprocess.run(words(pool, out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and two more nodes on this machine, one CPU slot each."""
    found = Cluster(initialize_head=True, head_node_args=CLUSTER)
    for _ in range(2):
        found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()


def words(pool: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.resample", f"--pool={pool}", f"--out={out}", *FLAGS, *flags]


def disturbed(
    command: list[str], out: Path, phase: str, action: Callable[[], None], env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run ``command``, do something when it comes to ``phase`` of its second round; its summary."""
    log = out.parent / "log.txt"
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink, env=os.environ | (env or {}))
    try:
        end, acted = time.monotonic() + 300, False
        while process.poll() is None and time.monotonic() < end:
            try:
                status = json.loads((out / "status.json").read_text())
            except (OSError, ValueError):
                status = {}
            if not acted and status.get("round") == 1 and phase_of(status) == phase:
                action()
                acted = True
            time.sleep(0.01)
        assert acted, log.read_text()
        assert process.poll() == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    return dict(json.loads((out / "summary.json").read_text()))


def tree(node: Any) -> dict[int, bytes]:
    """The processes of one node of a Cluster: {pid: command line}."""
    (raylet,) = node.all_processes["raylet"]
    return processes(raylet.process.pid)


def works(node: Any) -> bool:
    """Whether Ray has set a pool actor on a node."""
    return any(line.startswith(b"ray::PoolShards") for line in tree(node).values())


def test_a_cluster_that_loses_a_node_gives_the_bytes_of_one_machine(
    pool: Path, here: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """Three nodes, a pool actor on each, two trainers; one node is killed in the middle of a round."""

    node = min(cluster.worker_nodes, key=lambda node: str(node.node_id))

    def lose() -> None:
        assert all(works(node) for node in [cluster.head_node, *cluster.worker_nodes])
        for pid in tree(node):  # as a machine goes: all at once, not the workers some time later
            os.kill(pid, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)

    command = words(pool, tmp_path / "run", f"--address={cluster.address}", "--pool-actors=3", "--trainers=2")
    summary = disturbed(command, tmp_path / "run", "train", lose)
    assert result(tmp_path / "run") == result(here)
    assert len(summary["deaths"]) >= 1
    assert summary["pool_actors"] == 3
    assert len(np.unique(load_subset(tmp_path / "run" / "subset-0.1").uids)) == 90


def test_an_address_where_nothing_answers_is_one_line(pool: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        words(pool, tmp_path, "--address=127.0.0.1:1"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --address 127.0.0.1:1: cannot join Ray")


# --- two machines, and the line between them ---

NAMES, LINKS, ADDRESSES = ("omtest-a", "omtest-b"), ("omt-a", "omt-b"), ("10.213.7.1", "10.213.7.2")


def sh(text: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(text.split(), capture_output=True, check=False)


@pytest.fixture
def two_machines(tmp_path: Path) -> Iterator[str]:
    """Two Ray nodes, each in a network of its own, with a line between them; the address of the head."""
    if shutil.which("ip") is None or sh(f"ip netns add {NAMES[0]}").returncode:
        pytest.skip("no network namespaces here (needs root and iproute2)")
    nodes = []
    try:
        sh(f"ip netns add {NAMES[1]}")
        sh(f"ip link add {LINKS[0]} netns {NAMES[0]} type veth peer name {LINKS[1]} netns {NAMES[1]}")
        for name, link, address in zip(NAMES, LINKS, ADDRESSES, strict=True):
            sh(f"ip -n {name} addr add {address}/24 dev {link}")
            sh(f"ip -n {name} link set {link} up")
            sh(f"ip -n {name} link set lo up")
        head, node = ADDRESSES
        start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        quick = json.dumps(QUICK)
        own = [f"--head --port=6479 --node-ip-address={head} --include-dashboard=false --num-cpus=1"]
        own += [f"--address={head}:6479 --node-ip-address={node} --num-cpus=1"]
        for name, flags in zip(NAMES, own, strict=True):
            system = [f"--system-config={quick}", f"--temp-dir={short_folder(tmp_path)}"] if "--head" in flags else []
            command = ["ip", "netns", "exec", name, *start, *flags.split(), *system]
            env = os.environ | {"RAY_AUTH_MODE": "disabled"}
            log = open(tmp_path / f"{name}.log", "wb")  # noqa: SIM115 - its owner is the process
            nodes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True))
            log.close()
            time.sleep(8.0)
        yield f"{head}:6479"
    finally:
        for name in NAMES:
            for pid in sh(f"ip netns pids {name}").stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            sh(f"ip netns del {name}")
        for process in nodes:
            process.wait()


def short_folder(tmp_path: Path) -> Path:
    """Ray's sockets lie below it, and their names must not be long."""
    link = Path("/tmp") / f"omt-{os.getpid()}"
    link.mkdir(exist_ok=True)
    return link


def test_a_line_that_is_cut_in_a_round_costs_no_byte(pool: Path, here: Path, two_machines: str, tmp_path: Path) -> None:
    command = words(pool, tmp_path / "run", f"--address={two_machines}", "--pool-actors=2", "--trainers=2")
    summary = disturbed(
        ["ip", "netns", "exec", NAMES[0], *command],
        tmp_path / "run",
        "train",
        lambda: sh(f"ip -n {NAMES[1]} link set {LINKS[1]} down") and None,
        {"RAY_AUTH_MODE": "disabled"},
    )
    assert result(tmp_path / "run") == result(here)
    assert len(summary["deaths"]) >= 1
    assert len(summary["trainers"]) == 1  # there is no second slot any more
