"""Small models, sources and draws that the training tests share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.data.batches import Batch
from musubi_tuner.flow import keyed


class MemorySource:
    """A BatchSource over given items: latents [N, C, F, H, W] in batches of `size`, in order."""

    def __init__(self, latents: Tensor, size: int) -> None:
        self.latents, self.size = latents, size

    def __len__(self) -> int:
        return len(range(0, len(self.latents), self.size))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, len(self)):
            items = tuple(range(index * self.size, min((index + 1) * self.size, len(self.latents))))
            scale = torch.tensor([1.0 + i for i in items])
            yield Batch(self.latents[list(items)], {"scale": scale}, items, number, index)


@dataclass(frozen=True)
class GivenDraws:
    """Noise and t from tables indexed by the batch's number in its epoch."""

    noises: Tensor
    times: Tensor

    def noise(self, batch: Batch) -> Tensor:
        return self.noises[batch.index]

    def t(self, batch: Batch) -> Tensor:
        return self.times[batch.index]

    def begin(self, batch: Batch) -> None:
        """Nothing is random in these models."""


class Toy(nn.Module):
    """A velocity model of a few hundred parameters that reads x, t and its conditioning; float32 or float64."""

    def __init__(self, cells: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.first = nn.Linear(cells + 2, 24, dtype=dtype)
        self.last = nn.Linear(24, cells, dtype=dtype)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=make, dtype=dtype) * 0.2

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        flat = x_t.flatten(1).to(self.first.weight.dtype)
        extra = torch.stack([t, cond["scale"]], 1).to(flat.dtype)
        return self.last(torch.tanh(self.first(torch.cat([flat, extra], 1)))).view_as(x_t)


def noting_gradients(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A list that gets the joined gradients of every step, as the optimizer meets them."""
    found: list[Tensor] = []

    def before_step(*_: object) -> None:
        found.append(torch.cat([p.grad.flatten().clone() for p in parameters]))

    optimizer.register_step_pre_hook(before_step)
    return found


def items_of(count: int, shape: Sequence[int] = (2, 1, 3, 4)) -> Tensor:
    return keyed.normal((count, *shape), "items") * 0.3 + 1
