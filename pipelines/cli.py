"""What every command shares: one-line errors with exit codes, and starting or joining Ray."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from miner.errors import MinerError, disk_full


def run(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and exit: 0, or one line on stderr and the error's exit code, or 130 after Ctrl-C."""
    try:
        main()
        sys.stdout.flush()
    except MinerError as error:
        _stop(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        full = disk_full(error, error.filename)
        _stop(str(full) if full else f"{error.filename}: {error.strerror}", 1)
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to go on", 130)
    sys.exit(0)


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
