"""The Wan 2.1 and 2.2 transformer, in the order embed, run, head; module paths are the keys of the original checkpoint.

    h = patch(x); for each block: self attention and feed-forward, both shifted, scaled and gated by the time vector,
    with plain cross attention to the text between them; head: shift, scale, linear, unpatch.

What conditions a video joins the input as further channels. Models of version 2.1 that do so also attend to picture
features, by keys and values of their own. Modulation is float32 throughout: the time sinusoid and the rope angles are
float64 before that. Source: Wan 2.1 technical report (Wan team 2025) and its published checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.attention import attention
from musubi_tuner.nn.modulation import float_linear, gated, modulate, sinusoid
from musubi_tuner.nn.norms import LayerNorm, RMSNorm
from musubi_tuner.nn.rope import grid_rotations, rotate, told_rotations
from musubi_tuner.nn.runner import Run, direct

NO_FIRST_FRAME = (
    "this transformer takes 36 channels (image to video) and was given no first frame: cache with wan_cache_latents "
    "--i2v, or sample with --image_path (--i in a prompt line)"
)
NO_FEATURES = (
    "this transformer attends to features of its first frame and was given none: name the CLIP encoder with --clip, "
    "when caching latents (wan_cache_latents --i2v --clip ...) and when sampling"
)
NO_CONTROL = (
    "this transformer takes 48 channels (control) and was given no control: name the control clips in the data set "
    "file (control_directory), or sample with --control_path (--cn in a prompt line)"
)


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a transformer. `head_dim` is dim / num_heads; frequencies and patch are fixed by the training."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    cross_attn_norm: bool = True
    rope_theta: float = 10000.0
    image_embed_dim: int | None = None
    """Width of picture features; None: the model attends to none."""
    image_positions: int = 0
    """Picture tokens with a learned position, where there are such: 514, those of a first and a last frame."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim = {self.dim}, num_heads = {self.num_heads}: dim / num_heads must be an even integer")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head that turn with time, row and column."""
        side = 2 * (self.head_dim // 6)
        return (self.head_dim - 2 * side, side, side)


@dataclass(frozen=True)
class BlockContext:
    """What all blocks share: modulation `[B, 6, D]` float32, rotations `[L, d/2]` or `[B, L, d/2]`, text `[B, T, D]`,
    picture `[B, N, D]` or None."""

    modulation: Tensor
    rotations: Tensor
    text: Tensor
    picture: Tensor | None
    attn_mode: str


class WanModel(nn.Module):
    """Noisy latents `[B, C, F, H, W]`, timestep `[B]` in 0..1000 and text `[B, T, text_dim]` -> velocity."""

    def __init__(self, config: WanConfig, *, attn_mode: str = "sdpa") -> None:
        super().__init__()
        self.config, self.attn_mode = config, attn_mode
        d = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, d, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, d), nn.GELU("tanh"), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        if config.image_embed_dim is not None:
            self.img_emb = PictureEmbedding(config.image_embed_dim, d, config.image_positions)
        self.blocks = nn.ModuleList(WanAttentionBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def pictures(self) -> tuple[str, ...]:
        """Roles of what every request must come with."""
        ends = ("start", "end") if self.config.image_positions else ("start",)
        return {16: (), 36: ends, 48: ("control_clip",)}[self.config.in_channels]

    @property
    def optional_pictures(self) -> tuple[str, ...]:
        """Roles of what it may come with beside these."""
        return {16: (), 36: ("end",), 48: ("start",)}[self.config.in_channels]

    @property
    def conditioned_on(self) -> Mapping[str, str]:
        """Fields that its conditioning must have beside text, each with the sentence for where it is not there."""
        channels, features = self.config.in_channels, self.config.image_embed_dim is not None
        found = {"image": NO_FIRST_FRAME} if channels == 36 else {"control": NO_CONTROL} if channels == 48 else {}
        return found | ({"clip": NO_FEATURES} if channels == 36 and features else {})

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        *,
        picture: Tensor | None = None,
        run: Run = direct,
        frame_positions: Tensor | None = None,
    ) -> Tensor:
        """Velocity of `x`'s shape (channels: `out_channels`), in x's dtype.

        picture: features `[B, N, image_embed_dim]`, for models that attend to them; without, to text alone.
        frame_positions: `[B, F]`, replace 0, 1, 2, ... as the temporal rope positions.
        """
        h, grid = self.patches(x)
        time = self.time_vector(timestep)
        ctx = BlockContext(
            modulation=float_linear(self.time_projection[1], self.time_projection[0](time)).unflatten(1, (6, -1)),
            rotations=self.rotations(grid, x.device, frame_positions),
            text=self.text_embedding(self.padded(text).to(h.dtype)),
            picture=None if picture is None else self.img_emb(picture.to(h.dtype)),
            attn_mode=self.attn_mode,
        )
        h = run(list(self.blocks), h, ctx)
        return self.unpatch(self.head(h, time), grid).to(x.dtype)

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens [B, L, D] in (frame, row, column) order, and the grid."""
        h = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # [B, D, F, H/2, W/2]
        frames, rows, columns = h.shape[2:]
        return h.flatten(2).transpose(1, 2), (frames, rows, columns)

    def time_vector(self, timestep: Tensor) -> Tensor:
        """[B, D] float32 from `timestep: [B]` (0..1000)."""
        wave = sinusoid(timestep, self.config.freq_dim).float()
        first, act, last = self.time_embedding
        return float_linear(last, act(float_linear(first, wave)))

    def padded(self, text: Tensor) -> Tensor:
        """Text zero-padded to `text_len`: the model attends to the padding, as it was trained to."""
        tokens, width = text.shape[1:]
        missing = self.config.text_len - tokens
        if missing < 0 or width != self.config.text_dim:
            raise UserError(
                f"text of {tokens} tokens, {width} wide: this model takes at most {self.config.text_len} tokens, "
                f"{self.config.text_dim} wide; encode the captions with the text encoder that belongs to it"
            )
        return nn.functional.pad(text, (0, 0, 0, missing))

    def rotations(self, grid: tuple[int, int, int], device: torch.device, frames: Tensor | None) -> Tensor:
        """Rope table of the patch grid, [L, head_dim/2]; with `frames: [B, F]` of each sample, [B, L, head_dim/2]."""
        dims, theta = self.config.rope_dims, self.config.rope_theta
        if frames is None:
            return grid_rotations([torch.arange(n, device=device) for n in grid], dims, theta)
        scale = torch.ones(len(frames), device=device)
        return told_rotations(frames.to(device), grid[1:], dims, theta, scale).flatten(1, 3)

    def unpatch(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, pt*ph*pw*C] (channel fastest) -> [B, C, F, H, W]."""
        batch, p = tokens.shape[0], self.config.patch_size
        cells = tokens.reshape(batch, *grid, *p, self.config.out_channels)
        cells = cells.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, F, pt, H, ph, W, pw]
        return cells.reshape(batch, -1, grid[0] * p[0], grid[1] * p[1], grid[2] * p[2])


class WanAttentionBlock(nn.Module):
    """Self attention, cross attention, feed-forward on `h: [B, L, D]`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.dim
        self.norm1 = LayerNorm(d, config.eps, affine=False)
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(d, config.eps, affine=True) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = (Attention if config.image_embed_dim is None else PictureAttention)(config)
        self.norm2 = LayerNorm(d, config.eps, affine=False)
        self.ffn = nn.Sequential(nn.Linear(d, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, d))
        self.modulation = nn.Parameter(torch.zeros(1, 6, d))

    def forward(self, h: Tensor, ctx: BlockContext) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation.float() + ctx.modulation).unbind(1)
        y = self.self_attn(modulate(self.norm1(h), shift_a, scale_a), None, ctx)
        h = gated(h, y, gate_a)
        h = h + self.cross_attn(self.norm3(h), ctx.text, ctx)
        y = self.ffn(modulate(self.norm2(h), shift_f, scale_f))
        return gated(h, y, gate_f)


class Attention(nn.Module):
    """Attention of `x: [B, L, D]` to itself (rotated) or to `text: [B, T, D]`; q and k are normalised over D."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)

    def forward(self, x: Tensor, text: Tensor | None, ctx: BlockContext) -> Tensor:
        source = x if text is None else text
        q = self.heads(self.norm_q(self.q(x)))
        k = self.heads(self.norm_k(self.k(source)))
        v = self.heads(self.v(source))
        if text is None:
            q, k = rotate(q, ctx.rotations), rotate(k, ctx.rotations)
        return self.o(self.attended(q, k, v, ctx).flatten(2))

    def attended(self, q: Tensor, k: Tensor, v: Tensor, ctx: BlockContext) -> Tensor:
        """What the heads of `q: [B, L, heads, d]` gather."""
        return attention(q, k, v, mode=ctx.attn_mode)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, heads, d]."""
        return x.unflatten(-1, (self.num_heads, -1))


class PictureAttention(Attention):
    """Attention to the text, to which that to the picture's tokens is added before the output projection."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
        self.norm_k_img = RMSNorm(config.dim, config.eps)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, ctx: BlockContext) -> Tensor:
        y = super().attended(q, k, v, ctx)
        if ctx.picture is None:
            return y
        k, v = self.heads(self.norm_k_img(self.k_img(ctx.picture))), self.heads(self.v_img(ctx.picture))
        return y + attention(q, k, v, mode=ctx.attn_mode)


class PictureEmbedding(nn.Module):
    """Picture features `[B, N, W]`, with learned positions where N of them are known, -> `[B, N, D]`."""

    def __init__(self, width: int, dim: int, positions: int) -> None:
        super().__init__()
        norms = LayerNorm(width, 1e-5, affine=True), LayerNorm(dim, 1e-5, affine=True)
        self.proj = nn.Sequential(norms[0], nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim), norms[1])
        self.emb_pos = nn.Parameter(torch.zeros(1, positions, width)) if positions else None

    def forward(self, features: Tensor) -> Tensor:
        if self.emb_pos is not None:
            if features.shape[1] != self.emb_pos.shape[1]:
                raise UserError(
                    f"{features.shape[1]} picture tokens: this model takes {self.emb_pos.shape[1]}, those of a first "
                    "and a last frame; give both (--image_path, --end_image_path; wan_cache_latents --flf2v)"
                )
            features = features + self.emb_pos
        return self.proj(features)


class Head(nn.Module):
    """Final shift, scale and projection to patch values."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = LayerNorm(config.dim, config.eps, affine=False)
        self.head = nn.Linear(config.dim, patch * config.out_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).unbind(1)
        return float_linear(self.head, modulate(self.norm(h.float()), shift, scale))
