"""Pixels from untrusted image bytes, and back. JPEG, PNG and WEBP only; sizes are checked before decoding.

Ordinary JPEGs go through simplejpeg, PIL's own libjpeg-turbo without PIL: the same pixels in a fraction of the time.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000


def decode(data: bytes, size: int) -> np.ndarray:
    """Centre square of an encoded image as uint8 [size, size, 3]; bilinear unless already that size.

    Raises ValueError, with the reason, for bytes that are no sound JPEG, PNG or WEBP of at most 64 Mpx.
    """
    pixels = _jpeg(data)
    if pixels is None:
        with _opened(data) as image:
            return fit(_rgb(image), size)
    return pixels if pixels.shape == (size, size, 3) else fit(Image.fromarray(pixels), size)


def _jpeg(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3] of a sound JPEG in YCbCr or grey; None for everything else, which PIL is asked about."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if space not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, strict=True)  # strict: what libjpeg only warns of is left to PIL too
    except ValueError:
        return None


def whole(data: bytes) -> Image.Image:
    """The whole encoded image in RGB. Raises ValueError as ``decode`` does."""
    with _opened(data) as image:
        return _rgb(image)


def dimensions(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header; (0, 0) where ``decode`` would refuse the header."""
    try:
        with _opened(data) as image:
            return image.size
    except ValueError:
        return 0, 0


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to ``size`` and centre crop in one bilinear step: RGB image to uint8 [size, size, 3]."""
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG, the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
                yield image
        except Exception as error:  # on hostile bytes PIL raises nearly anything: SyntaxError, IndexError, ...
            raise ValueError(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # 16-bit grey: PIL's own conversion clips at 255 instead of scaling.
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.clip(levels.round(), 0, 255).astype(np.uint8))
    return image.convert("RGB")
