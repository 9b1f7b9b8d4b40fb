"""How much memory is free, on a GPU or here, where control groups (a container's) limit it; if it is too little."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

from miner.errors import MinerError

Method = TypeVar("Method", bound=Callable[..., Any])

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Files of a limit and of what is used of it, under cgroup v2 and v1, and what the files' cache in it is called.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that is free now; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch only keeps for later counts as used
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return max(min([os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_left()]), 0)


def _left() -> Iterator[int]:
    """What is left of each limit that holds for this process, bytes: of its own control group and those above it."""
    with contextlib.suppress(OSError):  # not Linux
        for line in OWN.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                group = PurePosixPath(path)
                for above in (group, *group.parents):  # in a container the last one is its own
                    yield from _left_in(CGROUPS / kinds / above.relative_to("/"))


def _left_in(folder: Path) -> Iterator[int]:
    for most, used, cached in _FILES:
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max": no limit
            limit, now = (int((folder / name).read_text()) for name in (most, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield limit - now + int(stat.get(cached, 0))


def fitting(method: Method) -> Method:
    """A method that forwards ``self.at_once`` images at a time: done anew with fewer until it fits the GPU's memory.

    Raises MinerError when it does not fit with one.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return method(self, *args, **kwargs)
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise MinerError("one image does not fit the GPU's memory: a smaller --model or --size") from None
                self.at_once //= 2
            torch.cuda.empty_cache()  # not before here is what ``method`` held let go of

    return call  # type: ignore[return-value]
