"""Which layers an adapter goes to: the family's block classes, thinned by patterns; and `--network_args`.

Patterns are regular expressions that must match the dotted module path in full. Without `include`, every linear of
the block classes is taken whose path no exclude matches. With `include`, `include_mode = "only"` takes exactly the
linears that match it, excluded or not; `"add"` takes the excluded ones among them back and leaves the rest alone.
"""

import ast
import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from torch import nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.linear import Fp8Linear
from musubi_tuner.weights.sources import some

_log = logging.getLogger(__name__)


class Targets(Protocol):
    """A family's defaults; `families.base.AdapterTargets` is one."""

    @property
    def block_classes(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class NetworkArgs:
    """The `key=value` pairs of `--network_args` that LoRA knows."""

    exclude_patterns: tuple[str, ...] = ()
    """Added to the family's own, which `default_excludes=False` drops."""
    include_patterns: tuple[str, ...] = ()
    include_mode: Literal["only", "add"] = "only"
    default_excludes: bool = True
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None
    """Learning rate of the up factors over that of the rest; None: one rate."""
    verbose: bool = False
    """Log the path of every target."""


_ELSEWHERE: Mapping[str, str] = {
    "conv_dim": "the targeted blocks hold no convolutions",
    "conv_alpha": "the targeted blocks hold no convolutions",
}


def parse_network_args(args: Sequence[str]) -> NetworkArgs:
    """`["exclude_patterns=[r'.*ffn.*']", "rank_dropout=0.1"]` -> NetworkArgs. All faults are told in one UserError."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    known = {f.name for f in fields(NetworkArgs)}
    for arg in args:
        key, equals, text = arg.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            faults.append(f"{arg!r} has no '='")
        elif key in _ELSEWHERE:
            faults.append(f"{key!r} cannot be used: {_ELSEWHERE[key]}")
        elif key not in known:
            near = difflib.get_close_matches(key, known, 1)
            faults.append(f"{key!r} is not known" + (f", did you mean {near[0]!r}?" if near else ""))
        else:
            try:
                values[key] = _value(key, text.strip())
            except ValueError as error:
                faults.append(f"{key}={text}: {error}")
    if faults:
        raise UserError(f"network_args: {'; '.join(faults)} (known: {', '.join(sorted(known))})")
    return NetworkArgs(**values)


def _value(key: str, text: str) -> Any:
    """The value of one argument; ValueError says what is allowed."""
    if key in ("exclude_patterns", "include_patterns"):
        return _patterns(text)
    if key == "include_mode":
        if text not in ("only", "add"):
            raise ValueError("use only or add")
        return text
    if key in ("default_excludes", "verbose"):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("use True or False")
        return text.lower() in ("true", "1")
    if text == "None":
        return None if key == "loraplus_lr_ratio" else 0.0
    number = float(text)
    if key == "loraplus_lr_ratio" and number <= 0:
        raise ValueError("use a ratio above 0")
    if key != "loraplus_lr_ratio" and not 0 <= number < 1:
        raise ValueError("use a probability from 0 to below 1")
    return number


def _patterns(text: str) -> tuple[str, ...]:
    """A Python list of strings, or one pattern as it is."""
    patterns: Any = text
    if text.startswith(("[", "(", "'", '"', "r'", 'r"')):
        try:
            patterns = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"not a list of strings ({error})") from error
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise ValueError(f"{pattern!r} is not a string")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
    return tuple(listed)


def find_targets(model: nn.Module, targets: Targets, args: NetworkArgs | None = None) -> tuple[str, ...]:
    """Dotted paths of the linears to adapt, in the order of the model. UserError when nothing is left."""
    args = args or NetworkArgs()
    candidates = _candidates(model, targets.block_classes)
    excludes = _compiled((*(targets.exclude if args.default_excludes else ()), *args.exclude_patterns))
    includes = _compiled(args.include_patterns)

    def wanted(path: str) -> bool:
        included = any(p.fullmatch(path) for p in includes)
        if includes and args.include_mode == "only":
            return included
        return included or not any(p.fullmatch(path) for p in excludes)

    chosen = tuple(path for path in candidates if wanted(path))
    if not chosen:
        raise UserError(
            f"the adapter has no target: patterns include {list(args.include_patterns)} and exclude "
            f"{[p.pattern for p in excludes]} leave none of {len(candidates)} linear layers "
            f"({some(candidates, 3)}); patterns must match the whole dotted path, e.g. '.*ffn.*'"
        )
    if includes and args.include_mode == "only":
        _log.info(
            "include_patterns: exactly the %d matching modules of %d are targeted (include_mode=add would add the "
            "matching ones to the default targets instead)",
            len(chosen),
            len(candidates),
        )
    _tell_idle((*args.exclude_patterns, *args.include_patterns), candidates)
    _log.info("adapter targets:\n%s", table(candidates, chosen))
    if args.verbose:
        _log.info("targeted modules:\n  %s", "\n  ".join(chosen))
    return chosen


def _tell_idle(patterns: Sequence[str], candidates: Sequence[str]) -> None:
    """Warn of each pattern of the user that no linear layer matches."""
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in candidates):
            _log.warning(
                "pattern %r matches none of %d linear layers (%s); it must match the whole dotted path, e.g. '.*ffn.*'",
                pattern,
                len(candidates),
                some(candidates, 3),
            )


def table(candidates: Sequence[str], chosen: Sequence[str]) -> str:
    """What is targeted, a line for each kind of layer (block numbers as N): how many of how many."""
    kinds: dict[str, list[int]] = {}
    taken = set(chosen)
    for path in candidates:
        row = kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", path, count=1), [0, 0])
        row[0] += path in taken
        row[1] += 1
    width = max(len(kind) for kind in (*kinds, "together"))
    lines = [f"  {kind:<{width}}  {count:>4} of {total}" for kind, (count, total) in kinds.items()]
    return "\n".join([*lines, f"  {'together':<{width}}  {len(chosen):>4} of {len(candidates)}"])


def _candidates(model: nn.Module, block_classes: Sequence[str]) -> tuple[str, ...]:
    """Every linear inside a module of one of the classes, once, in the model's order."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in block_classes:
            for name, child in module.named_modules(prefix=path):
                if type(child) is nn.Linear or isinstance(child, Fp8Linear):
                    found[name] = None
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear layer inside {' or '.join(block_classes)}: an adapter finds no "
            "target; is it a model of another family, or adapted already?"
        )
    return tuple(found)


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"pattern {error.pattern!r} is not a regular expression: {error}") from error
