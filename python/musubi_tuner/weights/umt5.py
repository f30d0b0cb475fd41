"""umt5 from its files: the original layout or transformers', with the tokenizer beside it."""

import dataclasses
import logging
from pathlib import Path
from typing import Final

import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.text.tokenizers import find_words, load_t5_tokenizer
from musubi_tuner.nn.text.umt5 import TextConfig, Umt5Encoder, empty_encoder
from musubi_tuner.weights.keys import Rules
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Header, open_checkpoint
from musubi_tuner.weights.sizes import named_fields

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Targets:
    """Linear layers that become FP8."""

    include: tuple[str, ...] = ("SelfAttention.", "DenseReluDense.")
    exclude: tuple[str, ...] = ("relative_attention_bias",)


_REPOSITORY: Final = "google/umt5-xxl"
_TOKENIZER_FOLDERS: Final = (_REPOSITORY, "umt5-xxl", "tokenizer", ".")

_FROM_ORIGINAL_TEXT: Final = Rules(
    (
        (r"^(?:encoder\.)*token_embedding\.", "shared."),
        (r"^(?:encoder\.)*norm\.", "encoder.final_layer_norm."),
        (r"^(?:encoder\.)*blocks\.", "encoder.block."),
        (r"(block\.\d+)\.attn\.", r"\1.layer.0.SelfAttention."),
        (r"(block\.\d+)\.pos_embedding\.embedding\.", r"\1.layer.0.SelfAttention.relative_attention_bias."),
        (r"(block\.\d+)\.norm1\.", r"\1.layer.0.layer_norm."),
        (r"(block\.\d+)\.norm2\.", r"\1.layer.1.layer_norm."),
        (r"(block\.\d+)\.ffn\.gate\.0\.", r"\1.layer.1.DenseReluDense.wi_0."),
        (r"(block\.\d+)\.ffn\.fc1\.", r"\1.layer.1.DenseReluDense.wi_1."),
        (r"(block\.\d+)\.ffn\.fc2\.", r"\1.layer.1.DenseReluDense.wo."),
    )
)


def text_key(key: str) -> str | None:
    """The key of transformers' UMT5EncoderModel for a key of the original file or of a repackaged one.

    None for what repackaged files hold twice or beside: the encoder's copy of the embedding, the tokenizer.
    """
    return None if key in ("encoder.embed_tokens.weight", "spiece_model") else _FROM_ORIGINAL_TEXT(key)


def load_text_encoder(
    path: str, tokenizer: str | None, *, fp8: bool, device: torch.device, dtype: torch.dtype
) -> Umt5Encoder:
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
        policy = WeightPolicy(dtype, Fp8Policy(_Targets()) if fp8 else None)
        report = materialize(model, checkpoint, rename=text_key, policy=policy, device=device)
    log.info("%s: %s", path, report.summary())
    return Umt5Encoder(model.eval(), words, config.max_length)


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
            f"{path} is not umt5: it has no {missing[0]}; give models_t5_umt5-xxl-enc-bf16.pth or "
            "umt5_xxl_fp16.safetensors"
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
