"""A dequantisation on the CPU as one call of the compiled module, which also allocates the result.

As for a forward (`fp8_linear/call.py`): `whole()` serves contiguous weights where nothing watches calls, once `learn`
was told that the compiled module is what serves them, and gives None otherwise.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from musubi_kernels import _eager, _native


@functools.cache
def _made() -> Any | None:
    return _eager.whole_calls("DequantizeCall")


def whole(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """q times scale in the scale's dtype, or None where Python has to look at the call. Not to be traced by Dynamo."""
    made = _made()
    w: torch.Tensor | None = None if made is None else made.run(q, scale)
    return w


def learn() -> None:
    """Let `whole` serve weights on the CPU, which the compiled module dequantises under the settings of now."""
    made = _made()
    if made is not None:
        made.learn(_native.isa())


def forget() -> None:
    """Let `whole` serve nothing until it has learnt again."""
    made = _made()
    if made is not None:
        made.forget()
