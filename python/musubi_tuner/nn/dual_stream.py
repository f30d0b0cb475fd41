"""Parts of transformers whose picture and text streams attend to each other, under the names of published checkpoints.

The paths below a module (`attn.to_q`, `attn.add_q_proj`, `ff.net.0.proj`, `linear_1`) are those of many such files, so
a model built of these parts needs no key rules. Vectors that depend on t are float32.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.nn.attention import attention
from musubi_tuner.nn.modulation import float_linear, sinusoid
from musubi_tuner.nn.norms import RMSNorm
from musubi_tuner.nn.rope import rotate

EPS = 1e-6


class Attended(Protocol):
    """What attention is told. rotations: `[L, d/2]` or `[B, L, d/2]` complex. keys: `[B]` that are real, None: all."""

    @property
    def rotations(self) -> Tensor: ...
    @property
    def keys(self) -> Tensor | None: ...
    @property
    def attn_mode(self) -> str: ...


class HeadProjections(nn.Module):
    """q, k, v `[B, L, heads, d]` of `x: [B, L, D]`, q and k normalised per head."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_k = RMSNorm(width // num_heads, EPS), RMSNorm(width // num_heads, EPS)
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three, of the first stream."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class JointAttention(HeadProjections):
    """Attention of two streams, each with weights of its own, to both."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.add_k_proj, self.add_v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.add_q_proj = nn.Linear(width, width)
        self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(width, width)]), nn.Linear(width, width)
        self.norm_added_q, self.norm_added_k = RMSNorm(width // num_heads, EPS), RMSNorm(width // num_heads, EPS)

    def forward(self, first: Tensor, second: Tensor, ctx: Attended) -> tuple[Tensor, Tensor]:
        """`first: [B, N, D]`, `second: [B, T, D]`; the sequence is in this order."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(second).unflatten(-1, (self.num_heads, -1)) for layer in layers)
        added = (self.norm_added_q(q), self.norm_added_k(k), v)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(self.heads(first), added, strict=True))
        y = rotated_attention(q, k, v, ctx)
        return self.to_out[0](y[:, : first.shape[1]]), self.to_add_out(y[:, first.shape[1] :])


def rotated_attention(q: Tensor, k: Tensor, v: Tensor, ctx: Attended) -> Tensor:
    """Attention over all tokens `[B, L, heads, d]` with rope; gives [B, L, heads d]."""
    q, k = rotate(q, ctx.rotations), rotate(k, ctx.rotations)
    return attention(q, k, v, lengths=ctx.keys, mode=ctx.attn_mode).flatten(2)


class AdaNorm(nn.Module):
    """`parts` vectors `[B, parts, D]` float32 from the vector (SiLU applied); the norm itself has no weights."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, vector: Tensor) -> Tensor:
        return float_linear(self.linear, vector).unflatten(-1, (self.parts, -1))


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, inner: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(width, inner)}), "2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.act(self.net["0"]["proj"](x)))


class VectorEmbedding(nn.Module):
    """[B, D] float32 of a vector per sample: linear, SiLU, linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return float_linear(self.linear_2, F.silu(float_linear(self.linear_1, x)))


class NumberEmbedding(VectorEmbedding):
    """[B, D] float32 of a number per sample, by its sinusoid of `width`. For time and for guidance."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(sinusoid(x, self.linear_1.in_features, torch.float32))


class TimeTextEmbedding(nn.Module):
    """[B, D] float32: time + guidance (if the model has that input) + a text vector."""

    def __init__(self, time_width: int, text_width: int, out: int, *, with_guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = NumberEmbedding(time_width, out)
        self.guidance_embedder = NumberEmbedding(time_width, out) if with_guidance else None
        self.text_embedder = VectorEmbedding(text_width, out)

    def forward(self, timestep: Tensor, text: Tensor, guidance: Tensor | None = None) -> Tensor:
        vector = self.timestep_embedder(timestep) + self.text_embedder(text)
        if self.guidance_embedder is None or guidance is None:
            return vector
        return vector + self.guidance_embedder(guidance)


def unpatch(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """[B, N, C*pt*ph*pw] (channel slowest) -> [B, C, F, H, W]."""
    (frames, rows, columns), (pt, ph, pw) = grid, patch
    cells = tokens.reshape(tokens.shape[0], frames, rows, columns, -1, pt, ph, pw)
    cells = cells.permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, C, F, pt, H, ph, W, pw]
    return cells.reshape(tokens.shape[0], -1, frames * pt, rows * ph, columns * pw)
