"""The parts of a generate command by its options: the transformer with its adapters, the VAE, the sampler."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from musubi_tuner.adapters.merge import KeyChoice, LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.guidance_steps import GuidanceSteps
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Dit, Family, HasExperts, HasGuidanceSteps, HasMagRatios, Vae
from musubi_tuner.memory.placement import DTYPES
from musubi_tuner.memory.plan import MemoryPlan, SwapOptions, plan_memory, swapped, unread
from musubi_tuner.nn.compiling import CompileSettings, compile_blocks
from musubi_tuner.nn.fast_products import multiply_fast
from musubi_tuner.nn.runner import Run
from musubi_tuner.sampling.models import OpenDit, Opened, open_dit, open_experts, read_model_config, weight_policy
from musubi_tuner.sampling.options import (
    LoraOptions,
    ModelOptions,
    SolverOptions,
    compile_settings,
    high_noise,
    model_options,
    own_options,
)
from musubi_tuner.sampling.pipeline import Sampler
from musubi_tuner.sampling.step_cache import StepCache, StepCacheOptions, step_cache
from musubi_tuner.weights.load import Merge
from musubi_tuner.weights.merged import save_merged
from musubi_tuner.weights.policy import WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

log = logging.getLogger(__name__)

Value = TypeVar("Value")

_SINGLE_BLOCKS = r"single_(transformer_)?blocks"
"""What the keys of single-stream blocks hold."""


@dataclass(frozen=True)
class Loading:
    """How the transformer is loaded, settled before anything is."""

    family: Family
    policy: WeightPolicy
    fast: bool
    compiling: CompileSettings | None

    def load(self, opened: Opened, device: torch.device, memory: MemoryPlan) -> tuple[Dit, Callable[[], Run]]:
        """The transformer of an opened checkpoint, on `device` but for what rests on the host; how its blocks run."""
        dit = opened.load(self.policy, device, host=memory.host, prepare=self._prepare)
        return dit, partial(swapped, memory.install(dit))

    def _prepare(self, dit: Dit) -> None:
        """What is done to each transformer that is loaded."""
        if self.fast:
            multiply_fast(dit, compiled=self.compiling is not None)
        if self.compiling is not None:
            compile_blocks(dit, self.family.spec.blocks, self.compiling)


def loading_of(family: Family, options: Resolved) -> Loading:
    """What the options say of loading. Raises UserError for what contradicts itself."""
    chosen = options[ModelOptions]
    policy = weight_policy(
        family,
        fp8=chosen.fp8,
        scaled=chosen.fp8_scaled,
        dtype=None if chosen.dit_dtype is None else DTYPES[chosen.dit_dtype],
        allow_prequantized=chosen.allow_prequantized,
    )
    if chosen.fp8_fast and not chosen.fp8:
        raise UserError("--fp8_fast chooses how FP8 weights are multiplied: give --fp8 too")
    return Loading(family, policy, chosen.fp8_fast, compile_settings(options, os.environ))


def open_transformer(family: Family, options: Resolved) -> Opened:
    """The transformer, or two, looked at but not loaded, with their adapters matched."""
    chosen, lora = options[ModelOptions], options[LoraOptions]
    if chosen.dit is None:
        raise UserError("--dit is required: the transformer's checkpoint")
    merges = _merges(lora)
    config = read_model_config(options.as_dict().get("model_config"))
    own, plan = model_options(family, options), high_noise(family, options)
    for sentence in family.without_effect(own) if isinstance(family, HasExperts) else ():
        log.warning("%s", sentence)

    def open_one(path: str, merges: Sequence[Merge]) -> OpenDit:
        modes = chosen.attn_mode, chosen.split_attn
        return open_dit(
            family, path, merges=merges, config=config, options=own, attn_mode=modes[0], split_attn=modes[1]
        )

    opened = open_one(chosen.dit, merges)
    if plan is None:
        return opened
    count = len(plan.lora_weight)  # patterns are for files by their place, in either expert
    patterns = {name: getattr(lora, name)[:count] for name in ("include_patterns", "exclude_patterns")}
    high = replace(lora, lora_weight=plan.lora_weight, lora_multiplier=plan.lora_multiplier, **patterns)
    return open_experts(opened, plan, _merges(high), open_one)


def memory_of(opened: Opened, options: Resolved, device: torch.device, compiling: CompileSettings | None) -> MemoryPlan:
    """Which weights rest on the host; what has no effect is told. Raises UserError."""
    chosen, spec = options[SwapOptions], opened.family.spec
    for name, why in dict(unread(chosen, device)).items():
        if options.given(name):
            log.warning("%s has no effect %s", name, why)
    shape = (opened.dit, spec.blocks, spec.inputs)
    return plan_memory(*shape, chosen, device, compiling=compiling, moves=opened.moves)


def save_merged_model(options: Resolved, opened: Opened) -> None:
    """`--save_merged_model`: write the checkpoint with its adapters, streamed; the transformer is not loaded."""
    chosen, lora = options[ModelOptions], options[LoraOptions]
    if not isinstance(opened, OpenDit):
        raise UserError(
            "--save_merged_model writes one checkpoint: merge each expert in a command of its own, without "
            "--dit_high_noise"
        )
    path = str(lora.save_merged_model)
    if not lora.lora_weight:
        raise UserError("--save_merged_model writes what --lora_weight gives: name the LoRA files")
    if chosen.fp8:
        log.warning("--fp8 has no effect on %s: merged weights are written in high precision", path)
    multipliers = _filled(lora.lora_multiplier, 1.0, len(lora.lora_weight))
    told = [f"{Path(file).name} x {m:g}" for file, m in zip(lora.lora_weight, multipliers, strict=True)]
    with open_checkpoint(opened.path) as checkpoint:
        count = save_merged(
            path,
            checkpoint,
            opened.merges,
            rename=opened.family.rename_dit_key,
            dtype=None if chosen.dit_dtype is None else DTYPES[chosen.dit_dtype],
            told=told,
        )
    log.info("wrote %s: %d weights merged with %s", path, count, ", ".join(told))


def _merges(lora: LoraOptions) -> list[Merge]:
    """The adapters of `--lora_weight`. Raises UserError for more values than files, and for files of another kind."""
    files = lora.lora_weight
    for name in ("lora_multiplier", "include_patterns", "exclude_patterns"):
        given = getattr(lora, name)
        if len(given) > len(files):
            raise UserError(
                f"{len(given)} values of --{name} for {len(files)} files of --lora_weight: give at most one per file"
            )
    single = (_SINGLE_BLOCKS,) if lora.exclude_single_blocks else ()
    multipliers = _filled(lora.lora_multiplier, 1.0, len(files))
    includes, excludes = (_filled(of, "", len(files)) for of in (lora.include_patterns, lora.exclude_patterns))
    rows = zip(files, multipliers, includes, excludes, strict=True)
    return [
        LoraMerge.from_file(path, multiplier, strict=lora.strict_lora, keys=KeyChoice(include, (exclude, *single)))
        for path, multiplier, include, exclude in rows
    ]


def _filled(values: Sequence[Value], rest: Value, count: int) -> tuple[Value, ...]:
    """`values`, at most `count` of them, and as many of `rest` as are missing."""
    return (*values, *[rest] * (count - len(values)))


def load_vae(family: Family, options: Resolved, device: torch.device) -> Vae:
    """The VAE of `--vae`."""
    chosen = options[ModelOptions]
    dtype = DTYPES[chosen.vae_dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    return family.load_vae(str(chosen.vae), device=device, dtype=dtype, options=own_options(family, options))


def sampler_of(
    family: Family, options: Resolved, dit: Dit, device: torch.device, make_run: Callable[[], Run]
) -> Sampler:
    """A sampler with a loaded transformer, whose blocks run as `make_run` says."""
    return Sampler(
        family,
        dit,
        device,
        make_run=make_run,
        joint=options[SolverOptions].cfg_batch,
        options=own_options(family, options),
        cache=step_cache_of(family, options),
        steps=guidance_steps(family, options),
    )


def step_cache_of(family: Family, options: Resolved) -> StepCache | None:
    """The step cache that is asked for. Raises UserError."""
    own = own_options(family, options), model_options(family, options)
    return step_cache(options[StepCacheOptions], family.mag_ratios(*own) if isinstance(family, HasMagRatios) else None)


def guidance_steps(family: Family, options: Resolved, dit: Dit | None = None) -> GuidanceSteps:
    """In which steps there is guidance, and by which blocks. Raises UserError, of `dit` too for blocks it has not."""
    found = GuidanceSteps()
    if isinstance(family, HasGuidanceSteps):
        found = family.guidance_steps(model_options(family, options))
    if found.layers and dit is not None:
        count = sum(len(list(dit.get_submodule(name).children())) for name in family.spec.blocks)
        if max(found.layers) >= count:
            raise UserError(f"--slg_layers {max(found.layers)}: this model has {count} blocks, 0 to {count - 1}")
    if found != GuidanceSteps() and options[StepCacheOptions].magcache_mag_ratios is not None:
        raise UserError(
            "--magcache_mag_ratios takes every step to be made alike: leave --cfg_skip_mode and --slg_layers out, or it"
        )
    return found


def require_vae(options: Resolved) -> None:
    """Raises UserError where no VAE is named, for requests that need it."""
    if options[ModelOptions].vae is None:
        raise UserError("--vae is required: pictures and videos that a request comes with are encoded by it")
