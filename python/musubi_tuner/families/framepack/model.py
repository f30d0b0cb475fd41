"""The FramePack transformer, in the order pack, run, head; module paths are the keys of the published checkpoints.

    h = [4x history | 2x history | clean frames | noisy section | image tokens | text tokens]

History is embedded by patches of 4 x 8 x 8 and 2 x 4 x 4 latent cells, so a long past costs few tokens; every frame has
the time position that it is told. Double blocks keep weights apart for the first four parts and the last two, single
blocks share them; all attend to all. Text beyond a sample's own length is hidden; its rows are computed and never read.
Vectors that depend on t, and the output projection, are float32.
Source: FramePack (Zhang & Agrawala 2025) on HunyuanVideo (Tencent 2024), published checkpoints.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.dual_stream import (
    EPS,
    AdaNorm,
    FeedForward,
    HeadProjections,
    JointAttention,
    TimeTextEmbedding,
    rotated_attention,
    unpatch,
)
from musubi_tuner.nn.modulation import float_linear, gated, norm_modulated
from musubi_tuner.nn.rope import RopeScaling, mean_rotations, repeated, told_rotations
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.nn.text.refiner import TextRefiner


@dataclass(frozen=True)
class FramePackConfig:
    """Sizes of a transformer; the defaults are what the published ones share."""

    hidden_size: int
    num_heads: int
    num_double_blocks: int
    num_single_blocks: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    patch_size_t: int = 1
    mlp_ratio: float = 4.0
    text_dim: int = 4096
    pooled_text_dim: int = 768
    image_embed_dim: int = 1152
    num_refiner_blocks: int = 2
    guidance_embed: bool = True
    timestep_embed_dim: int = 256
    rope_axes_dims: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or sum(self.rope_axes_dims) != self.head_dim:
            raise ValueError(
                f"hidden_size = {self.hidden_size}, num_heads = {self.num_heads}, rope_axes_dims = "
                f"{self.rope_axes_dims}: hidden_size / num_heads must be an integer and the sum of rope_axes_dims"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Inner width of the feed-forward parts."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent cells of a token: frames, rows, columns."""
        return (self.patch_size_t, self.patch_size, self.patch_size)


@dataclass(frozen=True)
class History:
    """Clean latents `[B, 16, F, H, W]` by resolution and the time index `[B, F]` of every frame.

    indices: of the noisy section. A resolution that is None has no tokens.
    """

    indices: Tensor
    clean: Tensor | None = None
    clean_indices: Tensor | None = None
    clean_2x: Tensor | None = None
    clean_2x_indices: Tensor | None = None
    clean_4x: Tensor | None = None
    clean_4x_indices: Tensor | None = None

    def parts(self) -> tuple[tuple[int, Tensor | None, Tensor | None], ...]:
        """(factor, latents, indices) from full to quarter resolution."""
        return (
            (1, self.clean, self.clean_indices),
            (2, self.clean_2x, self.clean_2x_indices),
            (4, self.clean_4x, self.clean_4x_indices),
        )


@dataclass(frozen=True)
class BlockContext:
    """What all blocks share.

    vector: `[B, D]` float32, SiLU applied. rotations: `[B, L, d/2]`, 1 for image-encoder and text tokens. keys: `[B]`
    keys that are real, None: all L of them.
    """

    vector: Tensor
    image_tokens: int
    rotations: Tensor
    keys: Tensor | None
    attn_mode: str


class FramePackModel(nn.Module):
    """Noisy section, its history, timestep, text and picture features -> velocity of the section.

    guidance: what the guidance input is told where the conditioning names nothing (in training).
    """

    def __init__(
        self,
        config: FramePackConfig,
        *,
        guidance: float = 1000.0,
        rope_scaling: RopeScaling | None = None,
        attn_mode: str = "sdpa",
    ) -> None:
        super().__init__()
        self.config, self.guidance, self.rope_scaling, self.attn_mode = config, guidance, rope_scaling, attn_mode
        c, d, time_width = config, config.hidden_size, config.timestep_embed_dim
        self.x_embedder = PatchEmbedding(config)
        self.context_embedder = TextRefiner(
            c.text_dim, d, time_width=time_width, num_heads=c.num_heads, inner=c.mlp_dim, depth=c.num_refiner_blocks
        )
        self.time_text_embed = TimeTextEmbedding(time_width, c.pooled_text_dim, d, with_guidance=c.guidance_embed)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_double_blocks))
        self.single_transformer_blocks = nn.ModuleList(
            SingleTransformerBlock(config) for _ in range(config.num_single_blocks)
        )
        self.norm_out = AdaNorm(d, 2)
        self.proj_out = nn.Linear(d, prod(config.patch) * config.out_channels)
        self.image_projection = nn.ModuleDict(
            {"up": nn.Linear(config.image_embed_dim, 3 * d), "down": nn.Linear(3 * d, d)}
        )
        self.clean_x_embedder = HistoryEmbedding(d)

    def forward(  # noqa: PLR0917 the inputs of the published model
        self,
        x: Tensor,
        timestep: Tensor,
        history: History,
        text: Tensor,
        pooled: Tensor,
        image: Tensor,
        guidance: Tensor,
        *,
        lengths: Tensor | None = None,
        run: Run = direct,
    ) -> Tensor:
        """Velocity `[B, out_channels, F, H, W]` in x's dtype.

        Args:
            x: `[B, in_channels, F, H, W]`. timestep: `[B]`, 0..1000. history: see there.
            text: `[B, T, text_dim]`. pooled: `[B, pooled_text_dim]`. image: `[B, N, image_embed_dim]`.
            guidance: `[B]`, as the model is told it (thousandfold); unread by models without that input.
            lengths: `[B]` leading tokens of `text` that are real, None: all.
        """
        self.check(x, text, pooled, image)
        tokens, rotations, grid = self.pack(x, timestep, history)
        side = torch.cat([self.project(image), self.context_embedder(text.to(tokens.dtype), timestep, lengths)], dim=1)
        ctx = BlockContext(
            vector=F.silu(self.time_text_embed(timestep, pooled, guidance)),
            image_tokens=tokens.shape[1],
            rotations=torch.cat([rotations, rotations.new_ones(*side.shape[:2], rotations.shape[2])], dim=1),
            keys=None if lengths is None else lengths + (tokens.shape[1] + image.shape[1]),
            attn_mode=self.attn_mode,
        )
        blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
        h = run(blocks, torch.cat([tokens, side], dim=1), ctx)
        section = h[:, ctx.image_tokens - prod(grid) : ctx.image_tokens]
        return unpatch(self.head(section, ctx.vector), grid, self.config.patch).to(x.dtype)

    def check(self, x: Tensor, text: Tensor, pooled: Tensor, image: Tensor) -> None:
        """UserError for conditioning that other encoders made."""
        c = self.config
        if (text.shape[-1], pooled.shape[-1], image.shape[-1]) != (c.text_dim, c.pooled_text_dim, c.image_embed_dim):
            raise UserError(
                f"text features {text.shape[-1]} and {pooled.shape[-1]} wide, picture features {image.shape[-1]}: this "
                f"model takes {c.text_dim}, {c.pooled_text_dim} and {c.image_embed_dim}; make the caches with the "
                "encoders that belong to it"
            )
        if x.shape[1] != c.in_channels:
            raise ValueError(f"x has {x.shape[1]} channels, the model takes {c.in_channels}")

    def pack(self, x: Tensor, timestep: Tensor, history: History) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """Tokens [B, N, D] of history and section in the order of the sequence, their rotations, the section's grid."""
        c, tokens = self.config, self.x_embedder(x)  # [B, D, F, H/2, W/2]
        frames, rows, columns = tokens.shape[2:]
        scale = torch.ones_like(timestep) if self.rope_scaling is None else self.rope_scaling.at(timestep)
        parts = [tokens.flatten(2)]
        tables = [told_rotations(history.indices, (rows, columns), c.rope_axes_dims, c.rope_theta, scale)]
        for factor, latents, indices in history.parts():
            if latents is not None and indices is not None:
                table = told_rotations(indices, (rows, columns), c.rope_axes_dims, c.rope_theta, scale)
                parts.insert(0, self.clean_x_embedder(latents.to(x), factor).flatten(2))
                tables.insert(0, mean_rotations(table, factor))
        rotations = torch.cat([table.flatten(1, 3) for table in tables], dim=1).to(torch.complex64)
        return torch.cat(parts, dim=2).transpose(1, 2), rotations, (frames, rows, columns)

    def project(self, image: Tensor) -> Tensor:
        """Tokens [B, N, D] of picture features: linear, SiLU, linear."""
        up, down = self.image_projection["up"], self.image_projection["down"]
        return down(F.silu(up(image.to(up.bias.dtype))))

    def head(self, h: Tensor, vector: Tensor) -> Tensor:
        """[B, N, patch values] float32 of the section's tokens."""
        shift_scale = self.norm_out(vector).flip(1)  # this layer alone is stored as scale, shift
        return float_linear(self.proj_out, norm_modulated(h, shift_scale, EPS))


class TransformerBlock(nn.Module):
    """Joint attention of both streams, then a feed-forward part each, on `h: [B, L, D]`."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm1, self.norm1_context = AdaNorm(d, 6), AdaNorm(d, 6)
        self.attn = JointAttention(config.hidden_size, config.num_heads)
        self.ff = FeedForward(d, config.mlp_dim, nn.GELU("tanh"))
        self.ff_context = FeedForward(d, config.mlp_dim, nn.GELU("tanh"))

    def forward(self, h: Tensor, ctx: BlockContext) -> Tensor:
        img, txt = h[:, : ctx.image_tokens], h[:, ctx.image_tokens :]
        img_a, img_f = self.norm1(ctx.vector).chunk(2, dim=1)  # [B, 3, D]: shift, scale, gate of each part
        txt_a, txt_f = self.norm1_context(ctx.vector).chunk(2, dim=1)
        y_img, y_txt = self.attn(norm_modulated(img, img_a, EPS), norm_modulated(txt, txt_a, EPS), ctx)
        img, txt = gated(img, y_img, img_a[:, 2]), gated(txt, y_txt, txt_a[:, 2])
        img = gated(img, self.ff(norm_modulated(img, img_f, EPS)), img_f[:, 2])
        txt = gated(txt, self.ff_context(norm_modulated(txt, txt_f, EPS)), txt_f[:, 2])
        return torch.cat([img, txt], dim=1)


class SingleTransformerBlock(nn.Module):
    """Attention and feed-forward of the joined sequence side by side, on `h: [B, L, D]`."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.attn = HeadProjections(config.hidden_size, config.num_heads)
        self.norm = AdaNorm(d, 3)
        self.proj_mlp = nn.Linear(d, config.mlp_dim)
        self.proj_out = nn.Linear(d + config.mlp_dim, d)

    def forward(self, h: Tensor, ctx: BlockContext) -> Tensor:
        mod = self.norm(ctx.vector)
        x = norm_modulated(h, mod, EPS)
        y = rotated_attention(*self.attn.heads(x), ctx)
        y = self.proj_out(torch.cat([y, F.gelu(self.proj_mlp(x), approximate="tanh")], dim=-1))
        return gated(h, y, mod[:, 2])


class PatchEmbedding(nn.Module):
    """Latents -> `[B, D, F, H/2, W/2]`."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.bias.dtype))


class HistoryEmbedding(nn.Module):
    """Clean latents of 16 channels -> `[B, D, frames, rows, columns]` of patches, by how much a token covers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(16, width, (1, 2, 2), (1, 2, 2))
        self.proj_2x = nn.Conv3d(16, width, (2, 4, 4), (2, 4, 4))
        self.proj_4x = nn.Conv3d(16, width, (4, 8, 8), (4, 8, 8))

    def forward(self, x: Tensor, factor: int) -> Tensor:
        """`x: [B, 16, F, H, W]`, its ends repeated to whole patches; factor: 1, 2 or 4."""
        layer = {1: self.proj, 2: self.proj_2x, 4: self.proj_4x}[factor]
        return layer(repeated(x, (2, 3, 4), layer.kernel_size).to(layer.bias.dtype))
