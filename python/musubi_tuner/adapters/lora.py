"""LoRA: a low-rank branch beside a linear layer, as a module in the layer's slot.

`y = base(x) + multiplier * (alpha / rank) * up(mask * down(x))`. The base, an `nn.Linear` or an `Fp8Linear`, becomes
a child of the slot and stays frozen; base product and branch are one op of `musubi_kernels`, which keeps neither a
dequantised weight nor the branch's input twice.

Dropout is keyed: a mask is a function of (seed, epoch, item, module), so gradient checkpointing recomputes the same
one, and a resumed or divided run draws the same numbers. `DropoutKey` holds the key of the step in progress.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_kernels import fp8_lora_linear, lora_linear
from musubi_tuner.flow.keyed import Key, uniform
from musubi_tuner.nn.linear import Fp8Linear

Base = nn.Linear | Fp8Linear


@dataclass(frozen=True)
class Dropout:
    """Probabilities in [0, 1): of single low-rank activations, of ranks (per item), of whole modules (per step)."""

    activation: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __post_init__(self) -> None:
        for name, p in (("dropout", self.activation), ("rank_dropout", self.rank), ("module_dropout", self.module)):
            if not 0.0 <= p < 1.0:
                raise ValueError(f"{name} = {p}: use a probability from 0 to below 1")

    @property
    def any(self) -> bool:
        return max(self.activation, self.rank, self.module) > 0.0


class DropoutKey:
    """The key of the training step in progress, shared by all modules of an adapter set."""

    def __init__(self) -> None:
        self._prefix: tuple[Key, ...] | None = None
        self._items: tuple[int, ...] = ()

    def begin_step(self, seed: int, epoch: int, items: tuple[int, ...]) -> None:
        self._prefix, self._items = (seed, epoch), items

    def draw(self, shape: tuple[int, ...], *purpose: Key) -> Tensor:
        """Uniform [0, 1) of `shape`: by item where the first axis counts the items, else by the whole batch."""
        if self._prefix is None:
            raise RuntimeError("dropout without a key: call AdapterSet.begin_step(seed, epoch, items) before the step")
        if shape and shape[0] == len(self._items):
            rows = [uniform(shape[1:], *self._prefix, item, *purpose, dtype=torch.float32) for item in self._items]
            return torch.stack(rows)
        return uniform(shape, *self._prefix, *self._items, *purpose, dtype=torch.float32)

    def coin(self, *purpose: Key) -> float:
        """One number for the whole batch."""
        return float(self.draw((), *purpose))


class LoraLinear(nn.Module):
    """The slot module. down: `[rank, in]`, up: `[out, rank]`, in `dtype`; alpha: 0 or None means the rank.

    down starts Kaiming-uniform (a = sqrt 5: within 1 / sqrt(in)), keyed by (seed, name); up starts at zero, so a fresh
    adapter changes nothing.
    """

    def __init__(
        self,
        name: str,
        base: Base,
        *,
        rank: int,
        alpha: float | None,
        seed: int = 0,
        multiplier: float = 1.0,
        dropout: Dropout | None = None,
        key: DropoutKey | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"{name}: rank {rank}; use 1 or more")
        self.name, self.rank, self.multiplier = name, rank, multiplier
        self.alpha = float(alpha) if alpha else float(rank)
        self.base: Base = base.requires_grad_(False)
        self.dropout, self.key, self.enabled = dropout or Dropout(), key or DropoutKey(), True
        device = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        if device.type != "meta":
            with torch.no_grad():
                self.down.copy_(initial_down(rank, base.in_features, seed, name))

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a linear layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.multiplier == 0.0 or self._dropped():
            return self.base(x)
        mask = self._mask(x)
        scale = self.scale * self.multiplier
        base = self.base
        if isinstance(base, Fp8Linear):
            return fp8_lora_linear(
                x, base.weight, base.scale_weight, base.bias, self.down, self.up, scale=scale, mask=mask
            )
        return lora_linear(x, base.weight, base.bias, self.down, self.up, scale=scale, mask=mask)

    def beside(self, base: Base) -> "LoraLinear":
        """This adapter in the slot of another layer of the same shape: the parameters are the same objects."""
        twin = copy.copy(self)
        twin._modules, twin._parameters = {"base": base.requires_grad_(False)}, dict(self._parameters)
        return twin

    def delta(self) -> Tensor:
        """What merging adds to the weight: float32 `[out, in]`."""
        return (self.scale * self.multiplier) * (self.up.detach().float() @ self.down.detach().float())

    def norm(self) -> float:
        """Frobenius norm of `up @ down * alpha / rank`, from the factors' Gram matrices: no `[out, in]` is made."""
        up, down = self.up.detach().double(), self.down.detach().double()
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return self.scale * math.sqrt(max(0.0, float(squared)))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, multiplier={self.multiplier}"

    def _dropped(self) -> bool:
        p = self.dropout.module
        return self.training and p > 0.0 and self.key.coin(self.name, "module_dropout") < p

    def _mask(self, x: Tensor) -> Tensor | None:
        """Factors of the low-rank activation `[..., rank]`: 0 or 1 / (1 - p); None where nothing is dropped."""
        if not self.training or not (self.dropout.activation or self.dropout.rank):
            return None
        shape = (*x.shape[:-1], self.rank)
        mask = torch.ones(*shape[:-1][:1], *(1,) * (len(shape) - 2), self.rank)
        if p := self.dropout.rank:
            kept = self.key.draw((*shape[:-1][:1], self.rank), self.name, "rank_dropout") >= p
            mask = mask * (kept / (1.0 - p)).reshape(mask.shape)
        if p := self.dropout.activation:
            mask = mask * (self.key.draw(shape, self.name, "dropout") >= p) / (1.0 - p)
        return mask.to(x.device)


def initial_down(rank: int, in_features: int, seed: int, name: str) -> Tensor:
    """Uniform in ±1 / sqrt(in_features), which is Kaiming-uniform with a = sqrt 5; float32 on the CPU."""
    bound = 1.0 / math.sqrt(in_features)
    return (2.0 * uniform((rank, in_features), seed, name, "lora_down", dtype=torch.float32) - 1.0) * bound
