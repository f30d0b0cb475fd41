"""CLIP's text tower as an encoder of whole captions: one pooled vector, the state of the end token after the last norm.

Source: Radford et al. 2021; the large model (`openai/clip-vit-large-patch14`) is what video and image models use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.text.tokenizers import load_json_tokenizer

REPOSITORY: Final = "openai/clip-vit-large-patch14"
TOKENIZER_PLACES: Final = ("tokenizer_2", "clip-vit-large-patch14", ".")
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PREFIX = "text_model."


@dataclass(frozen=True)
class ClipSizes:
    """Sizes of the text tower."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int = 77


def clip_key(key: str) -> str | None:
    """The key without the tower's prefix; None for the other tower and for projections."""
    if key.startswith(("vision_model.", "visual_projection.", "text_projection.", "logit_scale")):
        return None
    return None if key.endswith("position_ids") else key.removeprefix(_PREFIX)


def model_key(key: str, model: nn.Module) -> str | None:
    """The key of `empty_clip`'s model, whose library keeps the prefix in some versions and not in others."""
    name = clip_key(key)
    return f"{_PREFIX}{name}" if name is not None and hasattr(model, "text_model") else name


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> ClipSizes:
    """Sizes of a checkpoint with heads of 64. Raises UserError for a file of another kind."""
    plain = {clip_key(key): shape for key, shape in shapes.items()}
    needed = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    missing = [key for key in (*needed, "encoder.layers.0.mlp.fc1.weight") if key not in plain]
    if missing:
        raise UserError(
            f"{path} is not a CLIP text model: it has no text_model.{missing[0]}; give clip_l.safetensors or the "
            f"folder of {REPOSITORY}"
        )
    (vocab, width), (positions, _) = (plain[key] for key in needed)
    layers = {key.split(".")[2] for key in plain if key is not None and key.startswith("encoder.layers.")}
    inner = plain["encoder.layers.0.mlp.fc1.weight"][0]
    return ClipSizes(vocab, width, inner, len(layers), max(1, width // 64), positions)


def empty_clip(sizes: ClipSizes, end: int) -> nn.Module:
    """transformers' text tower that pools at the token `end`, on meta but for its table of positions."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=sizes.max_position_embeddings,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=end,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    tower = model.text_model if hasattr(model, "text_model") else model
    tower.embeddings.position_ids = torch.arange(sizes.max_position_embeddings).unsqueeze(0)
    return model


def load_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer: every text between its start and end token. Raises UserError for another one."""
    tokenizer = load_json_tokenizer(folder, bos_token=_START, eos_token=_END, pad_token=_END)
    found = tokenizer("").input_ids
    if found != tokenizer.convert_tokens_to_ids([_START, _END]):
        raise UserError(f"tokenizer {folder}: an empty text gives {found}, not {_START} {_END}; it is not CLIP's")
    return tokenizer


class ClipText:
    """Captions -> pooled vectors `[B, hidden_size]`."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """The pooled vector of each caption, cut to the tower's length as CLIP is."""
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).input_ids
        return self.model(input_ids=ids.to(next(self.model.parameters()).device)).pooler_output
