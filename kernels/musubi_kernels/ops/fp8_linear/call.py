"""A forward on CPU tensors as one call of the compiled module, which also allocates the result.

`whole()` serves what `learn` was told of, where nothing watches calls and no gradient is wanted, and gives None
otherwise. It reads tensors by torch's table of C functions for DLPack (torch 2.10 and newer); where that is missing,
calls take the way through Python, with the same results.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from musubi_kernels import _eager, _native


@functools.cache
def _made() -> Any | None:
    return _eager.whole_calls("Call", torch.is_grad_enabled, torch.is_autocast_enabled)


def whole(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The product, or None where Python has to look at the call. Not to be traced by Dynamo."""
    made = _made()
    y: torch.Tensor | None = None if made is None else made.run(x, q, scale, bias)
    return y


def learn(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Let `whole` serve calls like this one, which the compiled module's forward serves."""
    made = _made()
    if made is not None:
        made.learn(x, q, scale, bias, _native.isa())


def forget() -> None:
    """Let `whole` serve nothing until it has learnt again."""
    made = _made()
    if made is not None:
        made.forget()
