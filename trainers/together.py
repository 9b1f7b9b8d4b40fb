"""Training steps of the game that several trainers share, with the same result, bit for bit, as one trainer alone.

A batch is cut into parts, whose number is a setting of the run. Each trainer computes the gradients of some parts, all
of them get all parts' gradients (gloo on CPUs, NCCL between GPUs) and add them up in the order of the parts. BatchNorm
is frozen in the game, so that a part's gradient does not depend on who computes it, or on how many share the work.
"""

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from miner.errors import MinerError
from miner.rays import LostError
from trainers.train import autocast, uniformity

PATIENCE = timedelta(seconds=60)  # after which whoever is waited for counts as lost


def part_sizes(batch: int, parts: int) -> list[int]:
    """How many images each part of a batch has: nearly the same number, for ID and outlier images alike."""
    return [batch * (part + 1) // parts - batch * part // parts for part in range(parts)]


def own_positions(batch: int, steps: int, parts: int, rank: int, world: int) -> np.ndarray:
    """Positions, in ``steps`` batches laid end to end, of the images that trainer ``rank`` of ``world`` works at.

    Int64; step by step, and part by part (``rank``, ``rank + world``, ...) within a step.
    """
    cuts = np.split(np.arange(batch), np.cumsum(part_sizes(batch, parts))[:-1])
    return (np.arange(steps)[:, None] * batch + np.concatenate(cuts[rank::world])).reshape(-1)


def own_address() -> str:
    """This node's address as others of the cluster know it."""
    return ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"


def listen() -> socket.socket:
    """A socket, bound to a free port of ``own_address`` alone, where the members of a group will meet."""
    meeting = socket.socket()
    meeting.bind((own_address(), 0))
    return meeting


class Group:
    """Trainers that train together: this is member ``rank`` of ``world``. One alone needs to ``meet`` nobody."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.processes: Any = None

    def meet(self, where: tuple[str, int], device: torch.device, meeting: socket.socket | None) -> None:
        """Wait until all members are here. ``where``: address and port of the first one's ``meeting``.

        Raises LostError when they are not all there in time.
        """
        listening, first = meeting.detach() if meeting else None, self.rank == 0
        with _lost("while trainers met"):
            store = dist.TCPStore(
                *where, self.world, first, PATIENCE, wait_for_workers=False, master_listen_fd=listening
            )
            kind: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
            if device.type == "cuda":  # the current one: Ray shows each process the GPU that is its own, and no other
                settings = kind.Options()
            else:
                settings = kind._Options()
                # Else gloo listens wherever the host's name leads; a private Ray has 127.0.0.1 as its node's address.
                settings._devices = [kind.create_device(hostname=own_address())]
            settings._timeout = PATIENCE
            self.processes = kind(store, self.rank, self.world, settings)

    def gather(self, own: Tensor, parts: int) -> list[Tensor]:
        """All members' rows float32 ``[L]`` in the order of the parts; ``own`` are this member's, ``[p, L]``.

        Raises LostError when a member is gone.
        """
        if self.world == 1:
            return list(own)
        most = -(-parts // self.world)
        padded = F.pad(own, (0, 0, 0, most - len(own))).contiguous()
        found = [torch.empty_like(padded) for _ in range(self.world)]
        with _lost("in a training step"):
            self.processes.allgather([found], [padded]).wait()
        return list(torch.stack(found, dim=1).reshape(most * self.world, -1)[:parts])


@contextmanager
def _lost(when: str) -> Iterator[None]:
    """What torch says of a member that is gone, as LostError."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(f"a worker process died ({when}: {str(error).strip().splitlines()[0]})") from None


def own_gradients(
    net: nn.Module,
    inside: Tensor,
    labels: Tensor,
    outside: Tensor,
    factors: Tensor | None,
    alpha: float,
    sizes: list[int],
    group: Group,
) -> Tensor:
    """``part_gradient`` of each part that is this member's, padded to one length: float32 ``[p, L]``."""
    rows, start, batch = [], 0, sum(sizes)
    for size in sizes[group.rank :: group.world]:
        of = slice(start, start := start + size)
        of_factors = None if factors is None else factors[of]
        row = part_gradient(net, inside[of], labels[of], outside[of], of_factors, alpha, batch)
        rows.append(F.pad(row, (0, max(sizes) - size)))
    return torch.stack(rows)


def part_gradient(
    net: nn.Module, inside: Tensor, labels: Tensor, outside: Tensor, factors: Tensor | None, alpha: float, batch: int
) -> Tensor:
    """One part's share of ``joint_step``: float32 ``[P + 2 + n]``.

    That is the gradient of its share of the loss, its shares of cross-entropy and of the weighted outlier loss, and
    the n outliers' own losses. Images are normalised float32 [*, 3, S, S]; ``batch``: of the whole step.
    """
    with autocast(inside.device):
        logits = net(torch.cat([inside, outside])).float()
    entropy = F.cross_entropy(logits[: len(inside)], labels, reduction="sum") / batch
    losses = uniformity(logits[len(inside) :])
    weighted = (losses if factors is None else factors * losses).sum() / batch
    gradients = torch.autograd.grad(entropy + alpha * weighted, list(net.parameters()))
    told = [entropy.detach()[None], weighted.detach()[None], losses.detach()]
    return torch.cat([*(gradient.reshape(-1) for gradient in gradients), *told])


def descend_together(
    net: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Tensor], alpha: float, sizes: list[int]
) -> tuple[float, Tensor]:
    """One step down the sum of all parts' gradients: padded rows of ``part_gradient`` in the order of the parts.

    Returns (cross-entropy, outlier losses float32 [B] in batch order). Raises MinerError when the loss is not finite;
    the net is then unchanged.
    """
    parameters = list(net.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    total = rows[0][: size + 2].clone()
    for row in rows[1:]:
        total += row[: size + 2]
    entropy, weighted = total[size:].tolist()
    if not math.isfinite(entropy + alpha * weighted):
        raise MinerError(f"joint step: the loss became {entropy + alpha * weighted}; lower the learning rate (--lr)")
    start = 0
    for parameter in parameters:
        parameter.grad = total[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    optimizer.step()
    losses = [row[size + 2 : size + 2 + outliers] for row, outliers in zip(rows, sizes, strict=True)]
    return entropy, torch.cat(losses)
