"""Guidance: from a model's branches (with the prompt, without it) to the one velocity that a solver asks for.

    v = v_u + s (v_c - v_u)        classifier-free guidance (Ho & Salimans 2022)

A branch is a `Velocity`: the model with its conditioning and its own way of running the blocks, so a step cache lives
in one branch and never sees another. A combination of branches is a `Velocity` again, which is what further kinds of
guidance (a branch with blocks left out, guidance in some steps only) build on.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.families.base import Conditioning, Dit, Family
from musubi_tuner.flow.solvers import Velocity
from musubi_tuner.nn.experts import expert_at
from musubi_tuner.nn.runner import Run, direct


@dataclass(frozen=True)
class Branch:
    """The model with one conditioning; called with (x, t), t a number, it gives the velocity.

    dtype: compute dtype of the model (autocast); None leaves it to the weights.
    """

    family: Family
    dit: Dit
    cond: Conditioning
    run: Run = field(default=direct)
    dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
        with self._precision(x.device):
            v = self.family.predict(expert_at(self.dit, t), x, times, self.cond, run=self.run)
        return v.to(x.dtype)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.dtype is None or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


def classifier_free(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """v_u + scale (v_c - v_u) by two calls; the conditional branch is called first."""

    def velocity(x: Tensor, t: float) -> Tensor:
        v = conditional(x, t)
        without = unconditional(x, t)
        return without + scale * (v - without)

    return velocity


def classifier_free_joint(both: Velocity, scale: float) -> Velocity:
    """The same by one call of twice the batch: `both` holds the conditional samples first, then the others."""

    def velocity(x: Tensor, t: float) -> Tensor:
        v, without = both(torch.cat([x, x]), t).chunk(2)
        return without + scale * (v - without)

    return velocity


def on_device(value: Any, device: torch.device) -> Any:
    """Every tensor in a conditioning (nested mappings, lists, tuples) on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_device(part, device) for part in value)
    return value
