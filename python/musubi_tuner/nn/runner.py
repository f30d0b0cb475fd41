"""How the blocks of a transformer are run: a callable that the model is handed, never a patched `forward`.

A DiT is embed -> run(blocks, h, ctx) -> head. `direct` is the plain loop; gradient checkpointing
(`nn.checkpointing`), step caches (`sampling.step_cache`) and block swap are other callables of the same shape,
and they compose by wrapping one another.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

Hidden = Tensor | tuple[Tensor, ...]
Run = Callable[[Sequence[nn.Module], Any, Any], Any]
"""(blocks, h, ctx) -> h. `h` is a tensor or a tuple of tensors; `ctx` whatever the family's blocks share."""


def direct(blocks: Sequence[nn.Module], h: Any, ctx: Any) -> Any:
    """Call every block in order: h = block(h, ctx)."""
    for block in blocks:
        h = block(h, ctx)
    return h
