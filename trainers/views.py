"""Where the pool's images meet the net: their way to the device, and the views that a loss is averaged over."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# The image itself comes first. A loss that is averaged over views depends less on the net that it is measured with.
_SHIFTS = ((2, 1), (-2, -1), (1, -2), (-1, 2))
_MARGIN = 2


def on_device(images: np.ndarray, device: torch.device) -> Tensor:
    """A copy of uint8 images on ``device``; to a GPU through pinned memory, so that it is made beside its kernels."""
    copy = torch.empty(images.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(copy.numpy(), images)
    return copy.to(device, non_blocking=True)


def views(images: Tensor, count: int, flip: bool) -> Iterator[Tensor]:
    """The other ``count`` - 1 views of uint8 images [n, S, S, 3]: mirrored (if ``flip``), then shifted by 1 and 2 px.

    What a shift brings in is the image reflected at its edge. Views are made on the device that the images are on.
    """
    if count == 1:
        return
    side = images.shape[1]
    at = torch.arange(-_MARGIN, side + _MARGIN, device=images.device).abs()
    at = (side - 1) - ((side - 1) - at).abs()
    wide = images.index_select(1, at).index_select(2, at)
    others = [images.flip(2)] if flip else []
    others += [wide[:, _MARGIN + y :, _MARGIN + x :][:, :side, :side] for y, x in _SHIFTS]
    yield from others[: count - 1]
