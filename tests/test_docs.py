"""Documents that repeat the code say what it says: flags, columns, modules, links."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_columns_are_the_documented_ones(generate: ModuleType) -> None:
    """A change to a table that others read is deliberate: run `make docs`, and say it in CHANGELOG.md."""
    text = (ROOT / "docs" / "formats.md").read_text()
    assert generate.formats(text) == text


def documented() -> dict[str, str]:
    """What docs/commands.md shows of each command."""
    text = (ROOT / "docs" / "commands.md").read_text()
    return dict(re.findall(r"^## python -m pipelines\.(\w+)\n\n```text\n(.*?)^```", text, re.M | re.S))


def test_flags_are_the_documented_ones(generate: ModuleType) -> None:
    """Likewise; the words of the help may differ with the version of what draws it."""
    assert sorted(documented()) == generate.commands()
    for name, text in documented().items():
        found, wanted = (re.findall(r"^[│ ]*(--[a-z][a-z0-9.-]*)", t, re.M) for t in (generate.shown(name), text))
        assert found == wanted, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_have_the_flags_that_are_shown_with_them(path: Path) -> None:
    text = re.sub(r"\\\n\s*", "", path.read_text())  # lines that go on
    for name, rest in re.findall(r"python -m pipelines\.(\w+)([^`\n&|]*)", text):
        for flag in re.findall(r" (--[a-z][a-z.-]*)", rest):
            assert re.search(rf"^[│ ]*{flag}\b", documented()[name], re.M) or flag == "--help", (name, flag)


def test_the_architecture_names_every_module_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in ("miner", "trainers", "pipelines"):
        section = re.search(rf"^## `{package}/`.*?(?=^## |\Z)", text, re.M | re.S)
        assert section is not None, package
        named = set(re.findall(r"`(\w+)\.py`", section[0]))
        there = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        assert named == there, (package, named ^ there)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
