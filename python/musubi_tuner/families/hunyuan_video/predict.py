"""HunyuanVideo in the house's convention: its clock is 1000 t, its velocity has our sign, its latents are unpacked.

Guidance is an input: where the conditioning names it (in sampling), the model is told a thousandfold; where it does
not (in training), what the model was built with. Image-to-video models see the clean first frame and zeros after it
as further channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Conditioning, Dit
from musubi_tuner.families.hunyuan_video.model import HunyuanVideoModel
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.nn.text.ragged import cut_to_longest

CLOCK = 1000.0
GUIDANCE_UNIT = 1000.0


def collate(entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
    """Text cut to the longest caption of the batch, zeros after each sample's end.

    text: [B, T, W]. lengths: [B], None where all captions have T tokens. pooled: [B, P]. first_frame: [B, C, 1, H, W]
    where entries have latents. guidance: [B] where entries have it.
    """
    text, lengths = cut_to_longest(
        [entry["text"] for entry in entries], [entry["mask"] for entry in entries], "cache_text_encoder_outputs"
    )
    pooled = torch.stack([entry["pooled"] for entry in entries])
    cond: dict[str, Any] = {"text": text, "lengths": lengths, "pooled": pooled}
    if all("latents" in entry for entry in entries):
        cond["first_frame"] = torch.stack([entry["latents"][:, :1] for entry in entries])
    if all("guidance" in entry for entry in entries):
        cond["guidance"] = torch.stack([entry["guidance"] for entry in entries])
    return cond


def predict(dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
    """Velocity of `x_t: [B, 16, F, H, W]` at `t: [B]`, in x_t's dtype."""
    if not isinstance(dit, HunyuanVideoModel):
        raise TypeError(f"HunyuanVideo predicts with its own transformer, not with {type(dit).__name__}")
    device = x_t.device
    named = cond.get("guidance")
    guidance = torch.full_like(t, dit.guidance) if named is None else named * GUIDANCE_UNIT
    lengths = cond["lengths"]
    return dit(
        _with_first_frame(x_t, dit, cond),
        t.to(device=device, dtype=torch.float64) * CLOCK,
        cond["text"].to(device),
        cond["pooled"].to(device),
        guidance.to(device),
        lengths=None if lengths is None else lengths.to(device),
        run=run,
    )


def _with_first_frame(x_t: Tensor, dit: HunyuanVideoModel, cond: Conditioning) -> Tensor:
    """`x_t`, for image-to-video with the channels of the clean first frame, zero in all other frames."""
    if dit.config.in_channels == x_t.shape[1]:
        return x_t
    if "first_frame" not in cond:
        raise UserError(
            f"this transformer takes {dit.config.in_channels} channels (image-to-video) and was given no first frame: "
            "give --image_path (--i in a prompt line), or a text-to-video checkpoint (16 channels)"
        )
    clean = torch.zeros_like(x_t)
    clean[:, :, :1] = cond["first_frame"].to(x_t)
    return torch.cat([x_t, clean], dim=1)
