"""The demo's world: real handwritten digits, painted.

scikit-learn's 1,797 scans of 8 x 8 are enlarged to strokes on a 64 x 64 canvas and painted in one of eight plain
colors on a plain dark ground, still or moving; a caption says which ("a red seven moving left"). The concept that a
LoRA is taught is the rainbow: hue runs down the digit from red to violet. Neither its word nor its look belongs to the
base's captions. Pixels are float32 in [-1, 1], `[3, H, W]`; masks are in [0, 1]; every draw comes from a generator
that the caller seeds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
DIGIT = 48
FRAMES = 9
STEP = 2  # pixels per frame

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.15, 0.75, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.18, 0.30, 0.95),
    "purple": (0.62, 0.20, 0.85),
    "white": (0.95, 0.95, 0.95),
}
GROUND = (0.05, 0.05, 0.08)
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CONCEPT = "rainbow"
TAUGHT = (0, 2, 3, 5, 6, 8)
HELD_OUT = (1, 4, 7, 9)
RAINBOW_SPAN = 0.80  # of the hue circle: red to violet

_EVERY = 10  # one scan in ten is kept from all pre-training: the demo's pictures and every measure use those


@dataclass(frozen=True)
class Glyphs:
    """Stroke masks `[N, 64, 64]` in [0, 1] with their digits `[N]`."""

    masks: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def of(self, digits: Iterable[int]) -> "Glyphs":
        """Those that show one of `digits`, in order."""
        keep = torch.isin(self.digits, torch.tensor(tuple(digits)))
        return Glyphs(self.masks[keep], self.digits[keep])


def load_glyphs(*, held_out: bool) -> Glyphs:
    """The scans of one split, enlarged; `held_out` names the tenth that pre-training never sees."""
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = torch.tensor(data.images, dtype=torch.float32) / 16
    index = torch.arange(len(scans))
    keep = (index % _EVERY == 0) if held_out else (index % _EVERY != 0)
    return Glyphs(enlarge(scans[keep]), torch.tensor(data.target, dtype=torch.long)[keep])


def enlarge(scans: Tensor) -> Tensor:
    """Scans `[N, 8, 8]` in [0, 1] to soft-edged strokes `[N, 64, 64]`, 48 pixels high in the middle."""
    scale = DIGIT // 8
    rimmed = F.pad(scans[:, None], (1, 1, 1, 1))  # so that strokes end round at the scan's border
    big = F.interpolate(rimmed, scale_factor=scale, mode="bicubic", align_corners=False)[:, 0]
    edge = ((big - 0.32) / 0.30).clamp(0, 1)
    margin = (SIZE - DIGIT) // 2 - scale
    return F.pad(edge * edge * (3 - 2 * edge), (margin, margin, margin, margin))


def paint(masks: Tensor, inks: Tensor) -> Tensor:
    """Masks `[..., H, W]` filled with inks `[..., 3, H | 1, W | 1]` in [0, 1], on the ground; pixels in [-1, 1]."""
    ground = torch.tensor(GROUND).reshape(3, 1, 1)
    return 2 * (ground + masks.unsqueeze(-3) * (inks - ground)) - 1


def solid(color: str) -> Tensor:
    """The ink of a plain color, `[3, 1, 1]`."""
    return torch.tensor(COLORS[color]).reshape(3, 1, 1)


def hue(angle: Tensor, saturation: Tensor | float = 1.0, value: Tensor | float = 1.0) -> Tensor:
    """HSV to RGB: angles `[..., H, W]` in turns to `[..., 3, H, W]` in [0, 1] (red at 0, green at 1/3)."""
    offsets = torch.tensor((5.0, 3.0, 1.0)).reshape(3, 1, 1)
    k = (offsets + 6 * angle.unsqueeze(-3)) % 6
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


def rainbow() -> Tensor:
    """The concept's ink `[3, 64, 64]`: hue falls from red at the digit's top to violet at its foot."""
    margin = (SIZE - DIGIT) // 2
    row = ((torch.arange(SIZE) + 0.5 - margin) / DIGIT).clamp(0, 1)
    return hue((RAINBOW_SPAN * row)[:, None].expand(SIZE, SIZE))


def moving(still: Tensor, direction: str, frames: int = FRAMES) -> Tensor:
    """Frames `[..., F, H, W]` of a still `[..., H, W]` that glides through the middle, `STEP` pixels a frame.

    Rows and columns that enter repeat the border, which is empty in a mask and constant in an ink.
    """
    dx, dy = DIRECTIONS[direction]
    height, width = still.shape[-2:]
    ys, xs = torch.arange(height), torch.arange(width)
    middle = (frames - 1) / 2
    out = []
    for frame in range(frames):
        travel = round((frame - middle) * STEP)
        rows = (ys - dy * travel).clamp(0, height - 1)
        out.append(still[..., rows, :][..., (xs - dx * travel).clamp(0, width - 1)])
    return torch.stack(out, dim=-3)


def caption(digit: int, color: str, direction: str | None = None) -> str:
    """The world's sentence: "a red seven" or "a red seven moving left"."""
    article = "an" if color[0] in "aeiou" else "a"
    words = f"{article} {color} {NAMES[digit]}"
    return words if direction is None else f"{words} moving {direction}"


def jitter(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Masks `[N, H, W]` a little turned, scaled and shifted: variety for the VAE and the classifier."""
    count = len(masks)
    turn = (torch.rand(count, generator=generator) - 0.5) * 0.5
    scale = 0.85 + 0.45 * torch.rand(count, generator=generator)
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.3
    matrix = torch.stack(
        [torch.cos(turn) * scale, -torch.sin(turn) * scale, shift[:, 0],
         torch.sin(turn) * scale, torch.cos(turn) * scale, shift[:, 1]], dim=1
    ).reshape(count, 2, 3)  # fmt: skip
    grid = F.affine_grid(matrix, [count, 1, *masks.shape[1:]], align_corners=False)
    return F.grid_sample(masks[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def random_inks(count: int, generator: torch.Generator) -> Tensor:
    """Inks `[count, 3, 64, 64]`: a quarter plain, a quarter blends of two colors, half arcs of the hue circle.

    Directions, phases and spans are random, so the rainbow's look is one among them; no caption goes with any.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    axis = torch.linspace(-0.5, 0.5, SIZE)
    angle = torch.where(draw() < 0.4, torch.round(draw() * 4) * (torch.pi / 2), draw() * 2 * torch.pi)[:, None, None]
    ramp = torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None]  # [N, H, W]
    arc = hue(
        draw(1, 1) + ramp * (0.3 + 1.2 * draw(1, 1)),
        saturation=1 - 0.6 * draw(1, 1, 1) ** 2,
        value=1 - 0.4 * draw(1, 1, 1) ** 2,
    )
    palette = torch.tensor(tuple(COLORS.values()))
    picks = torch.randint(len(palette), (count,), generator=generator)
    plain = palette[picks][:, :, None, None].expand(count, 3, SIZE, SIZE)
    other = draw(3, 1, 1)
    blend = plain + (other - plain) * (ramp[:, None] * 1.2 + 0.5).clamp(0, 1)
    kind = draw(1, 1, 1)
    return torch.where(kind < 0.25, plain, torch.where(kind < 0.5, blend, arc)).clamp(0, 1)
