"""Wan's causal 3-D VAE: diffusers' class, fed from the original file, in the scale that the transformer knows.

    encode: (mean of the posterior - m_c) / s_c        decode: pixels clamped to [-1, 1]

Videos have 1 + 4 k frames: the first is coded alone, then four at a time with cached features.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.wan.keys import original_vae_key, vae_key
from musubi_tuner.families.wan.spec import LATENT_MEAN, LATENT_STD, SPEC
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


def empty_vae(config: VaeConfig) -> nn.Module:
    """diffusers' autoencoder of these sizes; initialised on the current default device."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )


def load_vae(path: str, *, device: torch.device, dtype: torch.dtype) -> WanVae:
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
            model = empty_vae(config)
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
