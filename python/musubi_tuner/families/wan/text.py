"""umt5, Wan's text encoder: transformers' class, fed from the original file, with a tokenizer from a local folder.

A caption is cleaned (HTML entities, white space), cut to the encoder's length, encoded with its padding masked, and
its features are cut to the caption's own length. (The model's own pipeline also mends mis-decoded text with `ftfy`;
captions are expected to be proper UTF-8.)
"""

import dataclasses
import html
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Fp8Targets
from musubi_tuner.families.wan.keys import text_key
from musubi_tuner.nn.text.tokenizers import find_words, load_t5_tokenizer
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Header, open_checkpoint
from musubi_tuner.weights.sizes import named_fields

log = logging.getLogger(__name__)

_FP8_TARGETS = Fp8Targets(include=("SelfAttention.", "DenseReluDense."), exclude=("relative_attention_bias",))
_REPOSITORY = "google/umt5-xxl"
_TOKENIZER_FOLDERS = (_REPOSITORY, "umt5-xxl", "tokenizer", ".")


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


class WanTextEncoder:
    """Captions -> features `[length, dim]`."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    def to(self, device: torch.device) -> "WanTextEncoder":
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


def load_text_encoder(
    path: str, tokenizer: str | None, *, fp8: bool, device: torch.device, dtype: torch.dtype
) -> WanTextEncoder:
    """The encoder of the original file with its tokenizer. Raises UserError naming the file at fault."""
    with open_checkpoint(path) as checkpoint:
        config = text_config(checkpoint.header)
        folder = tokenizer_file(path, tokenizer).parent
        words = load_t5_tokenizer(folder)
        if len(words) > config.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has {len(words)} tokens and {path} knows {config.vocab_size}: "
                "they do not belong together; name the encoder's own with --t5_tokenizer"
            )
        with torch.device("meta"):
            model = empty_encoder(config)
        policy = WeightPolicy(dtype, Fp8Policy(_FP8_TARGETS) if fp8 else None)
        report = materialize(model, checkpoint, rename=text_key, policy=policy, device=device)
    log.info("%s: %s", path, report.summary())
    return WanTextEncoder(model.eval(), words, config.max_length)


def tokenizer_file(path: str, named: str | None) -> Path:
    """The tokenizer of the encoder at `path`. Raises UserError where there is none."""
    return find_words(named, "t5_tokenizer", Path(path), _TOKENIZER_FOLDERS, _REPOSITORY)


def text_config(header: Header) -> TextConfig:
    """Sizes from the shapes; `musubi.config` in the metadata wins."""
    path = header.paths[0]
    shapes = {text_key(key): info.shape for key, info in header.tensors.items()}
    layer = "encoder.block.0.layer"
    needed = {
        "token_embedding.weight": "shared.weight",
        "blocks.0.attn.q.weight": f"{layer}.0.SelfAttention.q.weight",
        "blocks.0.ffn.fc1.weight": f"{layer}.1.DenseReluDense.wi_1.weight",
        "blocks.0.pos_embedding.embedding.weight": f"{layer}.0.SelfAttention.relative_attention_bias.weight",
    }
    missing = [original for original, key in needed.items() if key not in shapes]
    if missing:
        raise UserError(
            f"{path} is not umt5: it has no {missing[0]}; give models_t5_umt5-xxl-enc-bf16.pth of the Wan "
            "repository or umt5_xxl_fp16.safetensors"
        )
    (vocab_size, dim), (dim_attn, _), (dim_ffn, _), (buckets, heads) = (shapes[key] for key in needed.values())
    config = TextConfig(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=dim_attn,
        dim_ffn=dim_ffn,
        num_heads=heads,
        encoder_layers=len({key.split(".")[2] for key in shapes if key and key.startswith("encoder.block.")}),
        num_buckets=buckets,
    )
    named = named_fields(TextConfig, header.metadata.get("musubi.config"), f"{path}, musubi.config")
    return dataclasses.replace(config, **named)


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
