"""FramePack's encoders: LLaVA-Llama-3 for token features, CLIP-L for one pooled vector, SigLIP for pictures.

The text cache holds 512 rows per caption, of which a caption fills at most 256; the rows after its end are zero.
"""

from dataclasses import dataclass
from typing import Any

import torch

from musubi_tuner.families.framepack import options as groups
from musubi_tuner.families.framepack.spec import CAPTION_TOKENS, TEXT_TOKENS
from musubi_tuner.families.framepack.vae import PictureEncoder, load_picture_encoder
from musubi_tuner.memory.placement import DTYPES
from musubi_tuner.weights.encoders import TextPair, load_pair


@dataclass
class AllEncoders:
    """The encoders that a command named, None where it named none, and its options."""

    options: Any
    text: TextPair | None = None
    picture: PictureEncoder | None = None

    def to(self, device: torch.device) -> "AllEncoders":
        """Move to `device`; the same object."""
        for part in (self.text, self.picture):
            if part is not None:
                part.to(device)
        return self


def load_encoders(options: Any, *, device: torch.device, dtype: torch.dtype) -> AllEncoders | None:
    """The encoders that the options of a command name, the picture encoder in `dtype`; None where they name none."""
    found = AllEncoders(options)
    if isinstance(options, groups.TextEncoderOptions) and (options.text_encoder1 or options.text_encoder2):
        own, sizes = DTYPES[options.text_encoder_dtype], {"tokens": CAPTION_TOKENS, "rows": TEXT_TOKENS}
        task = options.custom_system_prompt if isinstance(options, groups.GenerationOptions) else None
        found.text = load_pair(options, dtype=own, device=device, owner="FramePack", task=task, **sizes)
    if isinstance(options, (groups.CacheLatentOptions, groups.EncodingOptions)) and options.image_encoder:
        found.picture = load_picture_encoder(options.image_encoder, device=device, dtype=dtype)
    return found if found.picture or found.text else None
