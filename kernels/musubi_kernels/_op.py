"""How an op is declared: once, with schema, fake, bodies by backend and backward, as a `torch.library` operator.

`Op` owns the operator `musubi_kernels::<name>`. Its one registered body picks a backend per call, so that
`torch.compile` sees a single opaque node. A backend's `refuses` answers None, or the reason why it cannot serve these
arguments. `Library.define` and `impl` are used rather than `custom_op`: they cost about 10 µs a call against 66.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from musubi_kernels._backends import missing
from musubi_kernels._pin import BACKENDS, PIN_VARIABLE, Backend, pinned

LIBRARY: Final = torch.library.Library("musubi_kernels", "DEF")
_log = logging.getLogger(__name__)

Body = Callable[..., Any]
Refusal = Callable[..., str | None]
Telling = Callable[..., str]


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, its body, and the reasons of those asked before or not at all."""

    backend: Backend
    body: Body
    refused: dict[str, str]
    pinned: bool
    tells: Telling | None = None


@dataclass(frozen=True)
class _Served:
    body: Body
    refuses: Refusal
    tells: Telling | None


@dataclass
class Op:
    """One operator. Call it like the schema says; add bodies with `serve`, a derivative with `derivative`."""

    name: str
    schema: str
    fake: Body
    _bodies: dict[Backend, _Served] = field(default_factory=dict)
    _lacking: dict[Backend, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Define the operator, its body and its fake; autograd is added by `derivative`."""
        LIBRARY.define(f"{self.name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified, self.fake, lib=LIBRARY)
        self._call = getattr(torch.ops.musubi_kernels, self.name).default

    @property
    def qualified(self) -> str:
        """The operator's full name."""
        return f"musubi_kernels::{self.name}"

    def __call__(self, *args: Any) -> Any:
        """Run the operator (through torch's dispatcher, so autograd, compile and fake tensors all work)."""
        return self._call(*args)

    def serve(
        self, backend: Backend, body: Body, refuses: Refusal = lambda *_: None, tells: Telling | None = None
    ) -> None:
        """Let `backend` serve this op with `body`, for arguments for which `refuses(*args)` is None.

        `tells(*args)` says, for `explain`, how the body would go about these arguments, where it has a choice.
        """
        self._bodies[backend] = _Served(body, refuses, tells)

    def lacks(self, backend: Backend, reason: str) -> None:
        """Let `explain` tell why `backend` has no body here, where more can be said than that."""
        self._lacking[backend] = reason

    def derivative(self, setup: Callable[..., None], backward: Body) -> None:
        """Register the backward: `setup(ctx, inputs, output)` and `backward(ctx, *grads)`."""
        torch.library.register_autograd(self.qualified, backward, setup_context=setup, lib=LIBRARY)

    def refusal(self, backend: Backend, args: tuple[Any, ...]) -> str | None:
        """Why `backend` cannot serve this op with `args`, or None."""
        served = self._bodies.get(backend)
        if served is None:
            return self._lacking.get(backend, f"it has no body for {self.name}")
        return missing(backend) or served.refuses(*args)

    def choose(self, args: tuple[Any, ...]) -> Choice:
        """The backend that serves `args` now; ValueError when a pinned one cannot."""
        pin = pinned()
        if pin is not None:
            reason = self.refusal(pin, args)
            if reason:
                raise ValueError(
                    f"{PIN_VARIABLE} = {pin}: it cannot serve {self.name} here because {reason}; unset the variable"
                )
            served = self._bodies[pin]
            return Choice(pin, served.body, {}, True, served.tells)
        refused: dict[str, str] = {}
        for backend in BACKENDS:
            reason = self.refusal(backend, args)
            if reason is None:
                served = self._bodies[backend]
                return Choice(backend, served.body, refused, False, served.tells)
            refused[backend] = reason
        raise ValueError(f"{self.name}: no backend serves this call: {refused}")

    def _run(self, *args: Any) -> Any:
        choice = self.choose(args)
        if choice.backend == "reference":
            _say_once_that_nothing_is_compiled()
        return choice.body(*args)


_said: set[str] = set()


def _say_once_that_nothing_is_compiled() -> None:
    if _said or pinned() == "reference":
        return
    _said.add("reference")
    reason = missing("native")
    if reason:
        _log.warning("FP8 layers run the torch reference, which is slow on a CPU: %s", reason)
