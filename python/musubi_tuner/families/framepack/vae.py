"""What pictures become: latents by the causal video VAE, 729 tokens by SigLIP's tower, and of both the cache's entries.

Latents are a sample of the posterior times 0.476986, the transformer's own scale. A long video is decoded in pieces
that overlap by all but one section and are blended there, as the published samplers do; memory is that of two sections
whatever the length.
Source: SigLIP (Zhai et al. 2023); the tower as published for FLUX Redux, which FramePack uses.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.one_frame import OneFrame
from musubi_tuner.families.base import Item
from musubi_tuner.families.framepack.options import CacheLatentOptions
from musubi_tuner.families.framepack.spec import SPEC, WINDOW
from musubi_tuner.flow import sections
from musubi_tuner.flow.sections import Fields
from musubi_tuner.nn.vae.video_kl import (
    SCALING,
    Savings,
    VideoKlSizes,
    VideoKlVae,
    empty_vae,
    sample_latents,
    sizes_from_shapes,
)
from musubi_tuner.weights.keys import Rename, same
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import WeightPolicy
from musubi_tuner.weights.reader import Header, open_checkpoint
from musubi_tuner.weights.sizes import named_fields

_VAE_PREFIX, _TOWER_PREFIX = "vae.", "vision_model."
_STEP = SPEC.latents.temporal
_PUBLISHED_SIDE = 384
"""Pixels of the published tower's square; its 27 patches of 14 leave the last 6 unseen."""


class SectionVae(VideoKlVae):
    """The video VAE that decodes a long video in pieces. window: latent frames of a section; None: all at once."""

    def __init__(self, model: Any, savings: Savings | None, window: int | None) -> None:
        super().__init__(model, savings)
        self.window = window

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled sample of the posterior `[B, 16, F, h, w]`, in the VAE's dtype."""
        return (sample_latents(self, pixels) * SCALING).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32, of scaled latents; not clamped."""
        if self.window is None or latents.shape[2] <= 2 * self.window + 1:
            return super().decode(latents)
        return in_pieces(super().decode, latents, self.window)


def in_pieces(decode: Callable[[Tensor], Tensor], latents: Tensor, window: int) -> Tensor:
    """Pixels of `latents: [B, 16, 1 + n window, h, w]`: two sections at a time from the end, blended with the rest.

    The last piece, at the left, begins with the start frame, so it has one frame more.
    """
    shared = 4 * window - 3
    first = latents.shape[2] - window
    pixels = decode(latents[:, :, first:])
    while first > 0:
        begin = first - window if first - window > 1 else 0
        piece = decode(latents[:, :, begin : first + window])
        pixels = blended(piece, pixels, shared)
        first = begin
    return pixels


def blended(left: Tensor, right: Tensor, shared: int) -> Tensor:
    """Two clips `[B, 3, F, H, W]` of which `shared` frames are the same time; weights fall from left to right."""
    weight = torch.linspace(1, 0, shared, dtype=left.dtype, device=left.device).view(1, 1, -1, 1, 1)
    middle = weight * left[:, :, -shared:] + (1 - weight) * right[:, :, :shared]
    return torch.cat([left[:, :, :-shared], middle, right[:, :, shared:]], dim=2)


def load_vae(
    path: str, *, device: torch.device, dtype: torch.dtype, savings: Savings | None, window: int | None
) -> SectionVae:
    """The VAE of its file or folder. Raises UserError where it is something else."""
    with open_checkpoint(path) as checkpoint:
        rename = _without(_VAE_PREFIX, checkpoint.header.tensors)
        sizes = sizes_from_shapes(_shapes(checkpoint.header, rename), checkpoint.header.paths[0])
        with torch.device("meta"):
            model = empty_vae(dataclasses.replace(sizes, **_named(VideoKlSizes, checkpoint.header)))
        materialize(model, checkpoint, rename=rename, policy=WeightPolicy(dtype), device=device, progress=False)
    return SectionVae(model.eval(), savings, window)


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of the picture tower."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int


@dataclass
class PictureEncoder:
    """Pictures -> the tower's last hidden state."""

    model: nn.Module
    size: int

    def to(self, device: torch.device) -> "PictureEncoder":
        """Move to `device`; the same object."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, picture: Tensor) -> Tensor:
        """Features [tokens, W] of `picture: [3, H, W]` in [-1, 1], which is squeezed to the tower's square."""
        values = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu()
        square = Image.fromarray(values.numpy()).resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
        weight = next(self.model.parameters())
        return self.model(pixel_values=pixels.to(weight.device, weight.dtype)[None]).last_hidden_state[0]


def load_picture_encoder(path: str, *, device: torch.device, dtype: torch.dtype) -> PictureEncoder:
    """SigLIP's tower of its file or folder; its pooling head is not read. Raises UserError for something else."""
    with open_checkpoint(path) as checkpoint:
        header = checkpoint.header
        sizes = dataclasses.replace(tower_sizes(header), **_named(TowerSizes, header))
        model = empty_tower(sizes)
        inner = hasattr(model, "vision_model")
        materialize(
            model,
            checkpoint,
            rename=lambda key: _tower_key(key, inner),
            policy=WeightPolicy(dtype),
            device=device,
            progress=False,
        )
    return PictureEncoder(model.to(device).eval(), sizes.image_size)


def tower_sizes(header: Header) -> TowerSizes:
    """Sizes from shapes; heads are 72 wide, as published. Raises UserError for a file of another kind."""
    shapes = {_tower_key(key, False): info.shape for key, info in header.tensors.items()}
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
    missing = [key for key in (*needed, "encoder.layers.0.mlp.fc1.weight") if key not in shapes]
    if missing:
        raise UserError(
            f"{header.paths[0]} is not SigLIP's picture encoder: it has no {_TOWER_PREFIX}{missing[0]}; give "
            "sigclip_vision_patch14_384.safetensors, or image_encoder/model.safetensors of flux_redux_bfl"
        )
    width, _, patch, _ = shapes[needed[0]]
    layers = {key.split(".")[2] for key in shapes if key is not None and key.startswith("encoder.layers.")}
    inner, side = shapes["encoder.layers.0.mlp.fc1.weight"][0], isqrt(shapes[needed[1]][0])
    size = _PUBLISHED_SIDE if (side, patch) == (27, 14) else side * patch
    return TowerSizes(width, inner, len(layers), max(1, width // 72), patch, size)


def empty_tower(sizes: TowerSizes) -> Any:
    """transformers' picture tower without its pooling head, on meta but for its table of positions."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        patch_size=sizes.patch_size,
        image_size=sizes.image_size,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    config.vision_use_head = False
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    tower = model.vision_model if hasattr(model, "vision_model") else model
    count = (sizes.image_size // sizes.patch_size) ** 2
    tower.embeddings.position_ids = torch.arange(count).unsqueeze(0)
    return model


def _tower_key(key: str, inner: bool) -> str | None:
    """The key in the library's model, whose tower has a prefix in some versions; None: head and other towers."""
    name = key.removeprefix(_TOWER_PREFIX)
    if name.startswith(("head.", "text_model.", "logit_")) or name.endswith("position_ids"):
        return None
    return f"{_TOWER_PREFIX}{name}" if inner else name


def _without(prefix: str, keys: Iterable[str]) -> Rename:
    """Where any key begins with `prefix`, the others belong to something else."""
    if not any(key.startswith(prefix) for key in keys):
        return same
    return lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None


def _shapes(header: Header, rename: Rename) -> Mapping[str, tuple[int, ...]]:
    return {name: info.shape for key, info in header.tensors.items() if (name := rename(key)) is not None}


def _named(kind: type, header: Header) -> dict[str, Any]:
    return named_fields(kind, header.metadata.get("musubi.config"), f"{header.paths[0]}, musubi.config")


def training_entries(
    items: Sequence[Item], vae: SectionVae, encoder: PictureEncoder, options: CacheLatentOptions
) -> list[list[Fields]]:
    """The cache entries of items of one shape: one for each section of a clip, or one picture. Raises UserError."""
    if options.one_frame:
        return [[_one_frame(item, vae, encoder, options)] for item in items]
    window = int(items[0].said.get("fp_latent_window_size", WINDOW))
    frames = items[0].frames
    count = (frames - 1) // (_STEP * window)
    if count < 1:
        raise UserError(
            f"a clip of {frames} frames ({items[0].caption[:60]!r}): a section has {window} latent frames, so it takes "
            f"at least {_STEP * window + 1}: use longer clips (frame_extraction = full), a smaller "
            "fp_latent_window_size, or for pictures --one_frame"
        )
    pixels = torch.stack([_pixels(item)[:, : 1 + count * window * _STEP] for item in items])
    found = []
    for latents, clip in zip(vae.encode(pixels), pixels, strict=True):
        image = encoder.encode(clip[:, 0])
        found.append([{**told, "image": image} for told in sections.of_clip(latents, window, in_time=options.f1)])
    return found


def _one_frame(item: Item, vae: SectionVae, encoder: PictureEncoder, options: CacheLatentOptions) -> Fields:
    """A picture and its controls, each coded as a clip of one frame."""
    target = _pixels(item)
    if target.shape[1] != 1:
        raise UserError(f"--one_frame takes pictures, not clips of {target.shape[1]} frames: use an image dataset")
    plan = OneFrame.of_dataset(item.said, half=not options.one_frame_no_2x, quarter=not options.one_frame_no_4x)
    plan.times(len(item.controls))
    told = sections.one_frame(plan, _latents(item.controls, item.masks, vae=vae, size=target.shape[2:]), WINDOW)
    return {"latents": vae.encode(target[None])[0], **told, "image": encoder.encode(item.controls[0][:, 0])}


def request_fields(item: Item, vae: SectionVae, encoder: PictureEncoder) -> Fields:
    """Latents of a request's pictures by role, `control` together, and the features of the first picture, float32."""
    found: Fields = {}
    size, masks = (item.height, item.width), item.masks or (None,) * len(item.controls)
    for role in ("start", "end", "control"):
        chosen = [(p, m) for p, m, r in zip(item.controls, masks, item.roles, strict=True) if r == role]
        if chosen:
            found[role] = _latents(*zip(*chosen, strict=True), vae=vae, size=size).float()
    starts = [p for p, r in zip(item.controls, item.roles, strict=True) if r == "start"]
    first = next((p for p, r in zip(item.controls, item.roles, strict=True) if r != "end"), item.controls[0])
    if len(starts) > 1:
        found["images"] = torch.stack([encoder.encode(start[:, 0]).float() for start in starts])
    return {**found, "image": encoder.encode(first[:, 0]).float()}


def _latents(
    pictures: Sequence[Tensor], masks: Sequence[Tensor | None], *, vae: SectionVae, size: Sequence[int]
) -> Tensor:
    """`[16, n, h, w]` of pictures `[3, 1, H, W]`, each coded alone, by masks `[1, 1, H, W]` where there are any.

    Raises UserError for a picture of another size.
    """
    for picture in pictures:
        if tuple(picture.shape[2:]) != tuple(size):
            raise UserError(
                f"a control of {picture.shape[3]} x {picture.shape[2]} pixels beside a picture of {size[1]} x {size[0]}"
                ": history has the size of the section; leave no_resize_control and control_resolution out"
            )
    coded = [vae.encode(picture[None, :, :1])[0] for picture in pictures]
    for place, mask in enumerate(masks):
        if mask is not None:
            share = nn.functional.adaptive_avg_pool2d(mask[:, 0], coded[place].shape[2:])
            coded[place] = coded[place] * share.to(coded[place])
    return torch.cat(coded, dim=1)


def _pixels(item: Item) -> Tensor:
    if item.pixels is None:
        raise ValueError("an item without pixels has no latents")
    return item.pixels
