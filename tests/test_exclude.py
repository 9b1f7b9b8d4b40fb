"""Taking images out of a finished run: the table, every subset, and a kill between any two writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from miner import exclude as module
from miner.build import write_arrays_pool
from miner.errors import MinerError, UsageError
from miner.exclude import exclude, read_list
from miner.export import export
from miner.pool import Pool
from miner.run_dir import write_json
from miner.subset import load_subset, write_subset
from miner.weights import ShardState, excluded_counts, final_table, load_weights, write_arrow
from pipelines.exclude import exclude_and_report, listed, of_classes

ROOT = Path(__file__).resolve().parent.parent
COUNT, N = 200, 200
GAMMAS = (0.1, 0.5)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over a pool of 200 images in three shards, with two subsets and 20 rows near ID."""
    folder, rng = tmp_path_factory.mktemp("exclude"), np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    pool = write_arrays_pool(str(folder / "pool"), "p", images, np.arange(COUNT) % 4, ("fox", "owl", "elk", "newt"), 3)
    manifest = json.loads((folder / "pool" / "pool.json").read_text())
    info = [{"name": name, "wnid": f"n0000000{i}"} for i, name in enumerate(pool.classes)]
    write_json(folder / "pool" / "pool.json", manifest | {"class_info": info})
    run = folder / "run"
    (run / "weights").mkdir(parents=True)
    rank = rng.permutation(COUNT - 20)
    first = 0
    for number, shard in enumerate(pool.shards):
        state = ShardState.fresh("paper", shard.count)
        state["state"][:] = rng.lognormal(size=shard.count)
        state.exclude(np.arange(0, shard.count, 10), "near-id")
        own = np.zeros(shard.count, np.uint64)
        kept = int(state.eligible.sum())
        own[state.eligible] = rank[first : first + kept]
        first += kept
        table = final_table(pool.shard_index(number), state, 0.5, own, {"run_id": "r"})
        write_arrow(table, run / "weights" / f"shard-{number:06d}.arrow")
    assert first <= len(rank)
    return run


def finished(made: Path, folder: Path, draw: str = "rank") -> Path:
    """A copy of the run with its ranks closed, its subsets and its summary."""
    run = folder / "run"
    shutil.copytree(made, run)
    table = load_weights(run)
    order = pc.rank(pc.fill_null(table["rank"], 2**63), tiebreaker="first").to_numpy() - 1
    ends = [0]
    for number in range(3):
        part = table.filter(pc.equal(table["shard"], number))
        own = order[ends[-1] : ends[-1] + len(part)].astype(np.uint64)
        column = pa.array(own, mask=part["rank"].is_null().to_numpy())
        place = table.schema.get_field_index("rank")
        part = part.set_column(place, table.schema.field(place), column)
        part = part.replace_schema_metadata({"run_id": "r", "draw": draw})
        write_arrow(part, run / "weights" / f"shard-{number:06d}.arrow")
        ends.append(ends[-1] + len(part))
    table, pool = load_weights(run), Pool.open(str(made.parent / "pool"))
    rows, subsets = module.rows_of(table), {}
    for gamma in GAMMAS:
        recipe: dict[str, Any] = {"gamma": gamma, "n": N, "draw": draw, "settings": {"data": {"seed": 5}}}
        size = module._size(rows, recipe, "")
        chosen = table.filter(pc.less(table["rank"], pa.scalar(size, pa.uint64()))).sort_by("rank")
        figures = {"clipped_share": 0.0, "effective_sample_size": 0.0, "classes": {}}
        done = write_subset(pool, chosen, run / f"subset-{gamma:g}", recipe | figures, lambda count: None)
        subsets[f"subset-{gamma:g}"] = {name: done[name] for name in ("gamma", "count", *list(figures)[:2])}
    told = {"pool_path": pool.path, "n": N, "excluded": excluded_counts(table), "subsets": subsets}
    write_json(run / "summary.json", told)
    return run


def silent(line: str) -> None:
    """Nobody listens."""


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_subsets_are_filled_up_from_the_ranking(made: Path, tmp_path: Path) -> None:
    run = finished(made, tmp_path)
    before = load_weights(run)
    ranked = before.filter(before["excluded_by"].is_null()).sort_by("rank")["uid"].to_pylist()
    gone = dict.fromkeys(ranked[3:30:3], "audit:test") | {ranked[-1]: "opt-out"}
    near = before.filter(before["excluded_by"].is_valid())["uid"][0].as_py()
    summary = exclude(run, gone | {near: "opt-out"}, silent)
    left = [uid for uid in ranked if uid not in gone]
    for gamma, size in zip(GAMMAS, (20, 100), strict=True):
        subset = load_subset(run / f"subset-{gamma:g}")
        subset.verify()
        assert subset.uids == left[:size]
        assert subset.manifest["rank"].to_pylist() == list(range(size))
        assert sum(subset.recipe["classes"].values()) == size
        assert summary["subsets"][f"subset-{gamma:g}"]["effective_sample_size"] > 1
    table = load_weights(run)
    assert table.sort_by("rank").filter(table.sort_by("rank")["rank"].is_valid())["uid"].to_pylist() == left
    reason = dict(zip(table["uid"].to_pylist(), table["excluded_by"].to_pylist(), strict=True))
    weight = dict(zip(table["uid"].to_pylist(), table["weight"].to_pylist(), strict=True))
    old = dict(zip(before["uid"].to_pylist(), before["weight"].to_pylist(), strict=True))
    assert all(reason[uid] == why and weight[uid] == 0 for uid, why in gone.items())
    assert reason[near] == "near-id"  # the first reason stays
    assert all(weight[uid] == old[uid] for uid in left)
    assert summary["excluded"] == excluded_counts(table)
    assert summary["excluded"] | {"audit:test": 9, "opt-out": 1} == summary["excluded"]
    assert json.loads((run / "summary.json").read_text()) == summary
    assert table.schema.metadata == before.schema.metadata
    assert not (run / "recut").exists()


def test_twice_is_once_and_order_does_not_matter(made: Path, tmp_path: Path) -> None:
    uids = load_weights(made)["uid"].to_pylist()
    parts = [dict.fromkeys(uids[start:90:7], f"reason {start}") for start in (1, 2)]
    runs = [finished(made, tmp_path / name) for name in "abc"]
    exclude(runs[0], parts[0] | parts[1], silent)
    exclude(runs[1], parts[0], silent)
    exclude(runs[1], parts[1], silent)
    exclude(runs[1], parts[1], silent)
    exclude(runs[2], parts[1], silent)
    exclude(runs[2], parts[0], silent)
    assert contents(runs[0]) == contents(runs[1]) == contents(runs[2])


class Killed(BaseException):
    """A kill: nothing below catches it."""


def test_a_kill_between_any_two_writes_is_mended_by_the_same_call(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = dict.fromkeys(load_weights(made)["uid"].to_pylist()[3:150:5], "opt-out")
    fresh = finished(made, tmp_path)
    whole = Path(shutil.copytree(fresh, tmp_path / "whole"))
    exclude(whole, uids, silent)
    names = ("write_file", "write_json", "write_arrow", "write_subset", "atomic", "remove_folder")
    real = {name: getattr(module, name) for name in names}
    writes = 0
    for stop in range(1, 40):
        run = Path(shutil.copytree(fresh, tmp_path / str(stop)))
        calls = 0

        def killing(name: str, stop: int = stop) -> Any:
            def call(*arguments: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == stop:
                    if name == "write_subset":
                        (arguments[2] / "subset.json").unlink()  # it had begun
                    raise Killed
                return real[name](*arguments)

            return call

        for name in names:
            monkeypatch.setattr(module, name, killing(name))
        try:
            exclude(run, uids, silent)
        except Killed:
            writes += 1
        monkeypatch.undo()
        if calls < stop:
            break
        exclude(run, uids, silent)
        assert contents(run) == contents(whole), stop
    assert writes >= 12


def test_too_few_left_and_unknown_uids_change_nothing(made: Path, tmp_path: Path) -> None:
    run = finished(made, tmp_path)
    before, uids = contents(run), load_weights(run)["uid"].to_pylist()
    with pytest.raises(MinerError, match=r"subset-0\.5: .* only .* are left"):
        exclude(run, dict.fromkeys(uids[:120], "opt-out"), silent)
    with pytest.raises(UsageError, match="1 uids are not in the run's pool"):
        exclude(run, {uids[0]: "x", "0" * 32: "x"}, silent)
    assert contents(run) == before
    exclude(run, {uids[1]: "x"}, silent)
    (run / "excluded.parquet").write_bytes(b"PAR1")
    with pytest.raises(MinerError, match=r"excluded\.parquet: damaged"):
        exclude(run, {uids[2]: "x"}, silent)
    with pytest.raises(MinerError, match=r"summary\.json: missing"):
        exclude(tmp_path / "nothing", {}, silent)


def test_eq20_is_cut_again_by_its_own_rule(made: Path, tmp_path: Path) -> None:
    run = finished(made, tmp_path, "eq20")
    uids = load_weights(run)["uid"].to_pylist()
    exclude(run, dict.fromkeys(uids[1:60:4], "opt-out"), silent)
    rows = module.rows_of(load_weights(run))
    for gamma in GAMMAS:
        subset = load_subset(run / f"subset-{gamma:g}")
        assert len(subset) == module.ranking.subset_size(rows, gamma, N, "eq20", 5)
        assert not set(subset.uids) & set(uids[1:60:4])


def test_the_command(made: Path, tmp_path: Path) -> None:
    run = finished(made, tmp_path)
    table = load_weights(run)
    (tmp_path / "uids.txt").write_text(f"{table['uid'][5]}\n\n{str(table['uid'][6]).upper()}\n")

    words = ["--uids", tmp_path / "uids.txt", "--classes", "n00000003", "--reason", "take-down"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.exclude", str(run), *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = load_weights(run)
    newts = table.filter(pc.equal(table["label"], 3))["excluded_by"].to_pylist()
    assert set(newts) == {"class:newt", "near-id"}
    assert table["excluded_by"].to_pylist()[5] == "take-down"
    assert "2 take-down" in done.stdout
    assert len(read_list(run)) == 52
    assert not set(load_subset(run / "subset-0.5").manifest["label"].to_pylist()) & {3}


def test_exports_in_the_run_are_left_alone_and_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(made, tmp_path)
    subset = load_subset(run / "subset-0.5")
    first, second, third = subset.uids[:3]
    export(subset, "webdataset", run / "subset-0.5-2", removed=frozenset([first, second]))
    export(subset, "manifest", run / "manifest-0.5")
    before = contents(run / "subset-0.5-2")
    exclude_and_report(run, {first: "opt-out", third: "opt-out"})
    assert contents(run / "subset-0.5-2") == before  # what was removed from it did not come back
    assert not {first, third} & set(load_subset(run / "subset-0.5").uids)
    lines = capsys.readouterr().out
    assert f"{run / 'subset-0.5-2'}: an export, left as it is: 1 of its images are excluded" in lines
    assert f"{run / 'manifest-0.5'}: an export, left as it is: 2 of its images" in lines


def test_a_subset_of_another_ranking_is_not_cut_by_this_one(made: Path, tmp_path: Path) -> None:
    run = finished(made, tmp_path)
    recipe = json.loads((run / "subset-0.5" / "subset.json").read_text())
    write_json(run / "subset-0.5" / "subset.json", recipe | {"draw": "topk"})
    before = contents(run)
    with pytest.raises(MinerError, match=r"subset-0\.5: cut by --draw topk, before the run was ranked by rank"):
        exclude(run, {load_weights(run)["uid"][5].as_py(): "opt-out"})
    assert contents(run) == before


def test_two_classes_of_one_name_both_go(made: Path, tmp_path: Path) -> None:
    pool = shutil.copytree(made.parent / "pool", tmp_path / "pool")
    manifest = json.loads((pool / "pool.json").read_text())
    write_json(pool / "pool.json", manifest | {"classes": ["fox", "crane", "elk", "Crane"]})
    assert len(of_classes(("crane",), load_weights(made), str(pool))) == 100
    assert len(of_classes(("n00000003",), load_weights(made), str(pool))) == 50


def test_lists_and_classes_that_make_no_sense(made: Path, tmp_path: Path) -> None:
    (tmp_path / "uids.txt").write_text("not a uid\n")
    with pytest.raises(MinerError, match="line 1 is no uid"):
        listed(tmp_path / "uids.txt")
    with pytest.raises(MinerError, match="no such file"):
        listed(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="--classes yak: no class of"):
        of_classes(("yak",), load_weights(made), str(made.parent / "pool"))
    owls = of_classes(("OWL",), load_weights(made), str(made.parent / "pool"))
    assert (len(owls), set(owls.values())) == (50, {"class:owl"})
