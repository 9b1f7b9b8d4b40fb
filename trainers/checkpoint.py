"""Checkpoints: safetensors whose header carries JSON metadata. Nothing here unpickles."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from miner.errors import MinerError
from miner.files import atomic
from trainers import models


def save_checkpoint(path: str | os.PathLike[str], net: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write the weights of ``net`` and ``meta``, which must be JSON; complete or absent.

    ``meta`` holds "model" (a name of ``trainers.models``) and "classes" (names in label order), which
    ``load_net`` needs, and what else says where the weights come from: id, id_fingerprint, accuracy, config,
    seed. Raises MinerError when the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    data = save(tensors, metadata={"outlier-miner": json.dumps(dict(meta), sort_keys=True)})
    with atomic(os.fspath(path)) as file:
        file.write(data)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict (on the CPU) and metadata of a safetensors file; {} when it has none of ours.

    Raises MinerError for a missing file and for anything but safetensors, pickles above all.
    """
    where = os.fspath(path)
    if not os.path.isfile(where):
        raise MinerError(f"{where}: no such checkpoint file")
    with open(where, "rb") as file:
        head = file.read(2)
    if head == b"PK" or head[:1] == b"\x80" or where.endswith((".pt", ".pth", ".pkl", ".ckpt")):
        raise MinerError(
            f"{where}: a pickle, which can run code when it is loaded; convert one that you trust with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'net.safetensors')"
        )
    try:
        with safe_open(where, framework="pt", device="cpu") as tensors:
            text = (tensors.metadata() or {}).get("outlier-miner", "{}")
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, json.loads(text)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MinerError(f"{where}: not a sound safetensors file ({error}); write or fetch it again") from None


def load_net(path: str | os.PathLike[str], model: str, classes: Sequence[str]) -> tuple[models.Net, dict[str, Any]]:
    """The net ``model`` with the weights of ``path`` (on the CPU), and the file's metadata.

    Raises MinerError when the file was made for another model or other classes, or its tensors do not fit.
    """
    where = os.fspath(path)
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
    net = models.create(model, len(classes))
    expected = net.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want, found = (list(side[name].shape) if name in side else "none" for side in (expected, state))
        if want != found:
            raise MinerError(f"{where}: shape of {name} is {found}, in {model} {want}; pre-train anew")
    net.load_state_dict(state)
    return net, meta
