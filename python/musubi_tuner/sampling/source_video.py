"""Video to video: a clip that sampling begins from, at the noise level that `strength` says.

x = (1 - s) x0 + s e        at the first noise level s of the last `strength` part of the steps
"""

from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import video
from musubi_tuner.flow.schedules import Schedule
from musubi_tuner.sampling import clips


def frames_of(path: str, wanted: int, *, temporal: int, asked: bool) -> int:
    """Frames to sample: `wanted`, or as many as the clip has where nobody `asked` for them.

    Raises UserError for a file that is no video, and for one with fewer frames than were asked for.
    """
    found = clips.count(path, option="video_path")
    longest = video.floor_frames(found, temporal)
    if asked and wanted > found:
        raise UserError(
            f"--video_path {path} has {found} frames, {wanted} are asked for: give --video_length {longest} or less"
        )
    return min(wanted, longest)


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
