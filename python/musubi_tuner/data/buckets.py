"""Buckets: the sizes that pictures are brought to, and the bringing.

A bucket is a width and a height, multiples of the family's step, of about the area of the wanted resolution. A
picture goes to the bucket of the nearest aspect ratio, is scaled until it covers it and is cropped at its centre.
Enlarging is Pillow's Lanczos; reducing is exact area averaging (each target pixel is the mean of the source area
under it, borders weighted by their share), which Pillow's BOX filter is not: BOX takes whole pixels, so at a ratio
near 1 it drops single rows and columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
"""Width, height."""


def bucket_sizes(resolution: Size, step: int = 16) -> tuple[Size, ...]:
    """All buckets for the area of `resolution`, sorted.

    With s = floor(sqrt(area)): widths from floor(s/2) rounded down to `step`, below s + step; heights are area // width
    rounded down to `step`; and all of them transposed.
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    sizes: set[Size] = set()
    for width in range(max(side // 2 // step, 1) * step, side + step, step):
        height = area // width // step * step
        if height:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class Buckets:
    """The choice of a dataset: `resolution` alone, or its buckets where `enabled`."""

    resolution: Size
    enabled: bool = False
    no_upscale: bool = False
    step: int = 16

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        return bucket_sizes(self.resolution, self.step) if self.enabled else (self.resolution,)

    def choose(self, size: Size) -> Size:
        """The bucket of a picture of `size`; the first in sorted order where two ratios are equally near.

        Raises:
            ValueError: `no_upscale` and a picture smaller than one step.
        """
        width, height = size
        if not self.enabled:
            return self.resolution
        if self.no_upscale and width * height <= self.resolution[0] * self.resolution[1]:
            kept = (width // self.step * self.step, height // self.step * self.step)
            if not all(kept):
                raise ValueError(
                    f"{width} x {height} pixels is below {self.step} and bucket_no_upscale forbids enlarging"
                )
            return kept
        ratio = width / height
        return min(self.sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


@dataclass(frozen=True)
class Fit:
    """How a picture covers its bucket: the size after scaling, and left and top of the crop in it."""

    resized: Size
    left_top: Size
    enlarge: bool


def fit(size: Size, bucket: Size) -> Fit:
    """Scale by max(bw/w, bh/h), sides rounded half up (in whole numbers, so exactly); crop at the centre, floored."""
    (w, h), (bw, bh) = size, bucket
    top, bottom = (bw, w) if bw * h >= bh * w else (bh, h)
    resized = tuple((2 * side * top + bottom) // (2 * bottom) for side in size)
    left_top = ((resized[0] - bw) // 2, (resized[1] - bh) // 2)
    return Fit((resized[0], resized[1]), left_top, enlarge=top > bottom)


def to_bucket(image: Image.Image, bucket: Size) -> NDArray[np.uint8]:
    """Pixels `[H, W, C] uint8` of `image` brought to `bucket`; untouched where it has that size."""
    how = fit(image.size, bucket)
    (left, top), (width, height) = how.left_top, bucket
    if how.enlarge:
        x, y = (source / target for source, target in zip(image.size, how.resized, strict=True))
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        return np.asarray(image.resize(bucket, Image.Resampling.LANCZOS, box=box))
    pixels = np.asarray(image)
    if how.resized == image.size:
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])
    return area_resize(pixels, how.resized, (left, top), bucket)


def area_resize(pixels: NDArray[np.uint8], resized: Size, left_top: Size, crop: Size) -> NDArray[np.uint8]:
    """Area average of `pixels: [H, W, C]` at size `resized`, of which only the crop is computed; rounded half up."""
    rows = _edges(pixels.shape[0], resized[1], left_top[1], crop[1])
    columns = _edges(pixels.shape[1], resized[0], left_top[0], crop[0])
    planes = [_averaged(_averaged(plane, rows).T, columns).T for plane in np.moveaxis(pixels, -1, 0)]
    return np.floor(np.stack(planes, axis=-1) + (0.5 + 1e-6)).astype(np.uint8)  # a tie is up, whatever the last digits


def _edges(source: int, target: int, start: int, count: int) -> NDArray[np.float64]:
    """Borders, in source pixels, of target pixels `start` .. `start + count` of `target`."""
    return np.arange(start, start + count + 1, dtype=np.float64) * (source / target)


def _averaged(plane: NDArray[np.generic], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of `plane: [N, M]` between consecutive `edges` along its first axis, by differences of its integral.

    Done in bands of the target: the integral of a whole photograph of 100 megapixels would be 800 MB.
    """
    bands = range(0, len(edges) - 1, _BAND)
    return np.concatenate([_band(plane, edges[start : start + _BAND + 1]) for start in bands])


_BAND = 64


def _band(plane: NDArray[np.generic], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    first, last = int(edges[0]), min(math.ceil(edges[-1]), plane.shape[0])
    integral = np.zeros((last - first + 1, plane.shape[1]))
    np.cumsum(plane[first:last], axis=0, dtype=np.float64, out=integral[1:])
    whole = np.minimum(edges.astype(np.int64), last - 1)
    share = (edges - whole)[:, None]
    at_edges = integral[whole - first] * (1 - share) + integral[whole - first + 1] * share
    return np.diff(at_edges, axis=0) / np.diff(edges)[:, None]


def nearest_sizes(size: Size, step: Size) -> Sequence[Size]:
    """The size rounded down and up to multiples of `step`, for messages."""
    down = tuple(max(side // part, 1) * part for side, part in zip(size, step, strict=True))
    up = tuple(-(-side // part) * part for side, part in zip(size, step, strict=True))
    return [(down[0], down[1]), (up[0], up[1])]
