"""Starting or joining Ray, and getting results with errors that people can read."""

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from ray._private import ray_constants

from miner.errors import MinerError

GONE = (
    exceptions.RayActorError,  # it died, or its machine no longer answers
    exceptions.ActorUnschedulableError,  # the machine on which it was to start is gone
    exceptions.ObjectLostError,  # what it had made is gone with its machine
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,  # Ray ends processes before the machine has no memory left
)
FULL: dict[type[Exception], str] = {  # what nobody else can do better: what to do about it
    exceptions.OutOfDiskError: "no disk is left for what Ray's object store cannot hold; make space there (df /tmp)",
    exceptions.ObjectStoreFullError: "Ray's object store is full; enlarge it (docker run --shm-size, on a cluster ray "
    "start --object-store-memory), or take fewer --trainers or a smaller --batch",
    exceptions.RuntimeEnvSetupError: "a worker process cannot start: Ray cannot set its environment; see "
    "runtime_env_setup-*.log and runtime_env_agent.log among Ray's logs on that machine",
}


class LostError(MinerError):
    """A worker process, or what it held, is gone: its work can be done again by another one."""


def connect(address: str | None, num_cpus: int | None = None, object_store_bytes: int | None = None) -> int:
    """Join the Ray cluster at ``address``, or start one for this process alone; returns its number of CPU slots.

    Never joins a cluster that merely happens to run here. Its own listens on loopback addresses only, asks for a token
    unless RAY_AUTH_MODE says otherwise, and gets an object store of at most ``object_store_bytes``, by default Ray's
    third of the machine. Raises MinerError when none answers at ``address``.
    """
    if ray.is_initialized():
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    # Else Ray warns at every start that it will stop hiding the accelerators of actors that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a lost process was asked for is an error that nobody reads: it is asked of another one.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    own = address in (None, "local")
    options: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if own else {}
    if own and object_store_bytes:
        options["object_store_memory"] = object_store_bytes
    # Waiting threads must not spin: torch and faiss bring a thread pool each, and few cores serve both.
    if own:  # Ray's processes inherit it; for a runtime_env they would be started anew
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # A private Ray whose control server is gone will not come back: end soon (Ray: 60 s), and be started again.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    else:
        options["runtime_env"] = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if not own and ":" in str(address):
            _knock(str(address))
        with _loopback() if own else contextlib.nullcontext():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if object_store_bytes and "object store" in first:
            raise MinerError(f"Ray has no room for {object_store_bytes:,} bytes of shared objects: {first}") from None
        raise MinerError(f"--address {address}: cannot join Ray ({first}); check it, or leave it out") from None
    except Exception as error:  # Ray's own start-up has no type for it
        if "timed out" not in str(error):
            raise
        raise MinerError("Ray did not start in time: the machine is too busy; run the same command again") from None
    # Ray puts its own handler in its place: a SystemExit, which becomes an error inside ray.get.
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """While Ray starts: every part of it on 127.0.0.1, and a token that only this user can read.

    Ray has no setting for that on Linux (it turns 127.0.0.1 into the address that others see), but on macOS and
    Windows it starts on loopback, and this is the switch.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    variable, constant = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    # Ray itself asks for a token in a private cluster unless RAY_AUTH_MODE says "disabled".
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        _private_token(Path.home() / ".ray" / "auth_token")
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # the first for the processes that Ray starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(name)
        os.environ |= {name: variable} if variable is not None else {}


def _private_token(path: Path) -> None:
    """Ray's own token file, made with mode 0600 before Ray makes it with 0644, or brought to that mode."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.chmod(0o600)
    except FileNotFoundError:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another command made it meanwhile: that one is in use
            os.link(part, path)
        part.unlink()


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
    """``ray.get``, with a worker's own MinerError brought back as itself, and a dead worker as a LostError.

    A full object store, disk or GPU is a MinerError too.
    """
    try:
        return ray.get(refs)
    except exceptions.RayError as error:
        plain = _plain(getattr(error, "cause", error))  # a task's error may be that of what it was given
        if plain is None:
            raise
        raise plain from None


def put(value: Any) -> Any:
    """``ray.put``, with a full object store or disk as a MinerError."""
    try:
        return ray.put(value)
    except tuple(FULL) as error:
        raise MinerError(str(_plain(error))) from None


def _plain(error: BaseException) -> MinerError | None:
    """What a user can mend, or what another process can do again; None for a bug."""
    if isinstance(error, MinerError):
        return error
    if isinstance(error, GONE):
        return _lost(error)
    if advice := next((text for kind, text in FULL.items() if isinstance(error, kind)), ""):
        return MinerError(f"{advice}; then run the same command again ({_lines(error)[0]})")
    if isinstance(error, OSError):
        return MinerError(f"{error.filename or 'a worker process'}: {error.strerror or error}")
    if "OutOfMemoryError" in [kind.__name__ for kind in type(error).__mro__]:  # torch's, which need not be loaded here
        return MinerError(
            "the GPU's memory is full; take a smaller --batch (in the classifier's training --pretrain.batch), --model "
            f"or --size ({_lines(error)[0]})"
        )
    return None


def _lines(error: BaseException) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]


def _lost(error: BaseException) -> MinerError:
    lines = _lines(error)
    if "__init__" in lines[0]:  # it would fail again; its own error comes last
        return MinerError(f"a worker process cannot start ({lines[-1].strip()})")
    return LostError(f"a worker process died ({lines[0]}); run the same command again to go on")
