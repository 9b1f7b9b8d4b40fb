"""One sweep over the pool: blocks of images on their way from pool actors through trainers to their owners.

Whoever is free takes the next block. A block's images may come from any pool actor, for all of them can map any
shard; what is learned goes to the shard's owner. Blocks are cut by shard and scored alike by whoever scores them, so
who did what changes nothing. A block that is late is asked of somebody else as well, and the first answer counts.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miner.cluster import Crew
from miner.progress import Display

BLOCK_BYTES = 12 << 20  # pixels a scoring message: 4,096 images of 32 px
CUT = 256  # images a forward pass on a CPU: blocks are whole multiples of it
IN_FLIGHT = 3  # blocks on their way for each trainer: what bounds the memory of a sweep, whatever the pool's size
AT_ONCE = 2  # blocks that one trainer has: one it works at, and the next
LATE = 3.0  # times the usual time after which a block is asked of somebody else too
LATE_SECONDS = 1.0  # and not before


def block_size(size: int) -> int:
    """Images a block at ``size`` pixels a side: a multiple of CUT; a setting of the run, never of the machines."""
    return max(min(BLOCK_BYTES // (3 * size * size), 4096) // CUT, 1) * CUT


@dataclass(eq=False)
class Block:
    """Rows (int32) of one shard, and where they are on their way."""

    shard: int
    rows: np.ndarray
    holder: Any = None  # trainer that has kept the images from the sweep before
    images: Any = None  # reference to uint8 [n, S, S, 3], once a pool actor has gathered them
    scored: bool = False
    asked: list[Any] = field(default_factory=list)  # pool actors that were asked for the images
    given: list[Any] = field(default_factory=list)  # trainers that have them
    since: float = field(default_factory=time.monotonic)  # when it was last asked or given

    @property
    def key(self) -> bytes:
        """Names these very images: the next sweep has the same blocks, unless a loss cut one of the two short."""
        return hashlib.blake2b(self.rows.tobytes(), digest_size=16, salt=self.shard.to_bytes(8, "little")).digest()


def cut(masks: list[np.ndarray], counts: list[int], size: int) -> Iterator[Block]:
    """Blocks of the rows set in each shard's mask (``np.packbits``), in shard order."""
    for shard, (mask, count) in enumerate(zip(masks, counts, strict=True)):
        rows = np.flatnonzero(np.unpackbits(mask, count=count)).astype(np.int32)
        for start in range(0, len(rows), size):
            yield Block(shard, rows[start : start + size])


class Sweep:
    """``run`` scores every block once. ``folder`` and ``stamp``: where and under which name owners keep shards.

    With ``keep`` trainers keep images for the next sweep, as far as they have room.
    """

    def __init__(self, crew: Crew, display: Display, look_up: bool, keep: bool, folder: str, stamp: str) -> None:
        self.crew, self.display, self.look_up, self.keep = crew, display, look_up, keep
        self.folder, self.stamp = folder, stamp
        self.asked: dict[Any, tuple[Block, Any]] = {}  # images on their way -> block, pool actor
        self.ready: list[Block] = []
        self.scoring: dict[Any, tuple[Block, Any]] = {}  # scores on their way -> block, trainer
        self.taking: dict[Any, Block] = {}  # scores handed to their owner
        self.open: list[Block] = []  # asked for and not scored yet, oldest first
        self.usual = {"images": 0.0, "scores": 0.0}  # seconds that a block takes, a running mean
        self.lent = 0  # blocks that another than the owner served, or that two were asked for
        self.held = 0  # blocks whose images a trainer still had

    def run(self, blocks: Iterator[Block]) -> None:
        """Score them all; returns when every owner has what is its own. Raises LostError when a process is lost."""
        room = IN_FLIGHT * len(self.crew.trainers)
        while True:
            while len(self.open) < room and (block := next(blocks, None)) is not None:
                self.open.append(block)
                self._begin(block)
            self._feed()
            self._help()
            waiting = [*self.asked, *self.scoring, *self.taking]
            if not self.open and not self.taking:
                return
            for ref in self.crew.wait(waiting, seconds=LATE_SECONDS)[0]:
                self._arrived(ref)

    def _begin(self, block: Block) -> None:
        """Hand a block to the trainer that has its images already, or have them gathered."""
        block.holder = self.crew.holders.get(block.key)
        if block.holder is None:
            self._ask(block)
        else:
            self.held += 1
            self.ready.append(block)

    def _ask(self, block: Block) -> None:
        """Have the images gathered by the pool actor with the fewest open requests, the owner before others."""
        owner = self.crew.owner[block.shard]
        busy = [actor for _, actor in self.asked.values()]
        free = [actor for actor in self.crew.pools if actor not in block.asked]
        actor = min(free, key=lambda a: (busy.count(a), a is not owner))
        block.asked.append(actor)
        self.lent += actor is not owner
        block.since = time.monotonic()
        self.asked[actor.rows_of.remote(block.shard, block.rows)] = block, actor

    def _feed(self) -> None:
        """Give ready blocks to trainers that have room."""
        for block in list(self.ready):
            trainer, load = self._freest() if block.images is not None else self._load(block.holder)
            if load < AT_ONCE:
                self.ready.remove(block)
                self._give(block, trainer)

    def _load(self, trainer: Any) -> tuple[Any, int]:
        return trainer, sum(busy is trainer for _, busy in self.scoring.values())

    def _freest(self) -> tuple[Any, int]:
        return min((self._load(trainer) for trainer in self.crew.trainers), key=lambda found: found[1])

    def _give(self, block: Block, trainer: Any) -> None:
        block.given.append(trainer)
        block.since = time.monotonic()
        key = block.key
        if block.images is not None and not (self.keep and self.crew.hold(key, trainer, self._bytes(block))):
            key = b""
        self.scoring[trainer.score.remote(block.images, self.look_up, key)] = block, trainer

    def _help(self) -> None:
        """Ask others too for what is late: images of any other pool actor, scores of a trainer without work."""
        now = time.monotonic()
        for block in self.open:
            waits = now - block.since
            if block.images is None and block.given:  # by a trainer that had them
                if waits > self._late("scores") and not block.asked and len(self.crew.trainers) > 1:
                    self._ask(block)
            elif block.images is None and not block.asked:  # its holder has enough to do, for long now
                if waits > self._late("scores") and not self._freest()[1]:
                    self.ready.remove(block)
                    self.held -= 1
                    block.holder = None
                    self._ask(block)
            elif block.images is None:
                if waits > self._late("images") and len(block.asked) < min(len(self.crew.pools), 2):
                    self._ask(block)
            elif block.given and waits > self._late("scores") and len(block.given) < 2:
                trainer, load = self._freest()
                if not load and trainer not in block.given:
                    self.lent += 1
                    self._give(block, trainer)

    def _bytes(self, block: Block) -> int:
        return len(block.rows) * 3 * self.crew.config.data.size**2

    def _late(self, what: str) -> float:
        return max(LATE * self.usual[what], LATE_SECONDS)

    def _arrived(self, ref: Any) -> None:
        if ref in self.taking:
            self._taken(self.taking.pop(ref), ref)
        elif ref in self.asked:
            block, _ = self.asked.pop(ref)
            if block.images is None:
                block.images = ref
                self._learn("images", block)
                if not block.given:  # else ``_help`` has an eye on it
                    self.ready.append(block)
        else:
            block, _ = self.scoring.pop(ref)
            if not block.scored:
                block.scored = True
                self._learn("scores", block)
                self.open.remove(block)
                owner = self.crew.owner[block.shard]
                take = owner.take_scores.remote(block.shard, block.rows, ref, self.folder, self.stamp)
                self.taking[take] = block
                block.images = None  # the pixels may go; a trainer that is late still holds its own reference

    def _learn(self, what: str, block: Block) -> None:
        seconds = time.monotonic() - block.since
        self.usual[what] += 0.2 * (seconds - self.usual[what]) if self.usual[what] else seconds

    def _taken(self, block: Block, ref: Any) -> None:
        if self.crew.get(ref):
            self.crew.kept()  # that was the shard's last block: its scores lie in the run directory
        self.display.advance(len(block.rows))
