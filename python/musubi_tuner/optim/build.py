"""From the user's words to an optimizer: a table of short names, any class of torch or of an installed package.

A dotted name is imported only from a package that is installed (or from ours): a name from a command line or an
option file must not run a file that happens to lie in the current folder.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import nearest

DEFAULT = "AdamW"

_SHORT: Mapping[str, str] = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}
_SHORT_NAMES = ("AdamW", "AdamW8bit", "AdaFactor")


def build_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], *, rate: float
) -> torch.optim.Optimizer:
    """The optimizer `name` over parameter groups (`params`, `name`, maybe `lr`) at the rate `rate`.

    name: AdamW, AdamW8bit, AdaFactor (any case), a class of torch.optim, or `package.Class`; "" is AdamW.
    Raises UserError for a class that is not there and for arguments that it does not take.
    """
    cls = optimizer_class(name)
    if not any(True for group in groups for _ in group["params"]):
        raise UserError("there is nothing to train: no parameter was selected")
    accepted = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "params")]
    unknown = sorted(set(arguments) - set(accepted))
    if unknown and not _takes_anything(cls):
        close = nearest(unknown[0], accepted, 0.6)
        raise UserError(
            f"optimizer_args: {cls.__name__} has no argument {unknown[0]!r}"
            + (f"; did you mean {close}?" if close else f"; it takes {', '.join(accepted)}")
        )
    if _sets_its_own_rate(cls, arguments):
        return cls([{**g, "lr": None} for g in groups], **{"lr": None, **arguments})
    try:
        return cls([dict(g) for g in groups], **{"lr": rate, **arguments})
    except (TypeError, ValueError) as fault:
        raise UserError(f"{cls.__name__} refuses its arguments {dict(arguments)}: {fault}") from fault


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class that `name` means. Raises UserError."""
    given = name.strip() or DEFAULT
    dotted = _SHORT.get(given.lower(), given)
    if dotted == given and "." not in given:
        known = {n for n in dir(torch.optim) if _is_optimizer(getattr(torch.optim, n))}
        if given not in known:
            close = nearest(given, [*_SHORT_NAMES, *sorted(known)], 0.6)
            raise UserError(
                f"optimizer_type = {name!r} is not known: use {', '.join(_SHORT_NAMES)}, a class of torch.optim, or "
                "package.Class of an installed package" + (f"; did you mean {close}?" if close else "")
            )
        dotted = f"torch.optim.{given}"
    found = installed_class(dotted, "optimizer_type")
    if not _is_optimizer(found):
        raise UserError(f"optimizer_type = {name!r}: {dotted} is not an optimizer of torch's kind")
    return found


def scheduler_class(name: str) -> Callable[..., torch.optim.lr_scheduler.LRScheduler]:
    """A learning-rate scheduler class: of torch.optim.lr_scheduler, or `package.Class`. Raises UserError."""
    return installed_class(name if "." in name else f"torch.optim.lr_scheduler.{name}", "lr_scheduler_type")


def installed_class(dotted: str, option: str) -> Any:
    """`package.module.Class` of an installed package. Raises UserError that says which step failed."""
    module, _, attribute = dotted.rpartition(".")
    root = dotted.partition(".")[0]
    if not all(part.isidentifier() for part in dotted.split(".")):
        raise UserError(f"{option} = {dotted!r}: use the dotted name of a class, such as torch.optim.AdamW")
    if root != "musubi_tuner" and root not in _packages():
        raise UserError(
            f"{option} = {dotted!r}: the package {root} is not installed; `pip install` it, or choose another"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as fault:
        raise UserError(f"{option} = {dotted!r}: importing {module} failed: {fault}") from fault
    except AttributeError as fault:
        raise UserError(f"{option} = {dotted!r}: {module} has no {attribute}") from fault


@cache
def _packages() -> frozenset[str]:
    """Names that installed distributions can be imported by; to list them takes a third of a second."""
    return frozenset(importlib.metadata.packages_distributions())


def parse_arguments(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """`key=literal` words as keyword arguments; the value is everything after the first `=`. Raises UserError."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UserError(f"{option}: {pair!r} is not of the form key=value")
        try:
            found[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as fault:
            raise UserError(
                f"{option}: {pair!r}: the value must be a Python literal such as 0.1, True, (0.9, 0.99) or 'text'"
            ) from fault
    return found


def sets_its_own_rate(optimizer: torch.optim.Optimizer) -> bool:
    """True where a schedule must keep its hands off: AdaFactor with relative steps, schedule-free optimizers."""
    relative = any(group.get("relative_step") for group in optimizer.param_groups)
    return relative or type(optimizer).__name__.lower().endswith("schedulefree")


def set_training(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Switch optimizers that keep two versions of the weights (schedule-free ones) to the one that is needed."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The weights that are to be saved or looked at, for the time of the block."""
    set_training(optimizer, False)
    try:
        yield
    finally:
        set_training(optimizer, True)


def described(optimizer: torch.optim.Optimizer, arguments: Sequence[str]) -> str:
    """`module.Class(key=value,...)` for metadata; `arguments` as the user wrote them."""
    cls = type(optimizer)
    return f"{cls.__module__}.{cls.__name__}" + (f"({','.join(arguments)})" if arguments else "")


def _is_optimizer(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)


def _takes_anything(cls: type) -> bool:
    kinds = [p.kind for p in inspect.signature(cls.__init__).parameters.values()]  # type: ignore[misc]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _sets_its_own_rate(cls: type, arguments: Mapping[str, Any]) -> bool:
    return cls.__name__ == "Adafactor" and "transformers" in cls.__module__ and arguments.get("relative_step", True)
