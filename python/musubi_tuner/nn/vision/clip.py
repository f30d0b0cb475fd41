"""CLIP's picture tower in open_clip's original layout, up to its last block but one; module paths are the file's.

    tokens = [class, patches] + positions; pre-norm; blocks of self attention and feed-forward with exact gelu

Features are what the blocks before the last give, class token first, without a final norm. Pictures are brought to the
tower's square by bicubic interpolation without antialiasing, as the models that use these features were trained on.
Source: Radford et al. 2021; XLM-RoBERTa ViT-H of open_clip. Files are read by `weights.clip_vision`.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.nn.attention import attention
from musubi_tuner.nn.norms import LayerNorm

MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
STD: Final = (0.26862954, 0.26130258, 0.27577711)
EPS: Final = 1e-5


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of the tower; `num_layers` counts the blocks that are run, one less than the file has."""

    dim: int
    num_heads: int
    num_layers: int
    mlp_dim: int
    patch_size: int = 14
    image_size: int = 224


class ClipTower(nn.Module):
    """Pictures `[B, 3, S, S]`, normalized -> features `[B, 1 + (S / patch)^2, dim]`."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.sizes, d, p = sizes, sizes.dim, sizes.patch_size
        self.patch_embedding = nn.Conv2d(3, d, p, p, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1 + (sizes.image_size // p) ** 2, d))
        self.pre_norm = LayerNorm(d, EPS, affine=True)
        self.transformer = nn.Sequential(*(_Block(sizes) for _ in range(sizes.num_layers)))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, N, D]
        h = torch.cat([self.cls_embedding.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embedding
        return self.transformer(self.pre_norm(h))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Features of `pictures: [B, 3, H, W]` in [-1, 1], of any size, in the tower's dtype."""
        weight = self.patch_embedding.weight
        side = self.sizes.image_size
        square = F.interpolate(pictures.float(), (side, side), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(row, device=square.device).view(1, 3, 1, 1) for row in (MEAN, STD))
        features: Tensor = self(((square * 0.5 + 0.5 - mean) / std).to(weight.device, weight.dtype))
        return features


class _Block(nn.Module):
    """h + attention(norm1 h), then + mlp(norm2 h)."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        d = sizes.dim
        self.norm1, self.norm2 = LayerNorm(d, EPS, affine=True), LayerNorm(d, EPS, affine=True)
        self.attn = _Attention(d, sizes.num_heads)
        self.mlp = nn.Sequential(nn.Linear(d, sizes.mlp_dim), nn.GELU(), nn.Linear(sizes.mlp_dim, d))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))


class _Attention(nn.Module):
    """Self attention; rows of the fused projection are q, k, v, each with all heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, L, heads, d] each
        return self.proj(attention(q, k, v).flatten(2))
