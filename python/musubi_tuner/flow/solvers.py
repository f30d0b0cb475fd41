"""Solvers of the flow's ODE dx/dt = v(x, t) from t = 1 (noise) to 0 (data); none knows a model.

A solver is `solve(velocity, x, schedule, on_step=None) -> x`. It calls `velocity(x, t)` exactly once per step and in
order, with `t` from `schedule.times`, so that a caller may count. The multistep ones work on the clean prediction
x0 = x - sigma v over the half log-SNR lambda = log((1 - sigma) / sigma), where the linear part of the ODE is solved
exactly; their coefficients are float64 scalars and the samples keep the dtype of `x`.

At sigma = 1 and 0 lambda is infinite: exp(-inf) = 0 and 1/inf = 0 turn the steps there into first-order ones, and a
node that lies infinitely far back is left out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from musubi_tuner.flow.schedules import Schedule, linear, whole_thousandths

Velocity = Callable[[Tensor, float], Tensor]
"""(x, t) -> v of the shape and dtype of x."""
OnStep = Callable[[int, Tensor], None]
"""(number of steps done, x) after every step."""


class Solve(Protocol):
    """A solver: walks `x` along the schedule to sigma = 0."""

    def __call__(self, velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep | None = None) -> Tensor: ...


class MakeSchedule(Protocol):
    """(steps, flow shift) -> the grid that a solver walks."""

    def __call__(self, steps: int, factor: float, /) -> Schedule: ...


def euler(velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep | None = None) -> Tensor:
    """x <- x + (sigma' - sigma) v: first order."""
    sigmas = schedule.sigmas.tolist()
    for i, t in enumerate(schedule.times.tolist()):
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, t)
        _tell(on_step, i + 1, x)
    return x


def dpm_solver_2m(velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, algorithm 2): second order, first order at the last step."""
    sigmas = schedule.sigmas.tolist()
    lambdas = [_half_log_snr(s) for s in sigmas]
    before: Tensor | None = None
    for i, t in enumerate(schedule.times.tolist()):
        clean = x - sigmas[i] * velocity(x, t)
        slope = clean
        h = lambdas[i + 1] - lambdas[i]
        if before is not None and i + 1 < len(schedule):
            ratio = (lambdas[i] - lambdas[i - 1]) / h
            slope = clean + (clean - before) / (2 * ratio)
        x = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * math.expm1(-h) * slope
        before = clean
        _tell(on_step, i + 1, x)
    return x


def unipc(
    velocity: Velocity,
    x: Tensor,
    schedule: Schedule,
    on_step: OnStep | None = None,
    *,
    order: int = 2,
    linear_base: bool = False,
    noise_clock: bool = False,
    lower_at_end: bool = True,
) -> Tensor:
    """UniPC, multistep (Zhao et al. 2023, algorithms 5 and 6), order lowered at the start.

    The velocity of a step serves twice: it corrects the step that led here, then predicts the next one.

    Args:
        order: of the predictor; the corrector adds one.
        linear_base: B(h) = h (the paper's B1) in place of e^h - 1 (B2).
        noise_clock: polynomials in -log sigma in place of the half log-SNR. Both solve a constant clean prediction
            exactly, and this one is finite at sigma = 1.
        lower_at_end: lower the order in the last steps too. The very last one has no corrector and ends, of the first
            order, at the last clean prediction in either case.
    """
    steps = _unipc_steps(schedule, linear_base, noise_clock)
    order = min(order, max(len(steps) - 1, 1))
    cleans: list[Tensor] = []
    start, used = x, 0
    for i, t in enumerate(schedule.times.tolist()):
        clean = x - steps[i].sigma * velocity(x, t)
        if i > 0:
            x = _unipc_step(start, steps[:i], cleans[-used:], clean)
        cleans = [*cleans, clean][-order:]
        used = min(order, i + 1, len(steps) - i if lower_at_end or i + 1 == len(steps) else order)
        start = x
        x = _unipc_step(start, steps[: i + 1], cleans[-used:])
        _tell(on_step, i + 1, x)
    return x


@dataclass(frozen=True)
class _Step:
    """One step of the grid: its noise level and its clock, its length h on the clock, B(-h), and the signal at its end.

    The signal is what the clock's logarithm is of, over the noise level: 1 - sigma, or 1.
    """

    sigma: float
    clock: float
    after: float
    h: float
    base: float
    signal: float


def _unipc_steps(schedule: Schedule, linear_base: bool, noise_clock: bool) -> list[_Step]:
    sigmas = schedule.sigmas.tolist()
    clocks = [_minus_log(s) if noise_clock else _half_log_snr(s) for s in sigmas]
    steps = []
    for i in range(len(schedule)):
        h, after = clocks[i + 1] - clocks[i], sigmas[i + 1]
        base = -h if linear_base else math.expm1(-h)
        steps.append(_Step(sigmas[i], clocks[i], after, h, base, 1.0 if noise_clock else 1 - after))
    return steps


def _unipc_step(x: Tensor, steps: list[_Step], cleans: list[Tensor], arrived: Tensor | None = None) -> Tensor:
    """`x` over the last of `steps`, from the clean predictions of its start and before (`cleans`, latest last).

    With `arrived`, the clean prediction at its end, this is the corrector; without, the predictor.
    """
    step, now = steps[-1], cleans[-1]
    past = zip(reversed(steps[:-1]), reversed(cleans[:-1]), strict=False)
    known = [((s.clock - step.clock) / step.h, clean) for s, clean in past]
    known = [(node, clean) for node, clean in known if math.isfinite(node)]
    if arrived is not None:
        known.append((1.0, arrived))
    x = step.after / step.sigma * x - step.signal * math.expm1(-step.h) * now
    weights = _unipc_weights([node for node, _ in known], step.h, step.base)
    for rho, (node, clean) in zip(weights, known, strict=True):
        x = x - step.signal * step.base * rho / node * (clean - now)
    return x


def _unipc_weights(nodes: list[float], h: float, base: float) -> list[float]:
    """rho with sum_k rho_k nodes_k^(m-1) = m! phi_(m+1)(-h) (-h) / B for m = 1..len(nodes).

    One node alone gets 1/2 whatever h is, as the paper recommends and published samplers do.
    """
    if len(nodes) < 2:
        return [0.5] * len(nodes)
    moments, phi = [], math.expm1(-h) / -h - 1
    for m in range(1, len(nodes) + 1):
        moments.append(math.factorial(m) * phi / base)
        phi = phi / -h - 1 / math.factorial(m + 1)
    points = torch.tensor(nodes, dtype=torch.float64)
    powers = torch.stack([points**m for m in range(len(nodes))])
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()


def _half_log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma), infinite at the ends."""
    if sigma <= 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf


def _minus_log(sigma: float) -> float:
    """-log(sigma), infinite at 0."""
    return -math.log(sigma) if sigma > 0 else math.inf


def _tell(on_step: OnStep | None, done: int, x: Tensor) -> None:
    if on_step is not None:
        on_step(done, x)


@dataclass(frozen=True)
class Solver:
    """A solver with the grid that belongs to it."""

    solve: Solve
    schedule: MakeSchedule
    about: str


SOLVERS: Mapping[str, Solver] = {
    "unipc": Solver(unipc, partial(whole_thousandths, top=0.999), "UniPC, second order with corrector"),
    "unipc3": Solver(
        partial(unipc, order=3, linear_base=True, noise_clock=True, lower_at_end=False),
        linear,
        "UniPC, third order in -log sigma",
    ),
    "dpm++": Solver(dpm_solver_2m, whole_thousandths, "DPM-Solver++(2M), second order"),
    "vanilla": Solver(euler, linear, "Euler, first order"),
}
"""By the established names of `--sample_solver`."""


def get(name: str) -> Solver:
    """The solver of that name. Raises ValueError naming all."""
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} is not known: use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
