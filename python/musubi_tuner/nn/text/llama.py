"""Llama 3 as a text encoder of video models: hidden states of an instruction, cut to the caption's own tokens.

The caption stands inside a fixed instruction that asks for a description of a video; features are the hidden states
before the last `SKIPPED` layers, without the final norm, from the first token after the instruction's own. Those last
layers, the norm and the output layer are never built, so they cost neither memory nor time.

Attention is causal and captions are padded at the end, so no mask is needed: padding cannot reach a real token.
Source: HunyuanVideo technical report (Tencent 2024); the instruction is part of the trained model.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.text.tokenizers import load_json_tokenizer

log = logging.getLogger(__name__)

_ASPECTS = (
    "The main content and theme of the video.",
    "The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "background environment, light, style and atmosphere.",
    "camera angles, movements, and transitions used in the video:",
)
_TASK = "Describe the video by detailing the following aspects: " + "".join(
    f"{number}. {aspect}" for number, aspect in enumerate(_ASPECTS, start=1)
)


def _turn(role: str, text: str = "") -> str:
    """The start of a turn in Llama 3's chat format."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"


END: Final = "<|eot_id|>"


def instruction(task: str = _TASK) -> str:
    """What stands before a caption, with another task than the model was trained with."""
    return _turn("system", task + END) + _turn("user")


INSTRUCTION: Final = instruction()
"""What stands before each caption, to the letter: the transformer was trained with its effect on the features."""
INSTRUCTION_TOKENS: Final = 95
"""Tokens of the instruction with the begin token; the features of these are dropped."""
SKIPPED: Final = 2
REPOSITORY: Final = "xtuner/llava-llama-3-8b-v1_1-transformers"
TOKENIZER_PLACES: Final = ("tokenizer", "llava-llama-3-8b-v1_1-transformers", ".")
FP8_LINEARS: Final = ("self_attn.", "mlp.")
"""Substrings of the weights that can be FP8."""

_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.")
_UNUSED = re.compile(r"(lm_head|norm|vision_tower|multi_modal_projector|tokenizer)\b.*|.*rotary_emb\.inv_freq")


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes of the whole decoder as published."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0


def plain_key(key: str) -> str:
    """A key without the prefix that a language model has in its own file, or inside a vision-language model."""
    return next((key[len(p) :] for p in _PREFIXES if key.startswith(p)), key)


def decoder_key(key: str, num_layers: int) -> str | None:
    """The key of `empty_decoder`'s model; None for what it has not: the last layers, the norm, other towers."""
    name = plain_key(key)
    if _UNUSED.fullmatch(name) or _UNUSED.fullmatch(key):
        return None
    layer = re.match(r"layers\.(\d+)\.", name)
    return None if layer and int(layer[1]) >= num_layers - SKIPPED else name


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> LlamaSizes:
    """Sizes of a checkpoint with heads of 128. Raises UserError for a file of another kind."""
    plain = {plain_key(key): shape for key, shape in shapes.items()}
    first = "layers.0.self_attn.q_proj.weight"
    needed = ("embed_tokens.weight", first, "layers.0.self_attn.k_proj.weight", "layers.0.mlp.gate_proj.weight")
    missing = [key for key in needed if key not in plain]
    if missing:
        raise UserError(
            f"{path} is not a Llama text encoder: it has no {missing[0]}; give llava_llama3_fp16.safetensors or the "
            f"folder of {REPOSITORY}"
        )
    vocab, queries, keys, inner = (plain[key] for key in needed)
    layers = {int(key.split(".")[1]) for key in plain if re.match(r"layers\.\d+\.", key)}
    return LlamaSizes(vocab[0], vocab[1], inner[0], len(layers), max(1, queries[0] // 128), max(1, keys[0] // 128))


def empty_decoder(sizes: LlamaSizes) -> nn.Module:
    """transformers' Llama without its last layers and norm, on meta but for the rope table."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=max(sizes.num_layers - SKIPPED, 0),
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta,
        max_position_embeddings=8192,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaModel(config)
    model.norm = nn.Identity()
    model.rotary_emb = type(model.rotary_emb)(config)
    return model


def load_tokenizer(folder: Path) -> Any:
    """Llama 3's tokenizer. Raises UserError where it does not cut the instruction as the model was trained with."""
    tokenizer = load_json_tokenizer(folder, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    found = len(tokenizer(INSTRUCTION).input_ids)
    if found != INSTRUCTION_TOKENS:
        raise UserError(
            f"tokenizer {folder}: the instruction before each caption has {found} tokens, the model was trained with "
            f"{INSTRUCTION_TOKENS}; take tokenizer.json of {REPOSITORY}"
        )
    return tokenizer


class LlamaText:
    """Captions -> features `[tokens, hidden_size]`, at most `max_tokens` of them.

    task: the system prompt, in place of the one that the model was trained with.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int, task: str | None = None) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.before = INSTRUCTION if task is None else instruction(task)
        self.skipped = len(tokenizer(self.before).input_ids)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption (its end token included); longer captions are cut, with a warning."""
        limit = self.skipped + self.max_tokens
        rows = [self.tokenizer(self.before + caption + END).input_ids for caption in captions]
        for caption, row in zip(captions, rows, strict=True):
            if len(row) > limit:
                told = (len(row) - self.skipped, self.max_tokens, caption[:60])
                log.warning("a caption of %d tokens is cut to the %d that the model takes: %s...", *told)
        rows = [row[:limit] for row in rows]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        device = next(self.model.parameters()).device
        hidden = self.model(input_ids=ids.to(device)).last_hidden_state
        return [hidden[i, self.skipped : len(row)].clone() for i, row in enumerate(rows)]
