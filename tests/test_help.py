"""What a command imports before it knows what it is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = sorted(
    path.stem
    for path in (Path(__file__).resolve().parent.parent / "pipelines").glob("*.py")
    if "cli.run(main)" in path.read_text()
)
SHOW = """
import runpy, sys
sys.argv = [{name!r}, "--help"]
try:
    runpy.run_module({name!r}, run_name="__main__")
except SystemExit:
    print(sorted({{"torch", "ray", "faiss", "torchvision", "sklearn"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_waits_for_no_large_library(name: str) -> None:
    words = [sys.executable, "-c", SHOW.format(name=f"pipelines.{name}")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_there_are_commands() -> None:
    assert {"resample", "train", "report", "agree"} <= set(COMMANDS)
