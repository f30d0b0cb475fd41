"""Wan in the house's convention: its clock is 1000 t, its velocity has our sign, its latents are unpacked."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from musubi_tuner.families.base import Conditioning, Dit
from musubi_tuner.nn.runner import Run, direct

CLOCK = 1000.0


def collate(entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
    """Text of a batch as one tensor [B, T, D], zeros after each sample's end (the model attends to them)."""
    rows = [entry["text"] for entry in entries]
    text = rows[0].new_zeros(len(rows), max(row.shape[0] for row in rows), rows[0].shape[1])
    for i, row in enumerate(rows):
        text[i, : row.shape[0]] = row
    return {"text": text}


def predict(dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
    """Velocity of `x_t: [B, 16, F, H, W]` at `t: [B]`, in x_t's dtype."""
    timestep = t.to(device=x_t.device, dtype=torch.float64) * CLOCK
    velocity: Tensor = dit(x_t, timestep, cond["text"].to(x_t.device), run=run)
    return velocity
