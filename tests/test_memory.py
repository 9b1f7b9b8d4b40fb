"""Resident memory: of this process, of others, with shared pages counted once."""

import os
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from miner import memory

MB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")


@needs_proc
def test_usage_sees_what_is_allocated_and_remembers_the_peak() -> None:
    before = memory.usage()
    block = bytearray(os.urandom(1) * (64 * MB))
    during = memory.usage()
    grown = during["anon_bytes"] - before["anon_bytes"]
    assert 60 * MB < grown < 80 * MB
    assert abs(memory.resident() - during["rss_bytes"]) < 4 * MB
    del block
    after = memory.usage()
    assert after["rss_bytes"] < during["rss_bytes"] - 50 * MB
    assert after["peak_rss_bytes"] >= during["rss_bytes"]
    parts = after["anon_bytes"] + after["file_bytes"] + after["shmem_bytes"]
    assert parts == pytest.approx(after["rss_bytes"], rel=0.02)


@needs_proc
def test_shared_pages_count_once() -> None:
    code = """
import sys
from multiprocessing import resource_tracker, shared_memory
found = shared_memory.SharedMemory(sys.argv[1])
resource_tracker.unregister(found._name, "shared_memory")
sum(found.buf[i] for i in range(0, found.size, 4096))
print("ready", flush=True)
sys.stdin.read()
found.close()
"""
    block = shared_memory.SharedMemory(create=True, size=128 * MB)
    try:
        block.buf[:] = b"x" * len(block.buf)
        words = [sys.executable, "-c", code, block.name]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            rows = [memory.entry("here"), memory.entry("child", child.pid)]
            assert child.stdin is not None
            child.stdin.close()
    finally:
        block.close()
        block.unlink()
    plain = sum(row["rss_bytes"] for row in rows)
    assert all(row["shmem_bytes"] >= 128 * MB for row in rows)
    assert memory.total(rows) < plain - 100 * MB
    without = [{name: value for name, value in row.items() if name != "pss_bytes"} for row in rows]
    assert plain - 140 * MB < memory.total(without) < plain - 120 * MB


def test_the_table_shows_every_row_and_leaves_out_what_is_not_known() -> None:
    rows = [
        {"who": "driver", "rss_bytes": 123_456_789, "peak_rss_bytes": 200_000_000},
        {"who": "ray: runtime env agent", "rss_bytes": 1_000_000, "shmem_bytes": 0},
        {"who": "total", "pss_bytes": 124_456_789},
    ]
    lines = memory.table(rows).splitlines()
    assert lines[0].split() == ["memory", "in", "MB", "rss", "peak", "own", "shared", "by", "share"]
    assert lines[1].split() == ["driver", "123", "200"]
    assert lines[3].split() == ["total", "124"]
    assert len({line.find("by share") + 8 for line in lines[:1]} | {len(lines[3])}) == 1  # in its column


def test_systems_without_proc_tell_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", Path("/nowhere"))
    found = memory.usage()
    assert found["rss_bytes"] == found["peak_rss_bytes"] > 10 * MB
    assert memory.resident() == 0
    assert memory.ray_processes([]) == []
    with pytest.raises(ProcessLookupError):
        memory.usage(1)


@needs_proc
def test_everything_below_a_process_is_found() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', 'inner'])"
    with subprocess.Popen([sys.executable, "-c", code, "outer"], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        end = time.monotonic() + 20
        while len(found := dict(memory.below(child.pid))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        child.stdin.write(b"\n")
        child.stdin.close()
    assert "outer" in found.pop(child.pid)
    assert "inner" in found.popitem()[1]
    assert list(memory.below(child.pid)) == []


def test_a_process_that_is_gone_is_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(ProcessLookupError):
        memory.usage(child.pid)
