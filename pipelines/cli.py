"""What every command shares: one-line errors with exit codes, and starting or joining Ray."""

import logging
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
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains once more at exit
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


def connect(address: str | None, num_cpus: int | None) -> int:
    """Start Ray on this machine (address None) or join a cluster; returns the number of its CPU slots.

    Raises MinerError when no cluster answers at ``address``.
    """
    # Else Ray warns at every start that it will stop hiding the accelerators of actors that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    own = address in (None, "local")
    options: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if own else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise MinerError(
            f"--address {address}: cannot join Ray ({first}); check it, or leave it out"
        ) from None
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def disconnect() -> None:
    """Leave or stop Ray, if it was started."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def each(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], limit: int
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*call)`` as Ray tasks of one CPU, at most ``limit`` in flight; yields (index, result).

    Results come as they finish. A MinerError in a task is raised here as itself; other errors as Ray's.
    """
    import ray

    task = ray.remote(function).options(num_cpus=1, max_retries=3)
    flying: dict[Any, int] = {}
    queue = enumerate(calls)
    while True:
        while len(flying) < limit and (item := next(queue, None)) is not None:
            flying[task.remote(*item[1])] = item[0]
        if not flying:
            return
        for ref in ray.wait(list(flying))[0]:
            try:
                yield flying.pop(ref), ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, MinerError):
                    raise error.cause from None
                raise
