"""The cheap part of a training run, done first: options judged, model header looked at, data opened, length settled."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass, replace
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.data.batches import CachedBatches, DataOptions, open_batches
from musubi_tuner.families.base import Family
from musubi_tuner.memory.plan import MemoryPlan, SwapOptions, plan_memory, unread
from musubi_tuner.nn.compiling import CompileOptions, settings_of
from musubi_tuner.sampling.models import Opened, read_model_config
from musubi_tuner.sampling.options import task_defaults
from musubi_tuner.training import checks
from musubi_tuner.training.checkpoint import Names, output_folder, output_name
from musubi_tuner.training.config import (
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    RunOptions,
    SampleOptions,
    SaveOptions,
    TimestepOptions,
)
from musubi_tuner.training.events import State
from musubi_tuner.training.hub import HubOptions, Uploads, fetched, open_uploads
from musubi_tuner.training.loop import Plan
from musubi_tuner.training.machine import MachineOptions, prepare_machine
from musubi_tuner.training.model import check_adapter, model_dtype, open_model
from musubi_tuner.training.optimizer import rehearse
from musubi_tuner.training.resume import Resume, open_resume, start_of, total_steps
from musubi_tuner.training.retention import StateOptions
from musubi_tuner.training.runtime import LocalRuntime, launched
from musubi_tuner.training.state import remove_leftovers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What every part of a run is made from."""

    family: Family
    options: Resolved
    runtime: LocalRuntime
    names: Names
    seed: int
    opened: Opened
    memory: MemoryPlan
    source: CachedBatches
    plan: Plan
    resume: Resume | None
    state: State
    """Where the run starts."""
    uploads: Uploads | None = None


def prepare(family: Family, options: Resolved) -> Setting:
    """Check all that can be checked before the model is read, and open the data. Raises UserError."""
    save, chosen = options[SaveOptions], options[RunOptions]
    checks.check(options)
    for sentence in checks.ineffective(options):
        log.warning("%s", sentence)
    check_adapter(options[NetworkOptions], family.spec)
    own: list[Any] = [options[group] for group in family.option_groups("train")][1:]
    sizes = read_model_config(options.as_dict().get("model_config"))
    opened = open_model(family, options[ModelOptions], sizes, own[0] if own else None)
    for sentence in checks.one_sided(options, opened.boundary, task_defaults(family.spec, options).boundary):
        log.warning("%s", sentence)
    names = Names(output_folder(save.output_dir), output_name(save.output_name))
    runtime = launched(chosen.mixed_precision, options[MachineOptions].timeout)
    if runtime.sharded:
        _check_sharded(options)
    model_dtype(options[ModelOptions], runtime.dtype)
    memory = _memory(opened, options, runtime)
    prepare_machine(options[MachineOptions], runtime.device)
    uploads = open_uploads(options[HubOptions]) if runtime.rank == 0 else None
    states = _states(options)
    resume = open_resume(states)
    seed = chosen.seed if resume is None or chosen.seed is not None else resume.seed
    seed = runtime.agree(secrets.randbits(32) if seed is None else seed)
    source = _data(family, options[DataOptions], runtime, seed)
    checks.check_caches(opened.dit, source.entries)
    plan, state = _plan(chosen, states, resume, runtime, source.longest)
    rehearse(options[OptimizerOptions], options[TimestepOptions], family.spec, steps=plan.max_steps)
    if runtime.rank == 0 and (left := remove_leftovers(names.folder, names.name)):
        log.info("removed what a killed run left unfinished: %s", ", ".join(path.name for path in left))
    return Setting(family, options, runtime, names, seed, opened, memory, source, plan, resume, state, uploads)


def _memory(opened: Opened, options: Resolved, runtime: LocalRuntime) -> MemoryPlan:
    """Which weights rest on the host. Raises UserError."""
    chosen, trained = options[SwapOptions], options[ModelOptions].full_finetune
    device = runtime.device
    idle = [name for name, _ in unread(chosen, device) if options.given(name)]
    if idle and chosen.any:
        log.warning("%s: no effect on %s, where all weights are in host memory already", ", ".join(idle), device)
    if chosen.blocks_to_swap and trained and runtime.world > 1:
        raise UserError(
            f"blocks_to_swap = {chosen.blocks_to_swap} with --full_finetune in {runtime.world} processes: gradients of "
            "swapped blocks rest on the host, where processes do not meet; use one process, or shards (--use_fsdp)"
        )
    spec = opened.family.spec
    compiling = settings_of(options[CompileOptions], os.environ)
    shape = (opened.dit, spec.blocks, spec.inputs)
    return plan_memory(*shape, chosen, device, trained=trained, compiling=compiling, moves=opened.moves)


def _states(options: Resolved) -> StateOptions:
    """The options of states; one that lies on the hub is fetched."""
    states, hub = options[StateOptions], options[HubOptions]
    if states.resume is None or not hub.resume_from_huggingface:
        return states
    return replace(states, resume=fetched(states.resume, hub))


def _check_sharded(options: Resolved) -> None:
    """Raises UserError for what a launch with FSDP cannot do."""
    if options[SwapOptions].any:
        raise UserError(
            "the launcher asks for FSDP, which keeps a share of every block on each device: leave out --blocks_to_swap "
            "and --img_in_txt_in_offloading, or launch without FSDP"
        )
    if not options[ModelOptions].full_finetune:
        raise UserError(
            "the launcher asks for FSDP, which splits weights that are trained, and an adapter has few: use a plain "
            "launch (`accelerate launch --multi_gpu --num_processes N`), or train all weights with --full_finetune"
        )
    if options[SampleOptions].sample_prompts is not None:
        raise UserError(
            "previews are made by one process and with FSDP none has the whole model: leave out --sample_prompts, and "
            "render from the saved files"
        )


def _data(family: Family, chosen: DataOptions, runtime: LocalRuntime, seed: int) -> CachedBatches:
    source = open_batches(
        chosen.dataset_config,
        family,
        seed=seed,
        strict=chosen.strict_cache,
        rank=runtime.rank,
        world=runtime.world,
        workers=chosen.workers,
    )
    for sentence in source.warnings:
        log.warning("%s", sentence)
    log.info("%d items in %d batches an epoch, seed %d", source.num_items, len(source), seed)
    return source


def _plan(
    chosen: RunOptions, states: StateOptions, resume: Resume | None, runtime: LocalRuntime, batches: int
) -> tuple[Plan, State]:
    """How long the run is, and where in it it starts. Epoch and step options mean totals."""
    plan = Plan(chosen.max_train_steps, chosen.gradient_accumulation_steps)
    state = start_of(states, resume, plan, batches, runtime.world)
    if chosen.max_train_epochs is not None:
        plan = Plan(total_steps(plan, chosen.max_train_epochs, batches, state), plan.accumulation)
    over = chosen.max_train_epochs is not None and state.epoch > chosen.max_train_epochs
    if over or state.step > plan.max_steps:
        raise UserError(
            f"the run starts at step {state.step}, after {state.epoch} epochs, which is beyond its end: raise "
            "--max_train_steps or --max_train_epochs (they mean totals), or count from 0 with --reset_counters"
        )
    return plan, state
