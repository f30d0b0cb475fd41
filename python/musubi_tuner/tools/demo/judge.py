"""A small classifier that reads digits off pictures, whatever their colors: the demo's measure of likeness.

It sees strokes only: the distance from the dark ground, scaled to 1 at the brightest pixel, at 32 x 32. Trained on the
scans of pre-training, turned and shifted; the held-out tenth tells its own accuracy, which bounds what it can certify.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.flow import keyed
from musubi_tuner.tools.demo import world

_GRID = 32


def strokes(pixels: Tensor) -> Tensor:
    """Masks `[N, H, W]` in [0, 1] of pictures `[N, 3, H, W]` in [-1, 1]: how far a pixel is from the ground."""
    ground = torch.tensor(world.GROUND).reshape(3, 1, 1)
    distance = ((pixels + 1) / 2 - ground).abs().amax(dim=1)
    return (distance / distance.flatten(1).amax(1).clamp_min(0.2)[:, None, None]).clamp(0, 1)


class Judge(nn.Module):
    """Three convolutions and a linear map; 14,810 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 12, 3, padding=1)
        self.two = nn.Conv2d(12, 24, 3, padding=1)
        self.three = nn.Conv2d(24, 32, 3, padding=1)
        self.out = nn.Linear(32 * 4 * 4, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores `[N, 10]` of pictures `[N, 3, H, W]` in [-1, 1]."""
        return self.scores(strokes(pixels))

    def scores(self, masks: Tensor) -> Tensor:
        """Scores `[N, 10]` of stroke masks `[N, H, W]` in [0, 1]."""
        h = F.interpolate(masks[:, None], size=(_GRID, _GRID), mode="area")
        for layer in (self.one, self.two, self.three):
            h = F.max_pool2d(F.relu(layer(h)), 2)
        return self.out(h.flatten(1))


def train_judge(seed: int, steps: int = 900, size: int = 64) -> Judge:
    """A judge trained for `steps` batches of turned, scaled and shifted scans."""
    glyphs = world.load_glyphs(held_out=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        generator = keyed.generator(seed, "judge", step)
        picks = torch.randint(len(glyphs), (size,), generator=generator)
        masks = world.jitter(glyphs.masks[picks], generator)
        loss = F.cross_entropy(judge.scores(masks), glyphs.digits[picks], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, pixels: Tensor, digits: Tensor) -> float:
    """Share of pictures `[N, 3, H, W]` that the judge reads as `digits: [N]`."""
    return (judge(pixels).argmax(1) == digits).float().mean().item()


def load_judge(path: Path) -> Judge:
    """The shipped judge."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()
