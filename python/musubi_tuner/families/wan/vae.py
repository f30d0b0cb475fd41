"""Wan's causal 3-D VAE: diffusers' class, fed from the original file, in the scale that the transformer knows.

    encode: (mean of the posterior - m_c) / s_c        decode: pixels clamped to [-1, 1]

Videos have 1 + 4 k frames: the first is coded alone, then four at a time with cached features.

What conditions a video is coded as a video too: the given frames in their places and grey, which is 0, in the others,
before them 4 channels that mark which frames are given. A latent frame stands for four frames, hence four channels; of
the first frame, which is coded alone, all four are marked.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.one_frame import OneFrame
from musubi_tuner.families.base import Encoders, Item, Vae
from musubi_tuner.families.wan.options import CacheLatentOptions, EncodingOptions
from musubi_tuner.families.wan.spec import LATENT_MEAN, LATENT_STD, SPEC
from musubi_tuner.nn.vision.clip import ClipTower
from musubi_tuner.weights.encoders import TextAndPicture
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.sizes import named_fields


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of the VAE; the defaults are the published file's."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


class WanVae:
    """Pixels `[B, 3, F, H, W]` in [-1, 1] <-> latents `[B, 16, 1+(F-1)/4, H/8, W/8]`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        first = next(model.parameters())
        self.mean = first.new_tensor(LATENT_MEAN, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.std = first.new_tensor(LATENT_STD, dtype=torch.float32).view(1, -1, 1, 1, 1)

    def to(self, device: torch.device) -> "WanVae":
        """Move to `device`; the same object."""
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised posterior mean, in the VAE's dtype. Raises ValueError for a size that the network would cut."""
        grid, (frames, height, width) = SPEC.latents, pixels.shape[2:]
        if (frames - 1) % grid.temporal or height % grid.spatial or width % grid.spatial:
            raise ValueError(
                f"clip of {frames} frames, {height} x {width} pixels (height x width): the VAE takes 1 + "
                f"{grid.temporal} k frames, height and width in multiples of {grid.spatial}"
            )
        weight = next(self.model.parameters())
        mean = self.model.encode(pixels.to(weight.device, weight.dtype)).latent_dist.mode()
        return ((mean.float() - self.mean) / self.std).to(weight.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32."""
        weight = next(self.model.parameters())
        z = latents.to(weight.device, torch.float32) * self.std + self.mean
        return self.model.decode(z.to(weight.dtype)).sample.float().clamp(-1, 1)


def empty_vae(config: VaeConfig, *, cache_on_cpu: bool = False) -> nn.Module:
    """diffusers' autoencoder of these sizes; initialised on the current default device.

    cache_on_cpu: the features that are kept from frames to the next ones lie in CPU memory.
    """
    from diffusers import AutoencoderKLWan

    class CachingOnCpu(AutoencoderKLWan):
        def clear_cache(self) -> None:
            super().clear_cache()
            self._feat_map, self._enc_feat_map = _OnCpu(self._feat_map), _OnCpu(self._enc_feat_map)

    kind = CachingOnCpu if cache_on_cpu else AutoencoderKLWan
    return kind(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )


class _OnCpu(list[Any]):
    """A list of features that puts tensors into CPU memory, and gives them back on the device that they came from."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__(values)
        self.devices: dict[int, torch.device] = {}

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            self.devices[index], value = value.device, value.to("cpu")
        super().__setitem__(index, value)

    def __getitem__(self, index: Any) -> Any:
        value = super().__getitem__(index)
        return value.to(self.devices[index]) if isinstance(value, Tensor) else value


def load_vae(path: str, *, device: torch.device, dtype: torch.dtype, cache_on_cpu: bool = False) -> WanVae:
    """The VAE of the original file (Wan2.1_VAE.pth or .safetensors). Raises UserError where it is something else."""
    with open_checkpoint(path) as checkpoint:
        header = checkpoint.header
        if "encoder.conv1.weight" not in header.tensors or "decoder.head.2.weight" not in header.tensors:
            raise UserError(
                f"{path} is not a Wan VAE: it has no encoder.conv1.weight or no decoder.head.2.weight; give "
                "Wan2.1_VAE.pth or wan_2.1_vae.safetensors"
            )
        named = named_fields(VaeConfig, header.metadata.get("musubi.config"), f"{path}, musubi.config")
        base = header.tensors["encoder.conv1.weight"].shape[0]
        config = dataclasses.replace(VaeConfig(base_dim=base), **named)
        with torch.device("meta"):
            model = empty_vae(config, cache_on_cpu=cache_on_cpu)
        materialize(
            model,
            checkpoint,
            rename=lambda key: vae_key(key, config.num_res_blocks),
            policy=WeightPolicy(dtype),
            device=device,
            progress=False,
        )
    return WanVae(model.eval())


def to_original_keys(state: Mapping[str, Any], config: VaeConfig) -> dict[str, Any]:
    """A diffusers state dictionary under the original file's keys."""
    return {original_vae_key(key, config.num_res_blocks): value for key, value in state.items()}


def encoded(items: Sequence[Item], coder: Vae, encoders: Encoders | None) -> list[list[dict[str, Tensor]]]:
    """What `coder` and the tower make of training items, or of the pictures of requests."""
    if not isinstance(coder, WanVae):
        raise TypeError(f"Wan latents are those of its own VAE, not of {type(coder).__name__}")
    tower = encoders.picture if isinstance(encoders, TextAndPicture) else None
    chosen = encoders.options if isinstance(encoders, TextAndPicture) else None
    if items[0].pixels is None and items[0].controls:
        single = chosen.single if isinstance(chosen, EncodingOptions) else None
        return [[request_entry(item, coder, tower, single)] for item in items]
    given = ""
    if isinstance(chosen, CacheLatentOptions):
        if chosen.one_frame:
            return [[one_frame_entry(item, coder, tower)] for item in items]
        given = "both" if chosen.flf2v else "first" if chosen.i2v or chosen.clip else ""
    return [[entry] for entry in training_entries(items, coder, tower, given)]


def training_entries(
    items: Sequence[Item], vae: WanVae, tower: ClipTower | None, given: str
) -> list[dict[str, Tensor]]:
    """The cache entry of each of `items`, which have one shape.

    given: frames that the model is to be given: none (``), the first (`first`), or that and the last (`both`).
    """
    clips = torch.stack([item.pixels for item in items if item.pixels is not None])
    if len(clips) != len(items):
        raise ValueError("an item without pixels has no latents")
    columns = {"latents": vae.encode(clips)}
    if all(item.controls for item in items):
        if any(len(item.controls) > 1 for item in items):
            raise UserError(
                f"an item has {max(len(item.controls) for item in items)} controls ({items[0].caption[:60]!r}): a clip "
                "takes one control clip; several control pictures are for --one_frame"
            )
        columns["control"] = vae.encode(torch.stack([item.controls[0] for item in items]))
    if given:
        frames = {0: clips[:, :, 0]} | ({clips.shape[2] - 1: clips[:, :, -1]} if given == "both" else {})
        columns |= given_frames(frames, clips.shape[2], vae, tower)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(items))]


def request_entry(
    item: Item, vae: WanVae, tower: ClipTower | None, single: OneFrame | None = None
) -> dict[str, Tensor]:
    """Fields of a request's pictures and control clip, float32; of a `single` picture also `kept`."""
    by_role = dict(zip(item.roles, item.controls, strict=True))
    if single is not None:
        if item.frames != 1:
            raise UserError(f"one-frame mode makes one picture, not {item.frames} frames: give --video_length 1")
        found = at_times(single, item.controls, vae, tower)
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    if "control" in by_role:
        raise UserError("control pictures are for --one_frame_inference; a first frame is given with --image_path")
    places = {"start": 0, "end": item.frames - 1}
    frames = {place: by_role[role][None, :, 0] for role, place in places.items() if role in by_role}
    found = (
        {name: column[0] for name, column in given_frames(frames, item.frames, vae, tower).items()} if frames else {}
    )
    if "control_clip" in by_role:
        found["control"] = vae.encode(by_role["control_clip"][None])[0]
    return {name: value.float() for name, value in found.items()}


def one_frame_entry(item: Item, vae: WanVae, tower: ClipTower | None) -> dict[str, Tensor]:
    """The cache entry of a picture and its control pictures; all of them are the training target, as established."""
    if item.pixels is None or item.pixels.shape[1] != 1:
        raise UserError("--one_frame takes pictures, not clips: use an image dataset")
    plan = OneFrame.of_dataset(item.said, half=True, quarter=True)
    found = at_times(plan, item.controls, vae, tower, item.pixels)
    found.pop("kept")
    return found


TARGET_TIME: Final = 1
"""Time of a single picture that was told none."""


def at_times(
    plan: OneFrame, controls: Sequence[Tensor], vae: WanVae, tower: ClipTower | None, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Fields of a single picture among `controls: [3, 1, H, W]`, each a frame at its time, in the order of the times.

    image: [20, n + 1, h, w], grey for the picture. positions: [n + 1]. clip: [N, W] with a tower. kept: n + 1 frames
    and the place of the picture among them. latents: [16, n + 1, h, w], where a `target: [3, 1, H, W]` is given.
    """
    times = (*plan.times(len(controls)), TARGET_TIME if plan.target is None else plan.target)
    if len(set(times)) < len(times):
        raise UserError(
            f"one-frame mode: times {', '.join(map(str, times[:-1]))} and {times[-1]}: each must be another"
        )
    if len({tuple(picture.shape) for picture in (*controls, *(() if target is None else (target,)))}) > 1:
        raise UserError("one-frame mode: controls have the size of the picture; leave control_resolution out")
    order = sorted(range(len(times)), key=times.__getitem__)
    given = [vae.encode(picture[None])[0] for picture in controls]
    grey = vae.encode(torch.zeros_like(controls[0])[None])[0]
    marked = [torch.cat([torch.ones_like(x[:4]), x]) for x in given] + [torch.cat([torch.zeros_like(grey[:4]), grey])]
    found = {
        "image": torch.cat([marked[i] for i in order], dim=1),
        "positions": torch.tensor(sorted(times), dtype=torch.int32),
        "kept": torch.tensor([len(times), order.index(len(controls))]),
    }
    if target is not None:
        latents = [*given, vae.encode(target[None])[0]]
        found["latents"] = torch.cat([latents[i] for i in order], dim=1)
    if tower is not None:
        features = [tower.encode(picture[None, :, 0])[0] for picture in controls]
        found["clip"] = torch.cat(features).to(grey.dtype)
    return found


def given_frames(given: Mapping[int, Tensor], frames: int, vae: WanVae, tower: ClipTower | None) -> dict[str, Tensor]:
    """`image: [B, 20, F', h, w]`: marks and latents of a clip that has `given` frames `[B, 3, H, W]`, by place.

    With a tower also `clip: [B, N, W]`, the features of each given frame in order.
    """
    first = next(iter(given.values()))
    clip = first.new_zeros(len(first), 3, frames, *first.shape[2:])
    marks = torch.zeros(4 + frames - 1)  # by frame, the first one four times
    for place, picture in given.items():
        clip[:, :, place] = picture
        marks[3 + place] = 1
        if place == 0:
            marks[:4] = 1
    latents = vae.encode(clip)
    shown = marks.view(-1, 4).T[None, :, :, None, None].expand(len(first), -1, -1, *latents.shape[3:])
    found = {"image": torch.cat([shown.to(latents), latents], dim=1)}
    if tower is not None:
        found["clip"] = torch.cat([tower.encode(picture) for picture in given.values()], dim=1).to(latents.dtype)
    return found


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
