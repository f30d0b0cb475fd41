"""A small transformer that fits a language model's features to a diffusion transformer, told of time and mean.

h = linear(text); blocks of self attention and feed-forward with a gate each; gates from time + mean of the text
"""

from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.nn.attention import attention
from musubi_tuner.nn.dual_stream import EPS, AdaNorm, FeedForward, TimeTextEmbedding
from musubi_tuner.nn.modulation import gated
from musubi_tuner.nn.norms import LayerNorm
from musubi_tuner.nn.text.ragged import mean_of_real


class TextRefiner(nn.Module):
    """Text features `[B, T, text_width]` -> tokens `[B, T, width]`."""

    def __init__(self, text_width: int, width: int, *, time_width: int, num_heads: int, inner: int, depth: int) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(time_width, text_width, width, with_guidance=False)
        self.proj_in = nn.Linear(text_width, width)
        blocks = nn.ModuleList(RefinerBlock(width, num_heads, inner) for _ in range(depth))
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def forward(self, text: Tensor, timestep: Tensor, lengths: Tensor | None) -> Tensor:
        """lengths: `[B]` leading tokens that are real, None: all; those after them are computed and mean nothing."""
        vector = F.silu(self.time_text_embed(timestep, mean_of_real(text, lengths)))
        h = self.proj_in(text)
        for block in self.token_refiner["refiner_blocks"]:
            h = block(h, vector, lengths)
        return h


class RefinerBlock(nn.Module):
    """Self attention and feed-forward with a gate each, on `h: [B, T, D]`; neither rope nor q/k norms."""

    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(width, EPS, affine=True)
        layers = {name: nn.Linear(width, width) for name in ("to_q", "to_k", "to_v")}
        self.attn = nn.ModuleDict({**layers, "to_out": nn.ModuleList([nn.Linear(width, width)])})
        self.norm2 = LayerNorm(width, EPS, affine=True)
        self.ff = FeedForward(width, inner, nn.SiLU())
        self.norm_out = AdaNorm(width, 2)

    def forward(self, h: Tensor, vector: Tensor, lengths: Tensor | None) -> Tensor:
        gate_a, gate_f = self.norm_out(vector).unbind(1)
        x = self.norm1(h)
        q, k, v = (self.attn[name](x).unflatten(-1, (self.num_heads, -1)) for name in ("to_q", "to_k", "to_v"))
        h = gated(h, self.attn["to_out"][0](attention(q, k, v, lengths=lengths).flatten(2)), gate_a)
        return gated(h, self.ff(self.norm2(h)), gate_f)
