"""The demo's measure, as functions of tensors: held-out flow loss, color profile along the strokes, and the gates.

The loss compares the LoRA, told the true caption, with the base told nothing: the base never met the word "rainbow",
so its loss with that caption is inflated and would flatter the LoRA. Noise and t are drawn by key, the same for every
model. The profile is the mean color of stroke pixels by row band, against that of the true gradient; it sees color
only, not the digit's shape. `Verdict` sets both beside their gates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.flow import keyed, path
from musubi_tuner.tools.demo import judge, world

BANDS = 12
LOSS_GATE = 0.60
DISTANCE_GATE = 0.75

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x_t [B, C, F, H, W], t [B], indices [B]) -> velocity`; the indices name the samples whose captions are meant."""


@torch.no_grad()
def flow_loss(latents: Tensor, predict: Predict, *, seed: int, draws: int = 4, size: int = 32) -> float:
    """Mean of (v - (e - x0))^2 over latents `[N, C, F, H, W]`, at `draws` stratified t each, keyed noise."""
    total, seen = 0.0, 0
    count = len(latents)
    for draw in range(draws):
        for start in range(0, count, size):
            indices = torch.arange(start, min(start + size, count))
            x0 = latents[indices]
            noise = torch.stack([keyed.normal(x0.shape[1:], seed, draw, int(i), "judge noise") for i in indices])
            place = torch.cat([keyed.uniform((1,), seed, draw, int(i), "judge t") for i in indices])
            t = ((draw + place) / draws).clamp(1e-3, 1.0)
            v = predict(path.interpolate(x0, noise, t), t, indices)
            total += (v - path.velocity(x0, noise)).float().square().flatten(1).mean(1).sum().item()
            seen += len(indices)
    return total / seen


def color_profile(pixels: Tensor) -> Tensor:
    """Mean stroke color by band of rows: `[N, 3, 64, 64]` in [-1, 1] to `[N, BANDS, 3]` in [0, 1], NaN where empty."""
    ink = (judge.strokes(pixels) > 0.6).float()
    margin = (world.SIZE - world.DIGIT) // 2
    rows = slice(margin, world.SIZE - margin)
    count = len(pixels)
    masks = ink[:, rows].reshape(count, 1, BANDS, -1)
    colors = ((pixels[:, :, rows] + 1) / 2).reshape(count, 3, BANDS, -1)
    area = masks.sum(-1)
    mean = (colors * masks).sum(-1) / area
    return torch.where(area >= 4, mean, torch.nan).transpose(1, 2)


def rainbow_distance(pixels: Tensor) -> Tensor:
    """How far the strokes' colors are from the rainbow's, `[N]`: mean RGB distance over bands that hold a stroke.

    0 for the true gradient; a plain color is some 0.7 away; a picture without strokes counts as infinitely far.
    """
    margin = (world.SIZE - world.DIGIT) // 2
    true = world.rainbow()[:, margin:-margin].reshape(3, BANDS, -1).mean(-1).T  # [BANDS, 3]
    far = (color_profile(pixels) - true).square().sum(-1).sqrt()
    return torch.nan_to_num(torch.nanmean(far, dim=1), nan=torch.inf)


@dataclass(frozen=True)
class Gate:
    """One number of the measure: the LoRA's value, the base's, and the largest share of it that passes."""

    name: str
    base: float
    lora: float
    limit: float

    @property
    def share(self) -> float:
        return self.lora / self.base

    @property
    def passed(self) -> bool:
        return self.share <= self.limit  # a NaN does not pass

    def sentence(self) -> str:
        word = "passed" if self.passed else "FAILED"
        return (
            f"{self.name}: base {self.base:.3f}, LoRA {self.lora:.3f}; {self.share:.2f} of the base's "
            f"(gate {self.limit:.2f}, margin {self.limit - self.share:+.2f}): {word}"
        )


@dataclass(frozen=True)
class Verdict:
    """The gates, over all samples and for each sampling seed, and what is only reported."""

    gates: tuple[Gate, ...]
    reported: tuple[tuple[str, float, float], ...] = ()
    """Name, the base's value, the LoRA's."""
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    def lines(self) -> list[str]:
        beside = [f"{name}: base {base:.3f}, LoRA {lora:.3f} (no gate)" for name, base, lora in self.reported]
        return [gate.sentence() for gate in self.gates] + beside + list(self.notes)


def distance_gates(base: Sequence[Tensor], lora: Sequence[Tensor]) -> tuple[Gate, ...]:
    """The color gate for each sampling seed's pictures `[N, 3, 64, 64]`, without and with the LoRA."""
    gates = []
    for number, (without, taught) in enumerate(zip(base, lora, strict=True)):
        values = [rainbow_distance(pictures).mean().item() for pictures in (without, taught)]
        gates.append(Gate(f"distance to the rainbow, seed {number + 1}", *values, DISTANCE_GATE))
    return tuple(gates)
