"""The HunyuanVideo transformer, in the order embed, run, head; module paths are the keys of the original checkpoint.

    h = [patches, refined text]; double blocks: one attention over both streams, each with weights of its own;
    single blocks: attention and MLP side by side over the joined sequence; head: shift, scale, linear, unpatch.

One tensor `h: [B, image tokens + text tokens, D]` goes through all blocks, image first, so a caller's `run` sees one
stack. Text beyond a sample's own length is hidden from every attention; its rows are computed and never read.
Vectors that depend on t are float32. Source: HunyuanVideo technical report (Tencent 2024), published checkpoints.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.attention import attention
from musubi_tuner.nn.dual_stream import rotated_attention, unpatch
from musubi_tuner.nn.modulation import float_linear, gated, modulate, sinusoid
from musubi_tuner.nn.norms import LayerNorm, RMSNorm
from musubi_tuner.nn.rope import grid_rotations
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.nn.text.ragged import mean_of_real

_EPS = 1e-6


@dataclass(frozen=True)
class HunyuanVideoConfig:
    """Sizes of a transformer; the defaults are what all published ones share.

    in_channels: twice out_channels where the clean first frame is given beside the noisy latents.
    """

    hidden_size: int
    num_heads: int
    num_double_blocks: int
    num_single_blocks: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    mlp_ratio: float = 4.0
    text_dim: int = 4096
    pooled_text_dim: int = 768
    text_refiner_depth: int = 2
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


@dataclass(frozen=True)
class BlockContext:
    """What all blocks share.

    vector: `[B, D]` float32, SiLU applied. rotations: `[L, d/2]`, 1 for text. keys: `[B]` keys that are real, None:
    all L of them.
    """

    vector: Tensor
    image_tokens: int
    rotations: Tensor
    keys: Tensor | None
    attn_mode: str


class HunyuanVideoModel(nn.Module):
    """Noisy latents, timestep, text features and pooled text -> velocity.

    guidance: what the model's guidance input is told where the conditioning names nothing (in training).
    """

    def __init__(self, config: HunyuanVideoConfig, *, guidance: float = 1.0, attn_mode: str = "sdpa") -> None:
        super().__init__()
        self.config, self.guidance, self.attn_mode = config, guidance, attn_mode
        d = config.hidden_size
        self.img_in = PatchEmbedding(config)
        self.txt_in = TextRefiner(config)
        self.time_in = TimeEmbedding(config)
        self.vector_in = TwoLayers(("in_layer", "out_layer"), config.pooled_text_dim, d)
        self.guidance_in = TimeEmbedding(config) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.num_single_blocks))
        self.final_layer = FinalLayer(config)

    @property
    def pictures(self) -> tuple[str, ...]:
        """Roles of the pictures that every request must come with."""
        return ("start",) if self.config.in_channels > self.config.out_channels else ()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        *,
        lengths: Tensor | None = None,
        run: Run = direct,
    ) -> Tensor:
        """Velocity `[B, out_channels, F, H, W]` in x's dtype.

        Args:
            x: `[B, in_channels, F, H, W]`. timestep: `[B]`, 0..1000.
            text: `[B, T, text_dim]`. pooled: `[B, pooled_text_dim]`.
            guidance: `[B]`, as the model is told it (thousandfold); unread by models without that input.
            lengths: `[B]` leading tokens of `text` that are real, None: all.
        """
        self.check(x, text, pooled)
        tokens, grid = self.img_in(x)  # [B, N, D]
        h = torch.cat([tokens, self.txt_in(text.to(tokens.dtype), timestep, lengths)], dim=1)
        ctx = BlockContext(
            vector=F.silu(self.vector(timestep, pooled, guidance)),
            image_tokens=tokens.shape[1],
            rotations=self.rotations(grid, text.shape[1], x.device),
            keys=None if lengths is None else lengths + tokens.shape[1],
            attn_mode=self.attn_mode,
        )
        h = run([*self.double_blocks, *self.single_blocks], h, ctx)
        return unpatch(self.final_layer(h[:, : ctx.image_tokens], ctx.vector), grid, self.config.patch_size).to(x.dtype)

    def check(self, x: Tensor, text: Tensor, pooled: Tensor) -> None:
        """UserError for conditioning that another text encoder made."""
        c = self.config
        if (text.shape[-1], pooled.shape[-1]) != (c.text_dim, c.pooled_text_dim):
            raise UserError(
                f"text features {text.shape[-1]} and {pooled.shape[-1]} wide: this model takes {c.text_dim} and "
                f"{c.pooled_text_dim}; encode the captions with the two text encoders that belong to it"
            )
        if x.shape[1] != c.in_channels:
            raise ValueError(f"x has {x.shape[1]} channels, the model takes {c.in_channels}")

    def vector(self, timestep: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
        """[B, D] float32: time + pooled text + guidance."""
        vector = self.time_in(timestep) + self.vector_in(pooled)
        return vector if self.guidance_in is None else vector + self.guidance_in(guidance)

    def rotations(self, grid: tuple[int, int, int], text_tokens: int, device: torch.device) -> Tensor:
        """Rope table [N + T, head_dim/2] complex64: the patch grid, then ones for text."""
        positions = [torch.arange(n, device=device) for n in grid]
        image = grid_rotations(positions, self.config.rope_axes_dims, self.config.rope_theta).to(torch.complex64)
        return torch.cat([image, image.new_ones(text_tokens, image.shape[1])])


class DoubleStreamBlock(nn.Module):
    """Joint attention of image and text, then a feed-forward part each, on `h: [B, N + T, D]`."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        d, head = config.hidden_size, config.head_dim
        self.img_mod = Modulation(d, 6)
        self.img_norm1 = LayerNorm(d, _EPS, affine=False)
        self.img_attn_qkv = nn.Linear(d, 3 * d)
        self.img_attn_q_norm, self.img_attn_k_norm = RMSNorm(head, _EPS), RMSNorm(head, _EPS)
        self.img_attn_proj = nn.Linear(d, d)
        self.img_norm2 = LayerNorm(d, _EPS, affine=False)
        self.img_mlp = FeedForward(d, config.mlp_dim, nn.GELU("tanh"))
        self.txt_mod = Modulation(d, 6)
        self.txt_norm1 = LayerNorm(d, _EPS, affine=False)
        self.txt_attn_qkv = nn.Linear(d, 3 * d)
        self.txt_attn_q_norm, self.txt_attn_k_norm = RMSNorm(head, _EPS), RMSNorm(head, _EPS)
        self.txt_attn_proj = nn.Linear(d, d)
        self.txt_norm2 = LayerNorm(d, _EPS, affine=False)
        self.txt_mlp = FeedForward(d, config.mlp_dim, nn.GELU("tanh"))

    def forward(self, h: Tensor, ctx: BlockContext) -> Tensor:
        img, txt = h[:, : ctx.image_tokens], h[:, ctx.image_tokens :]
        img_a, img_f = self.img_mod(ctx.vector).chunk(2, dim=1)  # [B, 3, D]: shift, scale, gate of each part
        txt_a, txt_f = self.txt_mod(ctx.vector).chunk(2, dim=1)
        y = self.attend(modulate(self.img_norm1(img), *shift_scale(img_a)), txt, txt_a, ctx)
        img = gated(img, self.img_attn_proj(y[:, : ctx.image_tokens]), img_a[:, 2])
        txt = gated(txt, self.txt_attn_proj(y[:, ctx.image_tokens :]), txt_a[:, 2])
        img = gated(img, self.img_mlp(modulate(self.img_norm2(img), *shift_scale(img_f))), img_f[:, 2])
        txt = gated(txt, self.txt_mlp(modulate(self.txt_norm2(txt), *shift_scale(txt_f))), txt_f[:, 2])
        return torch.cat([img, txt], dim=1)

    def attend(self, img: Tensor, txt: Tensor, txt_mod: Tensor, ctx: BlockContext) -> Tensor:
        """[B, N + T, D]: attention of both streams to both; `img` is modulated already."""
        txt = modulate(self.txt_norm1(txt), *shift_scale(txt_mod))
        parts = (
            heads(self.img_attn_qkv(img), self.img_attn_q_norm, self.img_attn_k_norm),
            heads(self.txt_attn_qkv(txt), self.txt_attn_q_norm, self.txt_attn_k_norm),
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        return rotated_attention(q, k, v, ctx)


class SingleStreamBlock(nn.Module):
    """Attention and feed-forward of the joined sequence in one pair of linear layers, on `h: [B, L, D]`."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.split = (3 * d, config.mlp_dim)
        self.linear1 = nn.Linear(d, sum(self.split))
        self.linear2 = nn.Linear(d + config.mlp_dim, d)
        self.q_norm, self.k_norm = RMSNorm(config.head_dim, _EPS), RMSNorm(config.head_dim, _EPS)
        self.pre_norm = LayerNorm(d, _EPS, affine=False)
        self.modulation = Modulation(d, 3)

    def forward(self, h: Tensor, ctx: BlockContext) -> Tensor:
        mod = self.modulation(ctx.vector)
        qkv, inner = self.linear1(modulate(self.pre_norm(h), *shift_scale(mod))).split(self.split, dim=-1)
        y = rotated_attention(*heads(qkv, self.q_norm, self.k_norm), ctx)
        y = self.linear2(torch.cat([y, F.gelu(inner, approximate="tanh")], dim=-1))
        return gated(h, y, mod[:, 2])


class FinalLayer(nn.Module):
    """Shift, scale and projection of image tokens to patch values."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm_final = LayerNorm(d, _EPS, affine=False)
        self.linear = nn.Linear(d, prod(config.patch_size) * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        """[B, N, patch values]; `vector` has its SiLU already."""
        shift, scale = float_linear(self.adaLN_modulation[1], vector).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class Modulation(nn.Module):
    """`parts` vectors `[B, parts, D]` float32 from the vector (SiLU applied)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, vector: Tensor) -> Tensor:
        return float_linear(self.linear, vector).unflatten(-1, (self.parts, -1))


class FeedForward(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, width: int, inner: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), act, nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbedding(nn.Module):
    """Latents -> tokens [B, N, D] in (frame, row, column) order, and the grid."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        h = self.proj(x.to(self.proj.weight.dtype))  # [B, D, F, H/2, W/2]
        frames, rows, columns = h.shape[2:]
        return h.flatten(2).transpose(1, 2), (frames, rows, columns)


class TimeEmbedding(nn.Module):
    """[B, D] float32 of a number per sample: sinusoid, linear, SiLU, linear. For time and for guidance."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        width, d = config.timestep_embed_dim, config.hidden_size
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, value: Tensor) -> Tensor:
        wave = sinusoid(value, self.width, torch.float32)
        return float_linear(self.mlp[2], F.silu(float_linear(self.mlp[0], wave)))


class TwoLayers(nn.ModuleDict):
    """[B, out] float32: linear, SiLU, linear, under two names."""

    def __init__(self, names: tuple[str, str], width: int, out: int) -> None:
        super().__init__({names[0]: nn.Linear(width, out), names[1]: nn.Linear(out, out)})

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.values()
        return float_linear(last, F.silu(float_linear(first, x)))


class TextRefiner(nn.Module):
    """Text features `[B, T, text_dim]` -> tokens `[B, T, D]`: two blocks of self attention, gated by time and mean."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.input_embedder = nn.Linear(config.text_dim, d)
        self.t_embedder = TimeEmbedding(config)
        self.c_embedder = TwoLayers(("linear_1", "linear_2"), config.text_dim, d)
        blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.text_refiner_depth))
        self.individual_token_refiner = nn.ModuleDict({"blocks": blocks})

    def forward(self, text: Tensor, timestep: Tensor, lengths: Tensor | None) -> Tensor:
        vector = F.silu(self.t_embedder(timestep) + self.c_embedder(mean_of_real(text, lengths)))
        h = self.input_embedder(text)
        for block in self.individual_token_refiner["blocks"]:
            h = block(h, vector, lengths)
        return h


class RefinerBlock(nn.Module):
    """Self attention and feed-forward with a gate each, on `h: [B, T, D]`; neither rope nor q/k norms."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = LayerNorm(d, _EPS, affine=True)
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2 = LayerNorm(d, _EPS, affine=True)
        self.mlp = FeedForward(d, config.mlp_dim, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, h: Tensor, vector: Tensor, lengths: Tensor | None) -> Tensor:
        gate_a, gate_f = float_linear(self.adaLN_modulation[1], vector).chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(h)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        h = gated(h, self.self_attn_proj(attention(q, k, v, lengths=lengths).flatten(2)), gate_a)
        return gated(h, self.mlp(self.norm2(h)), gate_f)


def shift_scale(mod: Tensor) -> tuple[Tensor, Tensor]:
    """The first two vectors of `mod: [B, 3, D]`."""
    return mod[:, 0], mod[:, 1]


def heads(qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[B, L, heads, d]` of rows `[B, L, 3 heads d]`, q and k normalised per head."""
    q, k, v = qkv.unflatten(-1, (3, -1, q_norm.weight.shape[0])).unbind(2)
    return q_norm(q), k_norm(k), v
