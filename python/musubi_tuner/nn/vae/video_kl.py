"""The causal video autoencoder with a Gaussian posterior (4 x 8 x 8, 16 channels): diffusers' class and its memory.

    posterior: N(mean, std) of latents as the file was trained; a model's own scale is `scaling` times that

Whole clips are coded at once, so nothing depends on how memory is saved, with one exception: spatial tiles, which the
user asks for, are blended where they overlap. `chunk_frames` runs convolutions over a few frames at a time, exactly.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.flow import keyed
from musubi_tuner.nn.linear import set_module

SCALING: Final = 0.476986
_OVERLAP = 0.25
"""Share of a tile that its neighbour covers too."""


@dataclass(frozen=True)
class VideoKlSizes:
    """Sizes of the autoencoder; the defaults are the published file's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True


@dataclass(frozen=True)
class Savings:
    """How memory is saved. tile: pixels of a spatial tile's side, None: no tiles. chunk_frames: of convolutions."""

    tile: int | None = None
    chunk_frames: int | None = None


TILE: Final = 256


@dataclass(frozen=True)
class SavingOptions:
    """Video VAE"""

    vae_tiling: bool = option(False, help=f"code frames in tiles of {TILE} pixels that are blended: much less memory")
    vae_spatial_tile_sample_min_size: int | None = option(
        None, help="side of the tiles in pixels; turns tiling on", minimum=64
    )
    vae_chunk_size: int | None = option(
        None, help="frames that a convolution works on at once: less memory, the same numbers", minimum=1
    )

    @property
    def savings(self) -> Savings:
        """The options as the VAE takes them."""
        size = self.vae_spatial_tile_sample_min_size
        return Savings(size or (TILE if self.vae_tiling else None), self.vae_chunk_size)


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> VideoKlSizes:
    """Sizes but for the groups of its norms. Raises UserError for a file of another kind."""
    needed = ("encoder.conv_in.conv.weight", "encoder.down_blocks.0.resnets.0.conv1.conv.weight")
    missing = [key for key in (*needed, "post_quant_conv.weight") if key not in shapes]
    if missing:
        raise UserError(
            f"{path} is not the causal video VAE (4 x 8 x 8, 16 channels): it has no {missing[0]}; give the VAE file "
            "that was published with the transformer"
        )
    down = {key: shape for key, shape in shapes.items() if key.startswith("encoder.down_blocks.")}
    levels = len({key.split(".")[2] for key in down})
    prefix = "encoder.down_blocks.0.resnets."
    return VideoKlSizes(
        block_out_channels=tuple(
            down[f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight"][0] for i in range(levels)
        ),
        layers_per_block=len({key[len(prefix) :].split(".")[0] for key in down if key.startswith(prefix)}),
        latent_channels=shapes["post_quant_conv.weight"][0],
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
    )


def empty_vae(sizes: VideoKlSizes) -> nn.Module:
    """diffusers' autoencoder of these sizes; initialised on the current default device."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        block_out_channels=sizes.block_out_channels,
        layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.norm_num_groups,
        mid_block_add_attention=sizes.mid_block_add_attention,
    )


class VideoKlVae:
    """Pixels `[B, 3, F, H, W]` in [-1, 1] <-> latents `[B, C, 1+(F-1)/4, H/8, W/8]`, F = 1 + 4 k."""

    def __init__(self, model: Any, savings: Savings | None = None) -> None:
        savings = savings or Savings()
        # the library cuts clips of more than 16 frames into blended pieces by default
        model.use_framewise_encoding = model.use_framewise_decoding = False
        if savings.tile is not None:
            step = int(savings.tile * (1 - _OVERLAP))
            size = {"tile_sample_min_height": savings.tile, "tile_sample_min_width": savings.tile}
            model.enable_tiling(**size, tile_sample_stride_height=step, tile_sample_stride_width=step)
        if savings.chunk_frames is not None:
            _chunk_convolutions(model, savings.chunk_frames)
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device) -> "VideoKlVae":
        """Move to `device`; the same object."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, float32, unscaled."""
        weight = next(self.model.parameters())
        found = self.model.encode(pixels.to(weight.device, weight.dtype)).latent_dist
        mean, log_variance = found.parameters.float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled mean of the posterior, in the VAE's dtype."""
        return (self.posterior(pixels)[0] * SCALING).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32, of scaled latents; not clamped."""
        weight = next(self.model.parameters())
        unscaled = latents.to(weight.device, torch.float32) / SCALING
        return self.model.decode(unscaled.to(weight.dtype)).sample.float()


def sample_latents(vae: VideoKlVae, pixels: Tensor) -> Tensor:
    """A sample of the posterior for each clip of `pixels: [B, 3, F, H, W]`, float32, unscaled.

    Its noise is keyed by the clip's own content (its values rounded to 8 bits), so a picture gets the same latents in
    every batch, order, process and run.
    """
    mean, std = vae.posterior(pixels)
    noise = torch.stack([keyed.normal(mean.shape[1:], "posterior", _content(clip)) for clip in pixels])
    return mean + std * noise.to(mean.device)


def _content(clip: Tensor) -> str:
    """A hash of the clip's values as bytes 0..255."""
    values = ((clip.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous()
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=16).hexdigest()


class ChunkedCausalConv(nn.Module):
    """A causal convolution over `frames` output frames at a time: the same numbers from smaller workspaces."""

    def __init__(self, conv: nn.Conv3d, padding: tuple[int, ...], mode: str, frames: int) -> None:
        super().__init__()
        self.conv, self.padding, self.mode, self.frames = conv, padding, mode, frames

    def forward(self, x: Tensor) -> Tensor:
        *sides, front, _ = self.padding
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        total = (x.shape[2] + front - kernel) // stride + 1
        parts = []
        for first in range(0, total, self.frames):
            last = min(first + self.frames, total) - 1
            begin, end = first * stride - front, last * stride + kernel - front  # of x, before it is padded
            piece = F.pad(x[:, :, max(begin, 0) : end], (*sides, max(-begin, 0), 0), mode=self.mode)
            parts.append(self.conv(piece))
        return torch.cat(parts, dim=2)


def _chunk_convolutions(model: Any, frames: int) -> None:
    kind = type(model.encoder.conv_in)  # the library's causal convolution
    for path, module in [(path, module) for path, module in model.named_modules() if type(module) is kind]:
        set_module(model, path, ChunkedCausalConv(module.conv, module.time_causal_padding, module.pad_mode, frames))
