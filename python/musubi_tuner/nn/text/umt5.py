"""umt5: captions to token features, by transformers' class.

A caption is cleaned (HTML entities, white space), cut to the encoder's length, encoded with its padding masked, and
its features are cut to the caption's own length. (Mis-decoded text is not mended: captions are expected to be proper
UTF-8.) Files are read by `weights.umt5`.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the encoder by umt5's own names."""

    vocab_size: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    encoder_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    shared_pos: bool = False
    max_length: int = 512


class Umt5Encoder:
    """Captions -> features `[length, dim]`."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    def to(self, device: torch.device) -> "Umt5Encoder":
        """Move to `device`; the same object."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, cut to its own number of tokens (at least one: the end token)."""
        tokens = self.tokenizer(
            [clean_caption(caption) for caption in captions],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        mask = tokens.attention_mask.to(device)
        hidden = self.model(input_ids=tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
        return [row[:length].clone() for row, length in zip(hidden, mask.sum(1).tolist(), strict=True)]


def clean_caption(caption: str) -> str:
    """HTML entities resolved, white space folded to single blanks."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip()


class GatedFeedForward(nn.Module):
    """y = wo(gelu(wi_0 x) * wi_1 x) with the tanh form of gelu, under transformers' names.

    transformers' own casts activations to the dtype of `wo`, which an FP8 layer in that slot does not survive.
    """

    def __init__(self, dim: int, dim_ffn: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(dim, dim_ffn, bias=False), nn.Linear(dim, dim_ffn, bias=False)
        self.wo = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def empty_encoder(config: TextConfig) -> nn.Module:
    """transformers' umt5 encoder of these sizes; initialised on the current default device."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.dim_attn // config.num_heads,
        d_ff=config.dim_ffn,
        num_layers=config.encoder_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    model: Any = UMT5EncoderModel(sizes)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense = GatedFeedForward(config.dim, config.dim_ffn)
    return model
