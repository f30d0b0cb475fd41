"""Clips: which frames of a video become training items, and reading them.

The windows of a video are pure arithmetic on its frame count. Reading decodes from the start up to the last frame
that is asked for and brings each kept frame to its bucket at once, so memory is that of the clip as it is trained on.
Rotation tags of videos are not applied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from musubi_tuner.data.buckets import Size, to_bucket


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


def probe(path: Path) -> VideoInfo:
    """Frame count and size; where the container does not state its count, packets are counted.

    Raises:
        ValueError: not a video that can be opened, or one without frames.
    """
    with _opened(path) as (container, stream):
        frames = int(stream.frames) or sum(1 for packet in container.demux(stream) if packet.size)
        size = (int(stream.codec_context.width), int(stream.codec_context.height))
    if not frames or not all(size):
        raise ValueError("holds no frames")
    return VideoInfo(frames, size)


def read_frames(path: Path, indices: Sequence[int], bucket: Size) -> NDArray[np.uint8]:
    """Frames `indices` (ascending) as `[F, H, W, 3]`, each brought to `bucket`.

    Raises:
        ValueError: the video cannot be decoded or ends before the last index.
    """
    wanted = iter(indices)
    upcoming = next(wanted, None)
    found: list[NDArray[np.uint8]] = []
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if upcoming is None:
                break
            if number == upcoming:
                found.append(to_bucket(frame.to_image(), bucket))
                upcoming = next(wanted, None)
    if upcoming is not None:
        raise ValueError(f"ends before frame {upcoming}: is the file cut short?")
    return np.stack(found)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its first video stream; PyAV's errors become ValueError."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("has no video stream")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"cannot be read as a video: {error}") from error
