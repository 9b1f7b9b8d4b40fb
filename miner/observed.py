"""Actor classes that can be watched: a log, metrics and the memory of each process, without a line in its methods."""

import functools
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miner import memory, telemetry
from miner.logs import log, start

SLOW = 1.0  # seconds of a call that is worth a line in the log
_SHOWN = {"shard": "shard", "shards": "shards", "round_": "round", "start": "start"}  # arguments that a line shows

After = Callable[[Any, float], None]


def observed(kind: type, **after: After) -> Any:
    """A class for ``ray.remote`` that does what ``kind`` does and can be watched.

    Its constructor takes ``watch=(run directory, process name)`` besides the arguments of ``kind``. Every error that
    leaves a public method or the constructor is logged with its traceback and the shard and round it was about; so
    are slow calls. ``memory()`` gives the process's row of the memory table. ``after`` names functions that are told
    the result and the seconds of a method of that name, e.g. to count them.
    """

    def __init__(self: Any, *args: Any, watch: tuple[str, str] | None = None, **kwargs: Any) -> None:
        self._process = watch[1] if watch else kind.__name__
        if watch:
            start(*watch)
            telemetry.start(Path(watch[0]).name, watch[1])
        try:
            kind.__init__(self, *args, **kwargs)  # type: ignore[misc]
        except Exception:
            log.exception("could not start")
            raise

    def memory_row(self: Any) -> dict[str, Any]:
        """This process's row of the memory table."""
        return memory.entry(self._process)

    members: dict[str, Any] = {"__init__": __init__, "memory": memory_row}
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            members[name] = _watched(method, after.get(name))
    missing = after.keys() - members.keys()
    if missing:
        raise AttributeError(f"{kind.__name__} has no method {', '.join(missing)}")
    return type(kind.__name__, (kind,), members | {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _watched(method: Callable[..., Any], after: After | None) -> Callable[..., Any]:
    """``method`` with its errors and its slow calls logged."""
    names = list(inspect.signature(method).parameters)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            result = method(*args, **kwargs)
        except Exception as error:
            if getattr(error, "logged", False):  # by the method that this one called for it
                raise
            error.logged = True  # type: ignore[attr-defined]
            facts = _shown(names, args, kwargs) | {"seconds": round(time.monotonic() - began, 3)}
            log.exception("%s failed", method.__name__, extra=facts)
            raise
        seconds = time.monotonic() - began
        if seconds > SLOW:
            log.info(method.__name__, extra=_shown(names, args, kwargs) | {"seconds": round(seconds, 3)})
        if after:
            after(result, seconds)
        return result

    return call


def _shown(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return {_SHOWN[name]: value for name, value in given.items() if name in _SHOWN}
