"""HunyuanVideo's two text encoders: LLaVA-Llama-3 for token features, CLIP-L for one pooled vector.

The cache holds 256 rows per caption and a mask of the real ones; the rows after a caption's end are zero.
"""

import torch

from musubi_tuner.families.hunyuan_video.options import TextEncoderOptions
from musubi_tuner.families.hunyuan_video.spec import TEXT_TOKENS
from musubi_tuner.memory.placement import DTYPES
from musubi_tuner.weights.encoders import TextPair, load_pair


def load_text_encoders(options: TextEncoderOptions, *, device: torch.device) -> TextPair:
    """Both encoders on `device`. Raises UserError naming the file at fault, tokenizers before weights."""
    dtype = DTYPES[options.text_encoder_dtype]
    return load_pair(options, dtype=dtype, device=device, tokens=TEXT_TOKENS, rows=TEXT_TOKENS, owner="HunyuanVideo")
