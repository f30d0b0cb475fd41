"""Key rules of Wan files: transformer, VAE and text encoder in their original layouts.

The transformer's modules carry the checkpoint's own names, so only wrapper prefixes go. The VAE and umt5 are
diffusers' and transformers' classes; each rule below reads an original key and gives the class's, and
`original_vae_key` goes back.
"""

import re
from collections.abc import Mapping
from typing import Final

from musubi_tuner.weights.keys import WRAPPERS, Rules, without_prefix

rename_dit_key = without_prefix(*WRAPPERS)

_RESNET: Final = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"} | {
    "shortcut": "conv_shortcut"
}
_MIDDLE: Final = {"middle.0": "mid_block.resnets.0", "middle.1": "mid_block.attentions.0"} | {
    "middle.2": "mid_block.resnets.1"
}
_ENDS: Final = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_TOP: Final = {"conv1": "quant_conv", "conv2": "post_quant_conv"}


def vae_key(key: str, res_blocks: int) -> str:
    """The diffusers key of an original VAE key; `res_blocks` per level of the encoder."""
    side, _, rest = key.partition(".")
    if side in _TOP:
        return f"{_TOP[side]}.{rest}"
    for table in (_ENDS, _MIDDLE):
        rest = _replace_head(rest, table)
    rest = _replace_tail(rest, _RESNET)
    if found := re.match(r"upsamples\.(\d+)\.", rest):
        level, place = divmod(int(found[1]), res_blocks + 2)
        part = f"resnets.{place}" if place <= res_blocks else "upsamplers.0"
        rest = f"up_blocks.{level}.{part}.{rest[found.end() :]}"
    return f"{side}.{rest.replace('downsamples.', 'down_blocks.', 1)}"


def original_vae_key(key: str, res_blocks: int) -> str:
    """The original key of a diffusers VAE key: the inverse of `vae_key`."""
    side, _, rest = key.partition(".")
    if side in _TOP.values():
        return f"{_inverse(_TOP)[side]}.{rest}"
    if found := re.match(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", rest):
        place = int(found[3]) if found[2] == "resnets" else res_blocks + 1
        rest = f"upsamples.{int(found[1]) * (res_blocks + 2) + place}.{rest[found.end() :]}"
    rest = _replace_tail(rest, _inverse(_RESNET))
    for table in (_MIDDLE, _ENDS):
        rest = _replace_head(rest, _inverse(table))
    return f"{side}.{rest.replace('down_blocks.', 'downsamples.', 1)}"


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _replace_head(rest: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if rest.startswith(old + "."):
            return new + rest[len(old) :]
    return rest


def _replace_tail(rest: str, table: Mapping[str, str]) -> str:
    """Rename the part before the parameter's own name."""
    stem, _, leaf = rest.rpartition(".")
    for old, new in table.items():
        if stem.endswith("." + old):
            return f"{stem[: -len(old)]}{new}.{leaf}"
    return rest


text_key: Final = Rules(
    (
        (r"encoder\.", ""),
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
        (
            r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
            r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
        ),
        (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
        (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
        (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    )
)
"""Original umt5 key -> key of transformers' UMT5EncoderModel."""
