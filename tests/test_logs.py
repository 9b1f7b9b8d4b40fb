"""Logs of lines of JSON: whole lines, bounded files, nothing lost that could be kept, and no run ended by them."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miner import logs
from miner.errors import MinerError
from miner.logs import log
from miner.observed import observed


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    logs.stop()
    log.propagate = True


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(run.glob("logs/*")) for line in path.read_text().splitlines()]


def test_fields_and_tracebacks_are_in_the_line(tmp_path: Path) -> None:
    handler = logs.start(tmp_path, "pool-3")
    assert handler is not None
    assert not log.propagate
    log.info("shard %d decoded", 4, extra={"shard": np.int64(4), "seconds": np.float32(0.5), "where": tmp_path})
    try:
        raise ValueError("two\nlines, \udcff")
    except ValueError:  # not through ``log``: pytest listens too, and pytest-xdist cannot pass on what is no UTF-8
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 1, "failed", (), sys.exc_info()))
    first, second, third = lines(tmp_path)
    assert first["message"] == "log begins"
    assert (second["message"], second["shard"], second["seconds"]) == ("shard 4 decoded", 4, 0.5)
    assert (second["process"], second["level"], second["where"]) == ("pool-3", "info", str(tmp_path))
    assert "ValueError: two\nlines" in third["traceback"]


def test_files_are_bounded(tmp_path: Path) -> None:
    handler = logs.start(tmp_path, "driver")
    assert handler is not None
    handler.cap = 2000
    for i in range(200):
        log.info("line", extra={"i": i})
    files = sorted((tmp_path / "logs").iterdir())
    assert len(files) == 2
    assert all(path.stat().st_size <= 2000 for path in files)
    assert max(line.get("i", 0) for line in lines(tmp_path)) == 199
    logs.stop()
    for i in range(logs.KEPT + 20):
        (tmp_path / "logs" / f"old-{i}.jsonl").write_text("")
    logs.start(tmp_path, "driver")
    assert len(list((tmp_path / "logs").iterdir())) <= logs.KEPT + 1
    assert any(line["message"] == "log begins" for line in lines(tmp_path))  # the newest stay


def test_what_cannot_be_kept_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.start("s3://bucket/run", "driver") is None
    assert logs.start(tmp_path / "elsewhere", "pool-0") is None
    assert not (tmp_path / "elsewhere").exists()
    handler = logs.start(tmp_path, "driver")
    assert handler is not None
    log.info("no such %d", "number")  # a broken call is lost, and nothing else
    log.info("kept")
    assert lines(tmp_path)[-1] | {"time": ""} == lines(tmp_path)[-1] | {"time": "", "lines_lost_before": 1}
    log.info("kept too")
    assert "lines_lost_before" not in lines(tmp_path)[-1]
    logs.stop()
    log.error("after the end")
    assert capsys.readouterr().err == ""


def test_a_new_run_s_lines_do_not_go_to_the_one_before(tmp_path: Path) -> None:
    before = threading.excepthook
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        logs.start(tmp_path / name, "driver")
        log.info(name)
    logs.stop()
    assert [line["message"] for line in lines(tmp_path / "one")] == ["log begins", "one"]
    assert [line["message"] for line in lines(tmp_path / "two")] == ["log begins", "two"]
    assert threading.excepthook is before


class Worker:
    """Stands for an actor's class."""

    def __init__(self, broken: bool = False) -> None:
        if broken:
            raise MinerError("pool is gone")

    def each(self, method: str, shards: list[int]) -> list[int]:
        return [getattr(self, method)(shard, round_=2) for shard in shards]

    def double(self, shard: int, round_: int) -> int:
        if shard == 7:
            raise MinerError(f"shard {shard}: cut off")
        return 2 * shard


def test_what_leaves_an_actor_s_method_is_logged_once_and_raised(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    kind = observed(Worker, double=lambda result, seconds: told.append((result, seconds)))
    worker = kind(watch=(str(tmp_path), "pool-1"))
    assert worker.each("double", [1, 2]) == [2, 4]
    assert [result for result, _ in told] == [2, 4]
    with pytest.raises(MinerError, match="cut off"):
        worker.each("double", [3, 7])
    failed = [line for line in lines(tmp_path) if line["level"] == "error"]
    assert len(failed) == 1
    assert (failed[0]["message"], failed[0]["shard"], failed[0]["round"]) == ("double failed", 7, 2)
    assert "MinerError: shard 7: cut off" in failed[0]["traceback"]
    row = worker.memory()
    assert (row["who"], row["rss_bytes"] > 10 << 20) == ("pool-1", True)


def test_an_actor_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(MinerError):
        observed(Worker)(True, watch=(str(tmp_path), "pool-0"))
    assert "pool is gone" in lines(tmp_path)[-1]["traceback"]
    observed(Worker)()  # without a log, as tests and libraries use it
    with pytest.raises(AttributeError, match="tripple"):
        observed(Worker, tripple=print)


def test_nothing_is_printed_without_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert logging.getLogger("outlier_miner") is log
    log.error("nobody listens")
    assert capsys.readouterr() == ("", "")
