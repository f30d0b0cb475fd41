"""The parts of a generate command by its options: the transformer with its adapters, the VAE, the sampler."""

import torch

from musubi_tuner.adapters.merge import LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Dit, Family, HasMagRatios, Vae
from musubi_tuner.memory.placement import DTYPES
from musubi_tuner.sampling.models import OpenDit, open_dit, read_model_config, weight_policy
from musubi_tuner.sampling.options import LoraOptions, ModelOptions, SolverOptions, own_options
from musubi_tuner.sampling.pipeline import Sampler
from musubi_tuner.sampling.step_cache import StepCache, StepCacheOptions, step_cache
from musubi_tuner.weights.policy import WeightPolicy


def policy_of(family: Family, chosen: ModelOptions) -> WeightPolicy:
    """What becomes of the transformer's weights."""
    return weight_policy(
        family,
        fp8=chosen.fp8,
        scaled=chosen.fp8_scaled,
        dtype=None if chosen.dit_dtype is None else DTYPES[chosen.dit_dtype],
        allow_prequantized=chosen.allow_prequantized,
    )


def open_transformer(family: Family, options: Resolved) -> OpenDit:
    """The transformer, looked at but not loaded, with its adapters matched."""
    chosen, lora = options[ModelOptions], options[LoraOptions]
    if chosen.dit is None:
        raise UserError("--dit is required: the transformer's checkpoint")
    if len(lora.lora_multiplier) > len(lora.lora_weight):
        raise UserError(
            f"{len(lora.lora_multiplier)} values of --lora_multiplier for {len(lora.lora_weight)} files of "
            "--lora_weight: give at most one per file"
        )
    multipliers = (*lora.lora_multiplier, *([1.0] * (len(lora.lora_weight) - len(lora.lora_multiplier))))
    merges = [
        LoraMerge.from_file(path, multiplier, strict=lora.strict_lora)
        for path, multiplier in zip(lora.lora_weight, multipliers, strict=True)
    ]
    config = read_model_config(options.as_dict().get("model_config"))
    own = [options[group] for group in family.option_groups("generate")][1:]
    return open_dit(
        family,
        chosen.dit,
        merges=merges,
        config=config,
        options=own[0] if own else None,
        attn_mode=chosen.attn_mode,
        split_attn=chosen.split_attn,
    )


def load_vae(family: Family, options: Resolved, device: torch.device) -> Vae:
    """The VAE of `--vae`."""
    chosen = options[ModelOptions]
    dtype = DTYPES[chosen.vae_dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    return family.load_vae(str(chosen.vae), device=device, dtype=dtype, options=own_options(family, options))


def sampler_of(family: Family, options: Resolved, dit: Dit, device: torch.device) -> Sampler:
    """A sampler with a loaded transformer."""
    own, cache = own_options(family, options), step_cache_of(family, options)
    return Sampler(family, dit, device, joint=options[SolverOptions].cfg_batch, options=own, cache=cache)


def step_cache_of(family: Family, options: Resolved) -> StepCache | None:
    """The step cache that is asked for. Raises UserError."""
    known = family.mag_ratios(own_options(family, options)) if isinstance(family, HasMagRatios) else None
    return step_cache(options[StepCacheOptions], known)


def require_vae(options: Resolved) -> None:
    """Raises UserError where no VAE is named, for requests that need it."""
    if options[ModelOptions].vae is None:
        raise UserError("--vae is required: pictures that a request comes with are encoded by it")
