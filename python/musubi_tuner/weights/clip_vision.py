"""CLIP's picture tower from the file of the whole model: open_clip's XLM-RoBERTa ViT-H in its original layout.

The text tower, the last block, the final norm and the projection are not read.
"""

import dataclasses
import re
from math import isqrt

import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.vision.clip import ClipTower, TowerSizes
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import WeightPolicy
from musubi_tuner.weights.reader import Header, open_checkpoint
from musubi_tuner.weights.sizes import named_fields

_HEAD_DIM = 80  # of ViT-H
_PREFIX = "visual."
_BLOCK = re.compile(r"transformer\.(\d+)\.")
_NEEDED = ("patch_embedding.weight", "pos_embedding", "transformer.0.mlp.0.weight", "transformer.0.attn.to_qkv.weight")


def load_clip_vision(path: str, *, device: torch.device, dtype: torch.dtype) -> ClipTower:
    """The tower of models_clip_open-clip-xlm-roberta-large-vit-huge-14 (.pth or .safetensors). Raises UserError."""
    with open_checkpoint(path) as checkpoint:
        header = checkpoint.header
        sizes = tower_sizes(header)
        with torch.device("meta"):
            tower = ClipTower(sizes)
        materialize(
            tower,
            checkpoint,
            rename=lambda key: tower_key(key, sizes.num_layers),
            policy=WeightPolicy(dtype),
            device=device,
            progress=False,
        )
    return tower.eval()


def tower_key(key: str, layers: int) -> str | None:
    """Module path of a key of the file; None for what the first `layers` blocks do not need."""
    name = key.removeprefix(_PREFIX)
    block = _BLOCK.match(name)
    if not key.startswith(_PREFIX) or name.startswith(("post_norm.", "head")) or (block and int(block[1]) >= layers):
        return None
    return name


def tower_sizes(header: Header) -> TowerSizes:
    """Sizes from the shapes; `musubi.config` in the metadata wins. Raises UserError for a file of another kind."""
    path = header.paths[0]
    shapes = {key.removeprefix(_PREFIX): i.shape for key, i in header.tensors.items() if key.startswith(_PREFIX)}
    missing = [key for key in _NEEDED if key not in shapes]
    if missing:
        raise UserError(
            f"{path} is not the CLIP picture encoder: it has no {_PREFIX}{missing[0]}; give "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or the same as .safetensors"
        )
    dim, _, patch, _ = shapes["patch_embedding.weight"]
    blocks = {found[1] for key in shapes if (found := _BLOCK.match(key))}
    sizes = TowerSizes(
        dim=dim,
        num_heads=max(1, dim // _HEAD_DIM),
        num_layers=len(blocks) - 1,
        mlp_dim=shapes["transformer.0.mlp.0.weight"][0],
        patch_size=patch,
        image_size=patch * isqrt(shapes["pos_embedding"][1] - 1),
    )
    said = named_fields(TowerSizes, header.metadata.get("musubi.config"), f"{path}, musubi.config")
    return dataclasses.replace(sizes, **said)
