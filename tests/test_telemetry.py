"""Metrics as Prometheus sees them: scraped from a real Ray, started as every command starts it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from miner import telemetry

ROOT = Path(__file__).resolve().parent.parent
SCRAPE = """
import json, os, sys, time, urllib.request, warnings
warnings.simplefilter("error")
from pathlib import Path
from miner.rays import connect, get
connect(None, 1)
import ray
from miner import telemetry
from miner.observed import observed

run = Path(sys.argv[1])
telemetry.count("worker_deaths")  # before the run has a name: counted nowhere
telemetry.start(run.name, "driver")
url = telemetry.publish(run)
published = json.loads((run / telemetry.DISCOVERY).read_text())

class Scorer:
    def score(self, images):
        time.sleep(0.05)
        return {"loss": [0.0] * images}
    def block(self):
        return None

kind = ray.remote(observed(Scorer, score=telemetry.scored, block=telemetry.served))
actor = kind.remote(watch=(str(run), "trainer-0"))

def scrape(until):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        if until(page):
            return page
        time.sleep(0.3)
    raise SystemExit("not seen: " + page)

def value(page, name):
    return sum(float(l.rpartition(" ")[2]) for l in page.splitlines() if l.startswith(f"ray_outlier_miner_{name}{{"))

for name in ("rounds_committed", "worker_deaths"):
    telemetry.count(name)
telemetry.gauge("quarantined_rows", 3)
telemetry.gauge("shards_waiting", 2)
get([actor.score.remote(100), actor.score.remote(28), actor.block.remote()])
first = scrape(lambda page: value(page, "images_scored_total") == 128 and "blocks_served" in page and "waiting" in page)
telemetry.count("rounds_committed", 2)
telemetry.gauge("shards_waiting", 0)
get(actor.score.remote(1000))
time.sleep(5)  # gauges that were set once are still there
second = scrape(lambda page: value(page, "images_scored_total") > 128 and value(page, "rounds_committed_total") > 1)
began = time.perf_counter()
for _ in range(1000):
    telemetry.count("images_scored")
cost = (time.perf_counter() - began) / 1000
telemetry.stop()
print(json.dumps({"first": first, "second": second, "published": published, "url": url, "cost": cost,
                  "left": os.listdir(run)}))
"""


def samples(page: str) -> dict[tuple[str, str], float]:
    """{(name, process): value} of our metrics."""
    found = {}
    for line in page.splitlines():
        if line.startswith("ray_outlier_miner_"):
            process = re.search(r'[{,]process="([^"]*)"', line)
            assert process is not None, line
            assert 'run="somewhere"' in line
            found[line.partition("{")[0], process[1]] = float(line.rpartition(" ")[2])
    return found


def test_prometheus_sees_every_metric_and_counters_only_grow(tmp_path: Path) -> None:
    run = tmp_path / "somewhere"
    run.mkdir()
    env = os.environ | {"RAY_metrics_report_interval_ms": "1500"}
    words = [sys.executable, "-c", SCRAPE, str(run)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    first, second = samples(found["first"]), samples(found["second"])
    names = {f"ray_outlier_miner_{name}_total" for name in telemetry.COUNTERS}
    names |= {f"ray_outlier_miner_{name}" for name in telemetry.GAUGES}
    assert {name for name, _ in second} == names
    for (name, process), value in first.items():
        assert not name.endswith("_total") or second[name, process] >= value, name
    assert first["ray_outlier_miner_images_scored_total", "trainer-0"] == 128
    assert second["ray_outlier_miner_images_scored_total", "trainer-0"] == 1128
    assert 0.1 <= first["ray_outlier_miner_score_seconds_total", "trainer-0"] < 10
    assert second["ray_outlier_miner_blocks_served_total", "trainer-0"] == 1
    assert second["ray_outlier_miner_rounds_committed_total", "driver"] == 3
    assert second["ray_outlier_miner_worker_deaths_total", "driver"] == 1
    assert second["ray_outlier_miner_quarantined_rows", "driver"] == 3
    assert second["ray_outlier_miner_shards_waiting", "driver"] == 0
    assert second["ray_outlier_miner_rss_bytes", "trainer-0"] > 10 << 20
    kinds = dict(re.findall(r"^# TYPE (ray_outlier_miner_\w+) (\w+)$", found["second"], re.M))
    assert all(kind == ("counter" if name.endswith("_total") else "gauge") for name, kind in kinds.items())

    assert found["url"] == f"http://{found['published'][0]['targets'][0]}/metrics"
    assert telemetry.DISCOVERY not in found["left"]
    assert found["cost"] < 1e-3  # seconds a call; once a block of thousands of images


def test_without_ray_nothing_is_counted_and_wrong_names_are_noticed(tmp_path: Path) -> None:
    telemetry.count("images_scored", 5)
    telemetry.gauge("rss_bytes", 5)
    assert telemetry.publish(tmp_path) is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError):
        telemetry.count("images_scord")


def test_the_docs_list_every_metric() -> None:
    table = re.findall(r"^\| `outlier_miner_(\w+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.M)
    assert table == [*telemetry.COUNTERS, *telemetry.GAUGES]
