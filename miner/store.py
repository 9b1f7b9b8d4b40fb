"""How much of Ray's object store a run needs at once. A private Ray gets that much, and no third of the machine.

Everything here but the last term is bounded whatever the pool's size. What does not fit Ray writes to a disk (it
*spills*): slow, but never wrong.
"""

import os
import shutil
from pathlib import Path

import torch

from miner.config import ONE_SWEEP, Config
from miner.loop import CHUNK_STEPS
from miner.sweep import IN_FLIGHT, block_size
from trainers import models
from trainers.data import IdSet

LEAST = 96 << 20  # Ray itself takes no less than 75 MiB
SLACK = 32 << 20  # small objects, and what is lost between the large ones
COPIES = 2  # a block that is late is asked of a second pool actor
COLUMNS, SWEEP_COLUMNS = 24, 40  # bytes an image that the driver collects and hands out at once, while it ranks
STATES = 4  # of the classifier and its optimiser, on their way between trainers and driver
SHM = Path("/dev/shm")


def needed(config: Config, rows: int, id_set: IdSet) -> int:
    """Bytes of the object store that a run over a pool of ``rows`` images needs at once."""
    image = 3 * config.data.size**2
    block = COPIES * IN_FLIGHT * config.machines.trainers * block_size(config.data.size)
    chunks = 3 * CHUNK_STEPS * config.game.batch  # trained on, handed over, and asked for
    columns = SWEEP_COLUMNS if config.game.rule in ONE_SWEEP else COLUMNS
    known = sum(part.nbytes for part in (id_set.train_images, id_set.test_images))
    known += 24 * (len(id_set.train_labels) + len(id_set.test_labels))  # labels, and hashes of the pixels
    return max(known + max(block, chunks) * image + STATES * _state(config, id_set) + columns * rows + SLACK, LEAST)


def _state(config: Config, id_set: IdSet) -> int:
    """Bytes of the classifier with its optimiser's momentum."""
    with torch.device("meta"):
        net = models.create(config.data.model, len(id_set.classes))
    return 2 * sum(value.numel() * value.element_size() for value in net.state_dict().values())


def complaint(wanted: int) -> str | None:
    """What to tell when shared memory is too small: Ray then keeps the store in files, without a word."""
    if not SHM.is_dir() or os.environ.get("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"):
        return None
    free = shutil.disk_usage(SHM).free
    if free >= wanted:
        return None
    return (
        f"{SHM} has {free >> 20:,} MiB free and the run shares {wanted >> 20:,} MiB between its processes: it will be "
        "slow; enlarge it (docker run --shm-size)"
    )
