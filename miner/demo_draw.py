"""Drawing primitives of the embedded demo: pen strokes, font glyphs and textures of 32 px.

Whatever imitates the digits goes through their own path: a bitmap of 32 × 32 pixels, the count of set pixels
in each block of 4 × 4 (0 to 16), then a bilinear enlargement. So neither sharpness nor grey levels betray
which image is a digit. Integers wherever they serve, and coordinates rounded behind every sine, keep the
bytes the same from machine to machine.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 32
LEVELS = 16
ATLAS = 96
GLYPH = 72
# Textures are dim: a net that has seen only digits is sure of itself on any bright frame.
DARK = (0, 31)
LIGHT = (40, 121)

Array = np.ndarray
Font = tuple[str, ...]


def bilinear(grids: Array, size: int) -> Array:
    """Integer grids [n, g, g] -> int64 [n, size, size], enlarged bilinearly and times (2 · size)²; exact."""
    cells = grids.shape[1]
    weights = np.zeros((size, cells))
    for row in range(size):
        position = min(max((2 * row + 1) * cells - size, 0), 2 * size * (cells - 1))
        low, rest = divmod(position, 2 * size)
        weights[row, low] += 2 * size - rest
        weights[row, min(low + 1, cells - 1)] += rest
    return (weights @ grids.astype(np.float64) @ weights.T).astype(np.int64)


def enlarge(levels: Array, size: int = SIZE) -> Array:
    """Pen levels 0..16 [n, 8, 8] -> grey uint8 RGB [n, size, size, 3], white on black."""
    scaled = bilinear(levels, size)
    full = LEVELS * (2 * size) ** 2
    return rgb(((scaled * 255 + full // 2) // full).astype(np.uint8))


def rgb(grey: Array) -> Array:
    """uint8 [n, s, s] -> uint8 [n, s, s, 3]."""
    return np.repeat(grey[..., None], 3, axis=-1)


def count_blocks(masks: Array) -> Array:
    """Bitmaps bool [n, 32, 32] -> levels 0..16 int64 [n, 8, 8], as the digits were once made."""
    return masks.reshape(len(masks), 8, 4, 8, 4).sum(axis=(2, 4))


def pixel_grid() -> tuple[Array, Array]:
    """Pixel centres (x, y), float64 [32, 32] each, relative to the image's centre."""
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    return np.broadcast_to(axis, (SIZE, SIZE)), np.broadcast_to(axis[:, None], (SIZE, SIZE))


def round_off(values: Array) -> Array:
    """Coordinates rounded to 1/64 px, so that the last bit of a sine changes no pixel."""
    return np.round(values * 64) / 64


def stroke_masks(starts: Array, ends: Array, width: Array) -> Array:
    """Bitmaps bool [n, 32, 32] of the segments from ``starts`` to ``ends``, ``width`` [n] px wide.

    Both ends are float [n, s, 2]: (x, y) in px from the image's centre.
    """
    x, y = pixel_grid()
    starts, ends, width = round_off(starts), round_off(ends), round_off(width)
    masks = np.zeros((len(starts), SIZE, SIZE), dtype=bool)
    for start, end in zip(starts.swapaxes(0, 1), ends.swapaxes(0, 1), strict=True):
        dx, dy = (end - start).T[:, :, None, None]
        px, py = x - start[:, 0, None, None], y - start[:, 1, None, None]
        along = np.clip((px * dx + py * dy) / np.maximum(dx * dx + dy * dy, 1 / 4096), 0, 1)
        distance = (px - along * dx) ** 2 + (py - along * dy) ** 2
        masks |= distance <= (width**2 / 4)[:, None, None]
    return masks


def fit_box(points: Array, widths: Array, heights: Array) -> Array:
    """Points [n, k, 2] moved and scaled so that their box is ``widths`` × ``heights`` [n] px, centred."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    box = np.stack([widths, heights], axis=1)[:, None, :]
    return (points - (low + high) / 2) / np.maximum(high - low, 1.0) * box


def affine(rng: np.random.Generator, count: int, turn: float, shear: float, scale: tuple[float, float]) -> Array:
    """Random matrices float64 [count, 2, 2]: turned by ±``turn`` rad, sheared, scaled by x and y apart."""
    angle = rng.uniform(-turn, turn, count)
    slant = rng.uniform(-shear, shear, count)
    sx, sy = rng.uniform(*scale, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    first = np.stack([cos * sx, (cos * slant - sin) * sy], axis=1)
    second = np.stack([sin * sx, (sin * slant + cos) * sy], axis=1)
    return np.round(np.stack([first, second], axis=1) * 4096) / 4096


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> Array:
    """One glyph, its ink scaled to fill 72 px of a 96 px square and softened; uint8 [96, 96]."""
    left, top, right, bottom = (round(v) for v in font.getbbox(character))
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), character, fill=255, font=font)
    # A thin glyph must not be blown up into a beam, so the narrow side grows to at most 1.5 times its share.
    longest = max(ink.size)
    sides = [max(8, GLYPH * min(longest, side * 3 // 2) // longest) for side in ink.size]
    square = Image.new("L", (ATLAS, ATLAS))
    square.paste(
        ink.resize((sides[0], sides[1]), Image.Resampling.BILINEAR),
        ((ATLAS - sides[0]) // 2, (ATLAS - sides[1]) // 2),
    )
    return np.asarray(square.filter(ImageFilter.BoxBlur(5)))


@cache
def atlas(characters: str, fonts: Sequence[str]) -> Array:
    """Softened glyphs uint8 [fonts · characters, 96, 96] from the fonts that matplotlib brings along."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    loaded = [
        ImageFont.truetype(str(folder / f"{name}.ttf"), GLYPH, layout_engine=ImageFont.Layout.BASIC) for name in fonts
    ]
    return np.stack([_glyph(font, character) for font in loaded for character in characters])


def glyph_levels(rng: np.random.Generator, glyphs: Array, count: int) -> Array:
    """Random glyphs of an atlas, turned, sheared, scaled, moved, of random width: levels [count, 8, 8]."""
    chosen = rng.integers(0, len(glyphs), count)
    inverse = affine(rng, count, turn=0.2, shear=0.25, scale=(0.95, 1.25)) * (GLYPH / SIZE)
    shift = rng.integers(-2, 3, (count, 2, 1, 1))
    x, y = pixel_grid()
    x, y = x + shift[:, 0], y + shift[:, 1]
    middle = (ATLAS - 1) / 2
    column, row = (
        np.clip(np.rint(line[:, 0] * x + line[:, 1] * y + middle).astype(int), 0, ATLAS - 1)
        for line in inverse.swapaxes(0, 1)[..., None, None]
    )
    threshold = rng.integers(36, 100, (count, 1, 1))
    return count_blocks(glyphs[chosen[:, None, None], row, column] > threshold)


def colours(rng: np.random.Generator, count: int, low: int = 0, high: int = 256) -> Array:
    """Random colours int64 [count, 1, 1, 3] in [low, high)."""
    return rng.integers(low, high, (count, 1, 1, 3))


def mix(amount: Array, top: int, first: Array, second: Array) -> Array:
    """From ``first`` where ``amount`` [n, 32, 32] is 0 to ``second`` where it is ``top``: uint8 RGB."""
    part = amount[..., None].astype(np.int64)
    return ((first * (top - part) + second * part + top // 2) // top).astype(np.uint8)


def noise(rng: np.random.Generator, count: int) -> Array:
    """Uniform, bell-shaped and salt-and-pepper noise by turns, grey or coloured."""
    draws = rng.integers(0, 256, (count, SIZE, SIZE, 3))
    bell = (draws + rng.integers(0, 256, draws.shape) + rng.integers(0, 256, draws.shape)) // 3
    pepper = np.where(draws < rng.integers(10, 120, (count, 1, 1, 1)), (draws % 2) * 255, colours(rng, count, 60, 200))
    kind = rng.integers(0, 3, (count, 1, 1, 1))
    images = np.where(kind == 0, draws, np.where(kind == 1, bell, pepper))
    grey = rng.random((count, 1, 1, 1)) < 0.3
    dimmed = np.where(grey, images[..., :1], images) * rng.integers(*LIGHT, (count, 1, 1, 1)) // 255
    return dimmed.astype(np.uint8)


def gradients(rng: np.random.Generator, count: int) -> Array:
    """Ramps of colour in any direction, straight or round."""
    x, y = pixel_grid()
    a, b = rng.integers(-8, 9, (2, count, 1, 1))
    straight = a * x + (b + (a == 0) * 9) * y
    round_one = (x - a * 2) ** 2 + (y - b * 2) ** 2
    ramp = np.where(rng.random((count, 1, 1)) < 0.5, straight, round_one)
    low, high = ramp.min(axis=(1, 2), keepdims=True), ramp.max(axis=(1, 2), keepdims=True)
    return mix(
        np.rint((ramp - low) / (high - low) * 1024),
        1024,
        colours(rng, count, *DARK),
        colours(rng, count, *LIGHT),
    )


def stripes(rng: np.random.Generator, count: int) -> Array:
    """Stripes over the whole frame, hard or soft."""
    x, y = pixel_grid()
    a, b = rng.integers(-6, 7, (2, count, 1, 1))
    period = rng.integers(24, 72, (count, 1, 1))
    phase = np.rint(a * x + (b + (a == 0) * 7) * y).astype(np.int64) % period
    soft = np.abs(2 * phase - period) * 64 // period
    hard = np.where(2 * phase < period, 64, 0)
    wave = np.where(rng.random((count, 1, 1)) < 0.5, soft, hard)
    return mix(wave, 64, colours(rng, count, *DARK), colours(rng, count, *LIGHT))


def checkers(rng: np.random.Generator, count: int) -> Array:
    """Chequer boards of cells 2 to 8 px wide and high."""
    rows = (np.arange(SIZE) + rng.integers(0, 16, (count, 1))) // rng.integers(2, 9, (count, 1))
    columns = (np.arange(SIZE) + rng.integers(0, 16, (count, 1))) // rng.integers(2, 9, (count, 1))
    board = (rows[:, :, None] + columns[:, None, :]) % 2
    return mix(board, 1, colours(rng, count, *DARK), colours(rng, count, *LIGHT))


def blobs(rng: np.random.Generator, count: int) -> Array:
    """Soft clouds of two colours: random grids of 5 × 5, enlarged."""
    clouds = bilinear(rng.integers(0, 256, (count, 5, 5)), SIZE) // (2 * SIZE) ** 2
    return mix(clouds, 255, colours(rng, count, *DARK), colours(rng, count, *LIGHT))


def shapes(rng: np.random.Generator, count: int) -> Array:
    """Sharp outlines on a plain ground: lines, triangles, polygons, near-circles, in two colours."""
    corners = rng.choice([2, 3, 4, 5, 6, 12], count)[:, None]
    step = np.arange(13) % corners
    angle = 2 * np.pi * step / corners
    points = np.stack([np.cos(angle), np.sin(angle)], axis=2) * rng.uniform(7, 14, (count, 1, 1))
    points = points @ affine(rng, count, turn=np.pi, shear=0.4, scale=(0.6, 1.1))
    points += rng.integers(-6, 7, (count, 1, 2))
    masks = stroke_masks(points[:, :-1], points[:, 1:], rng.uniform(1.2, 4.5, count))
    return mix(masks, 1, colours(rng, count, 0, 90), colours(rng, count, 110, 256))
