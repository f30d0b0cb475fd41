"""MagCache: steps whose blocks would change little are not computed; the last computed change is used again.

    skipped output = input + last computed (output - input) of the whole stack

How much the change grows from step to step, the ratio m_i of its mean norms, is nearly the same for every prompt of a
model. While steps are skipped the product r of the ratios drifts from 1; the error e is the sum of |1 - r|. A step is
skipped while e stays below a threshold and no more than k follow one another; else it is computed and r, e begin anew.
The first steps (a share of all, one at least) and the last are always computed. Embedding and head always run. Where a
second transformer takes over on the way, its first steps are computed likewise, and r, e begin anew there.

A cache is a way of running the blocks (`nn.runner.Run`) of one branch in one run of denoising: it counts its calls.
Source: Ma et al. 2025 (MagCache).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.families.base import MagRatios
from musubi_tuner.nn.runner import Run, direct

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepCacheOptions:
    """Step cache (MagCache)"""

    magcache_mag_ratios: str | None = option(
        None,
        help="skip steps by these ratios, one a step with commas between them; other numbers of steps take the nearest "
        "ones; 0: the model's own",
    )
    magcache_retention_ratio: float = option(
        0.2, help="share of the steps at the start that are always computed", minimum=0, maximum=1
    )
    magcache_threshold: float = option(0.24, help="a step is skipped while the error stays below this", minimum=0)
    magcache_k: int = option(6, help="most steps that are skipped one after the other", minimum=0)
    magcache_calibration: bool = option(False, help="compute every step, and print the ratios")


@dataclass(frozen=True)
class MagCache:
    """The settings of a cache. ratios: of the steps that it was calibrated with, the first of them 1.

    without: those of further branches, where they differ. high_computed: no step before a switch is skipped.
    """

    ratios: tuple[float, ...]
    retention: float = 0.2
    threshold: float = 0.24
    most: int = 6
    without: tuple[float, ...] | None = None
    high_computed: bool = False

    def run(self, steps: int, inner: Run = direct, *, branch: int = 0, switch: int = 0) -> Run:
        """A fresh cache for a branch of a run of `steps` steps, `switch` of them by another transformer before."""
        ratios = self.without if branch and self.without is not None else self.ratios
        return _Skipping(self, interpolated(ratios, steps), inner, switch)


def interpolated(ratios: Sequence[float], steps: int) -> list[float]:
    """The ratios of `steps` steps: those nearest in the run; of a single step the last."""
    if len(ratios) == steps:
        return list(ratios)
    if steps == 1:
        return [ratios[-1]]
    return [ratios[round(i * (len(ratios) - 1) / (steps - 1))] for i in range(steps)]


@dataclass
class Decisions:
    """Which steps are skipped; `skip()` is asked once a step."""

    settings: MagCache
    ratios: Sequence[float]
    switch: int = 0
    step: int = 0
    ratio: float = 1.0
    error: float = 0.0
    skipped: int = 0

    def skip(self) -> bool:
        i, steps = self.step, len(self.ratios)
        self.step += 1
        begin, length = (self.switch, steps - self.switch) if i >= self.switch else (0, self.switch)
        if i < begin + max(int(self.settings.retention * length), 1) or i >= steps - 1:
            self.ratio, self.error, self.skipped = 1.0, 0.0, 0
            return False
        if i < self.switch and self.settings.high_computed:
            return False
        self.ratio *= self.ratios[i]
        self.error += abs(1 - self.ratio)
        self.skipped += 1
        if self.error < self.settings.threshold and self.skipped <= self.settings.most:
            return True
        self.ratio, self.error, self.skipped = 1.0, 0.0, 0
        return False


class _Skipping:
    """A `Run` that decides at each call."""

    def __init__(self, settings: MagCache, ratios: Sequence[float], inner: Run, switch: int) -> None:
        self.decisions, self.inner = Decisions(settings, ratios, switch), inner
        self.change: Any = None

    def __call__(self, blocks: Sequence[nn.Module], h: Any, ctx: Any) -> Any:
        if self.decisions.skip():
            return _each(lambda a, b: a + b, h, self.change)
        out = self.inner(blocks, h, ctx)
        self.change = _each(lambda a, b: a - b, out, h)
        return out


def _each(combine: Any, a: Any, b: Any) -> Any:
    """`combine` of two tensors, or of two tuples of them one by one."""
    if isinstance(a, Tensor):
        return combine(a, b)
    return tuple(combine(x, y) for x, y in zip(a, b, strict=True))


Row = tuple[float, float, float]
"""Mean and deviation of the ratio, and mean distance of directions (1 - cosine), over all tokens."""


@dataclass
class Calibration:
    """Measures the ratios of every branch while all steps are computed."""

    found: list[list[Row]] = field(default_factory=list)
    """Of each branch, and each step but the first."""

    def run(self, _steps: int, inner: Run = direct, *, branch: int = 0, switch: int = 0) -> Run:  # noqa: ARG002
        """A way of running the blocks that adds a branch."""
        rows: list[Row] = []
        self.found.append(rows)
        return _Measuring(rows, inner)

    def tell(self, script: str = "") -> None:
        """Log the ratios of each branch, as they are given back with --magcache_mag_ratios.

        script: whose logger's name scripts around it look for.
        """
        told = logging.getLogger(f"musubi_tuner.{script}") if script else log
        for number, rows in enumerate(self.found):
            means = ",".join(f"{value:.5f}" for value in (1.0, *(round(row[0], 5) for row in rows)))
            which = f" (run {number + 1} of {len(self.found)})" if len(self.found) > 1 else ""
            told.info("Copy and paste following values to --magcache_mag_ratios argument to use them:%s", which)
            told.info("%s", means)


class _Measuring:
    """A `Run` that compares the change which the blocks make with that of the call before, in float32."""

    def __init__(self, rows: list[Row], inner: Run) -> None:
        self.rows, self.inner = rows, inner
        self.before: Tensor | None = None

    def __call__(self, blocks: Sequence[nn.Module], h: Any, ctx: Any) -> Any:
        out = self.inner(blocks, h, ctx)
        after, start = (out, h) if isinstance(out, Tensor) else (out[0], h[0])
        change = after.float() - start.float()
        if self.before is not None:
            self.rows.append(compared(change, self.before))
        self.before = change
        return out


def compared(change: Tensor, before: Tensor) -> Row:
    """Mean and standard deviation of the ratio of norms, and mean of 1 - cosine, over the tokens of `[B, L, D]`."""
    ratio = change.norm(dim=-1) / before.norm(dim=-1)
    distance = 1 - F.cosine_similarity(change, before, dim=-1, eps=1e-8)
    spread = ratio.std().item() if ratio.numel() > 1 else 0.0
    return ratio.mean().item(), spread, distance.mean().item()


StepCache = MagCache | Calibration


def step_cache(chosen: StepCacheOptions, own: tuple[float, ...] | MagRatios | None) -> StepCache | None:
    """What the options ask for; `own` are the model's ratios. Raises UserError."""
    text = chosen.magcache_mag_ratios
    if chosen.magcache_calibration:
        if text is not None:
            raise UserError("--magcache_calibration computes every step: leave --magcache_mag_ratios out")
        return Calibration()
    if text is None:
        return None
    ratios = _parsed(text)
    if ratios == (0.0,):
        if own is None:
            raise UserError(
                "--magcache_mag_ratios 0: no ratios of this model are known; measure them with "
                "--magcache_calibration and give them here"
            )
        known = own if isinstance(own, MagRatios) else MagRatios(own)
    else:
        known = MagRatios(ratios)
    settings = chosen.magcache_retention_ratio, chosen.magcache_threshold, chosen.magcache_k
    return MagCache(known.ratios, *settings, without=known.without, high_computed=known.high_computed)


def _parsed(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as fault:
        raise UserError(f"--magcache_mag_ratios {text}: numbers with commas between them, or 0") from fault
