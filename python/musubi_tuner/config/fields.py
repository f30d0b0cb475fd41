"""An option is one field of a frozen dataclass, declared beside the code that reads it.

`option(...)` makes the field; `options_of(group)` reads a group back as `Option` rows, which know their type and can
turn a word of the command line (`from_words`) or a value of a TOML file (`from_value`) into the field's value. Both
raise `BadValue` with the reason alone; the caller puts file, line and flag in front of it. What a file may say more
loosely than its type (a number in quotes, a lone string for a list) is converted where it can mean one thing only, and
the second result says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_KEY = "musubi_option"
_SECRET = re.compile(r"(^|_)(token|api_key|apikey|password|secret)$")
_SCALARS = (bool, int, float, str, Path)


class BadValue(ValueError):
    """Why a value does not fit an option; without the option's name and the value's place."""


@dataclass(frozen=True)
class _Declared:
    help: str
    choices: tuple[Any, ...] | None
    minimum: float | None
    maximum: float | None
    above: float | None
    below: float | None
    shorthand: Mapping[str, Any]
    flags: tuple[str, ...]
    parse: Callable[[str], Any] | None
    metavar: str | None
    required: bool


def option(
    default: T,
    *,
    help: str,  # the word that every reader of a command line knows
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    shorthand: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    required: bool = False,
) -> T:
    """Declare an option as the default of a dataclass field.

    Args:
        default: the value when no layer says otherwise; not checked against the bounds, so None or 0 may mean "off".
        help: one or two plain sentences.
        choices: all allowed values.
        minimum, maximum: inclusive bounds; above, below: exclusive bounds. Each applies to every element of a list.
        shorthand: flags that stand for a value (`{"--sdpa": "sdpa"}`); `sdpa = true` in a file means the same.
        flags: more spellings of the flag, as established scripts have them.
        parse: text -> value, for words of the command line and for strings in a file; ValueError says why not.
        metavar: what the help shows for the value.
        required: the user must give it, on the command line or in a file.
    """
    declared = _Declared(
        help=" ".join(help.split()),
        choices=None if choices is None else tuple(choices),
        minimum=minimum,
        maximum=maximum,
        above=above,
        below=below,
        shorthand=dict(shorthand or {}),
        flags=tuple(flags),
        parse=parse,
        metavar=metavar,
        required=required,
    )
    return dataclasses.field(default=default, metadata={_KEY: declared})


def canonical(name: str) -> str:
    """A flag or a TOML key as an option's name: no leading dashes, inner dashes as underscores."""
    return name.strip().lstrip("-").replace("-", "_")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.72) -> str | None:
    """The most similar of `names`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return found[0] if found else None


@dataclass(frozen=True)
class Option:
    """A declared option with its type taken apart: scalar kinds, arity (None, "*" or a count), optional or not."""

    name: str
    group: type
    default: Any
    kinds: tuple[type, ...]
    arity: int | str | None
    optional: bool
    declared: _Declared

    @property
    def title(self) -> str:
        """Title of the group: the first line of its docstring."""
        return title_of(self.group)

    @property
    def is_flag(self) -> bool:
        """True for a boolean, which has `--x` and `--no-x` and takes no value."""
        return self.kinds == (bool,) and self.arity is None

    @property
    def secret(self) -> bool:
        """True for tokens and keys, whose values are never shown."""
        return _SECRET.search(self.name) is not None

    @property
    def spellings(self) -> tuple[str, ...]:
        """Canonical names that mean this option: its own and those of `flags`."""
        return (self.name, *(canonical(f) for f in self.declared.flags))

    @property
    def type_words(self) -> str:
        """The type in words for help and docs."""
        one = self._one_word
        if self.arity is None:
            return one
        many = one.replace("a whole number", "whole numbers").replace("a number", "numbers").replace("a path", "paths")
        return f"a list of {many}" if self.arity == "*" else f"{self.arity} {many}"

    @property
    def _one_word(self) -> str:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
        kinds = [k for k in self.kinds if not (k is int and float in self.kinds)]
        return " or ".join(words[k] for k in kinds)

    def from_words(self, words: Sequence[str]) -> Any:
        """The value of the words that followed the flag. Raises BadValue."""
        if self.arity is None:
            if len(words) != 1:
                raise BadValue("needs a value" if not words else f"takes one value, {len(words)} were given")
            return self._checked(self._scalar_of_text(words[0]))
        if self.arity != "*" and len(words) != self.arity:
            raise BadValue(f"takes {self.arity} values, {len(words)} {'was' if len(words) == 1 else 'were'} given")
        return tuple(self._checked(self._scalar_of_text(word)) for word in words)

    def from_value(self, value: Any) -> tuple[Any, str | None]:
        """The value of a TOML value, and a note where it had to be converted. Raises BadValue."""
        if isinstance(value, dict):
            raise BadValue(f"is a table; give {self.type_words}" + (' like ["key=value"]' if self.arity else ""))
        if self.arity is None:
            if isinstance(value, list):
                raise BadValue(f"is a list; give one value ({self.type_words})")
            return self._one(value)
        notes = []
        if not isinstance(value, list):
            if self.arity != "*":
                raise BadValue(f"needs a list of {self.arity} values")
            notes.append("read as a list of one")
            value = [value]
        if self.arity != "*" and len(value) != self.arity:
            raise BadValue(f"needs a list of {self.arity} values, {len(value)} were given")
        pairs = [self._one(element) for element in value]
        notes += [note for _, note in pairs if note]
        return tuple(v for v, _ in pairs), ("; ".join(dict.fromkeys(notes)) or None)

    def _one(self, value: Any) -> tuple[Any, str | None]:
        converted, note = self._scalar_of_value(value)
        return self._checked(converted), note

    def _scalar_of_text(self, text: str) -> Any:
        if self.declared.parse is not None:
            try:
                return self.declared.parse(text)
            except BadValue:
                raise
            except ValueError as fault:
                raise BadValue(str(fault) or f"must be {self._one_word}") from fault
        for kind in (k for k in _SCALARS if k in self.kinds):
            value = _READ[kind](text)
            if value is not None:
                return value
        raise BadValue(f"must be {self._one_word}")

    def _scalar_of_value(self, value: Any) -> tuple[Any, str | None]:
        if isinstance(value, str):
            plain = str in self.kinds or Path in self.kinds or self.declared.parse is not None
            converted = self._scalar_of_text(value)
            return converted, None if plain else f"text in quotes, read as {_shown(converted)}"
        if isinstance(value, bool):
            if bool in self.kinds:
                return value, None
        elif isinstance(value, int | float):
            return self._number(value)
        elif isinstance(value, datetime.date | datetime.time) and str in self.kinds:
            return value.isoformat(), "a date without quotes, read as text"
        raise BadValue(f"must be {self._one_word}")

    def _number(self, value: int | float) -> tuple[Any, str | None]:
        if not math.isfinite(value):
            raise BadValue("must be finite")
        if int in self.kinds and float(value).is_integer():
            return int(value), None
        if float in self.kinds:
            return float(value), None
        if str in self.kinds:
            return _shown(value), "a number without quotes, read as text"
        if bool in self.kinds and value in (0, 1):
            return bool(value), f"a number, read as {_shown(bool(value))}"
        raise BadValue(f"must be {self._one_word}")

    def _checked(self, value: Any) -> Any:
        d = self.declared
        if d.choices is not None and value not in d.choices:
            allowed = ", ".join(_shown(c) for c in d.choices)
            hint = nearest(str(value), [str(c) for c in d.choices], 0.6)
            raise BadValue(f"must be one of {allowed}" + (f"; did you mean {hint}?" if hint else ""))
        if isinstance(value, int | float) and not isinstance(value, bool):
            tests = (
                (d.minimum, d.minimum is not None and value < d.minimum, "at least"),
                (d.above, d.above is not None and value <= d.above, "above"),
                (d.maximum, d.maximum is not None and value > d.maximum, "at most"),
                (d.below, d.below is not None and value >= d.below, "below"),
            )
            if any(wrong for _, wrong, _ in tests):
                raise BadValue("must be " + self.bounds())
        return value

    def bounds(self) -> str:
        """The allowed range in words: `at least 1 and below 5`; empty when there is none."""
        d = self.declared
        rows = (("at least", d.minimum), ("above", d.above), ("at most", d.maximum), ("below", d.below))
        return " and ".join(f"{word} {_shown(bound)}" for word, bound in rows if bound is not None)


def _read_bool(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.strip().lower())


def _read_int(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else None


def _read_float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        raise BadValue("must be finite")
    return value


_READ: dict[type, Callable[[str], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: str,
    Path: Path,
}


def _shown(value: Any) -> str:
    """A value as a TOML file would say it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def title_of(group: type) -> str:
    """The first line of the group's docstring, without its full stop."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def options_of(group: type) -> tuple[Option, ...]:
    """The options of a group, in order. Raises TypeError where the declaration itself is wrong."""
    params = getattr(group, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise TypeError(f"option group {group.__name__} must be a frozen dataclass")
    hints = typing.get_type_hints(group)
    found = []
    for field in dataclasses.fields(group):
        declared = field.metadata.get(_KEY)
        if not isinstance(declared, _Declared):
            raise TypeError(f"{group.__name__}.{field.name}: declare it with option(default, help=...)")
        kinds, arity, optional = _take_apart(hints[field.name], f"{group.__name__}.{field.name}")
        found.append(Option(field.name, group, field.default, kinds, arity, optional, declared))
    return tuple(found)


def _take_apart(hint: Any, where: str) -> tuple[tuple[type, ...], int | str | None, bool]:
    members = _members(hint)
    optional = type(None) in members
    members = tuple(m for m in members if m is not type(None))
    arity: int | str | None = None
    if len(members) == 1 and typing.get_origin(members[0]) is tuple:
        args = typing.get_args(members[0])
        arity = "*" if args[-1] is Ellipsis else len(args)
        members = tuple(dict.fromkeys(m for a in args if a is not Ellipsis for m in _members(a)))
    if not members or any(m not in _SCALARS for m in members):
        raise TypeError(f"{where}: an option is bool, int, float, str, Path, their unions or tuples, not {hint}")
    return members, arity, optional


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
