"""Gather option values layer by layer, and note every fault and warning on the way.

`Table` holds all names that a command understands; `Layers` the values so far. `apply_file` and `apply_command_line`
put a layer on top. Nothing is raised for a user's fault here: `options.parse` tells all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from musubi_tuner.config.command_line import Arity, Words
from musubi_tuner.config.fields import BadValue, Option, canonical, nearest, options_of
from musubi_tuner.config.toml_file import Entry, find_file, read_entries

DEFAULT, FAMILY, COMMAND_LINE = "default", "family default", "command line"
ALREADY = "done in any case"
"""Where a known option belongs that asks for what is done anyway: it is taken in silence."""


@dataclass(frozen=True)
class Known:
    """An option of the established tool that this command has not: where it belongs, and how many words it takes."""

    where: str
    words: Arity = "*"


@dataclass(frozen=True)
class Value:
    """A resolved value and the layer that it comes from."""

    value: Any
    source: str


@dataclass
class Table:
    """All names that a command understands."""

    options: dict[str, Option] = field(default_factory=dict)
    spelled: dict[str, Option] = field(default_factory=dict)
    shorthand: dict[str, tuple[Option, Any]] = field(default_factory=dict)
    short: tuple[str, ...] = ("-h",)

    @staticmethod
    def of(groups: Sequence[type]) -> Table:
        table = Table()
        for group in groups:
            for item in options_of(group):
                table.add(item)
        return table

    def add(self, item: Option) -> None:
        twin = self.options.get(item.name)
        if twin is not None:
            if (twin.declared, twin.kinds, twin.default) != (item.declared, item.kinds, item.default):
                raise TypeError(f"option {item.name} is declared twice, differently: {twin.group}, {item.group}")
            return
        self.options[item.name] = item
        for name in item.spellings:
            self._claim(name)
            self.spelled[name] = item
        for flag, value in item.declared.shorthand.items():
            self._claim(canonical(flag))
            self.shorthand[canonical(flag)] = (item, value)
        self.short += tuple(f for f in item.declared.flags if not f.startswith("--"))

    def _claim(self, name: str) -> None:
        if name in self.spelled or name in self.shorthand:
            raise TypeError(f"two options are spelled {name}")

    def arities(self, elsewhere: Mapping[str, str | Known]) -> dict[str, Arity]:
        found: dict[str, Arity] = {n: k.words if isinstance(k, Known) else "*" for n, k in elsewhere.items()}
        for name, item in self.spelled.items():
            if item.is_flag:
                found[f"no_{name}"] = 0
                found[name] = 0
            else:
                found[name] = 1 if item.arity is None else item.arity
        found.update(dict.fromkeys(self.shorthand, 0))
        return found | {"print_config": "?", "help": 0, "h": 0}

    def names(self) -> list[str]:
        return [*self.spelled, *self.shorthand]


class Layers:
    """Values while they are being gathered, with the faults and warnings met on the way."""

    def __init__(self, table: Table, defaults: Mapping[str, object], elsewhere: Mapping[str, str | Known]) -> None:
        self.table, self.elsewhere = table, elsewhere
        self.faults: list[str] = []
        self.warnings: list[str] = []
        self.values = {name: Value(item.default, DEFAULT) for name, item in table.options.items()}
        for name, value in defaults.items():
            if name in table.options:
                self.values[name] = Value(_family_default(table.options[name], value), FAMILY)
        self.ignored: dict[str, list[str]] = {}

    def set(self, item: Option, value: Any, source: str) -> None:
        self.values[item.name] = Value(value, source)

    def ignore(self, name: str) -> None:
        """Note a name that is known elsewhere, for the one grouped warning."""
        known = self.elsewhere[name]
        where = known.where if isinstance(known, Known) else known
        names = self.ignored.setdefault(where, []) if where != ALREADY else [name]
        if name not in names:
            names.append(name)

    def grouped_warning(self) -> list[str]:
        if not self.ignored:
            return []
        parts = "; ".join(f"{', '.join(names)} ({where})" for where, names in self.ignored.items())
        return [f"has no effect here yet: {parts}"]


def _family_default(item: Option, value: object) -> Any:
    try:
        plain = list(value) if isinstance(value, tuple) else value
        return value if value is None and item.optional else item.from_value(plain)[0]
    except BadValue as fault:
        raise TypeError(f"family default {item.name} = {value!r}: {fault}") from fault


def apply_file(layers: Layers, flags: Sequence[Words]) -> None:
    given = [f for f in flags if f.name == "config_file" and f.known]
    if not given:
        return
    if len(given[-1].words) != 1:
        return  # told with the command line's faults
    path = find_file(given[-1].words[0])
    entries = read_entries(path)
    compat = any(f.name == "config_compat" for f in flags)
    compat = compat or any(canonical(e.key) == "config_compat" and e.value is True for e in entries)
    said: dict[str, tuple[Any, str]] = {}
    shorthand: dict[str, list[str]] = {}
    unknown: list[str] = []
    for entry in entries:
        name, place = canonical(entry.key), f"{path.name} line {entry.line}" if entry.line else path.name
        if name in layers.table.shorthand:
            _file_shorthand(layers, entry, name, place, shorthand)
        elif name in ("config_file", "print_config"):
            layers.warnings.append(f"{place}: {entry.key} has an effect on the command line only")
        elif name in layers.table.spelled:
            _file_value(layers, entry, layers.table.spelled[name], place, said)
        elif name in layers.elsewhere:
            layers.ignore(name)
        else:
            unknown.append(_unknown_key(layers.table, entry, name, place))
    for target, names in shorthand.items():
        _settle_shorthand(layers, layers.table.options[target], names, said.get(target), path.name)
    if unknown and compat:
        layers.warnings.append("unknown keys, passed over because of --config_compat: " + "; ".join(unknown))
    elif unknown:
        layers.faults += unknown


def _file_value(layers: Layers, entry: Entry, item: Option, place: str, said: dict[str, tuple[Any, str]]) -> None:
    shown = "***" if item.secret else repr(entry.value)
    try:
        value, note = item.from_value(entry.value)
    except BadValue as fault:
        layers.faults.append(f"{place}: {entry.key} = {shown}: {fault}")
        return
    if note:
        layers.warnings.append(f"{place}: {entry.key} = {shown}: {note}")
    if item.name in said:
        before, before_place = said[item.name]
        if before == value:
            layers.warnings.append(f"{place}: {item.name} was given before ({before_place}), with the same value")
        else:
            old = "***" if item.secret else repr(before)
            layers.faults.append(f"{place}: {item.name} = {shown} contradicts {old} of {before_place}; keep one")
        return
    said[item.name] = (value, place)
    layers.set(item, value, place)


def _file_shorthand(layers: Layers, entry: Entry, name: str, place: str, found: dict[str, list[str]]) -> None:
    item, value = layers.table.shorthand[name]
    if not isinstance(entry.value, bool) and entry.value not in ("true", "false", 0, 1):
        layers.faults.append(f"{place}: {entry.key} = {entry.value!r}: must be true or false")
    elif entry.value in (True, "true"):
        if not isinstance(entry.value, bool):
            layers.warnings.append(f"{place}: {entry.key} = {entry.value!r}: read as true")
        found.setdefault(item.name, []).append(name)
        layers.set(item, value, place)


def _settle_shorthand(
    layers: Layers, item: Option, names: Sequence[str], said: tuple[Any, str] | None, where: str
) -> None:
    """Where several shorthands, or one and the option itself, were given in a layer: which one counts."""
    ranked = [canonical(f) for f in item.declared.shorthand]
    first = min(names, key=ranked.index)
    value = layers.table.shorthand[first][1]
    if said is not None and said[0] != value:
        layers.faults.append(f"{where}: {first} and {item.name} = {said[0]!r} exclude each other; keep one")
    elif len(set(names)) > 1:
        layers.warnings.append(f"{where}: {', '.join(names)} exclude each other; {first} counts")
    layers.set(item, value, layers.values[item.name].source)


def _unknown_key(table: Table, entry: Entry, name: str, place: str) -> str:
    told = f"{place}: {entry.key} is not an option of this command"
    if entry.section.split(".")[0] in ("datasets", "general"):
        return told + "; this looks like a data set file, give it with --dataset_config"
    outer = table.spelled.get(canonical(entry.section.rpartition(".")[2])) if entry.section else None
    if outer is not None and outer.arity == "*":
        return f'{told}; {outer.name} takes a list like ["{entry.key}=value"]'
    close = nearest(name, table.names())
    return told + (f"; did you mean {close}?" if close else " (see --help for all)")


def apply_command_line(layers: Layers, flags: Sequence[Words]) -> None:
    shorthand: dict[str, list[str]] = {}
    said: dict[str, tuple[Any, str]] = {}
    for given in flags:
        if not given.known:
            layers.faults.append(_unknown_flag(layers.table, given))
            continue
        if given.shortened:
            layers.warnings.append(f"{given.flag} is read as --{given.name}")
        if given.name in layers.elsewhere:
            layers.ignore(given.name)
        elif given.name in layers.table.shorthand and not given.words:
            item, _ = layers.table.shorthand[given.name]
            shorthand.setdefault(item.name, []).append(given.name)
            layers.set(item, None, COMMAND_LINE)
        else:
            for item, value in _flag_value(layers, given):
                said[item.name] = (value, COMMAND_LINE)
                layers.set(item, value, COMMAND_LINE)
    for target, names in shorthand.items():
        _settle_shorthand(layers, layers.table.options[target], names, said.get(target), COMMAND_LINE)


def _flag_value(layers: Layers, given: Words) -> Iterator[tuple[Option, Any]]:
    table = layers.table
    item = table.spelled.get(given.name)
    if item is None and given.name.startswith("no_"):
        item = table.spelled.get(given.name.removeprefix("no_"))
    if given.name == "print_config":
        given = Words(given.name, given.flag, given.words or ("toml",), True)
    if item is None or item.is_flag:
        if given.words:
            shown = f"{given.flag}={given.words[0]}"
            layers.faults.append(f"{shown}: {given.flag} takes no value; write it alone" + _off(item))
        elif item is not None:
            yield item, given.name in item.spellings
        return
    try:
        yield item, item.from_words(given.words)
    except BadValue as fault:
        shown = " ***" if item.secret else "".join(f" {w}" for w in given.words)
        layers.faults.append(f"{given.flag}{shown}: {fault}")


def _off(item: Option | None) -> str:
    return f", or --no-{item.name} for off" if item is not None else ""


def _unknown_flag(table: Table, given: Words) -> str:
    close = nearest(given.name, table.names(), 0.6)
    return f"{given.flag} is not an option of this command" + (
        f"; did you mean --{close}?" if close else " (see --help)"
    )


def stray_word(word: str, before: str | None, table: Table) -> str:
    item = table.spelled.get(canonical(before)) if before else None
    if item is not None and item.is_flag:
        return f"{before} takes no value, {word!r} was given: write --{item.name} or --no-{item.name}"
    where = f" after {before}" if before else ""
    return f"{word!r}{where} belongs to no option: every value follows a flag like --{next(iter(table.options))}"
