"""Prometheus metrics of a run, through Ray: every node's metrics port serves what the processes on it counted.

Names are ``outlier_miner_*`` (Ray puts ``ray_`` before them, and ``_total`` behind counters), tags ``run`` and
``process``. A mean is the ratio of two counters: it is exact, while the sums of Ray's histograms are estimates.
Costs a few microseconds a call: count blocks, not images. Does nothing where there is no Ray.
"""

import contextlib
import json
import sys
import threading
from typing import Any

from miner import memory
from miner.files import Place
from miner.run_dir import write_json

COUNTERS = {
    "images_scored": "Background images scored",
    "score_seconds": "Seconds that trainers spent scoring",
    "blocks_served": "Blocks of images that pool actors handed out",
    "rounds_committed": "Rounds committed",
    "worker_deaths": "Pool actors and trainers that died",
}
GAUGES = {
    "quarantined_rows": "Images of the pool that do not decode",
    "shards_waiting": "Shards whose work in this phase is not handed out yet",
    "rss_bytes": "Resident memory of a process",
}
TAGS = ("run", "process")
PREFIX = "outlier_miner_"
DISCOVERY = "prometheus.json"  # Prometheus' file_sd format: where this run's metrics are served
REFRESH = 2.0  # seconds: Ray forgets a gauge that was not set for two of its reports (of 10 s, unless told otherwise)

_tags: dict[str, str] = {}
_made: dict[str, Any] = {}
_making = threading.Lock()
_gauges: dict[str, float] = {}
_ended: list[threading.Event] = []  # of the thread that refreshes gauges, while there is one
_published: list[tuple[Place, list[str]]] = []  # file and targets


def start(run: str, process: str) -> None:
    """Name the tags of everything that this process counts from now on, and keep its gauges fresh until ``stop``."""
    stop()
    _tags.update(run=run, process=process)
    ended = threading.Event()
    _ended.append(ended)
    threading.Thread(target=_refresh, args=(ended,), name="gauges", daemon=True).start()


def stop() -> None:
    """Count no more, and take back what ``publish`` wrote unless another process has put its own there."""
    while _ended:
        _ended.pop().set()
    _tags.clear()
    _gauges.clear()
    while _published:
        path, targets = _published.pop()
        with contextlib.suppress(Exception):
            if json.loads(path.read_text())[0]["targets"] == targets:
                path.unlink()


def _refresh(ended: threading.Event) -> None:
    while True:
        if size := memory.resident():
            gauge("rss_bytes", size)
        for name, value in list(_gauges.items()):
            gauge(name, value)
        if ended.wait(REFRESH):
            return


def count(name: str, value: float = 1.0) -> None:
    """Add to a counter of COUNTERS; nothing is added by 0."""
    if value > 0 and (metric := _metric(name, "Counter", COUNTERS)):
        metric.inc(float(value), dict(_tags))


def gauge(name: str, value: float) -> None:
    """Set a gauge of GAUGES."""
    if metric := _metric(name, "Gauge", GAUGES):
        _gauges[name] = value
        metric.set(float(value), dict(_tags))


def _metric(name: str, kind: str, known: dict[str, str]) -> Any:
    """The metric, or None where nothing is counted: no ``start``, or no Ray."""
    description = known[name]  # first: a wrong name is an error whether Ray runs or not
    ray = sys.modules.get("ray")
    if not _tags or ray is None or not ray.is_initialized():
        return None
    with _making:
        if name not in _made:
            from ray.util import metrics

            _made[name] = getattr(metrics, kind)(PREFIX + name, description, TAGS)
        return _made[name]


def scored(result: dict[str, Any], seconds: float) -> None:
    """Count one block that a trainer scored."""
    count("images_scored", len(result["loss"]))
    count("score_seconds", seconds)


def served(result: Any, seconds: float) -> None:
    """Count one block that a pool actor handed out."""
    count("blocks_served")


def endpoints() -> list[str]:
    """``host:port`` of every living node's metrics, the driver's node first; none without Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # or the next line would start one
        return []
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort", 0) > 0]
    nodes.sort(key=lambda node: node["NodeID"] != here)
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]


def publish(run: Place) -> str | None:
    """Write RUN/prometheus.json for Prometheus' ``file_sd_configs``; the URL of the driver's node, if it serves any."""
    try:
        targets, path = endpoints(), run / DISCOVERY
        if not targets:
            return None
        write_json(path, [{"targets": targets, "labels": {"job": "outlier-miner"}}])
    except Exception:  # neither a store nor Ray's book-keeping may end a run because nobody can watch it
        return None
    _published.append((path, targets))
    return f"http://{targets[0]}/metrics"
