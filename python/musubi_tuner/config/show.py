"""Options as text: the help page, the resolved values with their sources (TOML or JSON), and the docs table.

Secrets (tokens, API keys) are never shown.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from musubi_tuner.config.fields import Option, options_of


class Sourced(Protocol):
    """A value with the layer that it comes from."""

    @property
    def value(self) -> Any: ...
    @property
    def source(self) -> str: ...


def by_group(options: Sequence[Option]) -> Iterator[tuple[str, list[Option]]]:
    """Runs of options of the same group, with the group's title."""
    for title, rows in groupby(options, key=lambda item: item.title):
        yield title, list(rows)


def help_text(prog: str, description: str, options: Sequence[Option], values: Mapping[str, Sourced]) -> str:
    """The help page: every option with its meaning, allowed values and default in this command."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [f"usage: {prog} [--option value ...]", "", *textwrap.wrap(description, width), ""]
    for title, rows in by_group(options):
        lines.append(f"{title}:")
        for item in rows:
            lines.append("  " + ", ".join(_flags(item)))
            text = item.declared.help + _facts(item, values[item.name].value)
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    lines.append("  -h, --help\n      show this page")
    return "\n".join(lines)


def _flags(item: Option) -> list[str]:
    if item.is_flag:
        return [f"--{item.name}", *item.declared.flags, f"--no-{item.name}"]
    value = item.declared.metavar or (
        "{" + ",".join(map(str, item.declared.choices)) + "}" if item.declared.choices else None
    )
    value = value or {"int": "N", "float": "X", "Path": "PATH"}.get(item.kinds[-1].__name__, "TEXT")
    if item.arity is not None:
        value = f"[{value} ...]" if item.arity == "*" else " ".join([value] * int(item.arity))
    return [f"--{item.name} {value}", *item.declared.flags, *item.declared.shorthand]


def _facts(item: Option, default: Any) -> str:
    facts = [] if item.is_flag else [item.bounds()]
    if item.declared.required:
        facts.append("required")
    elif default not in (None, ()) and not (item.is_flag and default is False):
        facts.append(f"default {plain(default)}")
    told = "; ".join(f for f in facts if f)
    return f" ({told})" if told else ""


def plain(value: Any) -> str:
    """A value in the words of help and docs: `none`, `on`, `1e-4`, `256 256`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return " ".join(plain(v) for v in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def toml_value(value: Any) -> str:
    """A value in TOML. None has no form there and raises ValueError."""
    if value is None:
        raise ValueError("TOML has no null")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def print_toml(prog: str, options: Sequence[Option], values: Mapping[str, Sourced]) -> str:
    """The resolved options as an option file that gives the same values again, each with its source behind it."""
    lines = [f"# options of {prog}"]
    for title, rows in by_group(_printed(options)):
        lines += ["", f"# {title}"]
        for item in rows:
            found = values[item.name]
            if item.secret or found.value is None or (item.declared.required and found.source == "default"):
                shown = "(required)" if item.declared.required else "(hidden)" if found.value is not None else "(none)"
                lines.append(f"# {item.name} = {shown}  # {found.source}")
            else:
                lines.append(f"{item.name} = {toml_value(found.value)}  # {found.source}")
    return "\n".join(lines)


def print_json(prog: str, options: Sequence[Option], values: Mapping[str, Sourced]) -> str:
    """The resolved options as JSON: command, and value and source by option name."""
    rows = {
        item.name: {
            "value": "(hidden)"
            if item.secret and values[item.name].value is not None
            else _jsonable(values[item.name].value),
            "source": values[item.name].source,
        }
        for item in _printed(options)
    }
    return json.dumps({"command": prog, "options": rows}, indent=2, ensure_ascii=False)


def _printed(options: Sequence[Option]) -> list[Option]:
    return [item for item in options if item.name not in ("config_file", "print_config", "config_compat")]


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def markdown(groups: Sequence[type]) -> str:
    """Docs tables of option groups, one per group: option, values, default, meaning."""
    parts = []
    for group in groups:
        options = options_of(group)
        if not options:
            continue
        parts += [f"### {options[0].title}", "", "| option | value | default | meaning |", "|---|---|---|---|"]
        for item in options:
            names = ", ".join(f"`{f.split(' ')[0]}`" for f in _flags(item))
            shown = "required" if item.declared.required else plain(item.default)
            parts.append(
                "| " + " | ".join(_cell(c) for c in (names, _value_words(item), shown, item.declared.help)) + " |"
            )
        parts.append("")
    return "\n".join(parts)


def _value_words(item: Option) -> str:
    if item.is_flag:
        return "on or off"
    if item.declared.choices:
        return ", ".join(f"`{c}`" for c in item.declared.choices)
    return ", ".join(p for p in (item.type_words, item.bounds()) if p)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
