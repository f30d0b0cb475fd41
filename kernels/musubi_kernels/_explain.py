"""`explain`: the sentence that tells which backend serves a call, with the sizes that decided it.

A public function registers a planner here: from its arguments to (op, op arguments, sizes in words). Planning checks
the arguments as a call would and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from musubi_kernels._backends import missing
from musubi_kernels._native import isa_name
from musubi_kernels._op import Op
from musubi_kernels._pin import BACKENDS


@dataclass(frozen=True)
class Plan:
    """One call as it would be made: the op, its arguments, and its sizes in words (made only when asked for)."""

    op: Op
    args: tuple[Any, ...]
    sizes: Callable[[], str]


_PLANNERS: Final[dict[Callable[..., Any], Callable[..., Plan]]] = {}


def planned_by(function: Callable[..., Any], planner: Callable[..., Plan]) -> None:
    """Let `explain(function, ...)` use `planner`, which takes the same arguments."""
    _PLANNERS[function] = planner


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which backend would serve `fn(*args, **kwargs)`, and why the others would not. Runs nothing.

    Raises ValueError where the call itself would, and for a function that is not one of this package's ops.
    """
    planner = _PLANNERS.get(fn)
    if planner is None:
        known = ", ".join(sorted(f.__name__ for f in _PLANNERS))
        raise ValueError(f"{getattr(fn, '__name__', fn)!r} has no backends to explain; known: {known}")
    plan = planner(*args, **kwargs)
    choice = plan.op.choose(plan.args)
    chosen = _in_full(choice.backend)
    how = "pinned by MUSUBI_KERNELS" if choice.pinned else "first that can serve it"
    sentence = f"{fn.__name__}: {chosen} ({how}): {plan.sizes()}"
    if choice.tells is not None:
        sentence += f", by {choice.tells(*plan.args)}"
    others = [b for b in BACKENDS if b != choice.backend]
    reasons = {b: choice.refused.get(b) or plan.op.refusal(b, plan.args) for b in others}
    notes = [f"{b}: not used because {r}" if r else f"{b}: could serve it too" for b, r in reasons.items()]
    return "; ".join([sentence, *notes])


def _in_full(backend: str) -> str:
    if backend == "native" and missing("native") is None:
        return f"native-{isa_name()} on {torch.get_num_threads()} thread(s)"
    return backend
