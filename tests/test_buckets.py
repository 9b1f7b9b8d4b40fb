"""Pools, runs and subsets in an object store: a real S3 server on the loopback, kills, failing stores.

``gs://`` takes the same way through fsspec; nothing here has a server for it.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import s3fs
from fsspec.registry import _registry
from helpers import start_and_kill
from torch.utils.data import DataLoader

from miner import demo, load_subset, load_weights
from miner.buckets import BucketPath, filesystem
from miner.build import finish, prepare, run_job, write_arrays_pool
from miner.config import Config, Data, Game, Machines, Selection
from miner.errors import MinerError, UsageError
from miner.files import Place, atomic, local_copy, place, read_ranges, sha256
from miner.images import png
from miner.inputs import check
from miner.mining import Mined, mine
from miner.pool import Pool
from miner.recipe import Recipe
from miner.run_dir import RunDir, write_file, write_json
from miner.tars import TarWriter
from miner.universal import pool_runs
from pipelines import agree
from pipelines.report import write_report
from trainers import models
from trainers.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from trainers.config import TrainConfig
from trainers.data import load_id
from trainers.sets import open_outliers

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "s3://mining"
BEFORE_THE_KILL = (1, 2)  # rounds of three that may be committed when it comes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An S3 server in a process of its own, and the environment that names it; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "log"
    words = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "wb") as sink, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(words, stdout=sink, stderr=sink)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "knows")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("OUTLIER_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            end = time.monotonic() + 60
            while not answers(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
            fresh_clients()
            fs, _ = filesystem(BUCKET)
            fs.mkdir("mining")
            yield port
        finally:
            process.terminate()
            process.wait()
            fresh_clients()


def answers(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


def fresh_clients() -> None:
    """Clients know the environment that they were made in: let go of them."""
    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def endpoint(port: int) -> Iterator[None]:
    """Another server for ``s3://`` for a while."""
    fresh_clients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield
    fresh_clients()


class Proxy:
    """Passes connections on to the server, until ``most`` bytes have gone up; then it holds everything back."""

    def __init__(self, port: int, most: int) -> None:
        self.to, self.most, self.sent, self.end = port, most, 0, False
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = self.door.getsockname()[1]
        threading.Thread(target=self._open, daemon=True).start()

    @property
    def full(self) -> bool:
        return self.sent >= self.most

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.door.accept()
                threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.to)) as store, contextlib.suppress(OSError):
            other = {client: store, store: client}
            while not self.end:
                for ready in select.select(list(other), [], [], 0.1)[0]:
                    while self.full and not self.end:
                        time.sleep(0.05)
                    data = ready.recv(1 << 16)
                    if not data or self.end:
                        return
                    self.sent += len(data) if ready is client else 0
                    other[ready].sendall(data)

    def close(self) -> None:
        self.end = True
        self.door.close()


@pytest.fixture
def failing() -> Iterator[type[http.server.BaseHTTPRequestHandler]]:
    """A store that answers everything with ``code`` and an S3 error of that name."""

    class Handler(http.server.BaseHTTPRequestHandler):
        code, name, port, asked = 403, "AccessDenied", 0, 0

        def answer(self) -> None:
            type(self).asked += 1
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<Error><Code>{self.name}</Code><Message>Not today</Message></Error>".encode()
            self.send_response(self.code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *arguments: object) -> None:
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.port = web.server_address[1]
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield Handler
    web.shutdown()
    web.server_close()


def command(module: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"pipelines.{module}", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)


def contents(run: Place) -> dict[str, bytes]:
    """Every byte that a user gets: subsets and weights table."""
    found = {}
    for top in ("subset-*", "weights"):
        for path in run.glob(f"{top}/*"):
            found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    assert len(found) == 2 * 4 + 3
    return found


def everything(folder: BucketPath) -> list[str]:
    """Names of all objects below a folder, as the store lists them."""
    fs, inner = filesystem(folder.url)
    return [name.removeprefix(f"{inner}/") for name in fs.find(inner)]


# --- the main job ---


@pytest.fixture(scope="module")
def pools(server: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One pool and one checkpoint on the disk and in the bucket; gives the folder of each kind of place."""
    images, labels = demo.pool_arrays()
    homes = {"disk": str(tmp_path_factory.mktemp("pools")), "bucket": BUCKET}
    classes = load_id("demo").classes
    net = models.create("small", len(classes), 0)
    for home in homes.values():
        write_arrays_pool(f"{home}/few", "few", images[:450], labels[:450], demo.FAMILIES, shard_count=3)
        save_checkpoint(f"{home}/net.safetensors", net, {"model": "small", "classes": list(classes)})
    return homes


def config(home: str, out: Place, **machines: Any) -> Config:
    return Config(
        data=Data(pool=f"{home}/few", checkpoint=f"{home}/net.safetensors", seed=3),
        game=Game(rounds=3, steps=2, batch=32, views=1),
        selection=Selection(gamma=(0.1, 0.02), exclude_near_id=0.01, strata=4),
        machines=Machines(**machines),
        output=dataclasses.replace(Config().output, out=str(out)),
    )


@pytest.fixture(scope="module")
def runs(pools: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Mined]]:
    """The same job on the disk, and in the bucket: there SIGKILLed with two pool actors, and gone on with one."""
    home = tmp_path_factory.mktemp("run")
    local = mine(config(pools["disk"], home / "run", pool_actors=1))
    there = place(f"{BUCKET}/run")
    settings = config(pools["bucket"], there, pool_actors=1)
    flags = {"pool": settings.data.pool, "checkpoint": settings.data.checkpoint, "out": there, "seed": 3}
    flags |= {"rounds": 3, "steps": 2, "batch": 32, "views": 1, "exclude-near-id": 0.01, "strata": 4, "pool-actors": 2}
    words = [sys.executable, "-m", "pipelines.resample", *(f"--{name}={value}" for name, value in flags.items())]
    mark = there / "rounds" / "000000" / "COMMITTED"

    def first_round_is_done() -> bool:
        time.sleep(0.1)  # the store has other things to do
        return mark.exists()

    start_and_kill([*words, "--gamma", "0.1", "0.02"], ROOT, home / "log", first_round_is_done, 300)
    assert len(RunDir(there).committed()) in BEFORE_THE_KILL
    assert not (there / "weights").exists()
    yield {"disk": local, "bucket": mine(settings)}
    ray.shutdown()


def test_a_pool_in_a_bucket_has_the_bytes_of_one_on_the_disk(pools: dict[str, str]) -> None:
    local, remote = (Pool.open(f"{home}/few") for home in pools.values())
    remote.verify()
    assert remote.fingerprint == local.fingerprint
    for name in ("pool.json", "index.parquet", "000000.tar", "000001.tar", "000002.tar"):
        assert place(f"{remote.path}/{name}").read_bytes() == Path(local.path, name).read_bytes()


def test_a_killed_run_in_a_bucket_gives_the_bytes_of_one_on_the_disk(
    runs: dict[str, Mined], pools: dict[str, str]
) -> None:
    local, remote = runs["disk"], runs["bucket"]
    assert str(remote.run) == f"{BUCKET}/run"
    assert contents(remote.run) == contents(local.run)
    assert load_weights(remote.run).equals(load_weights(local.run))
    assert [str(path) for path in remote.subsets] == [f"{BUCKET}/run/subset-0.1", f"{BUCKET}/run/subset-0.02"]
    assert RunDir(remote.run).committed() == RunDir(local.run).committed() == [1, 2]
    assert [record["l_out"] for record in RunDir(remote.run).metrics()] == [
        record["l_out"] for record in RunDir(local.run).metrics()
    ]
    for name in ("config.json", "metrics.jsonl", "summary.json", "classifier.safetensors", "rounds/000002/COMMITTED"):
        assert name in everything(BucketPath(f"{BUCKET}/run"))
    assert not [name for name in everything(BucketPath(f"{BUCKET}/run")) if ".tmp" in name or "000000/" in name]
    other = config(pools["bucket"], remote.run)
    with pytest.raises(MinerError, match=r"s3://mining/run: holds a run with other settings \(game.steps: 2 there"):
        mine(dataclasses.replace(other, game=dataclasses.replace(other.game, steps=3)))


def test_tensorboard_s_events_come_along(runs: dict[str, Mined]) -> None:
    events = list((runs["bucket"].run / "tensorboard").iterdir())
    assert 1 <= len(events) <= 2  # the kill may have come between the first round's mark and its figures
    assert all(path.name.startswith("events.out.tfevents.") for path in events)
    assert sum(path.read_bytes().count(b"effective_sample_size") for path in events) >= 3 - max(BEFORE_THE_KILL)


def test_subsets_are_read_from_the_bucket(runs: dict[str, Mined]) -> None:
    large, local = load_subset(f"{BUCKET}/run/subset-0.1"), load_subset(runs["disk"].subsets[0])
    large.verify()
    assert large.uids == local.uids
    assert len(large) == 45
    assert set(load_subset(f"{BUCKET}/run/subset-0.02").uids) < set(large.uids)
    assert (large[3][0] == local[3][0]).all()
    outliers = open_outliers(f"{BUCKET}/run/subset-0.02", 32, seed=0)
    assert len(outliers) == 9
    assert outliers.origin["fingerprint"] == load_subset(runs["disk"].subsets[1]).recipe["fingerprint"]
    # In forked processes, after this one has used its client
    loader = DataLoader(large, batch_size=9, num_workers=2)
    assert sum(len(images) for images, _ in loader) == 45


def test_other_commands_read_the_bucket(
    runs: dict[str, Mined], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(write_report(f"{BUCKET}/run")) == f"{BUCKET}/run/report.html"
    html = place(f"{BUCKET}/run/report.html").read_text()
    assert html.startswith("<!doctype html>")
    assert "subset-0.02" in html
    monkeypatch.setattr(sys, "argv", ["agree", f"{BUCKET}/run", str(runs["disk"].run)])
    agree.main()
    assert "Spearman 1.000, IoU of the heaviest 10% 1.000" in capsys.readouterr().out
    summary = pool_runs((f"{BUCKET}/run", str(runs["disk"].run)), "mean-rank", (0.02,), place(f"{BUCKET}/pooled"))
    assert (
        load_subset(f"{BUCKET}/pooled/subset-0.02").recipe["count"] == summary["subsets"]["subset-0.02"]["count"] == 9
    )
    for where in (f"{BUCKET}/run", f"{BUCKET}/run/classifier.safetensors", f"{BUCKET}/net.safetensors"):
        assert open_checkpoint(where)[1]["model"] == "small"
    with pytest.raises(MinerError, match=r"s3://mining/none: no checkpoint.safetensors or classifier.safetensors"):
        load_checkpoint(f"{BUCKET}/none")


# --- uploads ---


def test_a_killed_upload_leaves_nothing_to_be_seen(server: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):  # noise of 5 MB each: the tar goes up in several parts
            path = tmp_path / "photos" / name / f"{i}.png"
            path.write_bytes(png(rng.integers(0, 256, (1300, 1300, 3), np.uint8)))
    out, proxy = BucketPath(f"{BUCKET}/photos"), Proxy(server, most=20 << 20)
    flags = ["--source", "folder", "--input", str(tmp_path / "photos"), "--out", str(out), "--workers", "1"]
    try:
        with endpoint(proxy.port):
            words = [sys.executable, "-m", "pipelines.shard", *flags]
            start_and_kill(words, ROOT, tmp_path / "log", lambda: proxy.full, 120)
    finally:
        proxy.close()
    assert everything(out) == ["shards/arguments.json"]
    fs, _ = filesystem(out.url)
    pending = fs.call_s3("list_multipart_uploads", Bucket="mining")["Uploads"]  # what a lifecycle rule would abort
    assert [upload["Key"] for upload in pending] == ["photos/000000.tar"]

    done = command("shard", *flags)
    assert done.returncode == 0, done.stderr
    recipe = Recipe("folder", (str(tmp_path / "photos"),))
    plan = prepare(recipe, str(tmp_path / "photos-pool"))
    for job in plan.jobs:
        run_job(str(tmp_path / "photos-pool"), job)
    local = finish(recipe, str(tmp_path / "photos-pool"), "photos", plan)
    assert "000000.tar" in everything(out)
    for name in everything(out):
        assert (out / name).read_bytes() == Path(local.path, name).read_bytes()
    Pool.open(out.url).verify()


@pytest.mark.parametrize("size", [8 << 20, 40 << 20], ids=["one request", "several parts"])
def test_a_killed_upload_spares_what_was_there(server: int, size: int, tmp_path: Path) -> None:
    there, proxy = BucketPath(f"{BUCKET}/over/{size}"), Proxy(server, most=size // 2)
    write_file(there, b"old")
    code = (
        "import sys; from miner.files import place; from miner.run_dir import write_file;"
        "write_file(place(sys.argv[1]), bytes(int(sys.argv[2])))"
    )
    try:
        with endpoint(proxy.port):
            words = [sys.executable, "-c", code, str(there), str(size)]
            start_and_kill(words, ROOT, tmp_path / "log", lambda: proxy.full, 60)
    finally:
        proxy.close()
    assert there.read_bytes() == b"old"
    write_file(there, bytes(size))
    assert sha256(there) == hashlib.sha256(bytes(size)).hexdigest()


def test_an_error_while_writing_uploads_nothing(server: int) -> None:
    path = BucketPath(f"{BUCKET}/broken")

    def write() -> None:
        with atomic(path) as sink:
            sink.write(b"half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert not path.exists()


# --- the commit protocol ---


def test_only_rounds_with_their_mark_count(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(place(f"{BUCKET}/rounds-of"))
    assert run.begin({"seed": 1}, resume=False) == 0
    for round_ in range(4):
        for name in ("A.json", "round.json"):  # one that is listed, and removed, before COMMITTED
            write_json(run.round(round_) / name, {"round": round_})
        run.log({"round": round_})
        assert run.committed() == list(range(max(round_ - 2, 0), round_))
        run.commit(round_)
    assert run.committed() == [2, 3]
    assert not run.round(1).exists()
    write_json(run.round(4) / "round.json", {"round": 4})  # the next one, cut off
    run.log({"round": 4})
    again = RunDir(place(f"{BUCKET}/rounds-of/"))
    assert again.begin({"seed": 1}, resume=True) == 4
    assert [record["round"] for record in again.metrics()] == [0, 1, 2, 3]
    assert (again.verified(3) / "round.json").exists()
    write_json(again.round(3) / "round.json", {"round": "other"})
    with pytest.raises(MinerError, match="changed since it was committed"):
        again.verified(3)
    # A process that is killed while it removes a round has taken the mark away first.
    unlink = BucketPath.unlink

    def killed(path: BucketPath, missing_ok: bool = False) -> None:
        if path.name != "COMMITTED":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(BucketPath, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        again.commit(4)
    assert again.round(2).exists()
    assert again.committed() == [3, 4]


def test_a_store_that_fails_meanwhile_takes_no_round_back(
    server: int, failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run = RunDir(place(f"{BUCKET}/patient"))
    for round_ in range(2):
        write_json(run.round(round_) / "round.json", {"round": round_})
        run.commit(round_)
    monkeypatch.setattr(run, "committed", lambda: [0, 1])  # it fails after it was listed
    failing.code, failing.name = 503, "ServiceUnavailable"
    with endpoint(failing.port), pytest.raises(MinerError, match="cannot be reached"):
        run.last_sound()
    assert RunDir(run.path).last_sound() == 1
    assert run.notes == []


def test_another_process_s_objects_are_seen_at_once(server: int) -> None:
    folder = BucketPath(f"{BUCKET}/shared")
    write_file(folder / "mine", b"1")
    assert [path.name for path in folder.iterdir()] == ["mine"]
    code = (
        "from miner.files import place; from miner.run_dir import write_file;"
        f"write_file(place('{folder}/theirs'), b'22'); place('{folder}/mine').unlink()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert not (folder / "mine").exists()
    assert (folder / "theirs").read_bytes() == b"22"


def test_paths_list_and_match_as_local_ones_do(server: int, tmp_path: Path) -> None:
    there = BucketPath(f"{BUCKET}/tree")
    for folder in (place(tmp_path), there):
        for name in ("a/1/x", "a/2/x", "a/2/y", "b", "ab/1/x", "a/z"):
            write_file(folder / name, name.encode())
        for pattern in ("*/1/x", "a/*/x", "a/[12]/*", "b", "a*/*", "none/*", "b/*", "a/*/x/*"):
            local = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(pattern))
            assert sorted(str(path).removeprefix(f"{folder}/") for path in folder.glob(pattern)) == local
    assert (there / "a").exists()
    assert not (there / "c").exists()
    assert not (there / "a/1/xx").exists()
    assert there.parent == BucketPath(f"{BUCKET}/") == BucketPath(BUCKET).parent
    with pytest.raises(FileNotFoundError) as error:
        (there / "none").read_bytes()
    assert error.value.filename == f"{there}/none"
    (there / "none").unlink(missing_ok=True)
    assert read_ranges(f"{there}/a/2/y", [(2, 2), (0, 1)]) == [b"2/", b"a"]
    with local_copy(there / "ab/1/x") as name:
        assert Path(name).read_bytes() == b"ab/1/x"
    assert not Path(name).exists()


# --- errors ---


def test_a_wrong_bucket_is_one_line(server: int) -> None:
    done = command("resample", "--out", "s3://minnig/run", "--pool", "demo")
    assert done.returncode == 1
    assert done.stderr.startswith("error: s3://minnig/run/")
    assert "there is no such bucket" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(MinerError, match="s3://minnig/x: there is no such bucket"):
        write_file(place("s3://minnig/x"), b"")


def test_an_endpoint_that_cannot_be_reached_is_one_line_soon(server: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with endpoint(port):
        started = time.monotonic()
        for attempt in (lambda: load_weights(f"{BUCKET}/run"), lambda: write_file(place(f"{BUCKET}/x"), b"")):
            with pytest.raises(MinerError, match=r"^s3://mining/.*: cannot be reached or used") as error:
                attempt()
            assert "\n" not in str(error.value)
            assert f"127.0.0.1:{port}" in str(error.value)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [(403, "InvalidAccessKeyId", "access denied"), (503, "ServiceUnavailable", "cannot be reached or used")],
)
def test_a_store_that_refuses_is_not_an_empty_one(
    server: int, failing: Any, code: int, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.code, failing.name = code, name
    run = RunDir(place(f"{BUCKET}/run"))
    with endpoint(failing.port):
        with pytest.raises(MinerError):
            run.path.exists()
        assert 0 < failing.asked <= 6  # tries again, but not for minutes
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with endpoint(failing.port):
        for attempt in (
            run.path.exists,
            run.committed,
            run.metrics,
            lambda: run.begin({}, resume=False),
            lambda: (run.path / "config.json").unlink(missing_ok=True),
            lambda: list(run.path.glob("rounds/*/COMMITTED")),
            lambda: sha256(run.path / "config.json"),
            lambda: Pool.open(f"{BUCKET}/few"),
            lambda: load_subset(f"{BUCKET}/run/subset-0.1"),
        ):
            with pytest.raises(MinerError, match=rf"^s3://mining/.*{words}") as error:
                attempt()
            assert "\n" not in str(error.value)


def test_missing_credentials_are_one_line(server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fresh_clients()
    with pytest.raises(MinerError, match=r"s3://mining/x: no credentials .*AWS_ACCESS_KEY_ID"):
        place(f"{BUCKET}/x").exists()
    fresh_clients()


@pytest.mark.parametrize(("scheme", "library", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, scheme: str, library: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for known in ("s3", "s3a", "gs", "gcs"):
        monkeypatch.delitem(_registry, known, raising=False)
    with pytest.raises(MinerError) as error:
        place(f"{scheme}://bucket/run").exists()
    assert f"{scheme}://bucket/run: " in str(error.value)
    assert str(error.value).endswith(f"pip install 'outlier-miner[{extra}]'")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("pipe:touch x", "refused"),
        ("simplecache::s3://bucket/run", "refused"),
        ("s3://bucket/run::file", "refused"),
        ("ftp://host/run", "refused"),
        ("https://host/run", "only read from"),
    ],
)
def test_places_that_cannot_hold_a_run_are_refused(out: str, words: str) -> None:
    settings = Config(output=dataclasses.replace(Config().output, out=out))
    with pytest.raises(UsageError) as error:
        check(settings)
    assert words in str(error.value)
    assert out in str(error.value)


def test_training_does_not_make_a_folder_of_a_url_s_name() -> None:
    with pytest.raises(UsageError, match="training writes to a local folder"):
        TrainConfig(out=Path("s3://bucket/run"))


def test_google_s_scheme_is_taken() -> None:
    settings = Config(output=dataclasses.replace(Config().output, out="gs://bucket/run/"))
    check(settings)
    assert str(settings.run_dir / "weights") == "gs://bucket/run/weights"


def test_adopting_files_into_a_url_is_refused(tmp_path: Path) -> None:
    with TarWriter(tmp_path / "a.tar") as tar:
        tar.write("1.png", png(np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(UsageError, match=r"--source tars adopts .* only image files .*parquet are written"):
        prepare(Recipe("tars", (str(tmp_path),)), "s3://bucket/pool")


def test_a_full_temporary_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/shm")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("miner.files.upload", full)
    with pytest.raises(MinerError, match=r"/dev/shm \(\$TMPDIR\): disk full"):
        write_file(place(f"{BUCKET}/x"), b"")
