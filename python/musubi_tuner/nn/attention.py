"""Scaled dot-product attention behind one function; the only file that knows attention libraries.

    y = softmax(q k^T / sqrt(d)) v    per sample and head (Vaswani et al. 2017)

`sdpa` is torch's own and always there. The others are used when asked for by name and installed; a missing one is an
error before any model is loaded (`check_mode`), never a silent fallback.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musubi_tuner.config.errors import UserError

LIBRARIES: Final = {
    "flash": "flash_attn",
    "flash3": "flash_attn_interface",
    "sageattn": "sageattention",
    "xformers": "xformers",
}
MODES: Final = ("sdpa", *LIBRARIES)
_SPLIT = "+split"
"""Ending of a mode that attends sample by sample where samples have different lengths."""


def check_mode(mode: str) -> str:
    """`mode`, if it is known and its library is installed; UserError otherwise."""
    if mode not in MODES:
        raise UserError(f"attn_mode = {mode}: use one of {', '.join(MODES)}")
    library = LIBRARIES.get(mode)
    if library is not None and find_spec(library) is None:
        raise UserError(f"attn_mode = {mode}: the package {library} is not installed; install it or use sdpa")
    return mode


def set_mode(model: nn.Module, mode: str, *, split: bool = False) -> None:
    """Let a transformer attend by `mode`, after `check_mode`. Models hold it in an attribute `attn_mode`, which goes to
    their blocks with the context. Raises TypeError for a model without one.

    split: sample by sample where samples of a batch have different lengths, in place of a mask.
    """
    if not isinstance(getattr(model, "attn_mode", None), str):
        raise TypeError(f"{type(model).__name__} has no attribute attn_mode, so its attention cannot be chosen")
    model.attn_mode = check_mode(mode) + (_SPLIT if split else "")  # type: ignore[assignment]


def attention(q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, mode: str = "sdpa") -> Tensor:
    """Attention of `q: [B, L, heads, d]` to `k, v: [B, S, heads, d]`; gives [B, L, heads, d] in q's dtype.

    Args:
        lengths: `[B]` number of leading keys that are real; None: all of them.
        mode: one of `MODES`, or what `set_mode` made of one. The libraries take no mask, so samples of different
            lengths go through them one by one; with `sdpa` they do so when the mode is split, else there is a mask.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    name = "sdpa" if q.dtype == torch.float32 else mode.removesuffix(_SPLIT)
    if lengths is None or (name == "sdpa" and not mode.endswith(_SPLIT)):
        return _sdpa(q, k, v, lengths) if name == "sdpa" else _BODIES[name](q, k, v)
    body = _sdpa if name == "sdpa" else _BODIES[name]
    parts = [body(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())]
    return torch.cat(parts)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    mask = None
    if lengths is not None:
        mask = torch.arange(k.shape[1], device=q.device) < lengths.to(q.device).unsqueeze(1)  # [B, S]
        mask = mask[:, None, None, :]
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return y.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("flash_attn").flash_attn_func(q, k, v)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = import_module("flash_attn_interface").flash_attn_func(q, k, v)
    return y[0] if isinstance(y, tuple) else y


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("sageattention").sageattn(q, k, v, tensor_layout="NHD")


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("xformers.ops").memory_efficient_attention(q, k, v)


_BODIES: Final[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "flash": _flash,
    "flash3": _flash3,
    "sageattn": _sage,
    "xformers": _xformers,
}
