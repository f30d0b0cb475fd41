"""umt5, Wan's text encoder: transformers' class, fed from the original file, with a tokenizer from a local folder.

A caption is cleaned (HTML entities, white space), cut to the encoder's length, encoded with its padding masked, and
its features are cut to the caption's own length.
"""

import dataclasses
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Fp8Targets
from musubi_tuner.families.wan.config import named_fields
from musubi_tuner.families.wan.keys import text_key
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Header, open_checkpoint

# transformers casts the feed-forward's activations to the dtype of its last weight, so that one stays as it is
_FP8_TARGETS = Fp8Targets(include=("SelfAttention", "DenseReluDense.wi_"), exclude=("relative_attention_bias",))
_TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "umt5-xxl", ".")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


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
    folder = find_tokenizer(Path(path), tokenizer)
    with open_checkpoint(path) as checkpoint:
        config = text_config(checkpoint.header)
        with torch.device("meta"):
            model = empty_encoder(config)
        policy = WeightPolicy(dtype, Fp8Policy(_FP8_TARGETS) if fp8 else None)
        materialize(model, checkpoint, rename=text_key, policy=policy, device=device)
    return WanTextEncoder(model.eval(), load_tokenizer(folder), config.max_length)


def text_config(header: Header) -> TextConfig:
    """Sizes from the shapes; `musubi.config` in the metadata wins."""
    path = header.paths[0]
    shapes = {key.replace("encoder.", ""): info.shape for key, info in header.tensors.items()}
    needed = ("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight")
    missing = [key for key in (*needed, "blocks.0.pos_embedding.embedding.weight") if key not in shapes]
    if missing:
        raise UserError(
            f"{path} is not umt5 in its original layout: it has no {missing[0]}; give "
            "models_t5_umt5-xxl-enc-bf16.pth of the Wan repository (or its safetensors form)"
        )
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    config = TextConfig(
        vocab_size=shapes["token_embedding.weight"][0],
        dim=shapes["token_embedding.weight"][1],
        dim_attn=shapes["blocks.0.attn.q.weight"][0],
        dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=heads,
        encoder_layers=len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        num_buckets=buckets,
    )
    named = named_fields(TextConfig, header.metadata.get("musubi.config"), f"{path}, musubi.config")
    return dataclasses.replace(config, **named)


def empty_encoder(config: TextConfig) -> nn.Module:
    """transformers' umt5 encoder of these sizes; initialised on the current default device."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
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
    )


def find_tokenizer(checkpoint: Path, given: str | None) -> Path:
    """The tokenizer's folder: the given one, or one beside the checkpoint. UserError says what to put where."""
    tried = [Path(given)] if given else [checkpoint.parent / name for name in _TOKENIZER_FOLDERS]
    for folder in tried:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return folder
    raise UserError(
        f"no umt5 tokenizer in {' or '.join(str(folder) for folder in tried)}: put {' and '.join(_TOKENIZER_FILES)} "
        "of google/umt5-xxl into a folder and name it with --t5_tokenizer; nothing is downloaded"
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error
