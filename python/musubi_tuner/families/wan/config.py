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
    if _tasks_of(config) is None:
        raise UserError(
            f"{header.paths[0]} takes {config.in_channels} input channels"
            f"{' and no picture features' if config.image_embed_dim is None else ''}: this version runs models that "
            "take 16 (text to video or image), 36 (image to video) or 48 with features (control)"
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
        "image_embed_dim": shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else None,
        "image_positions": shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else 0,
    }


_TASKS: Mapping[tuple[int, bool, bool], Mapping[int, tuple[str, ...]]] = {
    (16, False, False): {1536: ("t2v-1.3B",), 5120: ("t2v-14B", "t2i-14B", "t2v-A14B")},
    (36, True, False): {5120: ("i2v-14B",)},
    (36, True, True): {5120: ("flf2v-14B",)},
    (36, False, False): {5120: ("i2v-A14B",)},
    (48, True, False): {1536: ("t2v-1.3B-FC",), 5120: ("t2v-14B-FC", "i2v-14B-FC")},
}
"""Tasks of the published models by input channels, picture features, positions of these; and by width."""


def _tasks_of(sizes: WanConfig) -> Mapping[int, tuple[str, ...]] | None:
    kind = (sizes.in_channels, sizes.image_embed_dim is not None, sizes.image_positions > 0)
    return _TASKS.get(kind)


def check_task(task: str, sizes: WanConfig, path: Path) -> None:
    """UserError where `task` cannot be the published model of these sizes; unusual widths go with any of a kind."""
    by_width = _tasks_of(sizes) or {}
    every = tuple(name for names in by_width.values() for name in names)
    fitting = by_width.get(sizes.dim, every)
    if task not in fitting:
        what = f"of width {sizes.dim}" if task in every else f"with {sizes.in_channels} input channels"
        raise UserError(f"--task {task}: {path} is a model {what}; say --task {' or '.join(fitting)}")
