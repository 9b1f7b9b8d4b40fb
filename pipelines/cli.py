"""What every command shares: one-line errors with exit codes, and starting or joining Ray."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from miner.errors import MinerError, disk_full

_signals: list[int] = []  # SIGTERM, once it came


def run(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and exit: 0, or one line on stderr and the error's exit code, 130 after Ctrl-C, 143 after SIGTERM.

    SIGTERM (from ``kill``, a scheduler, a container's end) stops the command as Ctrl-C does.
    """
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        sys.stdout.flush()
    except MinerError as error:
        _stop(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        sys.exit(1)
    except RuntimeError as error:
        if not isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
            raise
        _stop("the GPU's memory is full: a smaller --batch or --batch-outliers, --model or --size", 1)
    except OSError as error:
        if error.filename is None:
            raise
        full = disk_full(error, error.filename)
        _stop(str(full) if full else f"{error.filename}: {error.strerror}", 1)
    except KeyboardInterrupt:
        if _signals:
            _terminated()
        _stop("interrupted; run the same command again to go on", 130)
    except SystemExit as stopped:
        if stopped.code == signal.SIGTERM:  # while Ray starts its own handler is in force, which does this
            _terminated()
        raise
    finally:
        if before is not None and not _signals:
            signal.signal(signal.SIGTERM, before)
    sys.exit(0)


def terminate(signum: int, frame: object) -> None:
    """What SIGTERM does: the exception that Ctrl-C raises, since everything, Ray's calls too, ends cleanly by it.

    A second SIGTERM is ignored: it would cut short the end of Ray's processes.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _signals.append(signum)
    raise KeyboardInterrupt


def _terminated() -> NoReturn:
    _signals.append(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _stop("terminated; run the same command again to go on", 128 + signal.SIGTERM)


def _stop(message: str, code: int) -> NoReturn:
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)


def disconnect() -> None:
    """Leave or stop Ray, if it was started."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def each(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], limit: int) -> Iterator[tuple[int, Any]]:
    """Run ``function(*call)`` as Ray tasks of one CPU, at most ``limit`` in flight; yields (index, result).

    Results come as they finish. A MinerError in a task is raised here as itself; other errors as Ray's.
    """
    import ray

    from miner.rays import get

    task = ray.remote(function).options(num_cpus=1, max_retries=3)
    flying: dict[Any, int] = {}
    queue = enumerate(calls)
    while True:
        while len(flying) < limit and (item := next(queue, None)) is not None:
            flying[task.remote(*item[1])] = item[0]
        if not flying:
            return
        for ref in ray.wait(list(flying))[0]:
            yield flying.pop(ref), get(ref)
