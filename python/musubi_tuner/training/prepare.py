"""The cheap part of a training run, done first: options judged, model header looked at, data opened, length settled."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Any

from musubi_tuner.config.options import Resolved
from musubi_tuner.data.batches import CachedBatches, DataOptions, open_batches
from musubi_tuner.families.base import Family
from musubi_tuner.sampling.models import OpenDit, read_model_config
from musubi_tuner.training import checks
from musubi_tuner.training.checkpoint import Names, output_folder, output_name
from musubi_tuner.training.config import (
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    RunOptions,
    SaveOptions,
    TimestepOptions,
)
from musubi_tuner.training.loop import Plan
from musubi_tuner.training.model import check_adapter, open_model
from musubi_tuner.training.optimizer import rehearse
from musubi_tuner.training.runtime import LocalRuntime, launched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What every part of a run is made from."""

    family: Family
    options: Resolved
    runtime: LocalRuntime
    names: Names
    seed: int
    opened: OpenDit
    source: CachedBatches
    plan: Plan


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
    names = Names(output_folder(save.output_dir), output_name(save.output_name))
    runtime = launched(chosen.mixed_precision)
    seed = runtime.agree(secrets.randbits(32) if chosen.seed is None else chosen.seed)
    source = _data(family, options[DataOptions], runtime, seed)
    plan = _plan(chosen, runtime, len(source))
    rehearse(options[OptimizerOptions], options[TimestepOptions], family.spec, steps=plan.max_steps)
    return Setting(family, options, runtime, names, seed, opened, source, plan)


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


def _plan(chosen: RunOptions, runtime: LocalRuntime, batches: int) -> Plan:
    plan = Plan(chosen.max_train_steps, chosen.gradient_accumulation_steps)
    if chosen.max_train_epochs is None:
        return plan
    return Plan(runtime.agree(chosen.max_train_epochs * plan.steps_per_epoch(batches)), plan.accumulation)
