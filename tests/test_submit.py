"""The main job handed to a cluster as people do it: a head with token authentication, and `ray job submit`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from miner import demo, load_subset
from miner.build import write_arrays_pool
from miner.config import Game
from trainers.actor import Trainer
from trainers.checkpoint import save_checkpoint
from trainers.data import IdSet

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    """A running head: where its dashboard answers, and the environment of whoever holds its token."""

    url: str
    port: int
    token: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at; all different, as they are held open together."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def processes_of(folder: str) -> list[int]:
    """Processes whose command line or environment names ``folder``: Ray's daemons and the workers they started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
        if folder.encode() in known and state != "Z":
            found.append(int(entry.name))
    return found


def end_all(folder: str) -> None:
    """End every process of ``folder``, politely and then not, and wait until none is left."""
    deadline = time.monotonic() + 30
    polite = time.monotonic() + 2
    while left := processes_of(folder):
        for pid in left:
            try:
                os.kill(pid, signal.SIGTERM if time.monotonic() < polite else signal.SIGKILL)
            except ProcessLookupError:
                continue
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.5)


def status(url: str, token: str | None = None, body: bytes | None = None) -> int:
    """The HTTP status of a request (with a body: POST), with the token or without."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def jobs(head: Head) -> bytes:
    """All jobs that the head knows, as JSON."""
    request = urllib.request.Request(f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


def listening(port: int) -> set[str]:
    """The addresses at which something listens on ``port``, in the kernel's hexadecimal."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head of its own: ports, temporary folder and token are this test's, and so are all processes it ends."""
    folder = tempfile.mkdtemp(prefix="head-")  # short: Ray's sockets lie in it, and their paths have a limit
    home = tmp_path_factory.mktemp("home")
    make = next(line for line in (ROOT / "docs/cluster.md").read_text().splitlines() if line.startswith("(umask 077;"))
    path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])  # as in an activated environment
    subprocess.run(["bash", "-c", make], check=True, env=os.environ | {"HOME": str(home), "PATH": path})
    token_file = home / ".outlier-miner" / "auth_token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text().strip()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "no_proxy": "127.0.0.1"}
    environment["PATH"] = path
    gcs, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
    words = [str(RAY), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    words += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    words += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    words += [f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}"]
    words += [f"--metrics-export-port={metrics}"]
    url, log = f"http://127.0.0.1:{dashboard}", Path(folder) / "start.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(words, stdout=sink, stderr=sink, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                if status(f"{url}/api/jobs/", token) == 200:
                    break
            except OSError:
                pass
            time.sleep(0.5)
        yield Head(url, dashboard, token, environment)
    finally:
        end_all(folder)
        process.wait()
        shutil.rmtree(folder)


def submit(head: Head, working_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``ray job submit`` from outside the repository."""
    command = [str(RAY), "job", "submit", "--address", head.url, "--working-dir", str(working_dir), "--", *words]
    return subprocess.run(
        command, cwd=working_dir.parent, env=head.environment, capture_output=True, text=True, check=False
    )


def test_the_head_answers_only_here_and_only_with_the_token(head: Head) -> None:
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary"):
        assert status(head.url + path) == 401, path
        assert status(head.url + path, "0" * 64) in (401, 403), path
        assert status(head.url + path, head.token) == 200, path
    job = json.dumps({"entrypoint": "true"}).encode()
    assert status(f"{head.url}/api/jobs/", None, job) == 401
    assert json.loads(jobs(head)) == []
    assert listening(head.port) == {"0100007F"}


def test_the_main_job_runs_by_job_submit(head: Head, tmp_path: Path, digits: IdSet) -> None:
    images, labels = demo.pool_arrays()
    pool = tmp_path / "pool"
    pool.mkdir()
    write_arrays_pool(str(pool), "some", images[:300], labels[:300], demo.FAMILIES, shard_count=2)
    trainer = Trainer("small", digits, seed=0, game=Game())
    net = tmp_path / "net.safetensors"
    save_checkpoint(net, trainer.net, {"model": "small", "classes": list(digits.classes), "accuracy": 0.1})
    code = tmp_path / "code"
    for package in ("miner", "trainers", "pipelines"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["python", "-m", "pipelines.resample", "--address=auto", f"--pool={pool}", f"--out={tmp_path / 'run'}"]
    words += ["--gamma=0.1", "--rounds=1", "--views=1", "--strata=0", f"--checkpoint={net}", "--pool-actors=1"]
    done = submit(head, code, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "run" / "subset-0.1") in done.stdout
    assert len(np.unique(load_subset(tmp_path / "run" / "subset-0.1").uids)) == 30
