"""Pre-training of the demo's VAE: Wan's class at a sixth of its width, on painted digits, in four stages.

Crops of images first, then crops of images and clips, then whole pictures; at last the decoder alone, so that latents
are settled before the end and whoever waits for them can begin. The loss is L1 and squared error on an
unclamped decode (diffusers clamps its output, which has no gradient where it saturates), with a little noise on the
latents so that a diffusion model's small errors stay small in pixels. Latents are free while training; at the end an
affine map is folded into `quant_conv` and `post_quant_conv`, so that the family's fixed mean and deviation hold: a
pipeline that normalizes with Wan's constants sees latents of mean 0 and deviation 1.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.flow import keyed
from musubi_tuner.tools.demo import world

ARCHITECTURE: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],  # diffusers' spelling
}


@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps on crops of `size` pixels; a share of the batches holds clips."""

    steps: int
    size: int
    images: int
    clips: int
    clip_share: float
    decoder_only: bool = False
    """The encoder stays as its average was when the stage began."""


@dataclass(frozen=True)
class VaeRecipe:
    """What made the shipped VAE."""

    seed: int = 20261124
    stages: tuple[Stage, ...] = (
        Stage(steps=2400, size=32, images=16, clips=2, clip_share=0.0),
        Stage(steps=3000, size=32, images=16, clips=2, clip_share=0.4),
        Stage(steps=300, size=64, images=8, clips=1, clip_share=0.4),
        Stage(steps=1400, size=64, images=8, clips=1, clip_share=0.5, decoder_only=True),
    )
    rate: float = 2e-3
    last_rate: float = 3e-5
    latent_noise: float = 0.05
    latent_pull: float = 1e-3
    average: float = 0.998
    report_every: int = 100
    save_every: int = 300

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


def build(seed: int) -> nn.Module:
    """A freshly initialized VAE whose causal convolutions run as 2-D ones on single frames."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**ARCHITECTURE)
    speed_up_single_frames(vae)
    return vae


def speed_up_single_frames(vae: nn.Module) -> None:
    """Put a `FrameConv` in every causal convolution's slot; parameters and their names stay."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, WanCausalConv3d):
                setattr(parent, name, FrameConv(child))


class FrameConv(nn.Module):
    """A causal 3-D convolution that skips the taps which meet only its own zero frames: half the time on images."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        self.stride: tuple[int, int, int] = conv.stride
        self.pads: tuple[int, ...] = tuple(conv._padding)  # left, right, top, bottom, past frames, 0

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """x: [B, C, F, H, W]; `cache_x`: the frames before it, where there are any."""
        kernel = self.weight.shape[2]
        if cache_x is None and x.shape[2] == 1 and self.pads[4] == kernel - 1:
            frame = F.pad(x[:, :, 0], self.pads[:4])
            return F.conv2d(frame, self.weight[:, :, -1], self.bias, stride=self.stride[1:]).unsqueeze(2)
        past = self.pads[4]
        if cache_x is not None and past > 0:
            x = torch.cat([cache_x, x], dim=2)
            past -= cache_x.shape[2]
        return F.conv3d(F.pad(x, (*self.pads[:4], past, 0)), self.weight, self.bias, stride=self.stride)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Posterior means `[B, 16, 1 + (F - 1) / 4, H / 8, W / 8]` of pixels `[B, 3, F, H, W]`."""
    return vae._encode(pixels)[:, : ARCHITECTURE["z_dim"]]


def decode_unclamped(vae: Any, latents: Tensor) -> Tensor:
    """Pixels `[B, 3, F, H, W]` without diffusers' clamp, latent frame by latent frame as the causal cache demands."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for index in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return torch.cat(frames, dim=2)


def batch(glyphs: world.Glyphs, stage: Stage, clips: bool, generator: torch.Generator) -> Tensor:
    """Painted crops `[B, 3, 1 | 9, size, size]`: turned, scaled digits in plain, blended and hue-gradient inks."""
    count = stage.clips if clips else stage.images
    picks = torch.randint(len(glyphs), (count,), generator=generator)
    masks = world.jitter(glyphs.masks[picks], generator)
    inks = world.random_inks(count, generator)
    if clips:
        pixels = torch.stack([_clip(mask, ink, generator) for mask, ink in zip(masks, inks, strict=True)])
    else:
        pixels = world.paint(masks, inks).unsqueeze(2)
    top, left = torch.randint(world.SIZE - stage.size + 1, (2,), generator=generator).tolist()
    return pixels[..., top : top + stage.size, left : left + stage.size]


def _clip(mask: Tensor, ink: Tensor, generator: torch.Generator) -> Tensor:
    direction = tuple(world.DIRECTIONS)[int(torch.randint(4, (1,), generator=generator))]
    frames = world.paint(world.moving(mask, direction), world.moving(ink, direction).transpose(0, 1))
    return frames.transpose(0, 1)  # [3, F, H, W]


def fixed_sets(glyphs: world.Glyphs, count: int = 24) -> dict[str, Tensor]:
    """The pictures that judge: held-out scans in plain colors and in the rainbow, still and moving."""
    picks = torch.arange(count) * (len(glyphs) // count)
    masks, inks = glyphs.masks[picks], [world.solid(name) for name in world.COLORS]
    plain = torch.stack([inks[i % len(inks)].expand(3, world.SIZE, world.SIZE) for i in range(count)])
    rainbow = world.rainbow().expand(count, -1, -1, -1)
    directions = tuple(world.DIRECTIONS)

    def clips(ink: Tensor) -> Tensor:
        moved = [
            world.paint(
                world.moving(masks[i], directions[i % 4]), world.moving(ink[i], directions[i % 4]).transpose(0, 1)
            )
            for i in range(count // 3)
        ]
        return torch.stack(moved).transpose(1, 2)

    return {
        "plain": world.paint(masks, plain).unsqueeze(2),
        "rainbow": world.paint(masks, rainbow).unsqueeze(2),
        "plain clips": clips(plain),
        "rainbow clips": clips(rainbow),
    }


@torch.no_grad()
def psnr(vae: nn.Module, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the clamped reconstruction, over the whole set (range 2)."""
    error = (decode_unclamped(vae, encode(vae, pixels)).clamp(-1, 1) - pixels).square().mean().item()
    return 10 * math.log10(4 / error)


def loss_of(vae: Any, pixels: Tensor, recipe: VaeRecipe, generator: torch.Generator) -> Tensor:
    """L1 / 2 + 2 squared error of the noisy reconstruction, and a weak pull of the latents towards unit scale."""
    with torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
        latents = encode(vae, pixels)
    noisy = latents + recipe.latent_noise * torch.randn(latents.shape, generator=generator)
    error = decode_unclamped(vae, noisy) - pixels
    return 0.5 * error.abs().mean() + 2 * error.square().mean() + recipe.latent_pull * latents.square().mean()


def rate_at(step: int, recipe: VaeRecipe) -> float:
    """Linear warm-up over 50 steps, then half a cosine from `rate` to `last_rate`."""
    if step < 50:
        return recipe.rate * (step + 1) / 50
    done = (step - 50) / max(1, recipe.steps - 50)
    return recipe.last_rate + (recipe.rate - recipe.last_rate) * 0.5 * (1 + math.cos(math.pi * done))


def train(recipe: VaeRecipe, folder: Path) -> nn.Module:
    """The averaged VAE after all stages. Goes on from `folder/vae_state.pt` where that file is there."""
    glyphs, judges = world.load_glyphs(held_out=False), fixed_sets(world.load_glyphs(held_out=True))
    vae, average = build(recipe.seed), build(recipe.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=1e-4)
    state_file = folder / "vae_state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    sums: dict[str, list[float]] = {"images": [], "clips": []}
    started = time.perf_counter()
    for step in range(first, recipe.steps):
        stage, generator = recipe.stage_at(step), keyed.generator(recipe.seed, "vae", step)
        if stage.decoder_only:
            settle_encoder(vae, average)
        clips = bool(torch.rand((), generator=generator) < stage.clip_share)
        loss = loss_of(vae, batch(glyphs, stage, clips, generator), recipe, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate_at(step, recipe)
        optimizer.step()
        _follow(average, vae, min(recipe.average, (step + 1) / (step + 10)))
        sums["clips" if clips else "images"].append(loss.item())
        if (step + 1) % recipe.report_every == 0:
            _report(step + 1, sums, average, judges, time.perf_counter() - started)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            state = {"vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1}, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    return average


@torch.no_grad()
def settle_encoder(vae: Any, average: Any) -> None:
    """Give the model the averaged encoder and train it no more; doing so again changes nothing."""
    for side in ("encoder", "quant_conv"):
        part = getattr(vae, side)
        if any(p.requires_grad for p in part.parameters()):
            part.load_state_dict(getattr(average, side).state_dict())
            part.requires_grad_(False)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _report(step: int, sums: dict[str, list[float]], vae: nn.Module, judges: dict[str, Tensor], seconds: float) -> None:
    losses = "  ".join(f"{kind} {sum(values) / len(values):.4f}" for kind, values in sums.items() if values)
    for values in sums.values():
        values.clear()
    names = judges if step % 500 == 0 else ("plain", "rainbow")
    quality = "  ".join(f"{name} {psnr(vae, judges[name]):.1f}" for name in names)
    print(f"{step:6d}  {seconds:6.0f} s  loss {losses}  dB {quality}", flush=True)


def typical_pixels(seed: int, count: int = 240) -> list[Tensor]:
    """What the DiT will be trained on: stills and clips in plain colors, `[B, 3, F, 64, 64]` each."""
    glyphs, generator = world.load_glyphs(held_out=False), keyed.generator(seed, "typical")
    picks = torch.randperm(len(glyphs), generator=generator)[:count]
    colors, directions = tuple(world.COLORS), tuple(world.DIRECTIONS)
    inks = [world.solid(colors[i % len(colors)]) for i in range(count)]
    stills = world.paint(glyphs.masks[picks], torch.stack(inks)).unsqueeze(2)
    clips = [
        world.paint(world.moving(glyphs.masks[pick], directions[i % 4]), inks[i]).transpose(0, 1)
        for i, pick in enumerate(picks[: count // 10].tolist())
    ]
    return [*stills.split(40), torch.stack(clips)]


@torch.no_grad()
def fold_statistics(vae: Any, pixels: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> None:
    """Make latents of `pixels` come out with the given mean and deviation per channel, and decode as before.

    With u the free latent of mean m and deviation s: z = (u - m) / s * std + mean leaves `quant_conv`, and
    `post_quant_conv` undoes it. Both are 1 x 1 x 1, so the map is exact. The log-variance half becomes constant.
    """
    latents = torch.cat([encode(vae, part).transpose(0, 1).flatten(1) for part in pixels], dim=1).double()
    m, s = latents.mean(1), latents.std(1)
    target, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    gain = spread / s
    dim = ARCHITECTURE["z_dim"]
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight.double(), quant.bias.double()
    weight[:dim] *= gain.reshape(-1, 1, 1, 1, 1)
    bias[:dim] = (bias[:dim] - m) * gain + target
    weight[dim:], bias[dim:] = 0, 2 * torch.log(0.05 * spread)
    back, offset = post.weight.double(), post.bias.double()
    offset = offset + (back[:, :, 0, 0, 0] * (m - target / gain)).sum(1)
    quant.weight.copy_(weight)
    quant.bias.copy_(bias)
    post.weight.copy_(back / gain.reshape(1, -1, 1, 1, 1))
    post.bias.copy_(offset)
