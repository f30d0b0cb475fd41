"""How an op is declared: once, with schema, fake, bodies by backend and backward, as a `torch.library` operator.

`Op` owns the operator `musubi_kernels::<name>`. Its one registered body picks a backend per call, so that
`torch.compile` sees a single opaque node. A backend's `refuses` answers None, or the reason why it cannot serve these
arguments. `Library.define` and `impl` are used rather than `custom_op`: they cost about 10 µs a call against 66. In
eager mode calls go to the body by a shorter way (see `_eager`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from musubi_kernels import _eager
from musubi_kernels._backends import missing
from musubi_kernels._pin import BACKENDS, PIN_VARIABLE, Backend, pinned

LIBRARY: Final = torch.library.Library("musubi_kernels", "DEF")
_MOST_SETTLED: Final = 4096
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


OPS: Final[dict[str, Op]] = {}
"""Every operator by its name."""


@dataclass
class Op:
    """One operator. Call it like the schema says; add bodies with `serve`, a derivative with `derivative`.

    `short`: which backend serves a call follows from the dtypes and devices of its tensors and from its other
    arguments, so that a call without autograd (a gradient's, in backward) may look its body up by them.
    """

    name: str
    schema: str
    fake: Body
    short: bool = False
    _bodies: dict[Backend, _Served] = field(default_factory=dict)
    _lacking: dict[Backend, str] = field(default_factory=dict)
    _settled: dict[Any, Body] = field(default_factory=dict)
    _function: type[torch.autograd.Function] | None = None

    def __post_init__(self) -> None:
        """Define the operator, its body and its fake; autograd is added by `derivative`."""
        LIBRARY.define(f"{self.name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified, self.fake, lib=LIBRARY)
        self._call = getattr(torch.ops.musubi_kernels, self.name).default
        OPS[self.name] = self

    @property
    def qualified(self) -> str:
        """The operator's full name."""
        return f"musubi_kernels::{self.name}"

    def __call__(self, *args: Any) -> Any:
        """Run the operator: through torch's dispatcher, so autograd, compile and fake tensors all work, or directly."""
        if self.short and not torch.is_grad_enabled():
            key = _eager.kinds(args)
            if key is not None:
                body = self._settled.get(key) or self.settle(key, args)
                if body is not None:
                    return body(*args)
        return self._call(*args)

    def settled(self, key: Any) -> Body | None:
        """The body that served a call of this key before, or None."""
        return self._settled.get(key)

    def settle(self, key: Any, args: tuple[Any, ...]) -> Body | None:
        """The body for `args`, kept for calls of the same key; None where the operator itself must be called.

        The reference stays behind the dispatcher: it is slow beside it, and says once that it is what runs.
        """
        choice = self.choose(args)
        if choice.backend == "reference" or not _eager.at_home(args[0]):
            return None
        if len(self._settled) >= _MOST_SETTLED:
            self._settled.clear()
        self._settled[key] = choice.body
        return choice.body

    def direct(self, body: Body, *args: Any) -> Any:
        """`body(*args)`, with the op's derivative where autograd wants one."""
        if not _eager.wants_gradient(args):
            return body(*args)
        return self._call(*args) if self._function is None else self._function.apply(*args, body)

    def forget(self) -> None:
        """Drop what was settled: what a machine has is looked at again."""
        self._settled.clear()

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
        self._function = _eager.function_of(self.name, setup, backward)

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
