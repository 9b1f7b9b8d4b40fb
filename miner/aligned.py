"""Cut windows out of images and measure how well two images agree in them. torch, in batches, on the CPU.

A window is (scale, x, y): the side of a square and its centre, in units of the image's side. Cutting is linear and
separable: a matrix for the rows, one for the columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # px that images are compared at: a copy of a small image need not be seen sharper
COARSE = 16  # px of the first look at a candidate
THUMB = 8  # px of a thumbnail
LEAST = 0.45  # of the side: smaller windows are not looked for
_GRID = ((1.0, 1), (0.9, 2), (0.8, 3), (0.7, 4), (0.6, 4))  # scale and positions a side: never 2 px off at SIDE
_GREY = torch.tensor([0.299, 0.587, 0.114])
_KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16
_STEP, _MOST = 0.02, 0.08  # of the image's side: to measure slopes over, and the farthest a window is moved at once
_FLAT = 1.0  # grey levels: an image that varies less has no structure to be compared


def grid() -> Tensor:
    """The windows that thumbnails of a reference image are taken of, float32 ``[V, 3]``; the whole image first."""
    found = []
    for scale, count in _GRID:
        places = torch.linspace(0, 1 - scale, count) + scale / 2 if count > 1 else torch.tensor([0.5])
        found += [(scale, float(x), float(y)) for y in places for x in places]
    return torch.tensor(found)


def pixels(images_BHWC: Tensor) -> Tensor:
    """uint8 ``[B, S, S, 3]`` of any size as float32 ``[B, 3, SIDE, SIDE]`` in [0, 255]."""
    x = images_BHWC.permute(0, 3, 1, 2).float()
    return x if x.shape[-1] == SIDE else F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)


def grey(x_BCSS: Tensor) -> Tensor:
    """Luminance ``[B, 1, S, S]``."""
    return torch.einsum("bchw,c->bhw", x_BCSS, _GREY)[:, None]


def cut(x_BCSS: Tensor, window_BM3: Tensor, side: int) -> Tensor:
    """``M`` windows of each image, float32 ``[B, M, C, side, side]``: triangle filter, as PIL's bilinear resize."""
    across, down = (_weights(window_BM3[..., 0], window_BM3[..., axis], side) for axis in (1, 2))
    rows = torch.matmul(down[:, :, None], x_BCSS[:, None])
    return torch.matmul(rows, across[:, :, None].transpose(-1, -2))


def _weights(scale_BM: Tensor, centre_BM: Tensor, side: int) -> Tensor:
    """What each of SIDE pixels gives to each of ``side``, ``[B, M, side, SIDE]``; past the edge the last one counts."""
    inside = (torch.arange(side) + 0.5) / side - 0.5
    at = (centre_BM[..., None] + inside * scale_BM[..., None]).mul(SIDE).clamp(0.5, SIDE - 0.5)
    width = (scale_BM * SIDE / side).clamp_min(1.0)[..., None, None]
    weight = (1 - (at[..., None] - (torch.arange(SIDE) + 0.5)).abs() / width).clamp_min(0)
    return weight / weight.sum(dim=-1, keepdim=True)


def thumbnails(x_BCSS: Tensor, whole: bool = False) -> Tensor:
    """Thumbnails of each window of ``grid``, float32 ``[B, V, 3 THUMB²]``: mean 0, length 1 (0 for one colour).

    ``whole``: of the first window alone.
    """
    parts = []
    for scale, count in _GRID[:1] if whole else _GRID:
        places = torch.linspace(0, 1 - scale, count) + scale / 2 if count > 1 else torch.tensor([0.5])
        weight = _weights(torch.full_like(places, scale), places, THUMB).flatten(0, 1)  # all places at once
        found = weight @ x_BCSS @ weight.T
        found = found.unflatten(3, (count, THUMB)).unflatten(2, (count, THUMB))  # [B, C, y, THUMB, x, THUMB]
        parts.append(found.permute(0, 2, 4, 1, 3, 5).flatten(1, 2))
    return standard(torch.cat(parts, dim=1))


def align(x_BCSS: Tensor, other_BCSS: Tensor, window_B3: Tensor, side: int, steps: int) -> tuple[Tensor, Tensor]:
    """Move windows of ``x`` to where they agree best with ``other`` at ``side`` px: ``steps`` of Gauss-Newton.

    Returns the best windows met, ``[B, 3]``, and the correlation of all pixels there, ``[B]``.
    """
    whole = torch.tensor([[[1.0, 0.5, 0.5]]]).expand(len(x_BCSS), -1, -1)
    goal = standard(cut(other_BCSS, whole, side))
    moves = torch.cat([torch.zeros(1, 3), _STEP * torch.eye(3)])
    best, agreement = window_B3, torch.full((len(window_B3),), -1.0)
    for step in range(steps + 1):
        tried = window_B3[:, None] + (moves if step < steps else moves[:1])
        found = standard(cut(x_BCSS, tried, side))
        here = (found[:, 0] * goal[:, 0]).sum(dim=1)
        better = here > agreement
        best, agreement = torch.where(better[:, None], window_B3, best), torch.where(better, here, agreement)
        if step < steps:
            slope = (found[:, 1:] - found[:, :1]) / _STEP
            normal = slope @ slope.transpose(1, 2)
            normal = normal + 1e-3 * torch.diag_embed(normal.diagonal(dim1=1, dim2=2)) + 1e-4 * torch.eye(3)
            wanted = slope @ (goal - found[:, :1]).transpose(1, 2)
            window_B3 = _inside(window_B3 + torch.linalg.solve(normal, wanted)[:, :, 0].clamp(-_MOST, _MOST))
    return best, agreement


def _inside(window_B3: Tensor) -> Tensor:
    """The windows, none larger than the image or beyond its edge."""
    scale = window_B3[:, :1].clamp(LEAST, 1.0)
    return torch.cat([scale, torch.minimum(torch.maximum(window_B3[:, 1:], scale / 2), 1 - scale / 2)], dim=1)


def detail(x_BCSS: Tensor, other_BCSS: Tensor) -> Tensor:
    """Correlation ``[B]`` of what two images hold beside their blurred selves.

    Two skies, two balls on a table agree in their blurred selves; in edges and texture only copies do.
    """
    return (standard(_sharp(x_BCSS)[:, None]) * standard(_sharp(other_BCSS)[:, None])).sum(dim=2)[:, 0]


def _sharp(x_BCSS: Tensor) -> Tensor:
    y = x_BCSS.flatten(0, 1)[:, None]
    for _ in range(3):
        y = F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), _KERNEL)
    return x_BCSS - y[:, 0].view(x_BCSS.shape)


def standard(x_BMCSS: Tensor) -> Tensor:
    """Each of M pictures as one row ``[B, M, C S S]`` of mean 0 and length 1; shorter where it is flat."""
    flat = x_BMCSS.flatten(2)
    flat = flat - flat.mean(dim=2, keepdim=True)
    return flat / flat.norm(dim=2, keepdim=True).clamp_min(_FLAT * flat.shape[2] ** 0.5)
