"""Starting or joining Ray, and getting results with errors that people can read."""

import logging
import os
import re
import signal
import socket
from typing import Any

import ray
from ray import exceptions

from miner.errors import MinerError

GONE = (
    exceptions.RayActorError,  # it died, or its machine no longer answers
    exceptions.ObjectLostError,  # what it had made is gone with its machine
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
)


class LostError(MinerError):
    """A worker process, or what it held, is gone: its work can be done again by another one."""


def connect(address: str | None, num_cpus: int | None = None) -> int:
    """Join the Ray cluster at ``address``, or start one for this process alone; returns its number of CPU slots.

    Never joins a cluster that merely happens to run here. Raises MinerError when none answers at ``address``.
    """
    if ray.is_initialized():
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    # Else Ray warns at every start that it will stop hiding the accelerators of actors that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = address in (None, "local")
    options: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if own else {}
    # Waiting threads must not spin: torch and faiss bring a thread pool each, and few cores serve both.
    options["runtime_env"] = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if not own and ":" in str(address):
            _knock(str(address))
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise MinerError(f"--address {address}: cannot join Ray ({first}); check it, or leave it out") from None
    except Exception as error:  # Ray's own start-up has no type for it
        if "timed out" not in str(error):
            raise
        raise MinerError("Ray did not start in time: the machine is too busy; run the same command again") from None
    if callable(on_sigterm):  # Ray's own handler takes its place: a SystemExit, which becomes an error inside ray.get
        signal.signal(signal.SIGTERM, on_sigterm)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def store_use() -> dict[str, int]:
    """Ray's object store on all nodes, bytes: ``capacity``, ``used`` now, ``spilled`` to disk since Ray started.

    Ray tells this only through what ``ray memory`` uses, which is not public: where that is gone, nothing is known.
    """
    try:
        from ray._private import internal_api, state

        stats = internal_api.get_memory_info_reply(state.state, timeout_seconds=10.0).store_stats
        return {
            "capacity": int(stats.object_store_bytes_avail),
            "used": int(stats.object_store_bytes_used),
            "spilled": int(stats.spilled_bytes_total),
        }
    except Exception:  # whatever another version of Ray may raise: figures must not end a run
        return {}


def _knock(address: str) -> None:
    """Raise OSError when nothing listens at ``host:port``: Ray itself would try for many minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def get(refs: Any) -> Any:
    """``ray.get``, with a worker's own MinerError brought back as itself, and a dead worker as a LostError."""
    try:
        return ray.get(refs)
    except exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MinerError):
            raise cause from None
        if isinstance(cause, GONE):  # it died while its result was on the way to another
            raise _lost(cause) from None
        if isinstance(cause, OSError):
            raise MinerError(f"{cause.filename or 'a worker process'}: {cause.strerror or cause}") from None
        raise
    except GONE as error:
        raise _lost(error) from None


def _lost(error: BaseException) -> MinerError:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    if "__init__" in lines[0]:  # it would fail again; its own error comes last
        return MinerError(f"a worker process cannot start ({lines[-1].strip()})")
    return LostError(f"a worker process died ({lines[0]}); run the same command again to go on")
