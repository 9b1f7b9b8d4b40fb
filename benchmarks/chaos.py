"""Kill a mining again and again, at seeded random moments, and compare what it leaves with an undisturbed one.

    python -m benchmarks.chaos --kills 60 --seed 1
    python -m benchmarks.chaos --kills 20 -- --trainers 2 --parts 2

Plays the main job on 3,000 of the demo's images (its classifier's own training included) once in peace and once
under fire: SIGKILL to pool actors, trainers, Ray's raylet and GCS server, SIGKILL, SIGTERM and SIGINT to the driver,
in every phase. Whenever the driver has ended, the same command is run again. Ends with an error unless every file of
the result has the same SHA-256 and nothing was left half-written. Prints a line a kill, with what it cost: the time
until the run was again as far as it had been.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miner import demo
from miner.build import write_arrays_pool
from miner.files import sha256

ROOT = Path(__file__).resolve().parent.parent
SHARDS, IMAGES, ROUNDS = 6, 3000, 4
FLAGS = (
    *("--gamma", "0.1", "0.01", "--rounds", str(ROUNDS), "--steps", "24", "--batch", "32", "--strata", "10"),
    *("--views", "3", "--pool-actors", "2", "--pretrain.epochs", "3", "--pretrain.batch", "64"),
)
BEFORE, AFTER = ("pretrain", "decode", "strata"), ("rank", "subset")
_ORDER = (*BEFORE, "score", "update", "train", "commit", *AFTER)
PHASES = dict(zip(_ORDER, (4, 2, 2, 6, 3, 4, 3, 1, 2), strict=True))  # how often each is struck in a plan
LONG = ("pretrain", "score", "train")  # phases in which to strike a random moment later
KINDS = {
    "pool actor": (b"ray::PoolShards", signal.SIGKILL),
    "trainer": (b"ray::Trainer", signal.SIGKILL),
    "raylet": (b"raylet/raylet", signal.SIGKILL),
    "gcs server": (b"gcs/gcs_server", signal.SIGKILL),
    "driver": (b"", signal.SIGKILL),
    "driver, terminated": (b"", signal.SIGTERM),
    "driver, interrupted": (b"", signal.SIGINT),
}
GIVE_UP = 900.0  # seconds without the next kill or the end


def make_pool(folder: Path) -> Path:
    """The demo's first images as a pool of several shards, of PNGs in tars."""
    images, labels = demo.pool_arrays()
    folder.mkdir(parents=True)
    write_arrays_pool(str(folder), "chaos", images[:IMAGES], labels[:IMAGES], demo.FAMILIES, shard_count=SHARDS)
    return folder


def result(run: Path) -> dict[str, str]:
    """SHA-256 of everything that a user gets from a run: weights, subsets, classifier."""
    paths = [path for top in ("weights", "subset-*") for path in sorted(run.glob(f"{top}/*"))]
    return {str(path.relative_to(run)): sha256(path) for path in [*paths, run / "classifier.safetensors"]}


def half_written(run: Path) -> list[Path]:
    """What no finished run may leave: temporary files in its results, uncommitted rounds, kept scores."""
    rounds = [path for path in run.glob("rounds/*") if not (path / "COMMITTED").exists()]
    return [*rounds, *run.glob("scores/*"), *run.glob("weights/.*"), *run.glob("subset-*/.*")]


def processes(root: int) -> dict[int, bytes]:
    """A process and all below it: {pid: command line}."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        below.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        todo += below.get(pid, [])
    return found


@dataclass
class Kill:
    """One blow: in which phase, at whom, and what it cost."""

    phase: str
    kind: str
    delay: float  # seconds after the phase was seen
    at: float = 0.0
    point: tuple[int, ...] = ()  # how far the run was
    before: tuple[int, int] = (0, 0)  # the driver's process number then, and how many losses it had mended
    lost: float | None = None  # seconds until the run was as far again; None: it is not yet


def plan(kills: int, seed: int, kinds: Sequence[str]) -> list[Kill]:
    """``kills`` blows, dealt over all PHASES and ``kinds`` in turn, in random order; only a driver writes subsets."""
    rng = random.Random(seed)
    phases = [phase for phase, share in PHASES.items() for _ in range(share)]
    drivers = [kind for kind in kinds if kind.startswith("driver")]
    dealt: list[Kill] = []
    while len(dealt) < kills:
        for phase in rng.sample(phases, len(phases)):
            turn = drivers if phase == "subset" else kinds
            dealt.append(Kill(phase, turn[len(dealt) % len(turn)], rng.expovariate(2.0) if phase in LONG else 0.0))
    return dealt[:kills]


class Chaos:
    """One mining under fire: ``play`` strikes as planned and runs the command again whenever it has ended."""

    def __init__(self, pool: Path, run: Path, kills: list[Kill], log: Path, flags: Sequence[str] = ()) -> None:
        self.pool, self.run, self.log, self.flags = pool, run, log, flags
        self.open, self.done = list(kills), list[Kill]()
        self.starts = 0
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """The command, as any user would run it, and run it again."""
        self.starts += 1
        with open(self.log, "ab") as sink:
            return subprocess.Popen(command(self.pool, self.run, self.flags), cwd=ROOT, stdout=sink, stderr=sink)

    def play(self) -> list[Kill]:
        """Strike until the plan is worked off or its phases are over, and the run has ended well; the kills done.

        Raises RuntimeError when the command ends by itself, or hangs.
        """
        while (code := self.driver.poll()) != 0:
            status = self.status()
            self.note_recovery(status)
            hit = bool(self.done) and self.done[-1].lost is None
            if code is not None:
                if not hit:
                    raise RuntimeError(f"the command ended by itself with {code}; see {self.log}")
                self.driver = self.start()
            elif not hit and (kill := next((k for k in self.open if k.phase == phase_of(status)), None)):
                self.strike(kill)
            if self.done and time.monotonic() - self.done[-1].at > GIVE_UP:
                raise RuntimeError(f"nothing happened for {GIVE_UP:.0f} s; see {self.log}")
            time.sleep(0.01)
        for kill in self.done:
            kill.lost = kill.lost or 0.0  # the run did not need whom the last one hit
        return self.done

    def status(self) -> dict[str, Any]:
        """The heartbeat of the driver that runs now; {} before its first."""
        try:
            found = dict(json.loads((self.run / "status.json").read_text()))
        except (OSError, ValueError):
            return {}
        return found if found.get("pid") == self.driver.pid else {}

    def strike(self, kill: Kill) -> None:
        """Kill as planned, unless there is nobody of that kind now."""
        time.sleep(kill.delay)
        pattern, number = KINDS[kill.kind]
        everybody, status = processes(self.driver.pid), self.status()
        pids = sorted(p for p, line in everybody.items() if (pattern in line if pattern else p == self.driver.pid))
        if not pids or not point(status) or self.driver.poll() is not None:
            return
        self.open.remove(kill)
        kill.phase, kill.point, kill.at = phase_of(status), point(status), time.monotonic()
        kill.before = status["pid"], status["death_count"]
        self.done.append(kill)
        os.kill(pids[len(self.done) % len(pids)], number)

    def note_recovery(self, status: dict[str, Any]) -> None:
        """Note what the last blow cost once the run has mended it and is as far again."""
        if not self.done or self.done[-1].lost is not None or not point(status):
            return
        kill = self.done[-1]
        mended = status["pid"] != kill.before[0] or status["death_count"] > kill.before[1]
        if kill.kind == "gcs server" and not mended and point(status)[:2] > kill.point[:2]:
            kill.lost = 0.0  # work goes on without it, until somebody new is wanted or Ray misses it
        elif mended and point(status) >= kill.point:
            kill.lost = time.monotonic() - kill.at
            print(f"{len(self.done):3d}. {kill.kind:19s} in {kill.phase:8s} cost {kill.lost:5.1f} s", flush=True)


def phase_of(status: dict[str, Any]) -> str:
    """The heartbeat's phase without its round or gamma."""
    words = str(status.get("phase", "")).split()
    name = words[-1] if words else ""
    return "subset" if name.startswith("subset-") else name


def point(status: dict[str, Any]) -> tuple[int, ...]:
    """How far a run is: round and phase in their order, and what is done of the phase; () while it starts."""
    name, order = phase_of(status), list(PHASES)
    if name not in order:
        return ()
    round_ = -1 if name in BEFORE else ROUNDS if name in AFTER else int(status["round"] or 0)
    return round_, order.index(name), int(status["done"])


def command(pool: Path, run: Path, flags: Sequence[str] = ()) -> list[str]:
    """The main job, with further ``flags``."""
    return [sys.executable, "-m", "pipelines.resample", "--pool", str(pool), "--out", str(run), *FLAGS, *flags]


def in_peace(pool: Path, run: Path, flags: Sequence[str] = ()) -> float:
    """Play once undisturbed; the seconds of its longest round."""
    subprocess.run(
        command(pool, run, flags), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return max(json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines())


def main() -> None:
    """Play in peace, play under fire, compare, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="kills in one mining")
    parser.add_argument("--seed", type=int, default=1, help="of their order, kinds and moments")
    parser.add_argument("--out", type=Path, help="folder for pool, runs and log (default: a temporary one)")
    parser.add_argument("flags", nargs="*", help="after --: further flags of pipelines.resample")
    asked = parser.parse_args()
    folder = asked.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    pool = make_pool(folder / "pool")
    round_ = in_peace(pool, folder / "peace", asked.flags)
    chaos = Chaos(pool, folder / "fire", plan(asked.kills, asked.seed, list(KINDS)), folder / "log.txt", asked.flags)
    kills = chaos.play()
    expected, found, left = result(folder / "peace"), result(folder / "fire"), half_written(folder / "fire")
    same = sum(expected[name] == digest for name, digest in found.items())
    lost = [kill.lost or 0.0 for kill in kills]
    print(
        f"{len(kills)} kills in one mining ({chaos.starts} starts of the command): {same} of {len(expected)} files the "
        f"same, {len(left)} half-written; lost a kill: mean {sum(lost) / len(lost):.1f} s, most {max(lost):.1f} s "
        f"(a round: {round_:.1f} s)"
    )
    if found != expected or left:
        sys.exit(f"error: the results differ; see {folder}")


if __name__ == "__main__":
    main()
