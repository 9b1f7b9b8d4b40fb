"""The package as other projects use it: small imports, reading without Ray or torch, streams that resume, the wheel."""

import doctest
import io
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from miner import Pool, Subset, load_subset
from miner.build import write_arrays_pool
from miner.errors import UsageError
from miner.subset import write_subset
from miner.weights import ShardState, final_table, write_arrow

ROOT = Path(__file__).resolve().parent.parent
IMAGES = np.random.default_rng(5).integers(0, 256, (20, 8, 8, 3), np.uint8)
DOCUMENTED = ("miner", "miner.subset", "miner.stream", "miner.weights", "miner.pool", "miner.mining")
WORKERS = "ignore:This DataLoader will create:UserWarning"
VITAL = "ignore:'set_vital' is deprecated:UserWarning"  # torchdata 0.11 with torch 2.15


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pool of 20 images, a finished run whose weights rise with the row, and two subsets of it."""
    home = tmp_path_factory.mktemp("home")
    pool = write_arrays_pool(str(home / "pools" / "letters"), "letters", IMAGES, np.arange(20) % 2, ["a", "b"])
    (home / "runs" / "demo" / "weights").mkdir(parents=True)
    tables, edges = [], pool.edges
    for shard, entry in enumerate(pool.shards):
        state = ShardState.fresh("uniform", entry.count)
        rows = np.arange(edges[shard], edges[shard + 1])
        state.columns["state"][:] = rows + 1
        tables.append(final_table(pool.shard_index(shard), state, 1 / 10.5, 19 - rows, {"format": "1"}))
        write_arrow(tables[-1], home / "runs" / "demo" / "weights" / f"shard-{shard:06d}.arrow")
    ranked = pa.concat_tables(tables).sort_by("rank")
    for gamma, count in ((0.1, 2), (0.95, 19)):
        folder = home / "runs" / "demo" / f"subset-{gamma}"
        write_subset(pool, ranked.slice(0, count), folder, {"gamma": gamma, "draw": "rank"}, lambda images: None)
    return home


@pytest.fixture
def subset(home: Path) -> Subset:
    return load_subset(home / "runs" / "demo" / "subset-0.95")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_the_documentation_shows_is_so(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(home)
    said = io.StringIO()
    with redirect_stdout(said):
        failed, tried = doctest.testmod(import_module(name))
    assert failed == 0, said.getvalue()
    assert tried > 0


# --- what is imported ---

READ = """
import sys
sys.modules |= dict.fromkeys(("ray", "faiss", "torch", "torchvision", "pandas", "sklearn", "matplotlib"))  # blocks them
import miner
from miner import Pool, load_subset, load_weights
subset = load_subset("runs/demo/subset-0.95", transform=lambda image: image.size)
assert subset[0] == ((8, 8), -1), subset[0]
assert subset.encoded(0)[1:4] == b"PNG"
subset.verify()
assert len(subset.uids) == len(subset) == 19
assert load_weights("runs/demo").num_rows == 20
pool = Pool.open("pools/letters")
assert len(pool.read(0, range(5))) == 5
pool.verify()
print(miner.__file__)
"""


def test_reading_needs_neither_ray_nor_torch(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, cwd=home, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import miner; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names} == {"miner"}


def test_every_exported_name_is_there() -> None:
    import miner

    assert all(getattr(miner, name).__module__.startswith("miner.") for name in miner.__all__)
    assert miner.mine is import_module("miner.mining").mine
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        miner.nothing  # noqa: B018


# --- streams ---


def first_bytes(item: tuple[torch.Tensor, int]) -> int:
    return int(item[0].reshape(-1)[:6].to(torch.int64).dot(256 ** torch.arange(6)))


def shown(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[list[int]]:
    return [[first_bytes((image, -1)) for image in images] for images, _ in batches]


@pytest.mark.parametrize("seed", [None, 7])
def test_a_plain_loop_goes_on_where_it_was_left(subset: Subset, seed: int | None) -> None:
    whole = [first_bytes(item) for item in subset.stream(seed)]
    assert sorted(whole) == sorted(first_bytes(subset[i]) for i in range(19))
    for stop in (0, 1, 7, 18, 19):
        stream = subset.stream(seed)
        begun = [first_bytes(item) for item in itertools.islice(stream, stop)]
        state = json.loads(json.dumps(stream.state_dict()))
        other = subset.stream(seed)
        other.load_state_dict(state)
        assert begun + [first_bytes(item) for item in other] == whole
        assert [first_bytes(item) for item in other] == whole  # the pass after it is a whole one


def test_orders_belong_to_seed_and_epoch(subset: Subset) -> None:
    def order(seed: int | None, epoch: int) -> list[int]:
        stream = subset.stream(seed)
        stream.set_epoch(epoch)
        return [first_bytes(item) for item in stream]

    assert order(None, 0) == order(None, 1) == [first_bytes(subset[i]) for i in range(19)]
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in orders}) == 4
    assert order(1, 1) == orders[3]


def test_states_of_something_else_are_refused(home: Path, subset: Subset) -> None:
    state = subset.stream(1).state_dict()
    with pytest.raises(UsageError, match="of another subset or of another seed"):
        subset.stream(2).load_state_dict(state)
    with pytest.raises(UsageError, match="of another subset or of another seed"):
        load_subset(home / "runs" / "demo" / "subset-0.1").stream(1).load_state_dict(state)
    with pytest.raises(UsageError, match="not the state of a stream"):
        subset.stream(1).load_state_dict({"given": 3})
    stream = subset.stream(1)
    stream.load_state_dict(state | {"worker": 1, "workers": 2})
    with pytest.raises(UsageError, match="this state is of one of 2 workers, not 1"):
        iter(stream)


@pytest.mark.filterwarnings(WORKERS)
@pytest.mark.filterwarnings(VITAL)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_in_the_middle_of_an_epoch(subset: Subset, workers: int) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(subset.stream(seed=3), batch_size=4, num_workers=workers)

    whole = shown(loader())
    assert sorted(itertools.chain(*whole)) == sorted(first_bytes(subset[i]) for i in range(19))
    begun = loader()
    passing = iter(begun)
    batches = shown(itertools.islice(passing, 3))
    state = begun.state_dict()
    other = loader()
    other.load_state_dict(state)
    assert batches + shown(iter(other)) == whole
    assert shown(iter(other)) == whole


@pytest.mark.filterwarnings(WORKERS)
def test_workers_that_stay_hear_of_the_next_epoch(subset: Subset) -> None:
    def order(epoch: int) -> list[int]:
        stream.set_epoch(epoch)
        return [first_bytes(item) for item in loader]

    stream = subset.stream(seed=3)
    loader: Iterable[tuple[torch.Tensor, int]] = stream
    plain = [order(epoch) for epoch in (0, 1)]
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    assert [order(epoch) for epoch in (0, 1)] == plain


@pytest.mark.filterwarnings(WORKERS)
def test_loaders_take_the_subset_map_style_and_joined_to_others(subset: Subset) -> None:
    images = list(itertools.chain(*shown(iter(DataLoader(subset, batch_size=4, num_workers=2)))))
    assert images == [first_bytes(subset[i]) for i in range(19)]
    assert len(subset + subset) == 38
    assert first_bytes((subset + subset)[19]) == images[0]
    known = torch.utils.data.TensorDataset(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    assert [int((known + subset)[i][1]) for i in (2, 3)] == [2, -1]


# --- the wheel, and its use elsewhere ---


def test_the_wheel_holds_all_packages_and_reads_by_itself(home: Path, tmp_path: Path) -> None:
    for name in ("miner", "trainers", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path / "tree", check=False)
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    files = [path for package in ("miner", "trainers", "pipelines") for path in (ROOT / package).rglob("*")]
    assert names == {str(path.relative_to(ROOT)) for path in files if path.suffix in (".py", ".typed")}
    assert "miner/py.typed" in names
    elsewhere = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    words = [sys.executable, "-P", "-c", READ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=home, env=elsewhere, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed" / "miner"))


def test_the_example_trains_with_pytorch_ood(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, image in enumerate(IMAGES[:4]):
        os.makedirs(tmp_path / "known" / f"class{i % 2}", exist_ok=True)
        Image.fromarray(image).save(tmp_path / "known" / f"class{i % 2}" / f"{i}.png")
    example = ROOT / "examples" / "oe_pytorch_ood.py"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "known"), str(home / "runs" / "demo" / "subset-0.1")])
    torch.manual_seed(0)
    runpy.run_path(str(example))
    said = capsys.readouterr().out
    assert said.endswith(" on 2 outliers and 4 known images\n")
    assert 0 < float(said.split()[1]) < 10
    assert len(example.read_text().partition("scale = ")[2].splitlines()) <= 15


def test_a_pool_is_read_by_a_plain_loop(home: Path) -> None:
    pool = Pool.open(str(home / "pools" / "letters"))
    encoded = [data for shard, entry in enumerate(pool.shards) for data in pool.read(shard, range(entry.count))]
    assert np.array_equal(np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in encoded]), IMAGES)
