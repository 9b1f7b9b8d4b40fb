"""The embedded demo needs no download: handwritten digits as ID, a drawn background pool, held-out OOD sets.

ID is the digits set that scikit-learn brings along (Alpaydin & Kaynak 1998, 8 × 8 pixels). The pool runs from
textures that look nothing like a digit (most of it) to a few families that come close: letters, train digits
mirrored or broken. The held-out families share no motif with the pool.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from miner.demo_draw import (
    DARK,
    LIGHT,
    SIZE,
    Array,
    affine,
    atlas,
    blobs,
    checkers,
    colours,
    count_blocks,
    enlarge,
    fit_box,
    glyph_levels,
    gradients,
    mix,
    noise,
    pixel_grid,
    shapes,
    stripes,
    stroke_masks,
)
from miner.errors import UsageError

Generator = np.random.Generator
Drawer = Callable[[Generator, int], Array]

CLASSES = tuple(str(digit) for digit in range(10))
TEST_PER_CLASS = 50
HELD_OUT_COUNT = 400
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmtt10",
)
# B, D, G, I, O, Q, S and Z are left out: small and blurred they read as digits.
LETTERS = "ACEFHJKLMNPRTUVWXY"
SEGMENTS = np.array(
    [
        [-8, -14, 8, -14],
        [8, -14, 8, 0],
        [8, 0, 8, 14],
        [-8, 14, 8, 14],
        [-8, 0, -8, 14],
        [-8, -14, -8, 0],
        [-8, 0, 8, 0],
    ]
)
# Bit i lights segment i: the ten digits and the usual second forms of 1, 6, 7 and 9.
SEGMENT_DIGITS = {63, 6, 48, 91, 79, 102, 109, 125, 124, 7, 39, 127, 111, 103}


@cache
def _split() -> tuple[Array, Array, Array, Array]:
    """Levels 0..16 and labels of the train and the test digits; 50 test digits a class, picked evenly."""
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    levels, labels = levels.reshape(-1, 8, 8).astype(np.int64), labels.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(len(CLASSES)):
        rows = np.flatnonzero(labels == digit)
        test[rows[np.arange(TEST_PER_CLASS) * len(rows) // TEST_PER_CLASS]] = True
    return levels[~test], labels[~test], levels[test], labels[test]


def digits(size: int = SIZE) -> tuple[Array, Array, Array, Array, tuple[str, ...]]:
    """ID: train uint8 [1297, size, size, 3], labels int64, test uint8 [500, ...], labels int64, class names.

    Raises UsageError for a size under 8 px, the set's own.
    """
    if size < 8:
        raise UsageError(f"the demo's digits are 8 px wide and are only enlarged: use a size of 8 or more, not {size}")
    train, train_labels, test, test_labels = _split()
    return enlarge(train, size), train_labels.copy(), enlarge(test, size), test_labels.copy(), CLASSES


def _walk(rng: Generator, count: int, steps: int, bend: float) -> Array:
    """Pen paths [count, steps + 1, 2] that turn by about ``bend`` rad a step."""
    heading = rng.uniform(0, 2 * np.pi, (count, 1)) + np.cumsum(rng.uniform(-bend, bend, (count, steps)), axis=1)
    moves = np.stack([np.cos(heading), np.sin(heading)], axis=2) * rng.uniform(4, 10, (count, steps, 1))
    return np.concatenate([np.zeros((count, 1, 2)), np.cumsum(moves, axis=1)], axis=1)


def _scribbles(rng: Generator, count: int) -> Array:
    """One random pen stroke as wide and as soft as those of the digits."""
    points = fit_box(_walk(rng, count, 9, 1.7), rng.uniform(12, 26, count), rng.uniform(22, 28, count))
    return enlarge(count_blocks(stroke_masks(points[:, :-1], points[:, 1:], rng.uniform(3, 6, count))))


def _letters(rng: Generator, count: int) -> Array:
    """Latin capitals of twelve fonts; those that look like a digit are left out."""
    return enlarge(glyph_levels(rng, atlas(LETTERS, FONTS), count))


def _seven_segment(rng: Generator, count: int) -> Array:
    """Seven-segment displays that show no digit."""
    patterns = [p for p in range(128) if p.bit_count() > 2 and p not in SEGMENT_DIGITS]
    lit = (rng.choice(patterns, count)[:, None] >> np.arange(7)) % 2 == 1
    # A dark segment hides as a second copy of the first lit one.
    shown = np.where(lit, np.arange(7), lit.argmax(axis=1)[:, None])
    matrix = affine(rng, count, turn=0.1, shear=0.3, scale=(0.8, 1.0)).swapaxes(1, 2)
    ends = SEGMENTS[shown].astype(np.float64).reshape(count, 14, 2) @ matrix + rng.integers(-2, 3, (count, 1, 2))
    masks = stroke_masks(ends[:, ::2], ends[:, 1::2], rng.uniform(3, 6, count))
    return enlarge(count_blocks(masks))


def _pick(rng: Generator, rows: Array, count: int) -> Array:
    """``count`` of ``rows``, none twice while they last."""
    rounds = [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(rounds)[:count]


def _broken_digits(rng: Generator, count: int) -> Array:
    """Train digits with a band erased, their halves swapped, or the halves of two classes spliced."""
    levels, labels, _, _ = _split()
    rows = _pick(rng, np.arange(len(levels)), count)
    whole, partner = levels[rows], rng.integers(0, len(levels), count)
    partner = np.where(labels[partner] == labels[rows], (partner + 1) % len(levels), partner)
    halves = np.where(np.arange(8) < 4, whole, levels[partner])
    erased = whole * (np.abs(np.arange(8) - rng.integers(2, 6, (count, 1))) > 1)[:, :, None]
    kinds = np.stack([erased, np.roll(whole, 4, axis=1), np.roll(whole, 4, axis=2), halves, halves])
    return enlarge(kinds[rng.integers(0, len(kinds), count), np.arange(count)])


def _mirrored_digits(rng: Generator, count: int) -> Array:
    """Train digits mirrored, upside down or on their side, of classes where no digit results."""
    levels, labels, _, _ = _split()

    def of(*wanted: int) -> Array:
        return levels[np.isin(labels, wanted)]

    turned = [
        of(3, 4, 6, 7, 9)[:, :, ::-1],
        of(4, 6, 7)[:, ::-1],
        np.rot90(of(2, 3, 4, 5, 6, 7, 9), axes=(1, 2)),
        np.rot90(of(2, 3, 4, 5, 6, 7, 9), axes=(2, 1)),
    ]
    every = np.concatenate(turned)
    return enlarge(every[_pick(rng, np.arange(len(every)), count)])


# From far to near, each with its share of the pool.
_POOL: dict[str, tuple[Drawer, int]] = {
    "noise": (noise, 3600),
    "gradients": (gradients, 3400),
    "stripes": (stripes, 3200),
    "checkers": (checkers, 3000),
    "blobs": (blobs, 3200),
    "shapes": (shapes, 2000),
    "scribbles": (_scribbles, 800),
    "letters": (_letters, 550),
    "seven-segment": (_seven_segment, 350),
    "broken-digits": (_broken_digits, 450),
    "mirrored-digits": (_mirrored_digits, 450),
}
FAMILIES: tuple[str, ...] = tuple(_POOL)
FAR = frozenset(FAMILIES[:5])
NEAR = frozenset(FAMILIES[7:])


def draw(family: str, count: int, seed: int) -> Array:
    """``count`` images of a pool family: uint8 [count, 32, 32, 3].

    Raises UsageError for an unknown family and a count under 1.
    """
    if family not in _POOL:
        raise UsageError(f"no demo family {family!r}; choose one of {', '.join(FAMILIES)}")
    if count < 1:
        raise UsageError(f"a demo family needs a count of 1 or more, not {count}")
    return _POOL[family][0](np.random.default_rng([FAMILIES.index(family), seed]), count)


def pool_arrays(seed: int = 0) -> tuple[Array, Array]:
    """The pool, shuffled: images uint8 [21000, 32, 32, 3] and each one's index into FAMILIES, int64."""
    counts = [count for _, count in _POOL.values()]
    images = np.concatenate([draw(family, count, seed) for family, count in zip(FAMILIES, counts, strict=True)])
    order = np.random.default_rng([len(FAMILIES), seed]).permutation(len(images))
    return images[order], np.repeat(np.arange(len(counts)), counts)[order]


def _crosses(rng: Generator, count: int) -> Array:
    """Three or four straight bars, about upright or level, as in a foreign script."""
    level = rng.random((count, 4)) < 0.5
    length = rng.uniform(6, 15, (count, 4))
    slant = rng.uniform(-3, 3, (count, 4))
    reach = np.stack([np.where(level, length, slant), np.where(level, slant, length)], axis=2)
    middle = rng.integers(-9, 10, (count, 4, 2))
    middle[:, 3] = np.where(rng.random((count, 1)) < 0.5, middle[:, 2], middle[:, 3])
    return enlarge(count_blocks(stroke_masks(middle - reach, middle + reach, rng.uniform(3, 6, count))))


def _scrambled_digits(rng: Generator, count: int) -> Array:
    """Test digits whose four quarters are turned in place, each by its own quarter turns."""
    levels = _split()[2]
    whole = levels[_pick(rng, np.arange(len(levels)), count)]
    quarters = whole.reshape(count, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(count * 4, 4, 4)
    turns = np.stack([np.rot90(quarters, turn, axes=(1, 2)) for turn in (1, 2, 3)])
    mixed = turns[rng.integers(0, 3, count * 4), np.arange(count * 4)]
    return enlarge(mixed.reshape(count, 2, 2, 4, 4).transpose(0, 1, 3, 2, 4).reshape(count, 8, 8))


def _rings(rng: Generator, count: int) -> Array:
    """Rings of two colours about a point in the frame."""
    x, y = pixel_grid()
    a, b = rng.integers(-10, 11, (2, count, 1, 1))
    rings = np.sqrt((x - a) ** 2 + (y - b) ** 2) // rng.integers(2, 6, (count, 1, 1)) % 2
    return mix(rings, 1, colours(rng, count, *DARK), colours(rng, count, *LIGHT))


def _photos(rng: Generator, count: int) -> Array:
    """Crops of 32 px from the two photographs that scikit-learn brings along, at a quarter of their size."""
    from sklearn.datasets import load_sample_images

    photos = []
    for photo in load_sample_images().images:
        high, wide = photo.shape[0] // 4 * 4, photo.shape[1] // 4 * 4
        blocks = photo[:high, :wide].reshape(high // 4, 4, wide // 4, 4, 3).astype(np.int64)
        photos.append((blocks.sum(axis=(1, 3)) // 16).astype(np.uint8))
    rows = rng.permutation((photos[0].shape[0] - SIZE + 1) * (photos[0].shape[1] - SIZE + 1))[:count]
    top, left = np.divmod(rows, photos[0].shape[1] - SIZE + 1)
    which = rng.integers(0, len(photos), count)
    return np.stack([photos[w][t : t + SIZE, c : c + SIZE] for w, t, c in zip(which, top, left, strict=True)])


def _script(characters: str) -> Drawer:
    """Glyphs of another script, from the two fonts that have them all."""
    return lambda rng, count: enlarge(glyph_levels(rng, atlas(characters, FONTS[:2]), count))


_HELD_OUT: dict[str, Drawer] = {
    "rings": _rings,
    "photos": _photos,
    "crosses": _crosses,
    "arrows": _script("←↑→↓↔↕↖↗↘↙↤↥↦↧↩↪↯↰↱↲↳↺↻⇄⇅⇇⇈⇐⇑⇒⇓⇔"),
    "symbols": _script("#&@%€£¥§¶±÷×†‡∀∃∈∉∋∏∑√∞∧∨∩∪≈≠≡≤≥⊂⊃⊕⊥♠♣♥♦♪♫"),
    "greek": _script("ΓΔΘΛΞΠΣΦΨΩαβγεζηκλμνξπφχψω"),
    "hebrew": _script("אבגדהחטכלמנעפצקרשת"),
    "tifinagh": _script("ⴰⴱⴳⴴⴵⴷⴹⴻⴼⴽⵀⵃⵄⵅⵇⵈⵉⵋⵌⵍⵎⵒⵓⵕⵖⵙⵚⵛⵜⵟⵡⵢⵣⵥ"),
    "scrambled-digits": _scrambled_digits,
}
HELD_OUT: tuple[str, ...] = tuple(_HELD_OUT)


def held_out(seed: int = 1) -> dict[str, Array]:
    """OOD test sets, name -> uint8 [400, 32, 32, 3], of families that the pool does not have."""
    return {
        name: drawer(np.random.default_rng([100 + row, seed]), HELD_OUT_COUNT)
        for row, (name, drawer) in enumerate(_HELD_OUT.items())
    }
