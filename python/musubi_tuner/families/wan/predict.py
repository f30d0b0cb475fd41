"""Wan in the house's convention: its clock is 1000 t, its velocity has our sign, its latents are unpacked.

What a model is conditioned on, beside text, joins its input as channels after the noisy latents: of image-to-video 4
channels that mark the given frames and 16 of latents; of control models 16 of the control and 16 of the first frame's
latents, zeros after it and without a picture.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Conditioning, Dit
from musubi_tuner.families.wan.model import WanModel
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.nn.text.ragged import stacked

CLOCK = 1000.0
MARKS = 4
"""Channels that mark which frames are given, before the 16 of a picture's latents."""
PICTURE_TOKENS = 257
"""Tokens of one picture's features."""


def collate(entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
    """Text of a batch as one tensor [B, T, D], zeros after each sample's end (the model attends to them).

    image: [B, 20, F, h, w]. control: [B, 16, F, h, w]. clip: [B, N, W]. positions: [B, F]. Each where entries have it.
    """
    rows = [entry["text"] for entry in entries]
    text = rows[0].new_zeros(len(rows), max(row.shape[0] for row in rows), rows[0].shape[1])
    for i, row in enumerate(rows):
        text[i, : row.shape[0]] = row
    cond = {"text": text}
    for name in ("image", "control", "clip", "positions"):
        if any(name in entry for entry in entries):
            cond[name] = stacked(name, entries)
    return cond


def predict(dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
    """Velocity of `x_t: [B, 16, F, H, W]` at `t: [B]`, in x_t's dtype."""
    if not isinstance(dit, WanModel):
        raise TypeError(f"Wan predicts with its own transformer, not with {type(dit).__name__}")
    positions = cond.get("positions")
    velocity: Tensor = dit(
        torch.cat([x_t, *(part.to(x_t) for part in _channels(dit, x_t, cond))], dim=1),
        t.to(device=x_t.device, dtype=torch.float64) * CLOCK,
        cond["text"].to(x_t.device),
        picture=_features(dit, x_t, cond),
        run=run,
        frame_positions=None if positions is None else positions.to(x_t.device),
    )
    return velocity


def _channels(dit: WanModel, x_t: Tensor, cond: Conditioning) -> list[Tensor]:
    """What joins `x_t` on the channel axis."""
    for name, sentence in dit.conditioned_on.items():
        if cond.get(name) is None:
            raise UserError(sentence)
    channels, image = dit.config.in_channels, cond.get("image")
    if channels == x_t.shape[1]:
        return []
    if channels == MARKS + 2 * x_t.shape[1]:
        return [cond["image"]]
    first = torch.zeros_like(x_t)
    if image is not None:
        first[:, :, :1] = image[:, MARKS:, :1].to(x_t)
    return [cond["control"], first]


def _features(dit: WanModel, x_t: Tensor, cond: Conditioning) -> Tensor | None:
    """Picture features for a model that attends to them; a control model without a picture is given zeros."""
    width = dit.config.image_embed_dim
    if width is None:
        return None
    found = cond.get("clip")
    if found is not None:
        return found.to(x_t.device)
    return torch.zeros(x_t.shape[0], PICTURE_TOKENS, width, device=x_t.device, dtype=x_t.dtype)
