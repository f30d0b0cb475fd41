"""What a trained file says about itself: the `ss_*` record of the run and the `modelspec.*` card, all strings.

The key names are those that users' tools read. `Facts` is what holds for the whole run; `at` adds what belongs to one
saved file. `sshs_*` hashes are added by the writer.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import FamilySpec
from musubi_tuner.training.config import (
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    RunOptions,
    SampleOptions,
    SaveOptions,
    TimestepOptions,
)

MINIMUM = (
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What `--no_metadata` leaves."""


@dataclass(frozen=True)
class Facts:
    """What a run knows beside its options. data: the source's own `ss_*` entries."""

    steps: int
    epochs: int
    seed: int
    precision: str
    optimizer: str
    network_dim: int | None = None
    network_alpha: float | None = None
    network_args: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    session: str = field(default_factory=lambda: str(secrets.randbits(32)))
    started: float = field(default_factory=time.time)


def at(
    spec: FamilySpec, options: Resolved, facts: Facts, step: int, epoch: int, *, now: float | None = None
) -> dict[str, str]:
    """The metadata of a file saved after `step` steps in epoch `epoch`; `now` is the time, for tests."""
    now = time.time() if now is None else now
    record = {**_run(spec, options, facts), **_network(spec, options, facts), **facts.data}
    record |= {"ss_steps": step, "ss_epoch": epoch, "ss_training_finished_at": now}
    if options[SaveOptions].no_metadata:
        record = {key: value for key, value in record.items() if key in MINIMUM}
    return {key: str(value) for key, value in {**record, **_card(spec, options, now)}.items()}


def _run(spec: FamilySpec, options: Resolved, facts: Facts) -> dict[str, Any]:
    run, rate, times = options[RunOptions], options[OptimizerOptions], options[TimestepOptions]
    model, save, samples = options[ModelOptions], options[SaveOptions], options[SampleOptions]
    record = {
        "ss_session_id": facts.session,
        "ss_training_started_at": facts.started,
        "ss_output_name": save.output_name,
        "ss_learning_rate": rate.learning_rate,
        "ss_num_epochs": facts.epochs,
        "ss_gradient_checkpointing": run.gradient_checkpointing,
        "ss_gradient_checkpointing_cpu_offload": run.gradient_checkpointing_cpu_offload,
        "ss_gradient_accumulation_steps": run.gradient_accumulation_steps,
        "ss_max_train_steps": facts.steps,
        "ss_lr_warmup_steps": rate.lr_warmup_steps,
        "ss_lr_scheduler": rate.lr_scheduler_type or rate.lr_scheduler,
        "ss_base_model_version": spec.base_model_version,
        "ss_mixed_precision": facts.precision,
        "ss_seed": facts.seed,
        "ss_training_comment": save.training_comment,
        "ss_optimizer": facts.optimizer,
        "ss_max_grad_norm": rate.max_grad_norm,
        "ss_fp8_base": model.fp8_base,
        "ss_full_fp16": False,
        "ss_full_bf16": model.full_finetune and model.full_bf16,
        "ss_weighting_scheme": times.weighting_scheme,
        "ss_logit_mean": times.logit_mean,
        "ss_logit_std": times.logit_std,
        "ss_mode_scale": times.mode_scale,
        "ss_timestep_sampling": times.timestep_sampling,
        "ss_sigmoid_scale": times.sigmoid_scale,
        "ss_discrete_flow_shift": times.discrete_flow_shift,
        "ss_timestep_offset": times.timestep_offset,
        "ss_sd_model_name": Path(model.dit).name,
    }
    return record | ({"ss_vae_name": Path(samples.vae).name} if samples.vae else {})


def _network(spec: FamilySpec, options: Resolved, facts: Facts) -> dict[str, Any]:
    if options[ModelOptions].full_finetune:
        return {}
    network = options[NetworkOptions]
    record = {
        "ss_network_module": network.network_module or spec.network_module,
        "ss_network_dim": facts.network_dim,
        "ss_network_alpha": facts.network_alpha,
        "ss_network_dropout": network.network_dropout,
    }
    return record | ({"ss_network_args": json.dumps(dict(facts.network_args))} if facts.network_args else {})


def _card(spec: FamilySpec, options: Resolved, now: float) -> dict[str, str]:
    save, times = options[SaveOptions], options[TimestepOptions]
    architecture = spec.modelspec_architecture
    if options[ModelOptions].full_finetune:
        architecture = architecture.removesuffix("/lora")
    card = {
        "sai_model_spec": "1.0.0",
        "architecture": save.metadata_arch or architecture,
        "implementation": spec.modelspec_implementation,
        "title": save.metadata_title or save.output_name,
        "resolution": save.metadata_reso or spec.modelspec_resolution,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)),
        "author": save.metadata_author,
        "description": save.metadata_description,
        "license": save.metadata_license,
        "tags": save.metadata_tags,
        "timestep_range": _timestep_range(times),
    }
    return {f"modelspec.{key}": value for key, value in card.items() if value is not None}


def _timestep_range(times: TimestepOptions) -> str | None:
    if times.min_timestep is None and times.max_timestep is None:
        return None
    low = 0 if times.min_timestep is None else times.min_timestep
    return f"{low},{1000 if times.max_timestep is None else times.max_timestep}"
