"""Options in layers: field default < family default < option file < command line, each value with its source.

A command names its option groups (frozen dataclasses whose fields are made by `option`); `parse` reads the option
file and the command line into one instance of each. Consumers get their own group, never a namespace:

    resolved = parse((OptimizerOptions, SaveOptions), argv, prog="train", description="...")
    resolved[OptimizerOptions].learning_rate

Every fault of the file and of the command line is told in one UserError; what can be mended without a doubt, and
what has no effect, is a line of `resolved.warnings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

from musubi_tuner.config.command_line import cut
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import Option, option, options_of
from musubi_tuner.config.layers import (
    DEFAULT,
    FAMILY,
    Known,
    Layers,
    Table,
    Value,
    apply_command_line,
    apply_file,
    stray_word,
)
from musubi_tuner.config.show import help_text, print_json, print_toml

__all__ = ["ConfigOptions", "Known", "Option", "Resolved", "UserError", "option", "parse"]

G = TypeVar("G")


@dataclass(frozen=True)
class ConfigOptions:
    """Option file."""

    config_file: str | None = option(None, help="TOML file with options; sections are only for reading", metavar="FILE")
    config_compat: bool = option(False, help="warn about unknown keys of the option file instead of stopping")
    print_config: str | None = option(
        None, help="print every option with its value and source, and stop", choices=("toml", "json")
    )


class Resolved:
    """What `parse` found: group instances by class, sources by option name, warnings for the log.

    `help` or `print_config` is set when the user asked for that text; the caller prints it and stops. `script` is the
    established name of the command.
    """

    def __init__(
        self,
        options: Mapping[str, Option],
        values: Mapping[str, Value],
        groups: Mapping[type, object],
        warnings: Sequence[str] = (),
        *,
        help: str | None = None,
        print_config: str | None = None,
        script: str = "",
    ) -> None:
        self._options = dict(options)
        self._values = dict(values)
        self._groups = dict(groups)
        self.warnings = list(warnings)
        self.help = help
        self.print_config = print_config
        self.script = script

    def __getitem__(self, group: type[G]) -> G:
        """The instance of an option group that the command was parsed with."""
        if group not in self._groups:
            raise KeyError(f"{group.__name__} is not one of this command's option groups")
        return cast("G", self._groups[group])

    def __contains__(self, group: type) -> bool:
        return group in self._groups

    def source(self, name: str) -> str:
        """Where the value comes from: `default`, `family default`, `config.toml line 12`, `command line`."""
        return self._values[name].source

    def given(self, name: str) -> bool:
        """True when the user said it, in a file or on the command line (even with the default's value)."""
        return self._values[name].source not in (DEFAULT, FAMILY)

    def filled(self, values: Mapping[str, Any], source: str) -> Resolved:
        """The same, with those of `values` that the user has not said; `source` is where they come from."""
        new = {name: value for name, value in values.items() if name in self._values and not self.given(name)}
        groups = {
            kind: replace(group, **{f.name: new[f.name] for f in fields(group) if f.name in new})  # type: ignore[type-var, arg-type]
            for kind, group in self._groups.items()
        }
        told = {**self._values, **{name: Value(value, source) for name, value in new.items()}}
        asked = {"help": self.help, "print_config": self.print_config}
        return Resolved(self._options, told, groups, self.warnings, script=self.script, **asked)

    def as_dict(self) -> dict[str, Any]:
        """All values by option name, secrets left out: for metadata and logs."""
        return {n: v.value for n, v in self._values.items() if not self._options[n].secret}

    def __repr__(self) -> str:
        return f"Resolved({', '.join(g.__name__ for g in self._groups)})"


def parse(
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    defaults: Mapping[str, object] | None = None,
    elsewhere: Mapping[str, str | Known] | None = None,
    script: str = "",
) -> Resolved:
    """Read the option file and the command line.

    Args:
        groups: frozen dataclasses of options; a group or an option that comes twice must be the same.
        argv: the command line without the program's name.
        prog, description: for the help text.
        defaults: the family's defaults by option name; those of other commands are passed over.
        script: established name of the command, where it has one.
        elsewhere: names that are accepted and told, in one warning, to have no effect.

    Raises:
        UserError: with every fault of the file and of the command line.
        TypeError: when a declaration itself is wrong.
    """
    unique = tuple(dict.fromkeys((ConfigOptions, *groups)))
    table = Table.of(unique)
    known = {n: k for n, k in (elsewhere or {}).items() if n not in table.spelled and n not in table.shorthand}
    layers = Layers(table, defaults or {}, known)
    whole = ["config_compat", "print_config", *(f"no_{name}" for name in table.spelled)]
    pieces = cut(argv, table.arities(known), short=table.short, whole=whole)
    if any(f.name in ("help", "h") and f.known for f in pieces.flags):
        text = help_text(prog, description, list(table.options.values()), layers.values)
        return Resolved(table.options, layers.values, {}, help=text)
    apply_file(layers, pieces.flags)
    apply_command_line(layers, pieces.flags)
    layers.faults += [stray_word(word, before, table) for word, before in pieces.stray]
    wanted = layers.values["print_config"].value
    instances = {} if layers.faults or wanted else _build(layers, unique)
    if layers.faults:
        raise UserError(_told(layers.faults))
    warnings = layers.warnings + layers.grouped_warning()
    shown = None
    if wanted:
        shown = (print_json if wanted == "json" else print_toml)(prog, list(table.options.values()), layers.values)
    return Resolved(table.options, layers.values, instances, warnings, print_config=shown, script=script)


def _told(faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} faults in the options:\n" + "\n".join(f"  {fault}" for fault in faults)


def _build(layers: Layers, groups: Sequence[type]) -> dict[type, object]:
    """One instance of each group; required options and the groups' own checks add to the faults."""
    built: dict[type, object] = {}
    for name, item in layers.table.options.items():
        found = layers.values[name]
        if item.declared.required and (found.source == DEFAULT or found.value in (None, "", ())):
            layers.faults.append(f"--{name} is required ({item.declared.help}): give it here or in --config_file")
    if layers.faults:
        return built
    for group in groups:
        try:
            built[group] = group(**{item.name: layers.values[item.name].value for item in options_of(group)})
        except UserError as fault:
            layers.faults.append(str(fault))
    return built
