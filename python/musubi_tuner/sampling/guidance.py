"""Guidance: from a model's branches (with the prompt, without it) to the one velocity that a solver asks for.

    v = v_u + s (v_c - v_u)                      classifier-free guidance (Ho & Salimans 2022)
    v <- (1 - r) v + r v std(v_c) / std(v)       rescaled by r, against too strong contrasts (Lin et al. 2023, 3.4)

A branch is a `Velocity`: the model with its conditioning and its own way of running the blocks, so a step cache lives
in one branch and never sees another. A combination of branches is a `Velocity` again, that counts its calls: solvers
make one a step. Guidance may differ from step to step and be left out in some; a branch with blocks left out may stand
in for the one without the prompt, or lead the result away from itself (skip-layer guidance):

    v = v_u + s (v_c - v_u) + s' (v_c - v_skipped)
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.guidance_steps import GuidanceSteps
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


@dataclass(frozen=True)
class Guide:
    """Guidance of a run. scales: one a step; 1: the branch with the prompt alone.

    layers: blocks that are left out in the steps `skipping`, in the branch without the prompt where `in_uncond`, else
    in a third one that the result is led away from with `away`. every: both branches are called in every step.
    rescale: r above.
    """

    scales: tuple[float, ...]
    layers: tuple[int, ...] = ()
    skipping: range = range(0)
    in_uncond: bool = False
    away: float = 0.0
    every: bool = False
    rescale: float = 0.0

    @property
    def guided(self) -> bool:
        """Whether any step needs the branch without the prompt."""
        return any(scale != 1.0 for scale in self.scales)


def guide_of(chosen: GuidanceSteps, scales: Sequence[float], *, every: bool = False, rescale: float = 0.0) -> Guide:
    """The guide of a run whose guidance would be `scales`, one a step."""
    steps = len(scales)
    on = applied(chosen.mode, chosen.ratio, steps)
    return Guide(
        tuple(scale if guided else 1.0 for scale, guided in zip(scales, on, strict=True)),
        layers=chosen.layers,
        skipping=range(int(chosen.start * steps), int(chosen.end * steps)) if chosen.layers else range(0),
        in_uncond=chosen.layer_mode == "uncond",
        away=chosen.scale,
        every=every,
        rescale=rescale,
    )


def applied(mode: str, ratio: float, steps: int) -> list[bool]:
    """Which steps are guided, a share `ratio` of them; see `config.guidance_steps`."""
    guided = int(steps * ratio)
    left = steps - guided
    if mode == "alternate":
        found, share = [], 0.0
        for _ in range(steps):
            share += ratio
            found.append(share >= 1.0)
            share -= found[-1]
        return found
    ranges = {
        "early": range(left, steps),
        "late": range(guided),
        "early_late": range(left // 2, left // 2 + guided),
        "middle": [i for i in range(steps) if not (steps - left) // 2 <= i < (steps - left) // 2 + left],
    }
    return [i in ranges.get(mode, range(steps)) for i in range(steps)]


def without_blocks(layers: Sequence[int], inner: Run = direct) -> Run:
    """`inner`, with the blocks of these numbers left out."""

    def run(blocks: Sequence[nn.Module], h: Any, ctx: Any) -> Any:
        return inner([block for i, block in enumerate(blocks) if i not in layers], h, ctx)

    return run


def classifier_free(
    conditional: Velocity, unconditional: Velocity, guide: Guide, skipped: Velocity | None = None
) -> Velocity:
    """The guided velocity; the conditional branch is called first. skipped: the branch with blocks left out, without
    the prompt where the guide says so."""
    steps = count()

    def velocity(x: Tensor, t: float) -> Tensor:
        i = next(steps)
        scale, v = guide.scales[i], conditional(x, t)
        if scale == 1.0 and not guide.every:
            return v
        leaves_out = skipped is not None and i in guide.skipping
        without = (skipped if leaves_out and guide.in_uncond and skipped else unconditional)(x, t)
        result = _guided(v, without, scale, guide.rescale)
        if leaves_out and not guide.in_uncond and skipped:
            result = result + guide.away * (v - skipped(x, t))
        return result

    return velocity


def classifier_free_joint(both: Velocity, guide: Guide) -> Velocity:
    """The same by one call of twice the batch: `both` holds the conditional samples first, then the others."""
    steps = count()

    def velocity(x: Tensor, t: float) -> Tensor:
        v, without = both(torch.cat([x, x]), t).chunk(2)
        return _guided(v, without, guide.scales[next(steps)], guide.rescale)

    return velocity


def _guided(v: Tensor, without: Tensor, scale: float, rescale: float) -> Tensor:
    guided = without + scale * (v - without)
    if not rescale:
        return guided
    dims = tuple(range(1, v.ndim))
    spread = v.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
    return guided * (1 - rescale + rescale * spread)


def on_device(value: Any, device: torch.device) -> Any:
    """Every tensor in a conditioning (nested mappings, lists, tuples) on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_device(part, device) for part in value)
    return value
