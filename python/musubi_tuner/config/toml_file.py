"""Read an option file: every key with its line and section, all sections flattened.

`tomllib` gives values without their lines, so a small scan of the text finds where each key and section header
stands; the values are the parser's. A byte-order mark, an extension in any case, and an extension left out are fine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Entry:
    """One `key = value` of a file. `section` is the dotted path of the table that it stands in, "" at the top."""

    key: str
    value: Any
    line: int | None
    section: str


def find_file(given: str) -> Path:
    """The option file that the user means: `given` with `.toml`, else exactly `given`. Raises UserError."""
    path = Path(given).expanduser()
    if not path.name:
        raise UserError(f"--config_file {given!r}: give the path of a TOML file")
    endings = ("",) if path.suffix.lower() == ".toml" else (".toml", ".TOML", "")
    candidates = [path.with_name(path.name + ending) for ending in endings]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"--config_file {given}: there is no folder {folder}; give the path of a TOML file")
    here = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".toml")
    hint = nearest(candidates[0].name, here, 0.6)
    raise UserError(
        f"--config_file {given}: there is no file {candidates[0]}" + (f"; did you mean {hint}?" if hint else "")
    )


def read_entries(path: Path) -> list[Entry]:
    """All keys of the file, in order, tables flattened at any depth. Raises UserError with the line of a fault."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: is not UTF-8 text (byte {fault.start}); save it as UTF-8") from fault
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        why = "this is JSON, option files are TOML" if text.lstrip().startswith("{") else _lower_first(str(fault))
        raise UserError(f"{path}: is not valid TOML: {why}") from fault
    lines = key_lines(text)
    return list(_flatten(table, (), lines))


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _flatten(table: dict[str, Any], path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> Iterator[Entry]:
    for key, value in table.items():
        here = (*path, key)
        if isinstance(value, dict):  # an inline table is a section as much as any
            yield from _flatten(value, here, lines)
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for number, element in enumerate(value):
                yield from _flatten(element, (*here, str(number)), lines)
        else:
            yield Entry(key, value, _line_of(here, lines), ".".join(path))


def _line_of(path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> int | None:
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


_KEY_PART = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)\s*""")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""+' + r"|'''.*?'''+" + r'|"(?:[^"\\\n]|\\.)*"' + r"|'[^'\n]*'|#[^\n]*", re.DOTALL
)


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line (from 1) of every assigned key of a valid TOML text, by full path; elements of `[[a]]` are a.0, a.1, ..."""
    found: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    seen: dict[tuple[str, ...], int] = {}
    position, line = 0, 1
    while position < len(text):
        end = _statement_end(text, position)
        statement = text[position:end]
        if statement.strip() and not statement.lstrip().startswith("#"):
            if statement.lstrip().startswith("["):
                section = _header(statement.strip(), seen)
            else:
                found[(*section, *_key_path(statement))] = line
        line += statement.count("\n")
        position = end
    return found


def _statement_end(text: str, position: int) -> int:
    """Offset after the newline that ends the statement at `position`: newlines in strings and brackets do not."""
    depth = 0
    while position < len(text):
        if text[position] in "\"'#":
            match = _STRING.match(text, position)
            position = match.end() if match else position + 1
            continue
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(text[position], 0)
        position += 1
        if text[position - 1] == "\n" and depth <= 0:
            break
    return position


def _key_path(text: str) -> tuple[str, ...]:
    parts = []
    position = 0
    while match := _KEY_PART.match(text, position):
        (part,) = tomllib.loads(f"{match.group(1)} = 0")  # the parser knows all escapes
        parts.append(part)
        position = match.end()
        if text[position : position + 1] != ".":
            break
        position += 1
    return tuple(parts)


def _header(text: str, seen: dict[tuple[str, ...], int]) -> tuple[str, ...]:
    """Path of a `[table]` or `[[table]]` line; the number of the current element follows each array on the way."""
    repeated = text.startswith("[[")
    names = _key_path(text.lstrip("["))
    path: tuple[str, ...] = ()
    for position, name in enumerate(names):
        path = (*path, name)
        if repeated and position == len(names) - 1:
            seen[path] = seen.get(path, -1) + 1
        if path in seen:
            path = (*path, str(seen[path]))
    return path
