"""Fuzz every reader with spoiled files and count what becomes of them; the last line says how many crashed.

    python -m benchmarks.fuzz --minutes 10 --seed 1

Each input is a sound file, changed by structure or by bytes. A reader must accept it, quarantine the image or raise one
line that names the file, within ten seconds and 3 GB, without opening, starting or writing anything outside its
folder. It runs in a child process: a crash or a hang costs one input, whose seed is printed.
"""

import argparse
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

from benchmarks.fuzz.sound import MAKERS
from benchmarks.fuzz.trial import SECONDS, attempt, spoiled

PATIENCE = 5 * SECONDS  # seconds without a word from the child: it hangs where no signal reaches it


def try_one(kind: str, seed: int, number: int, folder: Path) -> str:
    """What became of input ``number`` of this seed; a violation's words."""
    try:
        return attempt(kind, spoiled(Random(f"{kind} {seed} {number}"), kind), folder)
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "benchmarks" not in f.filename]
        where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        ours = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames if "site-packages" not in f.filename]
        return f"CRASH {type(error).__name__} {str(error)[:200]!r} at {where} via {' '.join(ours[-3:])}"


def _child(kinds: list[str], seed: int, first: int, stop: int, end: float, pipe: object) -> None:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # every file is synced to disk otherwise
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for number in range(first, stop):
            kind = kinds[number % len(kinds)]
            pipe.send((number, kind, None))
            pipe.send((number, kind, try_one(kind, seed, number, Path(folder, "fuzz"))))
            if time.monotonic() > end:
                break
    pipe.send((-1, "", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main() -> None:
    """Try inputs until the time or the number is up; exit code 1 after any crash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    args = parser.parse_args()
    end, number, counts, crashes, peak = time.monotonic() + 60 * args.minutes, 0, Counter(), Counter(), 0
    context = multiprocessing.get_context("fork")
    while number < args.inputs and time.monotonic() < end:
        pipe, other = context.Pipe(False)
        child = context.Process(target=_child, args=(args.kinds, args.seed, number, args.inputs, end, other))
        child.start()
        other.close()
        now, done = None, False
        while True:
            try:
                if not pipe.poll(PATIENCE):
                    raise TimeoutError
                at, kind, said = pipe.recv()
            except (EOFError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    os.kill(child.pid, signal.SIGKILL)
                break
            if at < 0:
                peak, done = max(peak, said), True
            elif said is None:
                now = (at, kind)
            else:
                number, now = at + 1, None
                if said.startswith("CRASH"):
                    crashes[f"{kind}: {said}"] += 1
                    if crashes[f"{kind}: {said}"] == 1:
                        print(f"{kind} --seed {args.seed} input {at}: {said}", flush=True)
                else:
                    counts[kind, said] += 1
        child.join()
        if now is not None:
            how = f"exit code {child.exitcode}"
            crashes[f"{now[1]}: {how}"] += 1
            print(f"{now[1]} --seed {args.seed} input {now[0]}: the process died or hung, {how}", flush=True)
            number = now[0] + 1
        elif done:
            break
    verdicts = ("accepted", "quarantined", "refused")
    for kind in args.kinds:
        print(f"{kind:<12}" + "".join(f"{verdict} {counts[kind, verdict]:>7}   " for verdict in verdicts))
    totals = [sum(n for (_, v), n in counts.items() if v == verdict) for verdict in verdicts]
    bad = sum(crashes.values())
    print(
        f"{sum(totals) + bad} inputs: "
        + ", ".join(f"{n} {v}" for v, n in zip(verdicts, totals, strict=True))
        + f", {bad} crashes; peak memory {peak >> 10} MiB"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
