"""Clips that a request comes with: one that controls it frame by frame, or one that sampling begins from.

A clip is a video file, or a folder of pictures in the order of their names. Frames are those of its beginning, at its
own rate, brought to the request's size.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import video


def count(path: str, *, option: str) -> int:
    """Frames of the clip that `option` names. Raises UserError for what is no clip."""
    try:
        return video.probe(Path(path).expanduser()).frames
    except FileNotFoundError as fault:
        raise UserError(f"--{option} {path} does not exist") from fault
    except ValueError as fault:
        raise UserError(f"--{option} {path} {fault}") from fault


def read(path: str, frames: int, width: int, height: int, device: torch.device, *, option: str) -> Tensor:
    """The first frames, `[3, F, H, W]` float32 in [-1, 1]. Raises UserError, naming the clip as that of `option`."""
    try:
        pixels = video.read_frames(Path(path).expanduser(), range(frames), (width, height))
    except ValueError as fault:
        raise UserError(f"--{option} {path} {fault}") from fault
    values = torch.from_numpy(np.array(pixels)).to(device, torch.float32)
    return values.permute(3, 0, 1, 2) / 127.5 - 1


def require_control(path: str, frames: int) -> None:
    """Raises UserError for a control clip that is none, and for one with fewer than `frames` frames."""
    found = count(path, option="control_path")
    if found < frames:
        raise UserError(f"--control_path {path} has {found} frames, {frames} are to be sampled: lower --video_length")
