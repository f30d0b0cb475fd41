"""Sizes of a FramePack transformer from what a file says of itself: `--model_config`, `musubi.config`, or shapes."""

from collections.abc import Mapping
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.framepack.keys import rename_dit_key
from musubi_tuner.families.framepack.model import FramePackConfig
from musubi_tuner.weights.reader import Header
from musubi_tuner.weights.sizes import configured, members

Shapes = Mapping[str | None, tuple[int, ...]]

_NEEDED = (
    "x_embedder.proj.weight",
    "clean_x_embedder.proj_4x.weight",
    "image_projection.up.weight",
    "context_embedder.proj_in.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "time_text_embed.timestep_embedder.linear_1.weight",
    "transformer_blocks.0.attn.norm_q.weight",
    "transformer_blocks.0.ff.net.0.proj.weight",
    "proj_out.weight",
)


def dit_config(header: Header, given: Mapping[str, Any] | None = None) -> FramePackConfig:
    """The configuration of the transformer in `header`; `given` wins over the file's metadata, that over shapes.

    Raises UserError where the file is no FramePack transformer.
    """
    path = header.paths[0]
    sizes = _sizes_from_shapes({rename_dit_key(key): info.shape for key, info in header.tensors.items()}, str(path))
    return configured(FramePackConfig, sizes, header, given)


def _sizes_from_shapes(shapes: Shapes, path: str) -> dict[str, Any]:
    missing = [key for key in _NEEDED if key not in shapes]
    if missing:
        raise UserError(
            f"{path} is not a FramePack transformer: it has no {missing[0]}; give FramePackI2V_HY, FramePack_F1_I2V_HY "
            "or a single file of one of them, not HunyuanVideo, the VAE or an encoder"
        )
    patch = shapes["x_embedder.proj.weight"]
    width, cell = patch[0], patch[2] * patch[3] * patch[4]
    return {
        "hidden_size": width,
        "num_heads": width // shapes["transformer_blocks.0.attn.norm_q.weight"][0],
        "num_double_blocks": members(shapes, "transformer_blocks."),
        "num_single_blocks": members(shapes, "single_transformer_blocks."),
        "in_channels": patch[1],
        "out_channels": shapes["proj_out.weight"][0] // cell,
        "patch_size": patch[3],
        "patch_size_t": patch[2],
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "text_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_text_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "image_embed_dim": shapes["image_projection.up.weight"][1],
        "num_refiner_blocks": members(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "guidance_embed": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "timestep_embed_dim": shapes["time_text_embed.timestep_embedder.linear_1.weight"][1],
    }
