"""The second transformer of Wan 2.2 as the options name it, and what goes together with it."""

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import HighNoise
from musubi_tuner.families.wan.options import GenerationModelOptions, ModelOptions
from musubi_tuner.families.wan.spec import SPEC


def high_noise(options: ModelOptions) -> HighNoise | None:
    """See `families.base.HasExperts`."""
    if options.dit_high_noise is None:
        return None
    boundary = options.boundary
    if boundary is None:
        with_one = {name: task.boundary for name, task in SPEC.tasks.items() if task.boundary is not None}
        known = ", ".join(f"{name}: {1000 * value:g}" for name, value in with_one.items())
        raise UserError(
            f"--dit_high_noise with --task {options.task}, which has one transformer: say at which timestep the one "
            f"for high noise takes over (--timestep_boundary 875), or the task ({known})"
        )
    usual = SPEC.tasks[options.task].guidance_high
    if not isinstance(options, GenerationModelOptions):
        return HighNoise(options.dit_high_noise, boundary, options.offload_inactive_dit, guidance=usual)
    files, multipliers = options.lora_weight_high_noise, options.lora_multiplier_high_noise
    if len(multipliers) > len(files):
        raise UserError(
            f"{len(multipliers)} values of --lora_multiplier_high_noise for {len(files)} files of "
            "--lora_weight_high_noise: give at most one per file"
        )
    guidance = options.guidance_scale_high_noise
    return HighNoise(
        options.dit_high_noise,
        boundary,
        offload=options.offload_inactive_dit,
        lazy=options.lazy_loading,
        lora_weight=files,
        lora_multiplier=(*multipliers, *[1.0] * (len(files) - len(multipliers))),
        guidance=usual if guidance is None else guidance,
    )


def without_effect(options: ModelOptions) -> list[str]:
    """See `families.base.HasExperts`."""
    if options.dit_high_noise is None:
        idle = [name for name, value in _for_two(options).items() if value not in (None, False, ())]
        return [f"without dit_high_noise there is no effect of {', '.join(idle)}"] if idle else []
    if isinstance(options, GenerationModelOptions) and options.lazy_loading and options.offload_inactive_dit:
        return ["offload_inactive_dit has no effect with lazy_loading, which keeps one transformer alone"]
    return []


def _for_two(options: ModelOptions) -> dict[str, object]:
    """The options that only matter with two transformers."""
    found: dict[str, object] = {
        "timestep_boundary": options.timestep_boundary,
        "offload_inactive_dit": options.offload_inactive_dit,
    }
    if isinstance(options, GenerationModelOptions):
        found["lazy_loading"] = options.lazy_loading
        found["lora_weight_high_noise"] = options.lora_weight_high_noise
        found["lora_multiplier_high_noise"] = options.lora_multiplier_high_noise
        found["guidance_scale_high_noise"] = options.guidance_scale_high_noise
    return found
