"""The optimizer of a run and what sets its learning rates, from the options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from musubi_tuner.families.base import FamilySpec
from musubi_tuner.optim.build import build_optimizer, parse_arguments, scheduler_class, sets_its_own_rate
from musubi_tuner.optim.schedules import Schedule, SchedulerClass, curve
from musubi_tuner.training.config import OptimizerOptions, TimestepOptions
from musubi_tuner.training.loop import Rate


def optimizer_and_rate(
    chosen: OptimizerOptions, groups: Sequence[Mapping[str, Any]], *, steps: int, processes: int = 1
) -> tuple[torch.optim.Optimizer, Rate | None]:
    """The optimizer, and what sets its rates (None: itself)."""
    arguments = parse_arguments(chosen.optimizer_args, "optimizer_args")
    optimizer = build_optimizer(chosen.optimizer_type, groups, arguments, rate=chosen.learning_rate)
    extra = parse_arguments(chosen.lr_scheduler_args, "lr_scheduler_args")
    if sets_its_own_rate(optimizer):
        return optimizer, None
    if chosen.lr_scheduler_type:
        return optimizer, SchedulerClass(scheduler_class(chosen.lr_scheduler_type)(optimizer, **extra), processes)
    factor = curve(
        chosen.lr_scheduler,
        steps=steps,
        processes=processes,
        warmup=chosen.lr_warmup_steps,
        decay=chosen.lr_decay_steps,
        cycles=chosen.lr_scheduler_num_cycles,
        power=chosen.lr_scheduler_power,
        timescale=chosen.lr_scheduler_timescale,
        min_ratio=chosen.lr_scheduler_min_lr_ratio,
        rate=chosen.learning_rate,
        args=extra,
    )
    return optimizer, Schedule(factor)


def rehearse(chosen: OptimizerOptions, times: TimestepOptions, spec: FamilySpec, *, steps: int) -> None:
    """Build optimizer, schedule and distribution of t once for nothing, so that what cannot be is told (UserError)
    before the model is loaded."""
    stand_in = {"params": [nn.Parameter(torch.zeros(1))], "lr": chosen.learning_rate}
    optimizer_and_rate(chosen, [stand_in], steps=steps)
    times.distribution((spec.latents.channels, 1, 64, 64))
