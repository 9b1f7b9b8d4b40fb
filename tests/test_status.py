"""A run watched from outside: heartbeats on clocks and disks that fail, and a real run that is ended by SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miner import demo, heartbeat, telemetry
from miner.build import write_arrays_pool
from miner.errors import MinerError
from miner.heartbeat import Heartbeat
from miner.progress import Display
from miner.run_dir import write_json
from pipelines import status
from trainers import models
from trainers.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def command(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"pipelines.{module}", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for something to hold; returns it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with settings and nothing else."""
    path = tmp_path / "run"
    write_json(path / "config.json", {"unit": "round", "game": {"rounds": 5}})
    return path


def write(run: Path, **changes: Any) -> dict[str, Any]:
    """A heartbeat that says "running", as this process would have written it now, but for ``changes``."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    facts: dict[str, Any] = {"state": "running", "phase": "round 2/5 score", "done": 30, "total": 120, "rounds": 5}
    facts |= {"rate": 10.0, "seconds_left": 9.0, "quiet_seconds": 0.1, "deaths": [], "death_count": 0, "beat": 1}
    facts |= {"started": now, "updated": now, "monotonic": time.monotonic()} | heartbeat.identity() | changes
    write_json(run / "status.json", facts)
    return facts


ELSEWHERE = {"host": "elsewhere", "boot": "another", "pids": "pid:[1]"}


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


# --- the heartbeat ---------------------------------------------------------------------------------------------------


def test_a_display_tells_phase_rate_and_time_left(run: Path) -> None:
    with Display() as display:
        display.follow(run, rounds=5)
        display.begin_round(1)
        display.phase("round 2/5 score", 120, done=20)
        display.started -= 4.0
        display.advance(40)
        until((run / "status.json").exists)
        found = until(lambda: (s := json.loads((run / "status.json").read_text()))["done"] == 60 and s)
        assert found["rate"] == pytest.approx(10, rel=0.3)  # the 20 done before are not this phase's work
        assert found["seconds_left"] == pytest.approx(60 / found["rate"], abs=0.1)
        assert (found["state"], found["phase"], found["round"]) == ("running", "round 2/5 score", 1)
        assert found["pid"] == os.getpid()
        seen = status.look(run)
        assert (seen["state"], seen["total"]) == ("running", 120)
        text = status.text(seen)
        assert "round 2/5 score: 60 of 120 (50%), " in text
        assert "rounds committed: 0 of 5" in text
    found = json.loads((run / "status.json").read_text())
    assert (found["state"], found["error"]) == ("finished", None)
    assert not list(run.rglob("*.tmp"))


def test_heartbeats_are_few_however_much_advances(run: Path) -> None:
    with Display() as display:
        display.follow(run, rounds=1)
        display.phase("decode", 10**6)
        before = until(lambda: display.heartbeat and display.heartbeat.beats)
        for _ in range(2000):
            display.advance(10)
        assert display.heartbeat is not None
        assert display.heartbeat.beats - before <= 2


@pytest.mark.parametrize(
    ("error", "state", "line"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(15), "interrupted", None),
        (MinerError("disk\nfull"), "failed", "disk full"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
    ],
)
def test_the_end_of_a_run_is_its_last_heartbeat(run: Path, error: BaseException, state: str, line: str | None) -> None:
    def end() -> None:
        with Display() as display:
            display.follow(run, rounds=1)
            raise error

    with pytest.raises(type(error)):
        end()
    seen = status.look(run)
    assert (seen["state"], seen["error"]) == (state, line)
    assert status.EXIT[seen["state"]] == 4


def test_deaths_and_quarantine_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display.follow(run, rounds=1)
        display.quarantined(3)
        for i in range(60):
            display.death(f"pool-{i}", "killed", 1.5)
    seen = status.look(run)
    assert (seen["quarantined"], seen["death_count"], len(seen["deaths"])) == (3, 60, 50)
    assert seen["deaths"][-1]["who"] == "pool-59"
    datetime.fromisoformat(seen["deaths"][-1]["when"])
    text = status.text(seen)
    assert "quarantined: 3 images" in text
    assert "workers that died: 60" in text
    assert "pool-59: killed, 1.5 s lost" in text
    assert "pool-59 died" in capsys.readouterr().err


def test_a_store_that_fails_or_hangs_holds_nothing_up(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    beats = Heartbeat(tmp_path / "file" / "status.json", dict, interval=0.01)  # a file is no folder
    until(lambda: beats.skipped > 2)
    beats.close()
    assert beats.skipped == beats.beats

    hanging = threading.Event()
    monkeypatch.setattr(heartbeat, "LAST_WORD", 0.1)
    monkeypatch.setattr(heartbeat, "write_json", lambda path, value: hanging.wait(20))
    began = time.monotonic()
    with Display() as display:
        display.follow(run, rounds=1)
        for _ in range(100):
            display.phase("decode", 10)
            display.advance(5)
    assert time.monotonic() - began < 5
    hanging.set()


def test_a_full_disk_is_skipped_and_then_told(run: Path) -> None:
    code = """
import json, resource, sys, time
from pathlib import Path
from miner.progress import Display
run = Path(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with Display() as display:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # no file may grow beyond 20 bytes
    display.follow(run, rounds=1)
    while display.heartbeat.skipped < 1:
        time.sleep(0.01)
    display.say("still here")
    assert not (run / "status.json").exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    display.say("and now on paper")
"""
    done = subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "status.json").read_text())["skipped"] >= 1
    assert not list(run.rglob("*.tmp"))
    lines = next(path.read_text().splitlines() for path in run.glob("logs/*.jsonl"))
    last = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    assert [line["message"] for line in last] == ["and now on paper", "finished"]
    assert last[0]["lines_lost_before"] == 2


# --- is it alive? ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_clock_that_jumps_changes_nothing_on_the_same_machine(run: Path, seconds: float) -> None:
    write(run, updated=ago(seconds), started=ago(seconds))
    seen = status.look(run, patience=0)
    assert seen["state"] == "running"
    assert 0 <= seen["age_seconds"] < 5
    assert seen["seconds_left"] == 9.0


def test_rate_and_time_left_do_not_ask_the_clock_on_the_wall(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display()
    display.phase("score", 100)
    display.started -= 5
    monkeypatch.setattr(time, "time", lambda: 0.0)  # 1970
    display.advance(50)
    facts = display.facts()
    assert facts["rate"] == pytest.approx(10, rel=0.1)
    assert facts["seconds_left"] == pytest.approx(5, rel=0.1)


def test_a_process_that_is_gone_is_stopped_at_once(run: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    began = heartbeat.pid_started(child.pid)
    write(run, pid=child.pid, pid_started=began)
    assert status.look(run)["state"] == "running"
    child.kill()
    until(lambda: heartbeat.pid_started(child.pid) is None, 5)  # a zombie is as dead, before anyone waits for it
    seen = status.look(run)
    child.wait()
    assert seen["state"] == "stopped"
    text = status.text(seen).splitlines()[0]
    assert "stopped in round 2/5 score" in text
    assert f"process {child.pid} is gone" in text
    assert "run the same command again to go on" in text
    write(run, pid_started=0)  # this process has the number now, but is another one
    assert status.look(run)["state"] == "stopped"


def test_a_process_that_lives_without_heartbeats_is_running_and_it_is_said(run: Path) -> None:
    write(run, monotonic=time.monotonic() - 300)
    seen = status.look(run)
    assert seen["state"] == "running"
    assert "lives, but without a heartbeat" in status.text(seen)
    assert "last heartbeat 5 min ago" in status.text(seen)


def test_another_machine_s_driver_is_judged_by_its_heartbeats(run: Path) -> None:
    write(run, **ELSEWHERE, updated=ago(3))
    assert status.look(run, patience=0)["state"] == "running"
    write(run, **ELSEWHERE, updated=ago(180))
    seen = status.look(run, patience=0.3)
    assert seen["state"] == "stopped"
    assert "last heartbeat 3 min ago" in status.text(seen)


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_another_machine_s_wrong_clock_hides_neither_life_nor_death(run: Path, seconds: float) -> None:
    facts = write(run, **ELSEWHERE, updated=ago(seconds))
    seen = status.look(run, patience=0.3)
    assert seen["state"] == "stopped"
    if seconds < 0:
        assert "the clock of elsewhere differs" in seen["why"]
        assert "60 min in the future" in status.text(seen)
        assert "-" not in status.text(seen).splitlines()[1].partition("last heartbeat")[2]
    beat = threading.Timer(0.5, lambda: write_json(run / "status.json", facts | {"beat": 2}))
    beat.start()
    seen = status.look(run, patience=20)
    beat.join()
    assert seen["state"] == "running"
    assert "the clock of elsewhere differs" in seen["why"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_runs_without_a_heartbeat_are_judged_by_what_they_left(run: Path) -> None:
    for round_ in (1, 2):
        write_json(run / "rounds" / f"{round_:06d}" / "COMMITTED", {})
    (run / "metrics.jsonl").write_text('{"round": 1, "l_out": 1.5}\n{"round": 2, "l_out": 1.25}\n{"round": 3, "l_')
    seen = status.look(run)
    assert (seen["state"], seen["committed"], seen["rounds"]) == ("stopped", 3, 5)
    assert "rounds committed: 3 of 5, L_out 1.2500" in status.text(seen)
    write_json(run / "summary.json", {})
    assert status.look(run)["state"] == "finished"
    assert "rounds committed: 3 of 5: the ranking had converged, L_out" in status.text(status.look(run))


def test_a_summary_outlives_a_last_heartbeat_that_was_lost(run: Path) -> None:
    write_json(run / "summary.json", {})
    os.utime(run / "summary.json", (1, 1))
    write(run, pid_started=0)
    assert status.look(run)["state"] == "stopped"  # the summary is that of a run before
    os.utime(run / "summary.json")
    assert status.look(run)["state"] == "finished"


def test_exit_codes_and_formats(run: Path, tmp_path: Path) -> None:
    write(run)
    done = command("status", run, "--json")
    assert done.returncode == 3
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["seconds_left"] == 9.0
    write(run, state="finished")
    done = command("status", run, "--watch", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{run}: finished\n")
    none = command("status", tmp_path)
    assert none.returncode == 1
    assert none.stderr == f"error: {tmp_path}: no run here (no config.json); check the path\n"
    assert command("status", run, "--watch", "0").returncode == 2
    assert command("status").returncode == 2


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"state": "running"}',
        '{"state": "odd"}',
        '{"state": "finished", "updated": "2026-01-01T00:00:00+00:00"}',
    ],
)
def test_a_damaged_heartbeat_is_one_line(run: Path, damage: str) -> None:
    (run / "status.json").write_text(damage)
    with pytest.raises(MinerError, match=r"status\.json") as caught:
        status.look(run)
    assert "\n" not in str(caught.value)


def test_status_needs_no_ray_and_starts_fast() -> None:
    code = "import sys, pipelines.status; print([m for m in ('ray', 'torch', 'numpy', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- a real run, ended from outside ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mining(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A command that plays many short rounds, and its run directory."""
    home = tmp_path_factory.mktemp("mining")
    images = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), dtype=np.uint8)
    write_arrays_pool(str(home / "pool"), "noise", images, None, [], shard_count=2)
    net = models.create("small", len(demo.CLASSES), 0)
    save_checkpoint(home / "net.safetensors", net, {"model": "small", "classes": list(demo.CLASSES)})
    flags = {"pool": home / "pool", "checkpoint": home / "net.safetensors", "out": home / "run", "pool-actors": 1}
    flags |= {"rounds": 16, "steps": 2, "batch": 16, "strata": 4, "views": 1, "exclude-near-id": 0, "gamma": 0.1}
    words = [sys.executable, "-m", "pipelines.resample", *(f"--{name}={value}" for name, value in flags.items())]
    return words, home / "run"


def session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_run_is_watched_terminated_and_finished(mining: tuple[list[str], Path], tmp_path: Path) -> None:
    words, run = mining
    with open(tmp_path / "log", "w") as sink:
        process = subprocess.Popen(words, cwd=ROOT, stdout=sink, stderr=sink, start_new_session=True)
    try:
        until(lambda: (run / "rounds" / "000000" / "COMMITTED").exists() or process.poll() is not None, 300)
        assert process.poll() is None, (tmp_path / "log").read_text()
        during = command("status", run)
        assert during.returncode == 3, during.stdout
        assert ": running" in during.stdout
        assert "of 16" in during.stdout
        assert (run / telemetry.DISCOVERY).exists()
        assert len(session(process.pid)) > 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        until(lambda: not session(process.pid), 20)  # Ray is gone as well
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    said = (tmp_path / "log").read_text().splitlines()
    assert said[-1] == "error: terminated; run the same command again to go on"
    assert not any("Traceback" in line for line in said)
    after = command("status", run)
    assert after.returncode == 4
    assert "interrupted in round " in after.stdout.splitlines()[0]
    assert not (run / telemetry.DISCOVERY).exists()
    committed = status.look(run)["committed"]
    assert 0 < committed < 16

    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"after {committed} committed rounds" in done.stderr
    assert command("status", run).returncode == 0
    check_logs(run)
    check_memory(run, done.stdout)


def check_logs(run: Path) -> None:
    """Each process of both runs kept a log of its own, in which every line is whole."""
    kinds: dict[str, list[dict[str, Any]]] = {"driver": [], "pool-0": [], "trainer-0": []}
    for path in (run / "logs").iterdir():
        name, _, pid = path.name.removesuffix(".jsonl").rpartition("-")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert {(line["process"], line["pid"]) for line in lines} == {(name, int(pid))}
        assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in lines)
        kinds[name] += lines
    assert all(kinds.values())
    rounds = sorted(line["round"] for line in kinds["driver"] if line["message"] == "round committed")
    assert rounds == list(range(16))  # none was played twice
    assert {line["message"] for line in kinds["driver"]} >= {"interrupted", "finished"}


def check_memory(run: Path, printed: str) -> None:
    rows = json.loads((run / "summary.json").read_text())["memory"]
    who = [row["who"] for row in rows]
    assert who[:3] == ["driver", "pool-0", "trainer-0"]
    assert {"ray: raylet", "ray: gcs_server"} <= set(who)
    assert len({row["pid"] for row in rows[:-1]}) == len(rows) - 1
    assert all(row["peak_rss_bytes"] >= row["rss_bytes"] > 10 << 20 for row in rows[:3])
    assert rows[-1]["pss_bytes"] < np.sum([row["rss_bytes"] for row in rows[:-1]])
    for name in ("driver", "trainer-0", "ray: raylet", "total"):
        assert f"\n{name} " in printed
