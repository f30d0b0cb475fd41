"""Noise levels of a sampling run: a `Schedule` is the grid that a solver walks and the times that the model is told.

Every schedule is a plain grid from (nearly) 1 down to 0, bent by `shift`, computed in float64 and free of any model.
Two facts of published checkpoints' own samplers live here and not in the solvers: some tell the model a time cut down
to whole thousandths while the solver walks the exact grid, and some begin a hair below 1, where the log-SNR is finite.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """`sigmas: [n + 1]` strictly falling to 0, walked by the solver; `times: [n]` what the model is told, in [0, 1].

    Both float64 on the CPU. Step i goes from `sigmas[i]` to `sigmas[i + 1]` with the velocity at `times[i]`.
    """

    sigmas: Tensor
    times: Tensor

    def __post_init__(self) -> None:
        steps = self.sigmas.numel() - 1
        if steps < 1 or self.times.shape != (steps,):
            raise ValueError(f"a schedule of {steps} steps needs as many times, not {tuple(self.times.shape)}")
        if self.sigmas[-1] != 0 or not bool((self.sigmas.diff() < 0).all()) or self.sigmas[0] > 1:
            raise ValueError(f"noise levels must fall from at most 1 to 0: {self.sigmas.tolist()}")

    def __len__(self) -> int:
        return self.times.numel()

    def last(self, steps: int) -> "Schedule":
        """Its last `steps` steps."""
        return Schedule(self.sigmas[-steps - 1 :], self.times[-steps:])


def shift(t: Tensor, factor: float) -> Tensor:
    """s t / (1 + (s - 1) t): more (s > 1) or fewer (s < 1) steps near noise; 0 and 1 stay (Esser et al. 2024, eq. 23).

    Raises ValueError unless `factor` is above 0.
    """
    if not factor > 0:
        raise ValueError(f"flow shift {factor}: must be above 0; 1 leaves the grid even")
    return factor * t / (1 + (factor - 1) * t)


def shift_of_length(tokens: float, *, highest: float = math.inf) -> float:
    """The shift for a sequence of so many tokens: its logarithm is 0.5 at 256 and 1.15 at 4096, on a line.

    highest: shift beyond which it does not grow. Source: the published samplers of several models.
    """
    few, many = 256, 4096
    return min(math.exp(0.5 + (tokens - few) / (many - few) * (1.15 - 0.5)), highest)


def linear(steps: int, factor: float, *, top: float = 1.0) -> Schedule:
    """Even grid top -> 0, shifted; the model is told the exact noise level."""
    sigmas = _grid(steps, factor, top)
    return Schedule(sigmas, sigmas[:-1].clone())


def whole_thousandths(steps: int, factor: float, *, top: float = 1.0) -> Schedule:
    """Even grid top -> 0, shifted; the model is told floor(1000 sigma) / 1000."""
    sigmas = _grid(steps, factor, top)
    return Schedule(sigmas, (sigmas[:-1] * 1000).floor() / 1000)


def _grid(steps: int, factor: float, top: float) -> Tensor:
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    even = top - torch.arange(steps, dtype=torch.float64) * (top / steps)
    return torch.cat([shift(even, factor), torch.zeros(1, dtype=torch.float64)])
