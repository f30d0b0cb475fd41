"""What a training run tells to those who watch it: saving, previews, trackers and progress bars are observers.

Events come on every process; an observer that writes files or talks checks the rank itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class State:
    """Where a run stands: optimiser steps done, epochs completed, batches done of the epoch after those.

    batch counts those of one process (of the longest share); recent: losses of the last steps, an epoch's at most.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    recent: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step as told to observers. `epoch` counts from 1; `average`: over the last epoch's length."""

    step: int
    epoch: int
    loss: float
    average: float
    grad_norm: float
    rates: Mapping[str, float]
    """Learning rate of each parameter group, by its name."""
    seconds: float
    items: int
    """Items of this process in the step."""


@dataclass(frozen=True)
class EpochRecord:
    """A completed epoch, counted from 1, with the mean loss of its steps; `last`: the run ends with it."""

    epoch: int
    step: int
    loss: float
    last: bool


class Observer(Protocol):
    """Told of the run's events, on every process; `Quiet` has them all empty."""

    def start(self, state: State) -> None: ...
    def step_end(self, record: StepRecord) -> None: ...
    def epoch_end(self, record: EpochRecord) -> None: ...
    def finish(self, state: State) -> None: ...
    def stopped(self, state: State) -> None: ...


class Quiet:
    """An observer that does nothing: a base for those that care for some events."""

    def start(self, state: State) -> None:
        """Before the first step."""

    def step_end(self, record: StepRecord) -> None:
        """After every optimiser step."""

    def epoch_end(self, record: EpochRecord) -> None:
        """After the last step of an epoch."""

    def finish(self, state: State) -> None:
        """After the last step; not when the run was broken off."""

    def stopped(self, state: State) -> None:
        """Instead of `finish`, after the step in which the run was asked to stop."""
