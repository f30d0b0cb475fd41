"""Two transformers that share the noise levels: one below a boundary of t, the other from it on.

A thin module that stands where one transformer would: shared code asks `expert_at(dit, t)` before each prediction, and
`transformers(dit)` where something is done to every transformer (adapters, compiling). Nothing else knows that there
are two. The one that is not needed rests on the device, on the CPU, or nowhere (it is loaded when it is needed).

What requires a gradient is never moved: adapters that both share stay where they are trained.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Rest = Literal["device", "cpu", "nowhere"]
"""Where the expert that is not needed rests."""
Load = Callable[[], nn.Module]
"""Gives an expert, on the device that it computes on."""


class Experts(nn.Module):
    """The expert for t below `boundary`, `low`, and the one from it on, `high`.

    load_low, load_high: called once, or with `rest = nowhere` whenever the other one was needed before.
    """

    def __init__(self, load_low: Load, load_high: Load, *, boundary: float, device: torch.device, rest: Rest) -> None:
        super().__init__()
        self.boundary, self.device, self.rest = boundary, device, rest
        self._load = {"low": load_low, "high": load_high}
        self.active: str | None = None
        self.low: nn.Module | None = None
        self.high: nn.Module | None = None
        if rest != "nowhere":
            for name in ("high", "low"):
                self._take(name)
            if rest == "cpu":
                move_frozen(self.high, torch.device("cpu"))

    def at(self, t: float | Tensor) -> nn.Module:
        """The expert of `t`, ready on the device; of a batch `[B]`, that of its first sample."""
        first = t if isinstance(t, float) else float(t.reshape(-1)[0])
        name = "high" if first >= self.boundary else "low"
        if name != self.active:
            self._activate(name)
        found = getattr(self, name)
        assert isinstance(found, nn.Module)
        return found

    def _activate(self, name: str) -> None:
        other = "low" if name == "high" else "high"
        if self.rest == "nowhere":
            setattr(self, other, None)  # its memory is free before the next one's is taken
            self._take(name)
        elif self.rest == "cpu":
            move_frozen(getattr(self, other), torch.device("cpu"))
            move_frozen(getattr(self, name), self.device)
        self.active = name

    def _take(self, name: str) -> None:
        loaded = self._load[name]()
        setattr(self, name, loaded)
        self.active = name


def expert_at(dit: nn.Module, t: float | Tensor) -> nn.Module:
    """The transformer that predicts at `t` in [0, 1]: an expert of two, or `dit` itself."""
    return dit.at(t) if isinstance(dit, Experts) else dit


def transformers(dit: nn.Module) -> tuple[nn.Module, ...]:
    """Every transformer that is there: the loaded ones of two experts, or `dit` itself."""
    if not isinstance(dit, Experts):
        return (dit,)
    return tuple(part for part in (dit.low, dit.high) if part is not None)


def move_frozen(module: nn.Module | None, device: torch.device) -> None:
    """Move every tensor of `module` that requires no gradient, in place: tensors that others hold move with it."""
    if module is None:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.requires_grad and tensor.device != device:
            tensor.data = tensor.data.to(device)
