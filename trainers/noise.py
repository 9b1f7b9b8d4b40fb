"""Noise as OOD sets: the Gaussian, uniform, Rademacher and blob images of Outlier Exposure, seeded."""

import numpy as np

NOISE = ("gaussian", "uniform", "rademacher", "blob")
COUNT = 2000
BLOCK = 100  # images drawn at once, to bound memory at large sizes
BLUR = 1.5  # sigma in pixels
REACH = 6  # pixels; four sigma


def draw_noise(name: str, size: int, seed: int, count: int = COUNT) -> np.ndarray:
    """``count`` images of one of NOISE: uint8 [count, size, size, 3], the same for the same arguments.

    Values are drawn in [-1, 1] of the normalised space (x/255 - 0.5)/0.25 that the nets see, as in the code of
    Outlier Exposure (Hendrycks et al. 2019): Gaussian N(0, 0.5²) clipped; Rademacher ±1; uniform; blobs are
    Bernoulli(0.7) pixels blurred over height, width and channels (sigma 1.5), what stays under 0.75 set to 0.
    """
    rng = np.random.default_rng([NOISE.index(name), seed])
    blocks = []
    for start in range(0, count, BLOCK):
        values = _values(name, rng, (min(BLOCK, count - start), size, size, 3))
        blocks.append(np.rint(values * 63.75 + 127.5).astype(np.uint8))
    return np.concatenate(blocks)


def _values(name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if name == "gaussian":
        return rng.normal(0.0, 0.5, shape).clip(-1, 1)
    if name == "uniform":
        return rng.uniform(-1, 1, shape)
    if name == "rademacher":
        return rng.integers(0, 2, shape) * 2.0 - 1
    blurred = (rng.random(shape) < 0.7).astype(np.float64)
    for axis in (1, 2, 3):
        blurred = _blurred(blurred, axis)
    return np.where(blurred < 0.75, 0.0, blurred) * 2 - 1


def _blurred(values: np.ndarray, axis: int) -> np.ndarray:
    """Gaussian filter along one axis; the border repeats outward."""
    kernel = np.exp(-0.5 * (np.arange(-REACH, REACH + 1) / BLUR) ** 2)
    pad = [(REACH, REACH) if i == axis else (0, 0) for i in range(values.ndim)]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, pad, "edge"), len(kernel), axis)
    return windows @ (kernel / kernel.sum())
