"""What several tests train with, and how they kill what they started."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from trainers.config import PretrainConfig

CPU = torch.device("cpu")
QUICK = PretrainConfig(epochs=3, batch=64, lr=0.1)


def silent(report: dict) -> None:
    """Progress that nobody watches."""


def start_and_kill(words: Sequence[str], root: Path, log: Path, when: Callable[[], object], seconds: float) -> None:
    """Run a command from ``root``; SIGKILL it with all its children once ``when()`` holds. It must not end before."""
    with open(log, "wb") as sink:
        process = subprocess.Popen(words, cwd=root, stderr=sink, stdout=sink, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while not when():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
