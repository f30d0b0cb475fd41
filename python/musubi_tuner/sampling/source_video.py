"""Video to video: a clip that sampling begins from, at the noise level that `strength` says.

    x = (1 - s) x0 + s e        at the first noise level s of the last `strength` part of the steps

Frames are those of the file's beginning, at its own rate, brought to the request's size.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import video
from musubi_tuner.flow.schedules import Schedule


def frames_of(path: str, wanted: int, *, temporal: int, asked: bool) -> int:
    """Frames to sample: `wanted`, or as many as the clip has where nobody `asked` for them.

    Raises UserError for a file that is no video, and for one with fewer frames than were asked for.
    """
    try:
        found = video.probe(Path(path).expanduser()).frames
    except FileNotFoundError as fault:
        raise UserError(f"--video_path {path} does not exist") from fault
    except ValueError as fault:
        raise UserError(f"--video_path {path} {fault}") from fault
    longest = video.floor_frames(found, temporal)
    if asked and wanted > found:
        raise UserError(
            f"--video_path {path} has {found} frames, {wanted} are asked for: give --video_length {longest} or less"
        )
    return min(wanted, longest)


def read(path: str, frames: int, width: int, height: int, device: torch.device) -> Tensor:
    """The first frames, `[3, F, H, W]` float32 in [-1, 1]. Raises UserError."""
    try:
        pixels = video.read_frames(Path(path).expanduser(), range(frames), (width, height))
    except ValueError as fault:
        raise UserError(f"--video_path {path} {fault}") from fault
    values = torch.from_numpy(np.array(pixels)).to(device, torch.float32)
    return values.permute(3, 0, 1, 2) / 127.5 - 1


def steps_left(steps: int, strength: float) -> int:
    """Of `steps`, how many are walked. Raises UserError where none is."""
    left = min(int(steps * strength + 1e-6), steps)
    if left < 1:
        raise UserError(f"--strength {strength:g} of {steps} steps leaves none: use at least {1 / steps:g}")
    return left


def begin(latents: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """What the solver starts from: `latents` and `noise: [B, C, F, H, W]` mixed at the schedule's first level."""
    sigma = float(schedule.sigmas[0])
    return (1 - sigma) * latents.to(noise) + sigma * noise
