"""A tiny transformer of every family, with seeded weights, for tests that run whatever families there are.

A family that is added gets one row in `TINY`; `tests/families/test_contract.py` fails without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from musubi_tuner.families import registry
from musubi_tuner.flow import keyed, sections
from musubi_tuner.weights.reader import Header, TensorInfo


@dataclass(frozen=True)
class Tiny:
    """sizes: the family's configuration. entry: a text-cache entry of n tokens, by field name."""

    sizes: dict[str, object]
    entry: Callable[[int], dict[str, Tensor]]
    latents: tuple[int, int, int, int]


def _wan_shapes(sizes: dict[str, object]) -> dict[str, tuple[int, ...]]:
    from musubi_tuner.families.wan.model import WanConfig, WanModel

    with torch.device("meta"):
        model = WanModel(WanConfig(**sizes))  # type: ignore[arg-type]
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _hunyuan_video_shapes(sizes: dict[str, object]) -> dict[str, tuple[int, ...]]:
    from musubi_tuner.families.hunyuan_video.model import HunyuanVideoConfig, HunyuanVideoModel

    with torch.device("meta"):
        model = HunyuanVideoModel(HunyuanVideoConfig(**sizes))  # type: ignore[arg-type]
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _framepack_shapes(sizes: dict[str, object]) -> dict[str, tuple[int, ...]]:
    from musubi_tuner.families.framepack.model import FramePackConfig, FramePackModel

    with torch.device("meta"):
        model = FramePackModel(FramePackConfig(**sizes))  # type: ignore[arg-type]
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _framepack_entry(tokens: int) -> dict[str, Tensor]:
    """Text as the cache has it, and a picture with a history of its own for each number of tokens."""
    start, later = (keyed.normal((16, n, 4, 6), "tiny", "history", n, tokens) for n in (1, 4))
    return {
        **_hunyuan_video_entry(tokens),
        **sections.inverted(start, later, 2, 1),
        "image": keyed.normal((5, 20), "tiny", "image", tokens),
    }


def _hunyuan_video_entry(tokens: int) -> dict[str, Tensor]:
    """Features as the text cache has them: eight rows, the real ones first, something in the others."""
    return {
        "text": keyed.normal((8, 24), "tiny", "text", tokens),
        "mask": (torch.arange(8) < tokens).long(),
        "pooled": keyed.normal((12,), "tiny", "pooled", tokens),
    }


SHAPES: dict[str, Callable[[dict[str, object]], dict[str, tuple[int, ...]]]] = {
    "wan": _wan_shapes,
    "hunyuan_video": _hunyuan_video_shapes,
    "framepack": _framepack_shapes,
}
TINY: dict[str, Tiny] = {
    "wan": Tiny(
        {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 3, "text_dim": 24, "text_len": 6},
        lambda n: {"text": keyed.normal((n, 24), "tiny", "text", n)},
        (16, 2, 4, 6),
    ),
    "hunyuan_video": Tiny(
        {
            "hidden_size": 64,
            "num_heads": 2,
            "num_double_blocks": 2,
            "num_single_blocks": 2,
            "mlp_ratio": 2.0,
            "text_dim": 24,
            "pooled_text_dim": 12,
            "rope_axes_dims": (8, 12, 12),
        },
        _hunyuan_video_entry,
        (16, 2, 4, 6),
    ),
    "framepack": Tiny(
        {
            "hidden_size": 64,
            "num_heads": 2,
            "num_double_blocks": 2,
            "num_single_blocks": 2,
            "mlp_ratio": 2.0,
            "text_dim": 24,
            "pooled_text_dim": 12,
            "image_embed_dim": 20,
            "rope_axes_dims": (8, 12, 12),
        },
        _framepack_entry,
        (16, 2, 4, 6),
    ),
}


def header_of(name: str, **sizes: object) -> Header:
    """The header that a file of the tiny model would have; `sizes` differ from the usual ones."""
    path = Path(f"tiny_{name}.safetensors")
    shapes = SHAPES[name](TINY[name].sizes | sizes)
    tensors = {key: TensorInfo(shape=shape, dtype=torch.float32, file=path) for key, shape in shapes.items()}
    return Header(tensors=tensors, metadata={}, paths=(path,))


def tiny_dit(name: str, **sizes: object) -> nn.Module:
    """The tiny transformer in float32 with seeded weights, small enough to keep activations in range."""
    family = registry.get(name)
    dit = family.build_dit(header_of(name, **sizes), TINY[name].sizes | sizes).to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in dit.named_parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(keyed.normal(parameter.shape, "tiny", name, key) * scale)
    return dit.requires_grad_(False).eval()
