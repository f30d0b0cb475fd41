"""Sizes of a HunyuanVideo transformer from what a file says of itself: `--model_config`, `musubi.config`, or shapes."""

from collections.abc import Mapping
from math import prod
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.hunyuan_video.keys import rename_dit_key
from musubi_tuner.families.hunyuan_video.model import HunyuanVideoConfig
from musubi_tuner.weights.reader import Header
from musubi_tuner.weights.sizes import configured, members

Shapes = Mapping[str | None, tuple[int, ...]]

_NEEDED = (
    "img_in.proj.weight",
    "txt_in.input_embedder.weight",
    "vector_in.in_layer.weight",
    "time_in.mlp.0.weight",
    "double_blocks.0.img_attn_q_norm.weight",
    "double_blocks.0.img_mlp.fc1.weight",
    "final_layer.linear.weight",
)


def dit_config(header: Header, given: Mapping[str, Any] | None = None) -> HunyuanVideoConfig:
    """The configuration of the transformer in `header`; `given` wins over the file's metadata, that over shapes.

    Raises UserError where the file is no HunyuanVideo transformer, or one that this version cannot run.
    """
    path = header.paths[0]
    sizes = _sizes_from_shapes({rename_dit_key(key): info.shape for key, info in header.tensors.items()}, str(path))
    config = configured(HunyuanVideoConfig, sizes, header, given)
    if config.in_channels not in (config.out_channels, 2 * config.out_channels):
        raise UserError(
            f"{path} takes {config.in_channels} input channels: this version runs text-to-video models, which take "
            f"{config.out_channels}, and image-to-video models of the SkyReels kind, which take "
            f"{2 * config.out_channels}; the official image-to-video model (33) is of another kind"
        )
    return config


def _sizes_from_shapes(shapes: Shapes, path: str) -> dict[str, Any]:
    missing = [key for key in _NEEDED if key not in shapes]
    if missing:
        raise UserError(
            f"{path} is not a HunyuanVideo transformer: it has no {missing[0]}; give the DiT file "
            "(mp_rank_00_model_states.pt or its safetensors form), not the VAE, a text encoder or another model"
        )
    patch = shapes["img_in.proj.weight"]
    return {
        "hidden_size": patch[0],
        "num_heads": patch[0] // shapes["double_blocks.0.img_attn_q_norm.weight"][0],
        "num_double_blocks": members(shapes, "double_blocks."),
        "num_single_blocks": members(shapes, "single_blocks."),
        "in_channels": patch[1],
        "out_channels": shapes["final_layer.linear.weight"][0] // prod(patch[2:]),
        "patch_size": tuple(patch[2:]),
        "mlp_ratio": shapes["double_blocks.0.img_mlp.fc1.weight"][0] / patch[0],
        "text_dim": shapes["txt_in.input_embedder.weight"][1],
        "pooled_text_dim": shapes["vector_in.in_layer.weight"][1],
        "text_refiner_depth": members(shapes, "txt_in.individual_token_refiner.blocks."),
        "guidance_embed": "guidance_in.mlp.0.weight" in shapes,
        "timestep_embed_dim": shapes["time_in.mlp.0.weight"][1],
    }
