"""Background Data Resampling (Li & Vasconcelos, CVPR 2020) from one command, at the paper's scale.

python -m benchmarks.paper --data DATA --ilsvrc imagenet/train --dry-run

Prints and runs one of our own commands after another: pipelines.shard (ILSVRC-12 as the pool), then for each ID set
and model pipelines.train --preset msp-resample (stage 1), pipelines.resample (stage 2), from the classifier of stage 1
pipelines.train --preset oe-resample (stage 3), and pipelines.evaluate. Stopped? The same command goes on: what is done
is skipped. Ends with a table beside the paper's figures.

Exact are the schedule, the released update and the paper's printed one, the draw, losses and protocol. Dropout and
BatchNorm in stage 3, crops, the nets' details and the test sets' sizes differ: benchmarks/paper/README.md lists all.
"""

import shlex
import subprocess
import sys

from benchmarks.paper.steps import Paper, Step, steps
from miner.errors import MinerError, UsageError
from miner.run_dir import write_file
from pipelines import cli


def main() -> None:
    """Plan; print, or run what is missing."""
    import tyro

    config = tyro.cli(Paper, prog="python -m benchmarks.paper", description=__doc__)
    planned = steps(config)
    if config.dry_run:
        show(config, planned)
        return
    for step in planned:
        run(config, step)
    from benchmarks.paper.table import table

    text = table(config)
    write_file(config.out / "table.md", text.encode())
    print(text)


def command(step: Step) -> str:
    """As one types it."""
    return shlex.join(("python", "-m", *step.words))


def show(config: Paper, planned: list[Step]) -> None:
    """Each command after a line with its cost, and the sum of what is still to do."""
    todo = 0
    for step in planned:
        finished = done(config, step)
        todo += 0 if finished else step.forwards
        print(f"# {step.name}: {'done' if finished else f'about {step.forwards / 1e6:,.1f} M forward passes'}")
        print(command(step))
    print(f"# to do: about {todo / 1e6:,.1f} M forward passes of one image (a backward pass counts as two)")


def done(config: Paper, step: Step) -> bool:
    """Whether a step has ended well here. Raises UsageError when another command made what is there."""
    record = config.out / "done" / f"{step.name}.txt"
    if not record.is_file() or not all(path.is_file() for path in step.leaves):
        return False
    if record.read_text().strip() != command(step):
        raise UsageError(f"{record}: another command made it; choose another --out, or delete this file to run it anew")
    return True


def run(config: Paper, step: Step) -> None:
    """Print a step's command and run it, unless it is done. Raises MinerError when it fails."""
    if done(config, step):
        print(f"# {step.name}: done", flush=True)
        return
    print(command(step), flush=True)
    code = subprocess.run([sys.executable, "-m", *step.words], check=False).returncode
    if code:
        raise MinerError(f"{step.name}: ended with exit code {code}; run the same command again to go on")
    write_file(config.out / "done" / f"{step.name}.txt", f"{command(step)}\n".encode())


if __name__ == "__main__":
    cli.run(main)
