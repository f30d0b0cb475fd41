"""Pictures: their size without decoding them, and their pixels as RGB.

The orientation tag of cameras is applied. Transparency is dropped (the colours under it stay), 16-bit grey is
brought to 8 bits, every other mode is converted to RGB by Pillow.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from musubi_tuner.data.buckets import Size, to_bucket

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"})

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the orientation tag."""
_FAULTS = (UnidentifiedImageError, OSError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot read: SyntaxError for damaged chunks, RuntimeError for damaged AVIF."""


def image_size(path: Path) -> Size:
    """Width and height as the picture is meant to be seen, from its header.

    Raises:
        ValueError: not a picture, or not readable.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except _FAULTS as error:
        raise ValueError(_why(path, error)) from error


def read_image(path: Path, bucket: Size) -> NDArray[np.uint8]:
    """Pixels `[H, W, 3]`, turned upright and brought to `bucket`.

    Raises:
        ValueError: the picture cannot be decoded, e.g. because it is cut short.
    """
    try:
        with Image.open(path) as image:
            turn = _TURNS.get(_orientation(image))
            image.load()
            rgb = _rgb(image)
    except _FAULTS as error:
        raise ValueError(_why(path, error)) from error
    return to_bucket(rgb if turn is None else rgb.transpose(turn), bucket)


def read_alpha(path: Path, bucket: Size) -> NDArray[np.uint8] | None:
    """Opacity `[H, W]` of a picture, turned and brought to `bucket` as `read_image`; None where all is opaque.

    Raises:
        ValueError: the picture cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            turn = _TURNS.get(_orientation(image))
            image.load()
            if not image.has_transparency_data:
                return None
            alpha = image.convert("RGBA").getchannel("A")
    except _FAULTS as error:
        raise ValueError(_why(path, error)) from error
    if alpha.getextrema() == (255, 255):
        return None
    upright = alpha if turn is None else alpha.transpose(turn)
    return to_bucket(upright.convert("RGB"), bucket)[..., 0]


def read_grey(path: Path, bucket: Size) -> NDArray[np.uint8]:
    """Brightness `[H, W]` of a picture, turned and brought to `bucket` as `read_image`.

    Raises:
        ValueError: the picture cannot be decoded.
    """
    rgb = Image.fromarray(read_image(path, bucket))
    return np.asarray(rgb.convert("L"))


def _why(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture that Pillow knows"
    return f"cannot be read as a picture ({error})"


def _orientation(image: Image.Image) -> int:
    """The orientation tag, 1 where there is none. Pillow would decode a whole PNG to look for a late tag."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(_ORIENTATION_TAG, 1))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.floor(np.clip(grey, 0, 255) + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("holds floating-point values, whose range is not known: save it with 8 or 16 bits")
    if image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA")
    return image.convert("RGB")
