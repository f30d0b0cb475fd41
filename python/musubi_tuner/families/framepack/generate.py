"""Sampling in sections and of single pictures: how long, from what, in which order. The loop is the caller's."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.one_frame import OneFrame
from musubi_tuner.config.section_text import SEPARATOR, Sectioned
from musubi_tuner.families.base import Item, Tools
from musubi_tuner.families.framepack.options import EncodingOptions, GenerationOptions
from musubi_tuner.families.framepack.spec import SPEC
from musubi_tuner.flow import sections
from musubi_tuner.flow.schedules import shift_of_length

log = logging.getLogger(__name__)

SOLVERS = {"unipc": "unipc3"}
"""What published samplers mean by a solver's name."""
HIGHEST_SHIFT = 7.0


def shift_of(frames: int, height: int, width: int) -> float:
    """Shift of the time grid for a section of so many latent frames, `height` x `width` pixels."""
    tokens = frames * (height // SPEC.latents.spatial) * (width // SPEC.latents.spatial) / 4
    return shift_of_length(tokens, highest=HIGHEST_SHIFT)


def plan(options: EncodingOptions, values: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """Frames, shift and solver of a request; see `families.base.OwnSampling`."""
    single, roles = one_frame(options, said), values["roles"]
    if "start" not in roles and not (single and "control" in roles):
        raise UserError(
            "FramePack goes on from a picture: give the first frame with --image_path (--i in a prompt line)"
            + (", or control pictures with --control_image_path (--ci)" if single else "")
        )
    window = options.latent_window_size
    count = 1 if single else _count(options, values, said)
    found: dict[str, Any] = {"solver": SOLVERS.get(values["solver"], values["solver"])}
    found["frames"] = 1 if single else 1 + SPEC.latents.temporal * window * count
    for name in ("prompt", "image"):
        for text in Sectioned.parse(values.get(name) or "").unused(count):
            log.warning("a %s is for no section of this length: %s", name, text[:60])
    if SEPARATOR in (values.get("image") or ""):
        found["said"] = {"image": values["image"]}
    if values["shift"] is None:
        found["shift"] = shift_of(1 if single else window, values["height"], values["width"])
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
    window, single = options.latent_window_size, one_frame(options, item.said)
    count = 1 if single else (item.frames - 1) // (SPEC.latents.temporal * window)
    size = SPEC.latents.shape(1, item.height, item.width)[2:]
    prompt, starts = Sectioned.parse(item.caption), Sectioned.parse(item.said.get("image", ""))

    def start_of(section: int) -> Tensor:
        return pictures["start"][:, starts.place(section, count)].unsqueeze(1)

    def made(section: int, told: Mapping[str, Tensor], frames: int = window) -> Tensor:
        image = pictures["images"][starts.place(section, count)] if "images" in pictures else pictures["image"]
        text = prompt.values[prompt.place(section, count)]
        return tools.denoise(tools.draw((SPEC.latents.channels, frames, *size)), {**told, "image": image}, text)

    if single is not None:
        controls = pictures["control"] if "control" in pictures else start_of(0)
        return made(0, sections.one_frame(single, controls, window), 1)
    if options.f1:
        if "end" in pictures:
            log.warning("--end_image_path has no effect with --f1: sections are made from the start on")
        past = start_of(0)
        for section in range(count):
            past = torch.cat([past, made(section, sections.forward(start_of(section), past, window))], dim=1)
        return past
    future = pictures.get("end", pictures["start"][:, :0])
    for section, padding in zip(reversed(range(count)), _chosen_paddings(options, count), strict=True):
        told = sections.inverted(start_of(section), future, window, padding)
        future = torch.cat([made(section, told), future], dim=1)
    return torch.cat([start_of(0), future[:, : count * window]], dim=1)


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
