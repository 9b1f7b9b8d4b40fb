"""TensorBoard's event files of a run, in its folder or, copied there after every round, at its URL."""

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from miner.files import Place, atomic


class Board:
    """Writes every round's figures. A context manager; what it wrote stays when it ends."""

    def __init__(self, folder: Place, first: int) -> None:
        """``first`` is the round that begins now: TensorBoard then forgets what earlier attempts at it wrote."""
        self.folder, self.first = folder, first
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Board":
        if isinstance(self.folder, Path):
            self._local = self.folder
        else:
            self._local = Path(self._stack.enter_context(TemporaryDirectory()))
        self._writer = SummaryWriter(str(self._local), purge_step=self.first)
        self._stack.callback(self._writer.close)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write the numbers of one round's ``record``. Raises MinerError when they cannot be copied to a URL."""
        for name, value in record.items():
            if name != "round" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["round"])
        if not isinstance(self.folder, Path):  # no appending to objects
            self._writer.flush()
            for path in sorted(self._local.iterdir()):
                with atomic(self.folder / path.name) as sink:
                    sink.write(path.read_bytes())
