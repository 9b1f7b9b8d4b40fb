"""Data-parallel training: processes of this machine under Ray Train, each on its share of every batch.

Ray Train starts the processes, joins them (gloo; nccl where there are GPUs) and ends them all when one fails. It does
not try again and keeps no checkpoints: the run directory has every epoch's state, and the same command goes on there.
"""

import json
import os
import time
from concurrent.futures import Future
from importlib import import_module
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import ray
import torch
from ray.util.queue import Empty, Queue

from miner.errors import MinerError, UsageError
from miner.files import Place
from miner.progress import Display
from miner.rays import connect
from trainers.config import TrainConfig
from trainers.fit import World
from trainers.training import Training

SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon it sees the end, or an error
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less: this machine is not a cloud's to take back
    "RAY_TRAIN_METRICS_ENABLED": "0",  # no dashboard reads them
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a worker that waits for a dead one cannot say goodbye
}
PAUSE = 0.2  # seconds between two messages about progress


def train_together(config: TrainConfig) -> dict[str, Any]:
    """Train as ``config`` says in ``config.workers`` processes and return the summary.

    Each takes one GPU where Ray sees any, else the threads of ``Training``. Starts a Ray of its own, and ends it,
    unless this process has one already. Raises UsageError for numbers that do not fit, and a worker's own MinerError.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    training = _prepare(config)
    with training.dir.locked():
        if done := training.finished(training.begin()):
            return done
        own = not ray.is_initialized()
        try:
            with TemporaryDirectory(prefix="outlier-miner-") as storage:
                _supervise(config, storage)
        finally:
            if own:
                ray.shutdown()
        return json.loads((config.run_dir / "summary.json").read_text())


def _prepare(config: TrainConfig) -> Training:
    """What would go wrong in a worker goes wrong here at once, and no two workers download or decode the same files."""
    world = World(0, config.workers)
    world.check(config.recipe)
    try:
        import_module("ray.train.torch")
    except ImportError as error:
        message = f"--workers {config.workers}: Ray Train is not complete ({error.__cause__ or error})"
        raise MinerError(f"{message}; pip install 'ray[train]'") from None
    training = Training(config, world)
    training.open()
    return training


def _supervise(config: TrainConfig, storage: str) -> None:
    """Run the workers to their end and show what the first one tells."""
    connect(None, max(config.workers, os.cpu_count() or 1))
    kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    found = int(ray.cluster_resources().get(kind, 0))
    if config.workers > found:
        raise UsageError(f"--workers {config.workers}: one {kind} each is needed, and there are {found}")
    queue = Queue(actor_options={"num_cpus": 0})
    try:
        run = _start(_trainer(config, queue, kind == "GPU", storage))
        with Display() as display:
            display.say(f"starting {config.workers} {kind} processes that train together")
            while not run.done() or not queue.empty():
                try:
                    method, *args = queue.get(timeout=PAUSE)
                except Empty:
                    continue
                getattr(display, method)(*args)
            if error := run.exception():
                raise _plain(error) from None
    finally:
        queue.shutdown(force=True)


def _trainer(config: TrainConfig, queue: Queue, gpu: bool, storage: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    never = FailureConfig(max_failures=0, controller_failure_limit=0)  # type: ignore[call-arg]  # mypy sees Ray Train 1
    return TorchTrainer(
        work,
        train_loop_config={"config": config, "folder": os.getcwd(), "queue": queue},
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=gpu),
        run_config=RunConfig(storage_path=storage, failure_config=never),
    )


def _start(trainer: Any) -> "Future[None]":
    """``trainer.fit`` in a thread: in the main one it would take Ctrl-C for itself."""
    run: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            run.set_exception(error)
        else:
            run.set_result(None)

    Thread(target=fit, daemon=True).start()
    return run


def _plain(error: BaseException) -> BaseException:
    """What went wrong first, as the worker's own error; a bug stays as Ray tells it."""
    failures = [failure for _, failure in sorted(getattr(error, "worker_failures", {}).items())]
    for failure in failures:  # before what the others say: they only miss it
        if died := getattr(failure, "health_check_failure", None):
            cause = str(died).strip().splitlines()[0]
            return MinerError(f"a worker process died ({cause}); run the same command again to go on")
    for failure in failures:
        known = isinstance(failure, MinerError | torch.OutOfMemoryError)
        if known or (isinstance(failure, OSError) and failure.filename):
            return failure
    return error


# --- in a worker -----------------------------------------------------------------------------------------------------


def work(told: dict[str, Any]) -> None:
    """What each process does: the same job as one process alone, as a part of a ``World``."""
    from ray.train import get_context

    os.chdir(told["folder"])  # Ray has a folder of its own for each worker, but the user's paths start from theirs
    context = get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    Training(told["config"], world, Relay(told["queue"])).run()


class Relay(Display):
    """A ``Display`` in a worker process: what it is told is shown by the process that started them all."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.units, self.sent = queue, 0, 0.0

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def follow(self, run: Place, rounds: int, unit: str = "round") -> None:
        """Begin the run's heartbeat."""
        self.queue.put(("follow", run, rounds, unit))

    def begin_round(self, round_: int) -> None:
        """An epoch begins."""
        self.queue.put(("begin_round", round_))

    def committed(self, record: dict[str, Any]) -> None:
        """An epoch is committed."""
        self.queue.put(("committed", record))

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of ``total`` units."""
        self.queue.put(("phase", name, total, done))

    def advance(self, units: int, unit: str = "images", note: str = "") -> None:
        """``units`` more are done; told on not more often than anyone can read."""
        self.units += units
        if time.monotonic() - self.sent > PAUSE:
            self.queue.put(("advance", self.units, unit, note))
            self.units, self.sent = 0, time.monotonic()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.queue.put(("say", text))
