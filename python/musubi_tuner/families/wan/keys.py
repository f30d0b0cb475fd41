"""Key rules of Wan files: transformer, VAE and text encoder in their original layouts.

The transformer's modules carry the checkpoint's own names, so only wrapper prefixes go; files in diffusers' names are
read too, as no key of one layout is a key of the other. The VAE and umt5 are diffusers' and transformers' classes; each
rule below reads an original key and gives the class's, and `original_vae_key` goes back.
"""

import re
from collections.abc import Mapping
from typing import Final

from musubi_tuner.weights.keys import WRAPPERS, Rename, Rules, chain, without_prefix

_FROM_DIFFUSERS: Final = Rules(
    (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),  # the one before cross attention; diffusers counts by place
        (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
        (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
        (r"_attn\.to_([qkv])\.", r"_attn.\1."),
        (r"_attn\.add_([kv])_proj\.", r"_attn.\1_img."),
        (r"_attn\.norm_added_k\.", "_attn.norm_k_img."),
        (r"_attn\.to_out\.0\.", "_attn.o."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    )
)

rename_dit_key: Rename = chain(without_prefix(*WRAPPERS), _FROM_DIFFUSERS)
"""Module path of a transformer's key in either layout, with or without a wrapper's prefix."""

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
