"""Options of training judged together, before anything is loaded.

What can be known to be wrong is one error of `check`; an option that the user gave and that the chosen path never reads
is named by `ineffective`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.data.cached import CachedItem
from musubi_tuner.families.base import Dit
from musubi_tuner.flow import timesteps
from musubi_tuner.memory.plan import SwapOptions, unread
from musubi_tuner.nn.compiling import CompileOptions, settings_of
from musubi_tuner.optim.schedules import SCHEDULES
from musubi_tuner.training.config import (
    LogOptions,
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    RunOptions,
    SampleOptions,
    TimestepOptions,
)
from musubi_tuner.training.hub import HubOptions
from musubi_tuner.training.retention import StateOptions
from musubi_tuner.training.tracker import tracker_config


def check(options: Resolved) -> None:
    """Raise one UserError with everything that the options alone tell to be impossible."""
    faults = list(_faults(options))
    if faults:
        raise UserError("; ".join(faults))


def _faults(options: Resolved) -> Iterator[str]:
    model, times, samples = options[ModelOptions], options[TimestepOptions], options[SampleOptions]
    if model.fp8_scaled and not model.fp8_base:
        yield "--fp8_scaled says how --fp8_base quantises: give both, or neither"
    if model.full_finetune and (model.fp8_base or options[NetworkOptions].network_weights):
        yield "--full_finetune trains the weights themselves: leave out --fp8_base and --network_weights"
    if model.full_fp16:
        yield "--full_fp16: gradients in float16 underflow; use --full_bf16, or float32 weights without either"
    if model.full_finetune and model.dit_dtype not in (None, "bfloat16" if model.full_bf16 else model.dit_dtype):
        yield f"--full_bf16 and dit_dtype = {model.dit_dtype} contradict each other: keep one"
    if model.full_finetune and model.dit_dtype == "float16":
        yield "dit_dtype = float16 with --full_finetune: gradients underflow; use bfloat16 or float32"
    if options[HubOptions].resume_from_huggingface and not options[StateOptions].resume:
        yield "--resume_from_huggingface fetches what --resume names: give both"
    if model.attn_mode == "sageattn":
        yield "attn_mode = sageattn has no backward pass: use sdpa or flash for training"
    if len(model.base_weights_multiplier) > len(model.base_weights):
        yield f"{len(model.base_weights_multiplier)} base_weights_multiplier for {len(model.base_weights)} base_weights"
    if times.range[0] >= times.range[1]:
        yield f"min_timestep = {times.min_timestep}, max_timestep = {times.max_timestep}: the first must be smaller"
    every = samples.sample_every_n_steps or samples.sample_every_n_epochs or samples.sample_at_first
    if samples.sample_prompts and not samples.vae:
        yield "previews need a VAE: give --vae, or leave out --sample_prompts"
    if every and not samples.sample_prompts:
        yield "previews need prompts: give --sample_prompts, or leave out --sample_every_n_steps and the like"
    yield from _log_faults(options[LogOptions])
    yield from _compile_faults(options)
    yield from _network_faults(options)


def _log_faults(logs: LogOptions) -> Iterator[str]:
    if "tensorboard" in logs.boards and not logs.logging_dir:
        yield f"log_with = {logs.log_with} needs a place: give --logging_dir"
    try:
        tracker_config(logs.log_tracker_config)
    except UserError as fault:
        yield str(fault)


def _compile_faults(options: Resolved) -> Iterator[str]:
    network = options[NetworkOptions]
    try:
        settings = settings_of(options[CompileOptions], os.environ)
    except UserError as fault:
        yield str(fault)
        return
    drops = [pair for pair in network.network_args if pair.replace("-", "_").startswith(("rank_drop", "module_drop"))]
    if settings is not None and settings.fullgraph and (network.network_dropout or drops):
        yield "keyed dropout splits a block into several graphs: leave out the fullgraph option, or the dropout"


def _network_faults(options: Resolved) -> Iterator[str]:
    network, kind = options[NetworkOptions], options[OptimizerOptions].optimizer_type
    if network.dim_from_weights and not network.network_weights:
        yield "--dim_from_weights reads the ranks of a file: give it with --network_weights"
    if network.scale_weight_norms is not None and kind.lower().endswith("schedulefree"):
        yield f"--scale_weight_norms changes weights that {kind} keeps in two versions: use one without the other"


def ineffective(options: Resolved) -> list[str]:
    """One sentence for each option that the user gave and that nothing on the chosen path reads."""
    return [f"{name} has no effect {why}" for name, why in _unread(options) if options.given(name)]


def check_caches(dit: Dit, entries: Sequence[CachedItem]) -> None:
    """Compare caches with what an opened transformer is conditioned on, where it has an attribute `conditioned_on`
    (fields, each with a sentence). Raises UserError."""
    for name, sentence in getattr(dit, "conditioned_on", {}).items():
        without = [entry.latent for entry in entries if name not in entry.fields]
        if without:
            raise UserError(f"{len(without)} of {len(entries)} latent caches, e.g. {without[0]}: {sentence}")


def one_sided(options: Resolved, boundary: float | None, usual: float | None) -> Iterator[str]:
    """Sentences about a range of t that does not suit the transformers that were given.

    boundary: between two experts, None where there is one transformer. usual: that of the task, None where it has none.
    """
    low, high = options[TimestepOptions].range
    if boundary is not None and (high <= boundary or low >= boundary):
        one, other = ("low", "high") if high <= boundary else ("high", "low")
        yield (
            f"all timesteps from {1000 * low:g} to {1000 * high:g} lie on the side of the expert for {one} noise, the "
            f"boundary being {1000 * boundary:g}: the one for {other} noise is held in memory and never trained on"
        )
    if boundary is None and usual is not None and low < usual < high:
        yield (
            f"this task has two experts and one was given, which is trained from {1000 * low:g} to {1000 * high:g}: in "
            f"sampling each works on its own side of {1000 * usual:g}; give --max_timestep {1000 * usual:g} for the "
            f"one for low noise, --min_timestep {1000 * usual:g} for the other, or both experts"
        )


def _unread(options: Resolved) -> Iterator[tuple[str, str]]:
    times, rate, run = options[TimestepOptions], options[OptimizerOptions], options[RunOptions]
    yield from _unread_timesteps(times)
    yield from _unread_rate(rate)
    if not run.gradient_checkpointing:
        yield "gradient_checkpointing_cpu_offload", "without gradient_checkpointing"
    if run.max_train_epochs is not None:
        yield "max_train_steps", "beside max_train_epochs"
    yield from _unread_finetune(options[ModelOptions])
    yield from _unread_logs(options[LogOptions])
    yield from _unread_hub(options[HubOptions])
    yield from _unread_fp8(options[ModelOptions])
    yield from _unread_compile(options[CompileOptions])
    yield from unread(options[SwapOptions], trained=options[ModelOptions].full_finetune)
    if options[NetworkOptions].dim_from_weights:
        for name in ("network_dim", "network_alpha"):
            yield name, "beside dim_from_weights"
    if options[SampleOptions].sample_every_n_epochs is not None:
        yield "sample_every_n_steps", "beside sample_every_n_epochs"


def _unread_rate(rate: OptimizerOptions) -> Iterator[tuple[str, str]]:
    curves = ("lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale")
    row = SCHEDULES.get(rate.lr_scheduler.lower())
    for name in (*curves, "lr_scheduler_min_lr_ratio"):
        if rate.lr_scheduler_type:
            yield name, f"with lr_scheduler_type = {rate.lr_scheduler_type}"
        elif row is not None and name not in row.reads:
            yield name, f"with lr_scheduler = {rate.lr_scheduler}"
    if rate.lr_scheduler_type:
        yield "lr_scheduler", "beside lr_scheduler_type"
        yield "lr_warmup_steps", f"with lr_scheduler_type = {rate.lr_scheduler_type}"


def _unread_finetune(model: ModelOptions) -> Iterator[tuple[str, str]]:
    if model.full_finetune:
        for name in ("network_module", "network_dim", "network_alpha", "network_dropout", "network_args"):
            yield name, "with full_finetune"
        yield "scale_weight_norms", "with full_finetune"
    else:
        for name in ("trainable_modules", "full_bf16"):
            yield name, "without full_finetune"


def _unread_timesteps(times: TimestepOptions) -> Iterator[tuple[str, str]]:
    sampler, scheme = times.timestep_sampling, times.weighting_scheme
    reads = set(timesteps.READS[sampler])
    if sampler == "sigma":
        reads |= {"logit_normal": {"logit_mean", "logit_std"}, "mode": {"mode_scale"}}.get(scheme, set())
    for name in ("discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std", "mode_scale"):
        if name not in reads:
            yield (
                name,
                f"with timestep_sampling = {sampler}"
                + (f" and weighting_scheme = {scheme}" if sampler == "sigma" and name != "discrete_flow_shift" else ""),
            )
    if sampler != "sigma" and scheme in ("logit_normal", "mode"):
        yield "weighting_scheme", f"as a density: {scheme} shapes timestep_sampling = sigma, not {sampler}"
    if times.range == (0.0, 1.0):
        yield "preserve_distribution_shape", "without min_timestep or max_timestep"
    if not times.stratified:
        yield "num_timestep_buckets", f"below 2 ({times.num_timestep_buckets})"


def _unread_logs(logs: LogOptions) -> Iterator[tuple[str, str]]:
    if not logs.boards:
        for name in ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config"):
            yield name, "without logging_dir"
    elif not logs.logging_dir:
        yield "log_prefix", "without logging_dir"
    if "wandb" not in logs.boards:
        for name in ("wandb_run_name", "wandb_api_key"):
            yield name, "without log_with = wandb"


def _unread_hub(hub: HubOptions) -> Iterator[tuple[str, str]]:
    if hub.huggingface_repo_id is None:
        names = ("huggingface_path_in_repo", "huggingface_repo_visibility", "save_state_to_huggingface", "async_upload")
        for name in (*names, *(() if hub.resume_from_huggingface else ("huggingface_token", "huggingface_repo_type"))):
            yield name, "without huggingface_repo_id"


def _unread_fp8(model: ModelOptions) -> Iterator[tuple[str, str]]:
    if not model.fp8_base:
        for name in ("fp8_exclude", "fp8_report"):
            yield name, "without fp8_base"
    if not model.fp8_scaled:
        for name in ("fp8_mode", "fp8_block_size", "allow_prequantized"):
            yield name, "without fp8_scaled"
    elif model.fp8_mode != "block":
        yield "fp8_block_size", f"with fp8_mode = {model.fp8_mode}"
    if not model.fp8_base:
        yield "fp8_format", "without fp8_base"


def _unread_compile(chosen: CompileOptions) -> Iterator[tuple[str, str]]:
    if not chosen.uses_dynamo:
        for name in ("dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"):
            yield name, "without dynamo_backend"
    if not chosen.compile:
        for name in ("backend", "mode", "dynamic", "fullgraph", "cache_size_limit"):
            yield f"compile_{name}", "without compile"
