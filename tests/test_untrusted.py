"""Nothing that is read is trusted: fuzzed readers, pickles, bombs, pipes, false manifests, open ports.

`python -m benchmarks.fuzz` runs the same trials by the hundred thousand.
"""

import ast
import contextlib
import gzip
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.sound import IMAGES, MAKERS, sound
from benchmarks.fuzz.trial import Violation, attempt, spoiled
from miner import cache
from miner.build import run_job, write_arrays_pool
from miner.errors import MinerError
from miner.images import decode, dimensions, png
from miner.pool import Pool, uid_of
from miner.recipe import Recipe
from miner.run_dir import RunDir, write_file
from miner.sources import plan
from miner.subset import load_subset
from miner.tars import TarWriter, read_samples
from miner.weights import load_weights
from trainers.checkpoint import load_checkpoint
from trainers.data import load_id
from trainers.read import npy, tar_images
from trainers.sets import open_images

ROOT = Path(__file__).resolve().parent.parent


# --- fuzzing ---


@pytest.mark.parametrize("kind", MAKERS)
def test_sound_inputs_are_accepted(tmp_path: Path, kind: str) -> None:
    assert attempt(kind, sound(kind), tmp_path / "fuzz") == "accepted"


@pytest.mark.parametrize("kind", MAKERS)
def test_spoiled_inputs_are_accepted_quarantined_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "fuzz"
    verdicts = []

    @settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32 - 1))
    def trial(seed: int) -> None:
        verdicts.append(attempt(kind, spoiled(Random(seed), kind), folder))

    trial()
    assert len(verdicts) >= 40
    assert {"refused", "quarantined"} & set(verdicts)


def test_a_trial_notices_what_it_is_there_to_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sound("npy")

    def failing(act: object) -> None:
        monkeypatch.setitem(attempt.__globals__["READERS"], "npy", act)
        with pytest.raises((Violation, ZeroDivisionError, MemoryError)):
            attempt("npy", files, tmp_path / "fuzz")

    def refuse(text: str) -> object:
        def act(root: Path) -> int:
            raise MinerError(text.format(root=root))

        return act

    failing(refuse("no file is named"))
    failing(lambda root: 1 // 0)
    failing(lambda root: len(Path("/etc/passwd").read_bytes()))
    failing(lambda root: (root / "../outside/new").write_bytes(b"x"))
    failing(lambda root: os.system("true"))
    failing(lambda root: pickle.loads(pickle.dumps(Path("x"))) and 0)
    failing(lambda root: len(bytearray(4 << 30)))
    monkeypatch.setitem(attempt.__globals__, "SECONDS", 0.1)
    failing(lambda root: time.sleep(5) or 0)


def test_messages_are_one_printable_line_of_bounded_length() -> None:
    text = str(MinerError("a\nb\x1b[2J\u202e \udcff" + "x" * 10_000 + " do this"))
    assert text.startswith("a b\\x1b[2J\\u202e \\udcffxxx")
    assert text.isprintable()
    assert len(text) < 1600
    assert text.endswith("do this")


# --- code ---


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = pickle.dumps(Payload(marker))
    pickle.loads(code)
    marker.rmdir()  # it does work
    np.save(tmp_path / "x.npy", np.array([Payload(marker)], object), allow_pickle=True)
    (tmp_path / "y.npy").write_bytes(code)
    np.savez(tmp_path / "z.npz", a=np.array([Payload(marker)], object), allow_pickle=True)
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    for name in "xyz":
        with pytest.raises(MinerError, match=rf"{name}\.npy"):
            npy(tmp_path / f"{name}.npy")
        with pytest.raises(MinerError, match=rf"{name}\.npy"):
            plan(Recipe("npy", (str(tmp_path / f"{name}.npy"),)))
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "old.safetensors")
    (tmp_path / "new.safetensors").write_bytes(code)
    (tmp_path / "x.pth").write_bytes(code)
    for name in ("old.safetensors", "new.safetensors", "x.pth"):
        with pytest.raises(MinerError, match="a pickle, which can run code"):
            load_checkpoint(tmp_path / name)
    for ext in ("pyd", "pkl", "pickle", "pth", "pt", "a.pkl", "PKL"):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
            (tmp_path / "code").write_bytes(code)
            tar.add(tmp_path / "code", f"a.{ext}")
        for read in (lambda: read_samples(tmp_path / "x.tar"), lambda: open_images(str(tmp_path / "x.tar"), 8)):
            with pytest.raises(MinerError, match="refused: a pickle"):
                read()
    assert not marker.exists()


BANNED_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml", "webdataset", "ray.data"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "torch.jit.load", "torch.hub.load",
    "pickle.load", "pickle.loads", "yaml.load", "shutil.unpack_archive", "ray.cloudpickle.loads",
}  # fmt: skip


def offences(source: str) -> list[str]:
    """Calls and imports by which data could become code, or leave its folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in modules if {name, name.partition(".")[0]} & BANNED_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {word.arg: ast.unparse(word.value) for word in node.keywords}
        last = name.rpartition(".")[2]
        bad = name in BANNED_CALLS or last in ("extractall", "extract") or flags.get("shell") == "True"
        bad |= name in ("np.load", "numpy.load") and flags.get("allow_pickle") != "False"
        bad |= last != "load" and flags.get("allow_pickle") == "True"
        found += [name] if bad else []
    return found


def test_no_data_becomes_code_anywhere() -> None:
    paths = [path for package in ("miner", "trainers", "pipelines") for path in (ROOT / package).rglob("*.py")]
    assert len(paths) > 60
    assert {str(path): found for path in paths if (found := offences(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "import webdataset as wds",
        "import ray.data",
        "eval('1')",
        "torch.load(x, weights_only=True)",
        "tar.extractall(path)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_offences_are_found(source: str) -> None:
    assert len(offences(source)) == 1
    assert offences("np.load(x, allow_pickle=False); net.eval(); b''.decode(); import json") == []


# --- bombs ---


def png_of(width: int, height: int) -> bytes:
    """A sound one-bit PNG, all black."""
    row = 1 + -(-width // 8)
    packer = zlib.compressobj(9)
    body = b"".join([packer.compress(bytes(row * 256)) for _ in range(height // 256)] + [packer.flush()])
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize("side", [16_384, 10_240, 8_192])
def test_a_pixel_bomb_is_quarantined_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], side: int) -> None:
    bomb = png_of(side, side)
    assert len(bomb) < 100_000
    start = time.process_time()
    with pytest.raises(ValueError, match=r"DecompressionBomb|at most 64000000"):
        decode(bomb, 32)
    assert dimensions(bomb) == (0, 0)
    with TarWriter(tmp_path / "x.tar") as tar:
        tar.write("bomb.png", bomb)
        tar.write("good.png", png(IMAGES[0]))
    (images,) = open_images(str(tmp_path / "x.tar"), 8)
    assert images.keys == ["good"]
    assert "1 of 2 images do not decode and are left out (bomb: " in capsys.readouterr().err
    assert time.process_time() - start < 2
    assert decode(png_of(2_048, 2_048), 32).max() == 0


def test_a_gzip_bomb_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar.gz").write_bytes(gzip.compress(bytes(80 << 20), 9))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(MinerError, match=r"x\.tar\.gz: expands past 67108864 bytes"):
        next(iter(tar_images(tmp_path / "in" / "x.tar.gz")))
    (job,) = plan(Recipe("tars", (str(tmp_path / "in"),))).jobs
    with pytest.raises(MinerError, match=r"x\.tar\.gz: expands past"):
        run_job(str(tmp_path / "temporary"), job)
    assert os.listdir(tmp_path / "temporary") == []


def test_pipes_in_place_of_files_are_refused_without_waiting(tmp_path: Path) -> None:
    pool = write_arrays_pool(str(tmp_path / "pool"), "tiny", IMAGES, None, [], shard_count=1)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("x.tar", "x.tar.gz", "x.npy", "images/sub/x.png", "classes.json"):
        os.mkfifo(tmp_path / name)
    for path in (Path(pool.shards[0].path), Path(pool.path, "pool.json")):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(MinerError, match="no regular file"):
            Pool.open(pool.path)
    for read in (
        lambda: read_samples(tmp_path / "x.tar"),
        lambda: next(tar_images(tmp_path / "x.tar.gz")),
        lambda: npy(tmp_path / "x.npy"),
        lambda: plan(Recipe("npy", (str(tmp_path / "x.npy"),))),
    ):
        with pytest.raises(MinerError, match="no regular file"):
            read()
    with pytest.raises(MinerError, match="no images"):
        open_images(str(tmp_path / "images"), 8)
    with pytest.raises(MinerError, match="no images"):
        plan(Recipe("folder", (str(tmp_path / "images"),)))
    for half in ("train", "test"):
        shutil.copy(sound_tar(tmp_path), tmp_path / f"{half}-0.tar")
    with pytest.raises(MinerError, match=r"classes\.json: no regular file"):
        load_id(str(tmp_path), 8)


def sound_tar(folder: Path) -> Path:
    (folder / "sound").write_bytes(sound("tar")["x.tar"])
    return folder / "sound"


def test_arrow_offsets_that_point_anywhere_are_not_followed(tmp_path: Path) -> None:
    data = sound("weights")["in/weights/shard-000000.arrow"]
    offsets = [32 * i for i in range(7)]
    at = data.index(struct.pack("<7i", *offsets))
    offsets[3] = 1 << 30
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / "shard-000000.arrow"
    path.write_bytes(data[:at] + struct.pack("<7i", *offsets) + data[at + 28 :])
    with pytest.raises(MinerError, match=r"shard-000000\.arrow: cannot be read as Arrow"):
        load_weights(tmp_path)


# --- what a pool or subset made elsewhere may name ---


def manifest(pool: Pool, **changes: object) -> None:
    path = Path(pool.path, "pool.json")
    content = json.loads(path.read_text())
    shards = [content["shards"][0] | changes, *content["shards"][1:]]
    path.write_text(json.dumps(content | {"shards": shards}))


@pytest.mark.parametrize("kind", ["tar", "raw"])
def test_a_pool_cannot_pass_off_another_file_as_its_images(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"password" * 8192)
    size = secret.stat().st_size
    pool = write_arrays_pool(str(tmp_path / "pool"), "tiny", IMAGES[:2], None, [], shard_count=1)
    raw = {"record_shape": [8, 8, 3], "bytes": 2 * 192} if kind == "raw" else {"bytes": size}
    manifest(pool, path=str(secret), file_bytes=size, kind=kind, **raw)
    opened = Pool.open(pool.path)  # an adopted shard lies anywhere on this machine
    with pytest.raises(MinerError, match=r"secret: image 0 changed since the pool was made"):
        opened.read(0, [0, 1])
    if kind == "tar":
        with pytest.raises(MinerError, match=r"secret: image 0 changed"):
            cache.open_shard(opened, 0, 8)
        assert not list((tmp_path / "pool" / "cache").rglob("*.npy"))


def test_images_are_read_when_their_uids_agree(tmp_path: Path) -> None:
    pool = write_arrays_pool(str(tmp_path / "pool"), "tiny", IMAGES, None, [], shard_count=1)
    elsewhere = tmp_path / "elsewhere.tar"
    Path(pool.shards[0].path).rename(elsewhere)
    manifest(pool, path=str(elsewhere))
    opened = Pool.open(pool.path)
    assert [uid_of(data) for data in opened.read(0, [5, 0])] == [opened.index()["uid"][i].as_py() for i in (5, 0)]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Pool]:
    pool = write_arrays_pool(str(tmp_path / "pool"), "tiny", IMAGES, None, [], shard_count=1)
    yield pool
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm("/far", recursive=True)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("000000.tar", True),
        ("memory://far/000000.tar", True),
        ("/etc/passwd", False),
        ("memory://other/000000.tar", False),
        ("memory://far/../other/000000.tar", False),
        ("memory://far//etc/passwd", False),
        ("../other/000000.tar", False),
        ("file:///etc/passwd", False),
        ("pipe:touch ran", False),
        ("simplecache::memory://far/000000.tar", False),
    ],
)
def test_a_remote_pool_names_only_what_lies_beneath_it(remote: Pool, path: str, allowed: bool) -> None:
    manifest(remote, path=path)
    memory = fsspec.filesystem("memory")
    for name in os.listdir(remote.path):
        memory.pipe(f"/far/{name}", Path(remote.path, name).read_bytes())
    if allowed:
        assert len(Pool.open("memory://far").read(0, [0])) == 1
        return
    with pytest.raises(MinerError, match=r"pool\.json: damaged manifest .*refused"):
        Pool.open("memory://far")


def test_a_fingerprint_cannot_lead_the_cache_elsewhere(remote: Pool) -> None:
    path = Path(remote.path, "pool.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "../../outside"}))
    with pytest.raises(MinerError, match=r"fingerprint '\.\./\.\./outside' is no hash"):
        Pool.open(remote.path)


@pytest.mark.parametrize("name", ["../../x.jpg", "/x.jpg", "a\nb.jpg", "x.pkl", "x.features.PTH"])
def test_keys_that_our_reader_refuses_are_not_written(tmp_path: Path, name: str) -> None:
    with TarWriter(tmp_path / "x.tar") as tar, pytest.raises(MinerError, match=r"x\.tar: member .* refused"):
        tar.write(name, b"1")


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "manifest.parquet"])
def test_a_subset_names_only_its_own_tars(tmp_path: Path, name: str) -> None:
    for file, data in sound("subset").items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    folder = tmp_path / "in"
    assert len(load_subset(folder)[0][0]) == 3
    table = pq.read_table(folder / "manifest.parquet")
    at = table.schema.get_field_index("tar")
    pq.write_table(table.set_column(at, table.schema.field(at), [[name] * len(table)]), folder / "manifest.parquet")
    with pytest.raises(MinerError, match="no tar of this subset"):
        load_subset(folder)
    recipe = json.loads((folder / "subset.json").read_text())
    recipe["tars"][0]["name"] = name
    (folder / "subset.json").write_text(json.dumps(recipe))
    with pytest.raises(MinerError, match=r"subset\.json: damaged"):
        load_subset(folder)


@pytest.mark.parametrize("name", ["../../config.json", "/etc/passwd", "..", "", "a\0b", "x" * 300])
def test_a_commit_names_only_files_of_its_round(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path)
    write_file(run.round(3) / "round.json", b"{}")
    run.commit(3)
    assert run.verified(3) == run.round(3)
    (run.round(3) / "COMMITTED").write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(MinerError, match="COMMITTED: damaged"):
        run.verified(3)


def spoil(path: Path, how: str) -> None:
    """Another program's idea of a COMMITTED."""
    path.unlink()
    if how == "folder":
        (path / "sub").mkdir(parents=True)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    "how", ["folder", "pipe", "", "[" * 100_000, "[1]", "3", '{"/etc/passwd": ""}', '{"round.json": 3}']
)
def test_a_commit_that_makes_no_sense_is_gone_back_behind(tmp_path: Path, how: str) -> None:
    run = RunDir(tmp_path)
    for round_ in (3, 4):
        write_file(run.round(round_) / "round.json", b"{}")
        run.commit(round_)
    spoil(run.round(4) / "COMMITTED", how)
    assert run.last_sound() == 3
    assert run.committed() == [3]
    assert len(run.notes) == 1
    assert "going back behind round 5" in run.notes[0]


@pytest.mark.parametrize("how", ["folder", "pipe"])
def test_what_a_commit_names_must_be_a_file(tmp_path: Path, how: str) -> None:
    run = RunDir(tmp_path)
    write_file(run.round(3) / "round.json", b"{}")
    run.commit(3)
    spoil(run.round(3) / "round.json", how)
    with pytest.raises(MinerError, match=r"round\.json: changed since it was committed"):
        run.verified(3)


def test_a_checkpoint_that_is_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "checkpoint.safetensors")
    for path in (tmp_path, tmp_path / "checkpoint.safetensors"):
        with pytest.raises(MinerError, match=r"checkpoint\.safetensors: no such checkpoint file"):
            load_checkpoint(path)


@pytest.fixture
def far() -> Iterator[Callable[[str], str]]:
    """Puts a sound input of a kind at a URL, and says which."""
    memory = fsspec.filesystem("memory")

    def put(kind: str) -> str:
        for name, data in sound(kind).items():
            memory.pipe(f"/far/{name}", data)
        return "memory://far/in"

    yield put
    with contextlib.suppress(FileNotFoundError):
        memory.rm("/far", recursive=True)


@pytest.mark.parametrize(
    ("kind", "name", "data", "read", "told"),
    [
        ("subset", "subset.json", b"[" * 100_000, load_subset, "not JSON that can be read"),
        ("subset", "subset.json", b'{"format": "outlier-miner/subset", "version": 1}', load_subset, "damaged"),
        ("subset", "manifest.parquet", b"PAR1", load_subset, "cannot be"),
        ("subset", "outliers-000000.tar", b"short", lambda url: load_subset(url).encoded(3), "wanted at byte"),
        ("subset", "outliers-000000.tar", None, lambda url: load_subset(url).encoded(3), "missing"),
        ("weights", "weights/shard-000000.arrow", b"ARROW1", load_weights, "cannot be read as Arrow"),
        ("pool", "pool.json", b"{", Pool.open, "not JSON"),
        ("pool", "000000.tar", None, lambda url: Pool.open(url).read(0, [0]), "missing"),
        ("pool", "000000.tar", None, lambda url: Pool.open(url).verify(), "missing"),
        ("pool", "index.parquet", b"PAR1", Pool.open, "cannot be|damaged"),
    ],
)
def test_what_lies_at_a_url_is_trusted_no_more(
    far: Callable[[str], str], kind: str, name: str, data: bytes | None, read: Callable[[str], object], told: str
) -> None:
    url, memory = far(kind), fsspec.filesystem("memory")
    memory.rm(f"/far/in/{name}")
    if data is not None:
        memory.pipe(f"/far/in/{name}", data)
    with pytest.raises(MinerError, match=rf"^{url}/{name}: .*({told})") as error:
        read(url)
    assert len(str(error.value)) < 1600


def test_arrow_offsets_at_a_url_are_not_followed(far: Callable[[str], str]) -> None:
    url, memory = far("weights"), fsspec.filesystem("memory")
    data = memory.cat("/far/in/weights/shard-000000.arrow")
    at = data.index(struct.pack("<7i", *range(0, 224, 32)))
    memory.pipe("/far/in/weights/shard-000000.arrow", data[: at + 12] + struct.pack("<i", 1 << 30) + data[at + 16 :])
    with pytest.raises(MinerError, match=r"shard-000000\.arrow: cannot be read as Arrow"):
        load_weights(url)


@pytest.mark.parametrize("label", [2**31 - 1, 1_000_000, -2])
def test_labels_that_would_make_huge_tables_are_refused(tmp_path: Path, label: int) -> None:
    with TarWriter(tmp_path / "x.tar") as tar:
        tar.write("a.png", png(IMAGES[0]))
        tar.write("a.cls", str(label).encode())
    with pytest.raises(MinerError, match=r"'a\.cls' at byte \d+: .* is no label"):
        read_samples(tmp_path / "x.tar")
    with pytest.raises(MinerError, match=r"index\.parquet: column label is not a pool index's"):
        write_arrays_pool(str(tmp_path / "pool"), "tiny", IMAGES, [label] * 6, [], shard_count=1).index()


# --- ports ---

DRIVER = """
import os, sys, time
import ray
from miner.rays import connect

connect(None, num_cpus=1)
ray.get(ray.remote(lambda: 0).remote())
print("GCS", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


def family(pid: int) -> set[int]:
    """A process and its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> list[str]:
    """Hexadecimal addresses, "address:port", at which these processes listen."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets]


LOOPBACK = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")


def test_a_private_ray_listens_on_loopback_and_asks_for_a_token(tmp_path: Path) -> None:
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    env = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        name, address = driver.stdout.readline().split()
        assert name == "GCS"
        found = listening(family(driver.pid))
        assert len(found) >= 6  # gcs_server, raylet twice, agents, a worker, the driver
        assert [where for where in found if not where.startswith(LOOPBACK)] == []
        token = tmp_path / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        ask = f"from ray._raylet import GcsClient; GcsClient(address={address!r})"
        command, without = [sys.executable, "-c", ask], env | {"RAY_AUTH_MODE": "disabled"}
        asked = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
        assert asked.returncode == 1
        assert "InvalidAuthToken" in asked.stderr
    finally:
        driver.communicate(timeout=60)
