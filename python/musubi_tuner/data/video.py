"""Clips: which frames of a video become training items, and reading them.

The windows of a video are pure arithmetic on its frame count. Reading decodes from the start up to the last frame
that is asked for and brings each kept frame to its bucket at once, so memory is that of the clip as it is trained on.
Frames are counted as they come out of the decoder. A change of rate goes by their number where they are evenly spaced
and by their time stamps where they are not. Quarter turns that the file asks for are applied. A folder of pictures is
a video too, its frames in the order of their names.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from musubi_tuner.data import images
from musubi_tuner.data.buckets import Size, to_bucket

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
"""Counterclockwise turns, in degrees."""


@dataclass(frozen=True)
class Window:
    """`count` consecutive frames from `start`, counted after any change of frame rate."""

    start: int
    count: int


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding it."""

    frames: int
    size: Size


def floor_frames(frames: int, temporal: int = 4) -> int:
    """The longest clip of at most `frames` frames that a VAE of this temporal step takes: 1 + temporal k."""
    return (frames - 1) // temporal * temporal + 1


def windows(
    frames: int,
    extraction: str,
    *,
    targets: Sequence[int] = (1,),
    stride: int = 1,
    samples: int = 1,
    max_frames: int = 129,
    temporal: int = 4,
) -> list[Window]:
    """Clips of a video of `frames` frames; each target length T is first brought down to 1 + temporal k.

    head: [0, T). chunk: [iT, (i+1)T), complete ones. slide: from 0 in steps of `stride`. uniform: `samples` starts
    spread evenly over 0 .. frames - T, floored; equal ones once. full: one clip of min(frames, max_frames), brought
    down. A length that the video does not reach gives none.
    """
    if extraction == "full":
        return [Window(0, floor_frames(min(frames, max_frames), temporal))] if frames else []
    found: dict[Window, None] = {}
    for count in dict.fromkeys(floor_frames(target, temporal) for target in targets):
        last = frames - count
        if last >= 0:
            starts = _starts(extraction, last, count, stride, samples)
            found.update(dict.fromkeys(Window(start, count) for start in starts))
    return list(found)


def _starts(extraction: str, last: int, count: int, stride: int, samples: int) -> Sequence[int]:
    """First frames of the clips of `count` frames; `last` is the last possible one."""
    if extraction == "chunk":
        return range(0, last + 1, count)
    if extraction == "slide":
        return range(0, last + 1, stride)
    if extraction == "uniform":
        return [int(start) for start in np.linspace(0, last, samples)]
    if extraction == "head":
        return [0]
    raise ValueError(f"frame_extraction {extraction!r} is not known: head, chunk, slide, uniform, full")


def kept_frames(frames: int, source_fps: float | None, target_fps: float | None) -> list[int]:
    """Frames that bring a video down to `target_fps`: those where floor(i target / source) changes.

    i target / source is summed up in floating point, as in existing caches, so a tick that falls on a whole number
    may come one frame late. A slower source, or an unknown rate, keeps every frame: none is doubled.
    """
    if source_fps is None or target_fps is None or source_fps <= target_fps:
        return list(range(frames))
    ratio = target_fps / source_fps
    ticks = [int(tick) for tick in accumulate(repeat(ratio, max(frames - 1, 0)), initial=0.0)]
    return [i for i in range(frames) if i == 0 or ticks[i] != ticks[i - 1]]


def at_rate(path: Path, info: VideoInfo, source_fps: float | None, target_fps: float | None) -> list[int]:
    """Frames of a file that bring it from the user's `source_fps` down to `target_fps`.

    By number, as `kept_frames`, where frames are evenly spaced; by presentation time where they are not: then the
    result is even, and a frame that stands longer than a tick comes more than once.

    Raises:
        ValueError: not a video that can be opened.
    """
    if source_fps is None or target_fps is None or path.is_dir():
        return kept_frames(info.frames, source_fps, target_fps)
    times = frame_times(path)
    if len(times) < info.frames or is_even(times):
        return kept_frames(info.frames, source_fps, target_fps)
    return at_times(times[: info.frames], min(source_fps, target_fps))


def is_even(times: Sequence[float]) -> bool:
    """Whether no frame is half an interval or more away from an even grid through the first and the last one."""
    if len(times) < 3:
        return True
    step = (times[-1] - times[0]) / (len(times) - 1)
    return all(abs(time - times[0] - i * step) < step / 2 for i, time in enumerate(times))


def at_times(times: Sequence[float], rate: float) -> list[int]:
    """The frame that is seen at each tick of `rate` a second, from the first frame's time to the last one's.

    times: seconds, ascending. A frame that comes within a thousandth of a tick after it counts as there.
    """
    ticks = int((times[-1] - times[0]) * rate + 1e-3) + 1
    return [bisect_right(times, times[0] + (tick + 1e-3) / rate) - 1 for tick in range(ticks)]


@lru_cache(maxsize=4096)
def _times(path: Path, _size: int, _modified: int) -> tuple[float, ...]:
    with _opened(path) as (container, stream):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        base = float(stream.time_base) if stream.time_base else 0.0
    return () if not base or None in stamps else tuple(sorted(stamp * base for stamp in stamps))


def frame_times(path: Path) -> tuple[float, ...]:
    """Presentation times of a file's frames in seconds, ascending; empty where it does not tell them. Not decoded.

    Raises:
        ValueError: not a video that can be opened.
    """
    stat = path.stat()
    return _times(path, stat.st_size, stat.st_mtime_ns)


def probe(path: Path) -> VideoInfo:
    """Frame count and size as seen; where the container does not state its count, packets are counted.

    Raises:
        ValueError: not a video that can be opened, or one without frames.
    """
    if path.is_dir():
        files = _frame_files(path)
        return VideoInfo(len(files), images.image_size(files[0]))
    with _opened(path) as (container, stream):
        frames = int(stream.frames)
        if not frames:
            frames = sum(1 for packet in container.demux(stream) if packet.size)
            container.seek(0)
        first = next(container.decode(stream), None)
    if first is None or not frames:
        raise ValueError("holds no frames that can be decoded")
    turned = _turn(first) in (90, 270)
    return VideoInfo(frames, (first.height, first.width) if turned else (first.width, first.height))


def read_frames(path: Path, indices: Sequence[int], bucket: Size) -> NDArray[np.uint8]:
    """Frames `indices` (ascending, repeats allowed) as `[F, H, W, 3]`, each brought to `bucket`.

    Raises:
        ValueError: the video cannot be decoded or ends before the last index.
    """
    if path.is_dir():
        files = _frame_files(path)
        if indices[-1] >= len(files):
            raise ValueError(f"holds {len(files)} frames, frame {indices[-1]} is wanted")
        return np.stack([images.read_image(files[index], bucket) for index in indices])
    wanted = iter(indices)
    upcoming = next(wanted, None)
    found: list[NDArray[np.uint8]] = []
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            shown = to_bucket(_upright(frame), bucket) if number == upcoming else None
            while shown is not None and number == upcoming:
                found.append(shown)
                upcoming = next(wanted, None)
            if upcoming is None:
                break
    if upcoming is not None:
        raise ValueError(f"ends before frame {upcoming}: is the file cut short?")
    return np.stack(found)


def _frame_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in images.EXTENSIONS and path.is_file())
    if not files:
        raise ValueError("is a folder without pictures, so no video")
    return files


def _turn(frame: Any) -> int:
    """Degrees, counterclockwise, by which a frame is to be turned to stand upright: a multiple of 90."""
    return round(frame.rotation / 90) * 90 % 360


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = _turn(frame)
    return image.transpose(_TURNS[turn]) if turn else image


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its first video stream; PyAV's errors become ValueError."""
    import av

    if path.stat().st_size == 0:
        raise ValueError("is empty (0 bytes)")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("has no video stream")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise ValueError(f"cannot be read as a video: {error}") from error
