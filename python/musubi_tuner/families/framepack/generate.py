"""Sampling in sections and of single pictures: how long, from what, in which order. The loop is the caller's."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.one_frame import OneFrame
from musubi_tuner.families.base import Item, Tools
from musubi_tuner.families.framepack.options import EncodingOptions, GenerationOptions
from musubi_tuner.families.framepack.spec import SPEC
from musubi_tuner.flow import sections

log = logging.getLogger(__name__)

SOLVERS = {"unipc": "unipc3"}
"""What published samplers mean by a solver's name."""
_FEW, _MANY, _MU_CAP = (256, 0.5), (4096, 1.15), math.log(7)
"""Tokens and log shift at two points of a line, and the highest log shift."""


def shift_of(frames: int, height: int, width: int) -> float:
    """Shift of the time grid for a section of so many latent frames, `height` x `width` pixels."""
    tokens = frames * (height // SPEC.latents.spatial) * (width // SPEC.latents.spatial) / 4
    along = (tokens - _FEW[0]) / (_MANY[0] - _FEW[0])
    return math.exp(min(_FEW[1] + along * (_MANY[1] - _FEW[1]), _MU_CAP))


def plan(options: EncodingOptions, values: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """Frames, shift and solver of a request; see `families.base.OwnSampling`."""
    single, roles = one_frame(options, said), values["roles"]
    if ";;;" in values["prompt"]:
        raise UserError("a prompt for each section (0:...;;;1:...) is not in this version: give one prompt for all")
    if "start" not in roles and not (single and "control" in roles):
        raise UserError(
            "FramePack goes on from a picture: give the first frame with --image_path (--i in a prompt line)"
            + (", or control pictures with --control_image_path (--ci)" if single else "")
        )
    frames = 1 if single else 1 + SPEC.latents.temporal * options.latent_window_size * _count(options, values, said)
    found: dict[str, Any] = {"frames": frames, "solver": SOLVERS.get(values["solver"], values["solver"])}
    if values["shift"] is None:
        part = 1 if single else options.latent_window_size
        found["shift"] = shift_of(part, values["height"], values["width"])
    return found


def _count(options: EncodingOptions, values: Mapping[str, Any], said: Mapping[str, str]) -> int:
    """Sections: what a prompt's entry says, then the command line; a preview's `--f` are frames, else seconds."""
    per_section = SPEC.latents.temporal * options.latent_window_size
    if "vs" in said:
        if not said["vs"].isdigit() or int(said["vs"]) < 1:
            raise UserError(f"--vs {said['vs']}: must be a number of sections, at least 1")
        return int(said["vs"])
    seconds = float(said["f"]) if "f" in said else None
    if not isinstance(options, GenerationOptions):
        return max(round((seconds or values["frames"] or 1) / per_section), 1)
    if seconds is None and options.latent_paddings and not options.f1:
        return len(_paddings(options.latent_paddings))
    if seconds is None and options.video_sections is not None:
        return options.video_sections
    if seconds is None and values["frames"] is not None:
        return max((values["frames"] - 1) // per_section, 1)
    return max(round((seconds or options.video_seconds) * values["fps"] / per_section), 1)


def one_frame(options: EncodingOptions, said: Mapping[str, str]) -> OneFrame | None:
    """How a single picture is made; None: a video is."""
    asked = options.one_frame_inference if isinstance(options, GenerationOptions) else None
    if "of" in said:
        return OneFrame.parse(said["of"])
    if asked is not None or options.one_frame:
        return OneFrame.parse(asked or "default")
    return None


def generate(options: EncodingOptions, item: Item, pictures: Mapping[str, Tensor], tools: Tools) -> Tensor:
    """Latents of a request; see `families.base.OwnSampling`."""
    window, image = options.latent_window_size, {"image": pictures["image"]}
    size = SPEC.latents.shape(1, item.height, item.width)[2:]
    single = one_frame(options, item.said)
    if single is not None:
        controls = pictures["control"] if "control" in pictures else pictures["start"]
        told = sections.one_frame(single, controls, window)
        return tools.denoise(tools.draw((SPEC.latents.channels, 1, *size)), {**told, **image})
    start = pictures["start"]
    count = (item.frames - 1) // (SPEC.latents.temporal * window)

    def section(told: Mapping[str, Tensor]) -> Tensor:
        return tools.denoise(tools.draw((SPEC.latents.channels, window, *size)), {**told, **image})

    if options.f1:
        if "end" in pictures:
            log.warning("--end_image_path has no effect with --f1: sections are made from the start on")
        made = start
        for _ in range(count):
            made = torch.cat([made, section(sections.forward(start, made, window))], dim=1)
        return made
    future = pictures.get("end", start[:, :0])
    for padding in _chosen_paddings(options, count):
        future = torch.cat([section(sections.inverted(start, future, window, padding)), future], dim=1)
    return torch.cat([start, future[:, : count * window]], dim=1)


def _chosen_paddings(options: EncodingOptions, count: int) -> list[int]:
    given = options.latent_paddings if isinstance(options, GenerationOptions) else None
    if given is None:
        return sections.paddings(count)
    found = _paddings(given)
    if len(found) != count:
        raise UserError(f"--latent_paddings {given}: {len(found)} numbers for {count} sections")
    return found


def _paddings(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise UserError(f"--latent_paddings {text}: whole numbers with commas between them, e.g. 3,2,1,0")
    return [int(word) for word in words]
