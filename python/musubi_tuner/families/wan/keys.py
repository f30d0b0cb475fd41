"""Key rules of transformer files: modules carry the original checkpoint's names, so only wrapper prefixes go.

Files in diffusers' names are read too, as no key of one layout is a key of the other.
"""

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
