"""Autoregressive sections: which latent frames a part of a video is told of, and where in time everything lies.

Inverted order: the last section is made first; each is told of the start frame and of the future that is there already.

    [start | blanks | section | 1 frame at full, 2 at half, 16 at quarter resolution]

Forward order: each section is told of the start frame and of the past.

    [start | 16 frames at quarter, 2 at half, 1 at full resolution | section]

One frame: a picture at a time of its own, told of control pictures at theirs.
Source: Zhang & Agrawala 2025 (inverted anti-drifting and vanilla sampling), and the published samplers.
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from musubi_tuner.config.one_frame import OneFrame

HISTORY: Final = (1, 2, 16)
"""Frames of history at full, half and quarter resolution."""
_PAST = sum(HISTORY)

Fields = dict[str, Tensor]
"""By name: `clean`, `clean_2x`, `clean_4x` latents `[C, F, h, w]`, with `_indices` the time index `[F]` int64 of each
frame, and `indices` those of the section itself."""


def inverted(start: Tensor, future: Tensor, window: int, padding: int) -> Fields:
    """History and indices of a section of `window` frames that has `padding` sections between it and the start.

    start: `[C, 1, h, w]`. future: `[C, F, h, w]`, the nearest frame first; zeros where it ends.
    """
    first, _, section, post, half, quarter = _split(1, padding * window, window, *HISTORY)
    near, two, four = _filled(future[:, :_PAST], at_end=True).split(HISTORY, dim=1)
    clean = torch.cat([start, near], dim=1), torch.cat([first, post])
    return _fields(section, clean=clean, clean_2x=(two, half), clean_4x=(four, quarter))


def forward(start: Tensor, past: Tensor, window: int) -> Fields:
    """History and indices of a section of `window` frames after `past: [C, F, h, w]`, the nearest frame last."""
    first, quarter, half, last, section = _split(1, *reversed(HISTORY), window)
    four, two, near = _filled(past[:, -_PAST:], at_end=False).split(HISTORY[::-1], dim=1)
    clean = torch.cat([start, near], dim=1), torch.cat([first, last])
    return _fields(section, clean=clean, clean_2x=(two, half), clean_4x=(four, quarter))


def paddings(count: int) -> list[int]:
    """Sections between each section and the start, in the order in which they are made (last in time first)."""
    if count > 4:
        return [3, *[2] * (count - 3), 1, 0]
    return list(range(count))[::-1]


def of_clip(latents: Tensor, window: int, *, in_time: bool) -> Iterator[Fields]:
    """The sections of a clip's `latents: [C, 1 + n window, h, w]` in the order of time, each with its own `latents`.

    in_time: made in forward order, otherwise inverted.
    """
    start, count = latents[:, :1], (latents.shape[1] - 1) // window
    for k in range(count):
        begin, end = 1 + k * window, 1 + (k + 1) * window
        if in_time:
            told = forward(start, latents[:, :begin], window)
        else:
            told = inverted(start, latents[:, end:], window, paddings(count)[count - 1 - k])
        yield {"latents": latents[:, begin:end].clone(), **told}


def one_frame(plan: OneFrame, controls: Tensor, window: int) -> Fields:
    """History and indices of one picture; `controls: [C, n, h, w]`, window: latent frames of a section.

    Raises UserError where times and controls do not pair.
    """
    times, target = torch.tensor(plan.times(controls.shape[1])), window if plan.target is None else plan.target
    _, _, post, half, quarter = _split(1, window, *HISTORY)
    clean = torch.cat([controls, zeros(controls, 1)], dim=1) if plan.post else controls
    clean_times = torch.cat([times, post]) if plan.post else times
    found = {"indices": torch.tensor([target]), "clean": clean, "clean_indices": clean_times}
    if plan.half:
        found |= {"clean_2x": zeros(clean, HISTORY[1]), "clean_2x_indices": half}
    if plan.quarter:
        found |= {"clean_4x": zeros(clean, HISTORY[2]), "clean_4x_indices": quarter}
    return found


def zeros(like: Tensor, frames: int) -> Tensor:
    """Empty latents `[C, frames, h, w]`."""
    return like.new_zeros(like.shape[0], frames, *like.shape[2:])


def _split(*lengths: int) -> tuple[Tensor, ...]:
    """Consecutive time indices in parts of these lengths."""
    return torch.arange(sum(lengths)).split(lengths)


def _filled(frames: Tensor, *, at_end: bool) -> Tensor:
    """19 frames of history, zeros where there are none, after or before those that are there."""
    empty = zeros(frames, _PAST - frames.shape[1])
    return torch.cat([frames, empty] if at_end else [empty, frames], dim=1)


def _fields(section: Tensor, **parts: tuple[Tensor, Tensor]) -> Fields:
    """Latents and time indices of each part, by name."""
    found = {"indices": section}
    for name, (latents, times) in parts.items():
        found |= {name: latents, f"{name}_indices": times}
    return found
