"""Epochs and steps: batches are grouped, the rate is set, the step is made, and the observers are told.

Saving, previews, progress bars and trackers are observers; none is known here. Where the run stands is one object,
`State`, and every random number is keyed, so a run that starts from a stored state continues the same sequence.

With several processes all make the same number of steps: the longest share of batches sets it, and a process whose
share has ended contributes an empty group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.optim.build import set_training
from musubi_tuner.training.events import EpochRecord, Observer, State, StepRecord
from musubi_tuner.training.step import Step

if TYPE_CHECKING:
    from musubi_tuner.data.batches import Batch, BatchSource


@dataclass(frozen=True)
class Plan:
    """max_steps: total of optimiser steps. accumulation: micro-batches per step; an epoch's rest makes a step too."""

    max_steps: int
    accumulation: int = 1

    def steps_per_epoch(self, batches: int) -> int:
        return -(-batches // self.accumulation)

    def epochs(self, batches: int) -> int:
        """Epochs that are begun."""
        return -(-self.max_steps // self.steps_per_epoch(batches))


class Rate(Protocol):
    """Sets the learning rates of `optimizer` for step number `step`, from 0 (`optim.schedules`)."""

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None: ...


def train(
    step: Step,
    source: BatchSource,
    plan: Plan,
    *,
    rate: Rate | None = None,
    observers: Sequence[Observer] = (),
    state: State | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train until `plan.max_steps`. `rate`: None leaves the optimiser's rates as they are.

    stop: asked after every step; True, which must be the same on all processes, ends the run there.
    Raises UserError for an empty source or a loss that is not finite.
    """
    state = State() if state is None else state
    batches = step.runtime.most(len(source))
    if batches == 0:
        raise UserError("the data set has no batch to train on: check the folders and captions it names")
    set_training(step.optimizer, True)
    for observer in observers:
        observer.start(state)
    stopping = False
    while state.step < plan.max_steps and not stopping:
        for group in _groups(source, state, plan.accumulation, batches):
            record = _one(step, group, rate, state, batches=batches, plan=plan)
            for observer in observers:
                observer.step_end(record)
            stopping = stop()
            if stopping or state.step == plan.max_steps:
                break
        if state.batch == batches:
            _end_epoch(state, plan, observers)
    for observer in observers:
        (observer.stopped if stopping else observer.finish)(state)
    return state


def _groups(source: BatchSource, state: State, size: int, batches: int) -> Iterator[list[Batch]]:
    """Micro-batches of each step to the end of the epoch; empty where other processes have some left."""
    own, share = len(source), source.epoch(state.epoch + 1, state.batch)
    for start in range(state.batch, batches, size):
        group = list(islice(share, size))
        if len(group) < min(size, own - start):
            raise RuntimeError(f"the source promised {own} batches an epoch and gave {start + len(group)}")
        yield group


def _one(step: Step, group: list[Batch], rate: Rate | None, state: State, *, batches: int, plan: Plan) -> StepRecord:
    """Make one step and advance the state."""
    started = time.perf_counter()
    if rate is not None:
        rate(step.optimizer, state.step)
    rates = group_rates(step.optimizer)
    result = step(group)
    state.step += 1
    state.batch = min(state.batch + plan.accumulation, batches)
    state.recent = [*state.recent, result.loss][-plan.steps_per_epoch(batches) :]
    return StepRecord(
        step=state.step,
        epoch=state.epoch + 1,
        loss=result.loss,
        average=sum(state.recent) / len(state.recent),
        grad_norm=result.grad_norm,
        rates=rates,
        seconds=time.perf_counter() - started,
        items=sum(len(batch.items) for batch in group),
    )


def _end_epoch(state: State, plan: Plan, observers: Sequence[Observer]) -> None:
    """Count a completed epoch and tell it: the recent losses are now the epoch's own."""
    state.epoch, state.batch = state.epoch + 1, 0
    mean = sum(state.recent) / max(1, len(state.recent))
    record = EpochRecord(state.epoch, state.step, mean, last=state.step >= plan.max_steps)
    for observer in observers:
        observer.epoch_end(record)


def group_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rate of every parameter group by `group["name"]`, or by number; none where the optimizer keeps it."""
    named = {str(group.get("name", i)): group["lr"] for i, group in enumerate(optimizer.param_groups)}
    return {name: float(rate) for name, rate in named.items() if rate is not None}
