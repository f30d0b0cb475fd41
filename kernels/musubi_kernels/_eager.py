"""The short way of an op call: straight to its body where nothing but autograd would look at the call.

A call through torch's dispatcher to an op whose body is Python costs 25 µs, and 60 µs more with its backward: as much
as the kernel of a small layer, and more than a fast card needs for it. So an eager call goes to the body itself, or to
a plain `autograd.Function` around it. Everything that traces, transforms or records calls gets the registered operator
as ever: torch.compile, export and jit, functorch, dispatch and function modes, tensor subclasses (fake ones too), the
profiler (its rows name the op). Loops stand where `all` and `any` would take three times as long.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import torch

from musubi_kernels import _native

Body = Callable[..., Any]
_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
_HOMES: Final = frozenset({"cpu", "cuda"})
_VARIABLES: Final = (
    "MUSUBI_KERNELS",
    _native.ISA_VARIABLE,
    "TRITON_INTERPRET",
    "MUSUBI_KERNELS_PATH",
    "MUSUBI_KERNELS_TUNE",
)


def _watchers() -> tuple[Callable[[], Any], ...] | None:
    """torch's own counters of what watches calls: each gives 0, None or False where nothing does. None: one lacks."""
    core: Any = torch._C
    autograd: Any = torch.autograd
    try:
        modes, functions = core._len_torch_dispatch_stack, core._len_torch_function_stack
        level, tracing, profiled = (
            core._functorch.maybe_current_level,
            core._get_tracing_state,
            autograd._profiler_enabled,
        )
    except AttributeError:
        return None
    return modes, functions, level, tracing, profiled


WATCHERS: Final = _watchers()


def _watched_by() -> Callable[[], bool]:
    if WATCHERS is None:
        return lambda: True
    modes, functions, level, tracing, profiled = WATCHERS

    def watched() -> bool:
        return bool(modes() or functions() or level() is not None or tracing() is not None or profiled())

    return watched


_watched: Final = _watched_by()


def whole_calls(kind: str, *also: object) -> Any | None:
    """The compiled module's class `kind`, which serves calls whole, over what it needs of torch and of `also`.

    None where something is missing: the module, what tells whether calls are watched, or torch's table of C functions
    for DLPack (torch 2.10 and newer; of another major version than 1 it serves as little)."""
    module, _ = _native.load()
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if module is None or exchange is None or WATCHERS is None:
        return None
    make = getattr(module, kind)
    try:
        return make(exchange, tuple(_PLAIN), WATCHERS, torch.get_num_threads, torch.Tensor.new_empty, *also)
    except ValueError:
        return None


def free(*tensors: torch.Tensor | None) -> bool:
    """Whether a call with these tensors may go to a body directly."""
    if torch.compiler.is_compiling() or _watched():
        return False
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return True


def wants_gradient(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd is on and one of the tensors requires a gradient."""
    if torch.is_grad_enabled():
        for each in arguments:
            if isinstance(each, torch.Tensor) and each.requires_grad:
                return True
    return False


def settings() -> str:
    """The variables that choose a backend and its way, as one word of a key."""
    module, _ = _native.load()
    if module is not None:
        found: str = module.settings()
        return found
    return "\n".join(os.environ.get(name, "") for name in _VARIABLES)


def facts(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What the checks and the choice of a backend look at in a tensor, apart from its strides."""
    return None if tensor is None else (tensor.dtype, tensor.device, tensor.shape)


def kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The settings, then each argument as a key has it (of a tensor its dtype and device); None where not `free`."""
    if torch.compiler.is_compiling() or _watched():
        return None
    key: list[Any] = [settings()]
    for each in arguments:
        if type(each) in _PLAIN:
            key.append(each.dtype)
            key.append(each.device)
        elif isinstance(each, torch.Tensor):
            return None
        else:
            key.append(each)
    return tuple(key)


def at_home(tensor: torch.Tensor) -> bool:
    """Whether its device has bodies (a meta tensor has none)."""
    return tensor.device.type in _HOMES


def function_of(name: str, setup: Callable[..., None], backward: Body) -> type[torch.autograd.Function]:
    """An autograd function that calls the body given as its last argument, with an op's own setup and backward."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = args[-1](*args[:-1])
        setup(ctx, args[:-1], output)
        return output

    def gradients(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return (*backward(ctx, *grads), None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    return type(name, (torch.autograd.Function,), members)
