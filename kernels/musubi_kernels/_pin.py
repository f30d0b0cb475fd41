"""The backends' names, and the one that `MUSUBI_KERNELS` pins."""

from __future__ import annotations

import os
from typing import Final, Literal, get_args

Backend = Literal["native", "triton", "cuda", "reference"]
BACKENDS: Final[tuple[Backend, ...]] = get_args(Backend)
"""All backends, in the order in which an op asks them."""

PIN_VARIABLE: Final = "MUSUBI_KERNELS"


def pinned() -> Backend | None:
    """The backend that `MUSUBI_KERNELS` names, None for `auto` or nothing; ValueError for any other word."""
    word = os.environ.get(PIN_VARIABLE, "auto") or "auto"
    if word == "auto":
        return None
    if word not in BACKENDS:
        raise ValueError(f"{PIN_VARIABLE} = {word!r}: no such backend; use auto, {', '.join(BACKENDS)}")
    return word
