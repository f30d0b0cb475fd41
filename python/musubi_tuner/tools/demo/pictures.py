"""What the demo shows: a grid of pictures with row and column titles, a strip of video frames, and the loss plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_SCALE = 2
_GAP = 6
_PAPER = (250, 250, 250)
_TEXT = (30, 30, 30)


def to_image(pixels: Tensor) -> Image.Image:
    """A picture `[3, H, W]` in [-1, 1] as 8-bit RGB."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


def from_image(path: Path) -> Tensor:
    """The pixels `[3, H, W]` in [-1, 1] of an image file."""
    with Image.open(path) as image:
        levels = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class Row:
    """A line of the grid: its title above, its pictures `[3, H, W]` side by side, a caption under each (or none)."""

    title: str
    pictures: Sequence[Tensor]
    captions: Sequence[str] = ()


def draw_grid(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of the rows, each picture at twice its size."""
    font = ImageFont.load_default(13)
    cell = rows[0].pictures[0].shape[-1] * _SCALE
    columns = max(len(row.pictures) for row in rows)
    heights = [20 + cell + (18 if row.captions else 0) + _GAP for row in rows]
    sheet = Image.new("RGB", (_GAP + columns * (cell + _GAP), _GAP + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        draw.text((_GAP, top), row.title, fill=_TEXT, font=font)
        for column, picture in enumerate(row.pictures):
            left = _GAP + column * (cell + _GAP)
            sheet.paste(to_image(picture).resize((cell, cell), Image.Resampling.LANCZOS), (left, top + 20))
            if row.captions:
                draw.text((left, top + 20 + cell + 1), row.captions[column], fill=_TEXT, font=font)
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def plot_losses(losses: Sequence[float], path: Path, *, window: int = 15) -> None:
    """Write a PNG of the loss of each step and of its running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="#b9c4d0", linewidth=0.9, label="each step")
    if len(losses) >= window:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color="#c0392b", linewidth=1.8, label=f"mean of {window}")
    axes.set_xlabel("step")
    axes.set_ylabel("flow-matching loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
