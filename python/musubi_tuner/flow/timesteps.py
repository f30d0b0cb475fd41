"""Distributions of the training time t as tables of pure functions: an inverse CDF `u -> t` and its CDF.

t in [0, 1], 1 = noise. A distribution is data; `mixture`, `squeeze`, `restrict` (exact truncation) and `on_grid` make
new ones from it, written once for all. Everything is float64, so that truncation to a far tail stays exact.

The logistic-normal is `logit t = loc + scale z`, z ~ N(0, 1) (Esser et al. 2024, section 3.1); a shift of s in time,
t -> s t / (1 + (s - 1) t), adds ln s to `loc`. With log-SNR l, t = sigmoid(-l / 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_EDGE = 2.0**-53
"""Draws are kept this far from 0 and 1, where inverse CDFs are infinite."""


@dataclass(frozen=True)
class Distribution:
    """quantile: u in [0, 1] -> t, non-decreasing, float64. cdf: t in [0, 1] -> P(T <= t)."""

    quantile: Callable[[Tensor], Tensor]
    cdf: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TimestepShape:
    """The numbers that the named distributions read; a distribution ignores those that are not its own."""

    sigmoid_scale: float = 1.0
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    density: str = "none"
    """Density of `sigma`: `logit_normal`, `mode`, anything else uniform."""


def distribution(
    name: str,
    latent_shape: Sequence[int],
    shape: TimestepShape,
    *,
    low: float = 0.0,
    high: float = 1.0,
    truncate: bool = False,
) -> Distribution:
    """The named distribution for latents `[C, F, H, W]`, brought into [low, high].

    truncate: cut the distribution to the range; otherwise t is squeezed into it linearly.
    Raises ValueError for an unknown name, an empty range or a range without mass.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"timestep_sampling = {name!r}: use one of {', '.join(DISTRIBUTIONS)}")
    tokens = (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
    found = DISTRIBUTIONS[name](shape, tokens)
    if (low, high) != (0.0, 1.0):
        found = (restrict if truncate else squeeze)(found, low, high)
    return on_grid(found, GRID) if name == "sigma" else found


def uniform() -> Distribution:
    """t = u."""
    return Distribution(_inside, lambda t: _f64(t).clamp(0, 1))


def logistic_normal(loc: float, scale: float) -> Distribution:
    """logit t = loc + scale z. Raises ValueError unless scale > 0."""
    if not scale > 0:
        raise ValueError(f"logistic-normal of scale {scale:g}: the scale must be above 0")
    return Distribution(
        lambda u: torch.sigmoid(loc + scale * torch.special.ndtri(_inside(u))),
        lambda t: torch.special.ndtr((torch.logit(_f64(t)) - loc) / scale),
    )


def mode(scale: float) -> Distribution:
    """t = u + s (cos^2(pi u / 2) - 1 + u), heavy in the middle (Esser et al. 2024, section 3.1).

    Raises ValueError where this is not a distribution: s outside [-1, 2 / (pi - 2)].
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"mode_scale = {scale:g}: use -1 to {2 / (math.pi - 2):.3f}, beyond it t would run backwards")

    def quantile(u: Tensor) -> Tensor:
        u = _inside(u)
        return u + scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    return Distribution(quantile, lambda t: _bisect(quantile, _f64(t)))


def mixture(parts: Sequence[tuple[float, Distribution]]) -> Distribution:
    """Draw from part i with probability `weight_i`; the weights add up to 1."""
    total = sum(weight for weight, _ in parts)
    if not math.isclose(total, 1.0, abs_tol=1e-9) or any(weight < 0 for weight, _ in parts):
        raise ValueError(f"mixture weights {[weight for weight, _ in parts]}: they must be positive and add up to 1")

    def cdf(t: Tensor) -> Tensor:
        return torch.stack([weight * part.cdf(t) for weight, part in parts]).sum(0)

    return Distribution(lambda u: _bisect(cdf, _inside(u)), cdf)


def squeeze(of: Distribution, low: float, high: float) -> Distribution:
    """low + (high - low) t."""
    _check_range(low, high)
    return Distribution(
        lambda u: low + (high - low) * of.quantile(u),
        lambda t: of.cdf(((_f64(t) - low) / (high - low)).clamp(0, 1)),
    )


def restrict(of: Distribution, low: float, high: float) -> Distribution:
    """`of` given that t is in [low, high]: the exact truncation, without rejection."""
    _check_range(low, high)
    below, above = (float(of.cdf(torch.tensor(end, dtype=torch.float64))) for end in (low, high))
    mass = above - below
    if mass < 1e-9:
        raise ValueError(
            f"the distribution of t has a mass of {mass:.1e} in [{low:g}, {high:g}]: widen the range, "
            "or squeeze instead of truncating"
        )
    return Distribution(
        lambda u: of.quantile(below + mass * _inside(u)).clamp(low, high),
        lambda t: ((of.cdf(_f64(t)) - below) / mass).clamp(0, 1),
    )


def one_side(of: Distribution, u: Tensor, boundary: float) -> Tensor:
    """u: [B] -> t [B], all of them where the first is: below `boundary`, or from it on.

    The first is drawn from `of`, the others from its truncation to that side, so that no draw is made again. For two
    models that share the noise levels.
    """
    first = of.quantile(u[:1])
    if len(u) == 1:
        return first
    high = bool(first[0] >= boundary)
    side = restrict(of, boundary, 1.0) if high else restrict(of, 0.0, math.nextafter(boundary, 0.0))
    return torch.cat([first, side.quantile(u[1:])])


def on_grid(of: Distribution, cells: int) -> Distribution:
    """t rounded up to a multiple of 1 / cells."""
    return Distribution(
        lambda u: torch.ceil((of.quantile(u) * cells).clamp(min=1e-6) - 1e-9) / cells,
        lambda t: of.cdf(torch.floor(_f64(t) * cells + 1e-9) / cells),
    )


def flow_shift_of(tokens: int, small: tuple[int, float], large: tuple[int, float]) -> float:
    """The log-shift mu, linear in the number of packed tokens through two (tokens, mu) points, not clamped."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return small[1] + slope * (tokens - small[0])


def _sigma(shape: TimestepShape, _tokens: int) -> Distribution:
    if shape.density == "logit_normal":
        return logistic_normal(-shape.logit_mean, shape.logit_std)
    return mode(shape.mode_scale) if shape.density == "mode" else uniform()


def _shifted(mu: Callable[[TimestepShape, int], float]) -> Callable[[TimestepShape, int], Distribution]:
    return lambda shape, tokens: logistic_normal(mu(shape, tokens), shape.sigmoid_scale)


def _log_snr(shape: TimestepShape, _tokens: int) -> Distribution:
    return logistic_normal(-shape.logit_mean / 2, shape.logit_std / 2)


def _blend(mu: Callable[[TimestepShape, int], float]) -> Callable[[TimestepShape, int], Distribution]:
    """80 % shifted, 7.5 % log-SNR of the user, 12.5 % log-SNR N(5.36, 1)."""

    def build(shape: TimestepShape, tokens: int) -> Distribution:
        parts = ((0.8, _shifted(mu)(shape, tokens)), (0.075, _log_snr(shape, tokens)))
        return mixture((*parts, (0.125, logistic_normal(-5.36 / 2, 0.5))))

    return build


def _mu_user(shape: TimestepShape, _tokens: int) -> float:
    return math.log(shape.shift)


def _mu_4096(_shape: TimestepShape, tokens: int) -> float:
    return flow_shift_of(tokens, (256, 0.5), (4096, 1.15))


def _mu_8192(_shape: TimestepShape, tokens: int) -> float:
    return flow_shift_of(tokens, (256, 0.5), (8192, 0.9))


GRID = 1000
"""Cells of `sigma`: t = 1 - i / 1000 for i = 0 ... 999."""

DISTRIBUTIONS: Mapping[str, Callable[[TimestepShape, int], Distribution]] = {
    "sigma": _sigma,
    "uniform": lambda _shape, _tokens: uniform(),
    "sigmoid": _shifted(lambda _shape, _tokens: 0.0),
    "shift": _shifted(_mu_user),
    "flux_shift": _shifted(_mu_4096),
    "qwen_shift": _shifted(_mu_8192),
    "logsnr": _log_snr,
    "qinglong_flux": _blend(_mu_4096),
    "qinglong_qwen": _blend(_mu_8192),
}
"""By the names of `--timestep_sampling`."""

READS: Mapping[str, frozenset[str]] = {
    "sigma": frozenset({"weighting_scheme"}),
    "uniform": frozenset(),
    "sigmoid": frozenset({"sigmoid_scale"}),
    "shift": frozenset({"sigmoid_scale", "discrete_flow_shift"}),
    "flux_shift": frozenset({"sigmoid_scale"}),
    "qwen_shift": frozenset({"sigmoid_scale"}),
    "logsnr": frozenset({"logit_mean", "logit_std"}),
    "qinglong_flux": frozenset({"sigmoid_scale", "logit_mean", "logit_std"}),
    "qinglong_qwen": frozenset({"sigmoid_scale", "logit_mean", "logit_std"}),
}
"""Options that each distribution reads; any other that the user gives has no effect."""


def _f64(values: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _inside(u: Tensor) -> Tensor:
    return _f64(u).clamp(_EDGE, 1 - _EDGE)


def _check_range(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"range of t [{low:g}, {high:g}]: it must lie in [0, 1], the lower end below the upper one")


def _bisect(rising: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """x in [0, 1] with rising(x) = value, to the last bit or so of float64."""
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(60):
        middle = (low + high) / 2
        below = rising(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
