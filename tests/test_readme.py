"""Every block of the README is run as it is pasted, in the order in which a newcomer meets them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
SETUP = "python3 -m pipelines.setup && "  # the tests run in what it has made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a newcomer stands: the checkout, but for what earlier runs have left there."""
    home = tmp_path_factory.mktemp("home")
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "pools"):
            (home / entry.name).symlink_to(entry)
    (home / "pools").mkdir()
    return home


def paste(home: Path, text: str) -> str:
    """Run a block and return what it printed."""
    command = text.replace(SETUP, "").replace(".venv/bin/python", "python")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # an activated environment
    names = {"PATH": path, "OUTLIER_POOLS": str(home / "pools")}
    words = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(words, cwd=home, env=os.environ | names, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_blocks_are_those_that_are_run_here() -> None:
    starts = [(kind, text.split()[2] if kind == "bash" else text.split()[0]) for kind, text in BLOCKS]
    first = "pipelines.setup"
    rest = [("python", "from"), ("bash", "pipelines.export"), ("bash", "pipelines.audit")]
    assert starts == [("bash", first), ("bash", first), *rest]
    assert BLOCKS[1][1] == SETUP + ".venv/bin/python -m pytest\n"  # what runs this


@pytest.fixture(scope="module")
def demo(home: Path) -> str:
    """The first block's output."""
    return paste(home, BLOCKS[0][1])


def test_the_demo_shows_a_result_worth_looking_at(home: Path, demo: str) -> None:
    assert (home / "runs" / "demo" / "report.html").stat().st_size > 100_000
    words = " ".join(demo.split())
    near, mined, random = (
        float(re.search(pattern, words)[1])  # type: ignore[index]
        for pattern in (r"and (\d+)% of the mined subset", r"mean AUROC of (0\.\d+)", r"as many random ones, (0\.\d+)")
    )
    assert near > 15  # 9 by chance
    assert mined > random + 0.01


def test_reading_as_shown(home: Path, demo: str) -> None:
    code = BLOCKS[2][1] + "\nprint(len(subset), subset[0][1], sum(1 for _ in stream))"
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["210", "-1", "210"]


def test_rehydrating_as_shown(home: Path, demo: str) -> None:
    (home / "pools" / "imagenet").symlink_to(home / "runs" / "demo" / "demo-pool")
    paste(home, "python -m pipelines.export runs/demo --gamma 0.01 --format manifest --out manifest-0.01")
    paste(home, BLOCKS[3][1])
    tar = "outliers-000000.tar"
    assert (home / "subset-0.01" / tar).read_bytes() == (home / "runs" / "demo" / "subset-0.01" / tar).read_bytes()


def test_an_audit_as_shown(home: Path, demo: str) -> None:
    assert "audit.html" in paste(home, BLOCKS[4][1])
