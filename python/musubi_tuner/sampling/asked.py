"""From a command line and its prompt files to requests, every size checked; faults are told together."""

import logging
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Family, OwnSampling, SamplingDefaults
from musubi_tuner.sampling import pictures, source_video
from musubi_tuner.sampling.options import PromptOptions, SolverOptions, high_noise, own_options, task_defaults
from musubi_tuner.sampling.prompts import PromptEntry, read_prompts
from musubi_tuner.sampling.request import Request

log = logging.getLogger(__name__)


def make_requests(family: Family, options: Resolved, entries: Sequence[PromptEntry] | None = None) -> list[Request]:
    """The requests of a command line, or of `entries`, every size checked. Raises UserError with every fault."""
    chosen = options[PromptOptions]
    found = _entries(chosen) if entries is None else entries
    common, requests, faults = _common_values(family, options), [], []
    idle = set(pictures.unserved(common, family.spec))
    for entry in found:
        seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
        try:
            given = entry.given(embedded=common["embedded_guidance"] is not None)
            request = _request(family, options, {"seed": seed} | common, given, entry)
            request.shape(family.spec.latents)
        except UserError as fault:
            faults.append(f"{entry.where}: {fault}" if chosen.prompt is None else str(fault))
        else:
            requests.append(request)
            idle |= set(pictures.unserved(given, family.spec))
    if faults:
        raise UserError("; ".join(faults))
    _tell_what_has_no_effect(options, found, requests, idle)
    return requests


def _entries(chosen: PromptOptions) -> list[PromptEntry]:
    if (chosen.prompt is None) == (chosen.from_file is None):
        given = "neither was given" if chosen.prompt is None else "both were given"
        raise UserError(f"what to sample comes from --prompt or from --from_file; {given}")
    return [PromptEntry(str(chosen.prompt), "--prompt")] if chosen.from_file is None else read_prompts(chosen.from_file)


def _request(
    family: Family, options: Resolved, common: Mapping[str, Any], given: dict[str, Any], entry: PromptEntry
) -> Request:
    """One entry's request: what only the family understands goes to it, pictures that it does not take are left out."""
    said, asked = dict(entry.said), "frames" in given or options.given("video_length")
    if isinstance(family, OwnSampling) and "frames" in given:
        said["f"] = str(given.pop("frames"))
    values = {**common, **given}
    if "guidance" in given and common["guidance_high"] is not None:
        values["guidance_high"] = given["guidance"]  # a prompt's own guidance is that of both transformers
    left_out = pictures.unserved(values, family.spec)
    values = {name: value for name, value in values.items() if name not in left_out}
    if values["video"]:
        temporal = family.spec.latents.temporal
        values["frames"] = source_video.frames_of(values["video"], values["frames"], temporal=temporal, asked=asked)
    own = own_options(family, options)
    request = pictures.planned(family, own, values, said)
    if request.video:
        source_video.steps_left(request.steps, request.strength)
    if options[PromptOptions].one_frame_auto_resize:
        size = pictures.size_like(request, family.spec)
        return request if size is None else pictures.planned(family, own, values | size, said)
    return request


def _common_values(family: Family, options: Resolved) -> dict[str, Any]:
    """What the command line says of every request, the task's defaults where it says nothing."""
    task, chosen, solver = task_defaults(family.spec, options), options[PromptOptions], options[SolverOptions]
    plans = isinstance(family, OwnSampling)  # then what is not given is left to it
    height, width = chosen.video_size or (task.size[1], task.size[0])
    high = high_noise(family, options)
    return {
        "negative": chosen.negative_prompt or "",
        "height": height,
        "width": width,
        "frames": _or(chosen.video_length, None if plans else task.frames),
        "fps": _or(chosen.fps, task.fps),
        "steps": _or(solver.infer_steps, task.steps),
        "guidance": _or(solver.guidance_scale, task.guidance),
        "guidance_high": None if high is None else high.guidance,
        "embedded_guidance": _embedded(task, solver.embedded_cfg_scale),
        "shift": _or(solver.flow_shift, _or(task.shift_of(width, height), None if plans else 1.0)),
        "solver": _or(solver.sample_solver, task.solver),
        "rescale": solver.guidance_rescale,
        "video": None if plans else chosen.video_path,
        "strength": chosen.strength if chosen.video_path else 1.0,
        "control_masks": chosen.control_image_mask_path,
        "image": chosen.image_path,
        "end_image": chosen.end_image_path,
        "control_images": chosen.control_image_path,
        "control": chosen.control_path,
    }


def _embedded(task: SamplingDefaults, chosen: float | None) -> float | None:
    """The guidance that the transformer is told; None where it has no such input, which a given one is told."""
    if task.embedded_guidance is None and chosen is not None:
        log.warning("--embedded_cfg_scale has no effect: this model has no embedded guidance; see --guidance_scale")
    return None if task.embedded_guidance is None else _or(chosen, task.embedded_guidance)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _tell_what_has_no_effect(
    options: Resolved, entries: Sequence[PromptEntry], requests: Sequence[Request], idle: Collection[str]
) -> None:
    if options.given("negative_prompt") and not any(r.guided for r in requests):
        log.warning("--negative_prompt has no effect: guidance is off at --guidance_scale 1")
    if options.given("guidance_rescale") and not any(r.guided for r in requests):
        log.warning("--guidance_rescale has no effect: guidance is off at --guidance_scale 1")
    if options.given("video_path") and not any(r.video for r in requests):
        log.warning("--video_path has no effect: this model goes on from pictures, in sections")
    if options.given("strength") and not options.given("video_path"):
        log.warning("--strength has no effect without --video_path")
    if options.given("one_frame_auto_resize") and not any(r.frames == 1 and r.pictures for r in requests):
        log.warning("--one_frame_auto_resize has no effect: it is for single pictures that come with a picture")
    if idle:
        log.warning("without effect, since this model takes no such pictures: %s", ", ".join(sorted(idle)))
    unserved = sorted({name for entry in entries for name in entry.unserved})
    if unserved:
        log.warning("in the prompt file, without effect here: %s", ", ".join(unserved))
