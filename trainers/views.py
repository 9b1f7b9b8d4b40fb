"""Where images meet the net in the game: their way to the device, views that are scored, batches that train."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainers.data import IdSet, crop, draw_views, normalise

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


def game_batch(
    id_set: IdSet, batch: int, own: np.ndarray, outliers: np.ndarray, moment: list[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``own`` positions (int64 [n]) of a training step's batch, on ``device``, randomly cropped and mirrored.

    ID images, normalised float32 [n, 3, S, S], their labels [n], and the ``outliers``, uint8 [n, S, S, 3], likewise.
    ``moment`` (seed, round, step) seeds all that is drawn, which is drawn for the whole ``batch``, whoever needs what.
    """
    mixed = np.random.SeedSequence(moment).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    rows = torch.randint(len(id_set.train_labels), (batch,), generator=generator).numpy()[own]
    shifts, mirrored = draw_views(2 * batch, generator)
    at = torch.from_numpy(np.concatenate([own, batch + own]))
    both = on_device(np.concatenate([id_set.train_images[rows], outliers]), device)
    both = normalise(crop(both, shifts[:, at], mirrored[at], id_set.flip))
    return both[: len(rows)], torch.from_numpy(id_set.train_labels[rows]).to(device), both[len(rows) :]
