"""Sizes of a Wan transformer from what a file says about itself: `--model_config`, `musubi.config`, or its shapes."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.wan.keys import rename_dit_key
from musubi_tuner.families.wan.model import WanConfig
from musubi_tuner.weights.reader import Header
from musubi_tuner.weights.sizes import named_fields

_HEAD_DIM = 128  # of every published model
_LATENT_CHANNELS = 16


def wan_config(header: Header, given: Mapping[str, Any] | None = None) -> WanConfig:
    """The configuration of the transformer in `header`; `given` wins over the file's metadata, that over shapes.

    Raises UserError where the file is no Wan transformer, or one that this version cannot run.
    """
    shapes = {rename_dit_key(key): info.shape for key, info in header.tensors.items()}
    sizes = _sizes_from_shapes(shapes, str(header.paths[0]))
    sizes |= named_fields(WanConfig, header.metadata.get("musubi.config"), f"{header.paths[0]}, musubi.config")
    sizes |= named_fields(WanConfig, given, "--model_config")
    sizes.setdefault("num_heads", max(1, sizes["dim"] // _HEAD_DIM))
    try:
        config = WanConfig(**sizes)
    except ValueError as error:
        raise UserError(f"{header.paths[0]}: {error}") from error
    if config.in_channels != _LATENT_CHANNELS or "img_emb.proj.1.weight" in shapes:
        raise UserError(
            f"{header.paths[0]} takes {config.in_channels} input channels (image-to-video or control): this version "
            "runs Wan 2.1 text-to-video and text-to-image models, which take 16"
        )
    return config


def _sizes_from_shapes(shapes: Mapping[str | None, tuple[int, ...]], path: str) -> dict[str, Any]:
    needed = ("patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "head.head.weight")
    missing = [key for key in (*needed, "blocks.0.ffn.0.weight") if key not in shapes]
    if missing:
        raise UserError(
            f"{path} is not a Wan transformer: it has no {missing[0]}; give the DiT file (for example "
            "wan2.1_t2v_1.3B_bf16.safetensors), not the VAE, the text encoder or another family's model"
        )
    patch = shapes["patch_embedding.weight"]
    layers = {int(key.split(".")[1]) for key in shapes if key is not None and key.startswith("blocks.")}
    return {
        "dim": patch[0],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": len(layers),
        "in_channels": patch[1],
        "out_channels": shapes["head.head.weight"][0] // prod(patch[2:]),
        "patch_size": tuple(patch[2:]),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
    }


_TASKS_BY_WIDTH = {1536: ("t2v-1.3B",), 5120: ("t2v-14B", "t2i-14B")}


def check_task(task: str, sizes: WanConfig, path: Path) -> None:
    """UserError where `task` cannot be the published model of this width; unusual widths go with any task."""
    fitting = _TASKS_BY_WIDTH.get(sizes.dim, (task,))
    if task not in fitting:
        raise UserError(f"--task {task}: {path} is a model of width {sizes.dim}; say --task {' or '.join(fitting)}")
