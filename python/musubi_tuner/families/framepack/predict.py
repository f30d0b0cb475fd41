"""FramePack in the house's convention: its clock is 1000 t, its velocity has our sign, its latents are unpacked.

Guidance is an input that the model is told a thousandfold, in training and in sampling: what the conditioning names, or
else what the model was built with. History has one length in a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.families.base import Conditioning, Dit
from musubi_tuner.families.framepack.model import FramePackModel, History
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.nn.text.ragged import cut_to_longest, stacked

CLOCK = 1000.0
GUIDANCE_UNIT = 1000.0
_HISTORY = tuple(field.name for field in fields(History))


def collate(entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
    """Text cut to the longest caption of the batch, zeros after each sample's end; everything else stacked.

    text: [B, T, W]. lengths: [B], None where all captions have T tokens. pooled: [B, P]. image: [B, N, E]. The fields
    of `History`, where entries have them. guidance: [B] where entries have it.
    """
    text, lengths = cut_to_longest(
        [entry["text"] for entry in entries], [entry["mask"] for entry in entries], "fpack_cache_text_encoder_outputs"
    )
    cond: dict[str, Any] = {"text": text, "lengths": lengths, "pooled": stacked("pooled", entries)}
    for name in ("image", *_HISTORY, "guidance"):
        if any(name in entry for entry in entries):
            cond[name] = stacked(name, entries)
    return cond


def predict(dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
    """Velocity of `x_t: [B, 16, F, H, W]` at `t: [B]`, in x_t's dtype."""
    if not isinstance(dit, FramePackModel):
        raise TypeError(f"FramePack predicts with its own transformer, not with {type(dit).__name__}")
    device, lengths = x_t.device, cond["lengths"]
    named = cond.get("guidance")
    guidance = torch.full_like(t, dit.guidance) if named is None else named * GUIDANCE_UNIT
    return dit(
        x_t,
        t.to(device=device, dtype=torch.float64) * CLOCK,
        History(**{name: cond[name].to(device) for name in _HISTORY if name in cond}),
        cond["text"].to(device),
        cond["pooled"].to(device),
        cond["image"].to(device),
        guidance.to(device),
        lengths=None if lengths is None else lengths.to(device),
        run=run,
    )
