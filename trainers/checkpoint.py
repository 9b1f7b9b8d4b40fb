"""Checkpoints: safetensors whose header carries JSON metadata. Nothing here unpickles."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from miner.buckets import BucketPath
from miner.errors import MinerError
from miner.files import Place, atomic, local_copy, parse_json, place
from trainers import models

Where = str | os.PathLike[str] | Place  # a file, or a run directory; local or at a URL
RUN_FILES = ("checkpoint.safetensors", "classifier.safetensors")  # of pipelines.train, of pipelines.resample


def save_checkpoint(path: Where, net: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write the weights of ``net`` and ``meta``, which must be JSON; complete or absent.

    ``meta`` holds "model" (a name of ``trainers.models``) and "classes" (names in label order), which
    ``load_net`` needs, and what else says where the weights come from: id, id_fingerprint, accuracy, config,
    seed. Raises MinerError when the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    data = save(tensors, metadata={"outlier-miner": json.dumps(dict(meta), sort_keys=True)})
    with atomic(place(path)) as file:
        file.write(data)


def load_checkpoint(path: Where) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict (on the CPU) and metadata of a safetensors file or a run directory; {} when it has none of ours.

    Raises MinerError for a missing file and for anything but safetensors, pickles above all.
    """
    where = place(path)
    local_folder = isinstance(where, Path) and where.is_dir()
    if local_folder or (isinstance(where, BucketPath) and not where.name.endswith(".safetensors")):
        found = [where / name for name in RUN_FILES if (where / name).exists()]
        if not found and not local_folder and where.exists():
            found = [where]  # not a folder after all
        if not found:
            raise MinerError(f"{where}: no {' or '.join(RUN_FILES)} in it; train to the end, or name a checkpoint")
        where = found[0]
    if isinstance(where, Path) and not where.is_file():
        raise MinerError(f"{where}: no such checkpoint file")
    try:
        with local_copy(where) as local:
            return _read(str(where), local)
    except (FileNotFoundError, IsADirectoryError):
        raise MinerError(f"{where}: no such checkpoint file") from None


def _read(where: str, local: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``load_checkpoint`` gives of the ``local`` file that is known as ``where``."""
    with open(local, "rb") as file:
        head = file.read(2)
    if head == b"PK" or head[:1] == b"\x80" or where.endswith((".pt", ".pth", ".pkl", ".ckpt")):
        raise MinerError(
            f"{where}: a pickle, which can run code when it is loaded; convert one that you trust with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'net.safetensors')"
        )
    try:
        with safe_open(local, framework="pt", device="cpu") as tensors:
            text = (tensors.metadata() or {}).get("outlier-miner", "{}")
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MinerError(f"{where}: not a sound safetensors file ({error}); write or fetch it again") from None
    meta = parse_json(text, where)
    names = meta.get("classes", []) if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MinerError(f"{where}: its metadata does not make sense; write or fetch it again")
    if meta.get("model", models.NAMES[0]) not in models.NAMES:
        raise MinerError(f"{where}: holds {meta['model']!r}, no model of this program; update it")
    return state, meta


def open_checkpoint(path: Where) -> tuple[models.Net, dict[str, Any]]:
    """The net of a checkpoint file or of a run directory (on the CPU, eval mode), and its metadata.

    The metadata alone says what to build: "model", "classes" and "reject" (True: one output more than classes).
    Raises MinerError as ``load_checkpoint`` does, and for a file that does not say what it holds.
    """
    where = str(path)
    meta = load_checkpoint(where)[1]
    if not {"model", "classes"} <= meta.keys():
        raise MinerError(f"{where}: does not say which model and classes it holds; only our own checkpoints do")
    return load_net(where, meta["model"], meta["classes"], reject=bool(meta.get("reject")))


def load_net(
    path: Where, model: str, classes: Sequence[str], reject: bool = False, seed: int = 0
) -> tuple[models.Net, dict[str, Any]]:
    """The net ``model`` with the weights of ``path`` (on the CPU, eval mode), and the file's metadata.

    With ``reject`` the net has one output more than ``classes``, the last; a file without it gets a fresh row
    there, drawn from ``seed``; without ``reject`` such a row is left out.
    Raises MinerError when the file was made for another model or other classes, or its tensors do not fit.
    """
    where = str(path)
    state, meta = load_checkpoint(where)
    if meta.get("model", model) != model:
        raise MinerError(f"{where}: holds {meta['model']}, not {model}; pass --model {meta['model']}")
    made_for = list(meta.get("classes", classes))
    if len(made_for) != len(classes):
        raise MinerError(f"{where}: made for {len(made_for)} classes, the ID set has {len(classes)}; pre-train anew")
    if made_for != list(classes):
        first = next(i for i, pair in enumerate(zip(made_for, classes, strict=True)) if pair[0] != pair[1])
        raise MinerError(
            f"{where}: class {first} is {made_for[first]!r}, the ID set's {classes[first]!r}; pre-train anew"
        )
    net = models.create(model, len(classes) + reject, seed)
    expected = net.state_dict()
    outputs = state["head.bias"].numel() if "head.bias" in state else 0
    if outputs not in (0, len(classes) + bool(meta.get("reject"))):
        raise MinerError(f"{where}: has {outputs} outputs, the ID set {len(classes)} classes; pre-train anew")
    if bool(meta.get("reject")) != reject:
        for name in ("head.weight", "head.bias"):
            fresh = expected[name][len(classes) :].clone()
            if name in state and state[name].shape[1:] == fresh.shape[1:]:  # else it does not fit, as told below
                state[name] = torch.cat([state[name][: len(classes)], fresh])
    for name in sorted(expected.keys() | state.keys()):
        want, found = (list(side[name].shape) if name in side else "none" for side in (expected, state))
        if want != found:
            raise MinerError(f"{where}: shape of {name} is {found}, in {model} {want}; pre-train anew")
    net.load_state_dict(state)
    return net.eval(), meta


def pack(
    net: nn.Module, optimizer: torch.optim.Optimizer | None = None, more: Mapping[str, Tensor] | None = None
) -> bytes:
    """Net, optimiser state and other tensors as safetensors bytes: ``net.*``, ``optimizer.*``, ``more.*``."""
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"more.{name}": value for name, value in (more or {}).items()}
    for i, parameter in enumerate(_parameters(optimizer)):
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items() if value is not None}
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def unpack(blob: bytes) -> dict[str, Tensor]:
    """The state dict of the net in what ``pack`` gave."""
    return {name[4:]: value for name, value in load(blob).items() if name.startswith("net.")}


def restore(blob: bytes, net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put net and optimiser back to where ``pack`` took them; returns the other tensors.

    A blob without optimiser state resets the optimiser.
    """
    tensors = load(blob)
    net.load_state_dict(unpack(blob))
    optimizer.state.clear()
    for i, parameter in enumerate(_parameters(optimizer)):
        start = f"optimizer.{i}."
        for name in [name for name in tensors if name.startswith(start)]:
            value = tensors[name]
            if value.ndim:  # a counter of steps stays where it is
                value = torch.empty_like(parameter).copy_(value)  # in the parameter's own memory layout
            optimizer.state[parameter][name.removeprefix(start)] = value
    return {name[5:]: value for name, value in tensors.items() if name.startswith("more.")}


def _parameters(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]] if optimizer else []
