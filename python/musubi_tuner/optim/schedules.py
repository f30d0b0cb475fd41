"""Learning rates as tables of pure functions: `step -> factor` of each group's own rate.

A schedule holds no counter, so a resumed run needs none: `Schedule(optimizer, step)` sets the rates of optimiser step
`step` (from 0) before that step is made. Warm-up and decay lengths are steps, or ratios of the total.

With several processes the curve is read at `step * processes` of `total * processes`, as launchers have always
advanced it, so a warm-up given in steps ends `processes` times sooner while one given as a ratio does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import nearest

Factor = Callable[[int], float]


def steps_or_ratio(text: str) -> int | float:
    """`100` steps, `0.1` or `10%` of the total. Raises ValueError."""
    number = text.strip()
    value = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    if not math.isfinite(value) or value < 0 or (value > 1 and not value.is_integer()):
        raise ValueError("must be whole steps, a ratio from 0 to 1, or a percentage like 10%")
    return int(value) if value >= 1 and not number.endswith("%") else value


@dataclass(frozen=True)
class ScheduleShape:
    """What the curves read. total, warmup, decay: in scheduler steps (see `curve`).

    min_ratio: floor as a fraction of the rate; None where the user gave none. rate: the base rate.
    args: further `key = value` pairs of the user, by the curve's own names.
    """

    total: int
    warmup: int = 0
    decay: int = 0
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_ratio: float | None = None
    rate: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)


def curve(
    name: str,
    *,
    steps: int,
    processes: int = 1,
    warmup: int | float = 0,
    decay: int | float = 0,
    **shape: Any,
) -> Factor:
    """The factor of optimiser step k under the schedule `name`; further arguments as in `ScheduleShape`.

    Raises UserError for an unknown name, lengths that do not fit into the run, and arguments that the curve lacks.
    """
    key = name.strip().lower()
    if key not in SCHEDULES:
        close = nearest(key, SCHEDULES, 0.6)
        raise UserError(
            f"lr_scheduler = {name!r} is not known: use one of {', '.join(SCHEDULES)}"
            + (f"; did you mean {close}?" if close else "")
        )
    total = steps * processes
    warm, fall = (_length(n, length, total) for n, length in (("lr_warmup_steps", warmup), ("lr_decay_steps", decay)))
    row = SCHEDULES[key]
    found = ScheduleShape(total=total, warmup=warm, decay=fall, **shape)
    _check(key, row, found)
    factor = row.build(found)
    return lambda step: factor(step * processes)


def _length(name: str, length: int | float, total: int) -> int:
    if isinstance(length, int):
        steps = length
    elif 0 <= length <= 1:
        steps = int(length * total)
    else:
        raise UserError(f"{name} = {length:g}: use whole steps, or a ratio from 0 to 1")
    if not 0 <= steps <= total:
        raise UserError(f"{name} = {length:g}: the run has {total} scheduler steps; use 0 to {total}")
    return steps


def _check(name: str, row: Row, shape: ScheduleShape) -> None:
    unknown = sorted(set(shape.args) - set(row.args))
    if unknown:
        offered = f"it takes {', '.join(row.args)}" if row.args else "it takes none"
        raise UserError(f"lr_scheduler_args: {name} has no argument {unknown[0]!r}; {offered}")
    if shape.warmup and not row.warms_up:
        raise UserError(f"lr_warmup_steps = {shape.warmup}: {name} has no warm-up; use constant_with_warmup, or 0")
    if shape.min_ratio is not None and not 0 <= shape.min_ratio <= 1:
        raise UserError(f"lr_scheduler_min_lr_ratio = {shape.min_ratio:g}: use 0 to 1")


def _warm(shape: ScheduleShape, step: int) -> float:
    return step / max(1, shape.warmup)


def _progress(shape: ScheduleShape, step: int) -> float:
    """0 at the end of warm-up, 1 at the end of the run; goes on beyond it."""
    return (step - shape.warmup) / max(1, shape.total - shape.warmup)


def _after_warmup(body: Callable[[ScheduleShape, float], float]) -> Callable[[ScheduleShape], Factor]:
    """A linear warm-up from 0, then `body(shape, progress)`."""

    def build(shape: ScheduleShape) -> Factor:
        return lambda step: _warm(shape, step) if step < shape.warmup else body(shape, _progress(shape, step))

    return build


def _linear(_shape: ScheduleShape, progress: float) -> float:
    return max(0.0, 1 - progress)


def _cosine(_shape: ScheduleShape, progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _cosine_with_restarts(shape: ScheduleShape, progress: float) -> float:
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((shape.cycles * progress) % 1.0)))


def _polynomial(shape: ScheduleShape, progress: float) -> float:
    end = POLYNOMIAL_END / shape.rate if shape.rate else 0.0
    return end if progress > 1 else (1 - end) * (1 - progress) ** shape.power + end


def _cosine_with_min_lr(shape: ScheduleShape) -> Factor:
    if shape.min_ratio is None:
        raise UserError("cosine_with_min_lr needs a floor: give --lr_scheduler_min_lr_ratio, e.g. 0.1")
    floor = shape.min_ratio

    def body(of: ScheduleShape, progress: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * of.cycles * progress))

    return _after_warmup(body)(shape)


def _inverse_sqrt(shape: ScheduleShape) -> Factor:
    scale = shape.timescale or shape.warmup or INVERSE_SQRT_TIMESCALE

    def factor(step: int) -> float:
        if step < shape.warmup:
            return _warm(shape, step)
        return 1 / math.sqrt((step - shape.warmup + scale) / scale)

    return factor


def _warmup_stable_decay(shape: ScheduleShape) -> Factor:
    floor, start = shape.min_ratio or 0.0, shape.total - shape.decay
    falls: Mapping[str, Callable[[float], float]] = {
        "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * shape.cycles * p)),
        "linear": lambda p: 1 - p,
        "1-sqrt": lambda p: 1 - math.sqrt(p),
    }
    kind = shape.args.get("decay_type", "cosine")
    if kind not in falls:
        raise UserError(f"lr_scheduler_args: decay_type = {kind!r}; use one of {', '.join(falls)}")
    if start < shape.warmup:
        raise UserError(f"warm-up of {shape.warmup} and decay of {shape.decay} steps: the run has only {shape.total}")

    def factor(step: int) -> float:
        if step < shape.warmup:
            return floor + (1 - floor) * _warm(shape, step)
        if step < start:
            return 1.0
        if step >= shape.total:
            return floor
        return floor + (1 - floor) * max(0.0, falls[kind]((step - start) / shape.decay))

    return factor


def _piecewise_constant(shape: ScheduleShape) -> Factor:
    text = str(shape.args.get("step_rules", ""))
    *rules, last = text.split(",")
    try:
        bounds = [(int(end), float(value)) for value, end in (rule.split(":") for rule in rules)]
        rest = float(last)
    except ValueError as fault:
        raise UserError(
            f"piecewise_constant needs --lr_scheduler_args \"step_rules='1:50,0.1:100,0.01'\", {text!r} was given"
        ) from fault
    return lambda step: next((value for end, value in bounds if step < end), rest)


def _rex(shape: ScheduleShape) -> Factor:
    """r + (1 - r) z / (alpha + beta z), z = 1 - s / S over the steps after warm-up (Chen et al. 2021 for r = 0)."""
    floor = REX_FLOOR if shape.min_ratio is None else shape.min_ratio
    alpha, beta = float(shape.args.get("rex_alpha", 0.1)), float(shape.args.get("rex_beta", 0.9))
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise UserError(f"rex_alpha = {alpha:g}, rex_beta = {beta:g}: both must be at least 0 and one above it")
    length = shape.total - shape.warmup

    def factor(step: int) -> float:
        if step < shape.warmup:
            # the first two steps are at the floor, then it rises linearly
            return floor + (1 - floor) * max(0, step - 1) / max(1, shape.warmup - 1)
        if step - shape.warmup >= length:
            return floor
        z = 1 - (step - shape.warmup) / length
        return floor + (1 - floor) * z / (alpha + beta * z)

    return factor


POLYNOMIAL_END = 1e-7
"""Rate at the end of `polynomial`."""
INVERSE_SQRT_TIMESCALE = 10_000
REX_FLOOR = 0.01


@dataclass(frozen=True)
class Row:
    """A schedule: its builder, whether it has a warm-up, and the names of its further arguments."""

    build: Callable[[ScheduleShape], Factor]
    warms_up: bool = True
    args: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    """Options that this curve reads beside the warm-up."""


SCHEDULES: Mapping[str, Row] = {
    "constant": Row(lambda _shape: lambda _step: 1.0, warms_up=False),
    "constant_with_warmup": Row(_after_warmup(lambda _shape, _progress: 1.0)),
    "linear": Row(_after_warmup(_linear)),
    "cosine": Row(_after_warmup(_cosine)),
    "cosine_with_restarts": Row(_after_warmup(_cosine_with_restarts), reads=frozenset({"lr_scheduler_num_cycles"})),
    "polynomial": Row(_after_warmup(_polynomial), reads=frozenset({"lr_scheduler_power"})),
    "inverse_sqrt": Row(_inverse_sqrt, reads=frozenset({"lr_scheduler_timescale"})),
    "cosine_with_min_lr": Row(
        _cosine_with_min_lr, reads=frozenset({"lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"})
    ),
    "warmup_stable_decay": Row(
        _warmup_stable_decay,
        args=("decay_type",),
        reads=frozenset({"lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"}),
    ),
    "piecewise_constant": Row(_piecewise_constant, warms_up=False, args=("step_rules",)),
    "rex": Row(_rex, args=("rex_alpha", "rex_beta"), reads=frozenset({"lr_scheduler_min_lr_ratio"})),
}
"""By the names of `--lr_scheduler`."""


@dataclass(frozen=True)
class Schedule:
    """Sets every group's rate to its own base rate times `factor(step)`; the base rate is the group's first one."""

    factor: Factor

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        factor = self.factor(step)
        for group in optimizer.param_groups:
            base = group.setdefault("initial_lr", group["lr"])
            group["lr"] = base * factor


@dataclass
class SchedulerClass:
    """A scheduler class of torch or of another package, advanced `processes` times between optimiser steps."""

    scheduler: torch.optim.lr_scheduler.LRScheduler
    processes: int = 1
    done: int = 0

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:  # noqa: ARG002 -- it has its own
        while self.done < step:
            for _ in range(self.processes):
                self.scheduler.step()
            self.done += 1
