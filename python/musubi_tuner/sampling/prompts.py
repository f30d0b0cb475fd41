"""Prompt files: what to sample, one request per line, as established tools write it.

A line is a prompt followed by `--x value` options (`a red seven --w 480 --h 832 --d 1`); `#` begins a comment line. A
TOML file has a table `[prompt]` of common values and `[[prompt.subset]]` tables with their own; a JSON file a list of
such tables. All three give `PromptEntry` rows of the same names, unset values left to the caller's defaults. Every
fault of a file is told at once, with its line or entry.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class PromptEntry:
    """A prompt and what its entry says; None: not said. `unserved`: options that have no effect here yet.

    said: options that only some families understand, by their names in a line.
    """

    prompt: str
    where: str
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    embedded_guidance: float | None = None
    shift: float | None = None
    negative: str | None = None
    image: str | None = None
    end_image: str | None = None
    control_images: tuple[str, ...] | None = None
    control_masks: tuple[str, ...] | None = None
    control: str | None = None
    said: Mapping[str, str] = field(default_factory=dict)
    unserved: tuple[str, ...] = ()

    def given(self, *, embedded: bool = False) -> dict[str, Any]:
        """What the entry says, by the names of `Request`.

        embedded: the transformer has embedded guidance; otherwise its scale stands for the one that is not given.
        """
        skipped = ("where", "unserved", "said")
        said = {f.name: v for f in fields(self) if f.name not in skipped and (v := getattr(self, f.name)) is not None}
        if not embedded and "embedded_guidance" in said:
            said.setdefault("guidance", said.pop("embedded_guidance"))
            said.pop("embedded_guidance", None)
        return said


LINE_OPTIONS: Mapping[str, str] = {
    "w": "width",
    "h": "height",
    "f": "frames",
    "d": "seed",
    "s": "steps",
    "g": "embedded_guidance",
    "l": "guidance",
    "fs": "shift",
    "n": "negative",
    "i": "image",
    "ei": "end_image",
    "ci": "control_images",
    "cim": "control_masks",
    "cn": "control",
}
"""Options of a line, by the field they set; `l` is the scale of classifier-free guidance."""
_LISTS = ("ci", "cim")
"""Options that may come repeatedly."""

LINE_SAID = ("of", "vs")
"""Options that a family may understand: one-frame settings, number of sections."""
LINE_UNSERVED = ("im", "m", "mcrr", "mct", "mck")

TABLE_KEYS: Mapping[str, str] = {
    "prompt": "prompt",
    "negative_prompt": "negative",
    "width": "width",
    "height": "height",
    "frame_count": "frames",
    "fps": "fps",
    "seed": "seed",
    "sample_steps": "steps",
    "guidance_scale": "embedded_guidance",
    "cfg_scale": "guidance",
    "discrete_flow_shift": "shift",
    "image_path": "image",
    "end_image_path": "end_image",
    "control_image_path": "control_images",
    "control_image_mask_path": "control_masks",
    "control_video_path": "control",
}
"""Keys of a TOML or JSON entry."""

TABLE_SAID: Mapping[str, str] = {"one_frame": "of", "video_sections": "vs"}
"""Further keys, by the option of a line that they stand for."""

TABLE_UNSERVED = ("enum",)

_WHOLE = ("width", "height", "frames", "fps", "seed", "steps")


def read_prompts(path: str) -> list[PromptEntry]:
    """The entries of a prompt file (.toml, .json, or lines). Raises UserError with every fault."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as fault:
        raise UserError(f"prompt file {path} does not exist") from fault
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"prompt file {path} cannot be read as UTF-8 text: {fault}") from fault
    kind = file.suffix.lower()
    entries = _tables(file, kind, text) if kind in (".toml", ".json") else _lines(file.name, text)
    if not entries:
        raise UserError(f"prompt file {path} holds no prompt: write one per line, like `a cat --w 480 --h 832 --d 1`")
    return entries


def parse_line(line: str, where: str = "prompt") -> PromptEntry:
    """One line's entry. Raises UserError naming the option at fault."""
    prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line.strip())
    found: dict[str, str] = {}
    said: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    unserved = []
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name in LINE_UNSERVED:
            unserved.append(f"--{name}")
        elif name not in LINE_OPTIONS and name not in LINE_SAID:
            allowed = ", ".join(f"--{known}" for known in (*LINE_OPTIONS, *LINE_SAID))
            raise UserError(f"{where}: --{name} is not an option of a prompt line; use {allowed}")
        elif not value.strip() and name != "n":
            raise UserError(f"{where}: --{name} needs a value")
        elif name in LINE_SAID:
            said[name] = value.strip()
        elif name in _LISTS:
            lists.setdefault(LINE_OPTIONS[name], []).append(value.strip())
        else:
            found[name] = value.strip()
    values = {LINE_OPTIONS[n]: _value(LINE_OPTIONS[n], v, f"{where}: --{n}") for n, v in _in_order(found, LINE_OPTIONS)}
    values |= {field: tuple(paths) for field, paths in lists.items()}
    return PromptEntry(prompt.strip(), where, said=said, unserved=tuple(unserved), **values)


def _lines(name: str, text: str) -> list[PromptEntry]:
    rows = [
        (f"{name} line {number}", line)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return _all(rows, lambda where, line: parse_line(line, where))


def _tables(file: Path, kind: str, text: str) -> list[PromptEntry]:
    try:
        tree = tomllib.loads(text) if kind == ".toml" else json.loads(text)
    except ValueError as fault:  # both decoders' errors are ValueErrors and name the place
        raise UserError(f"prompt file {file} is not {kind[1:].upper()}: {fault}") from fault
    common: Mapping[str, Any] = {}
    rows: Any = tree
    if isinstance(tree, Mapping):
        outer = tree.get("prompt")
        if not isinstance(outer, Mapping):
            raise UserError(f"prompt file {file}: a table [prompt] with [[prompt.subset]] entries is needed")
        common = {key: value for key, value in outer.items() if key != "subset"}
        rows = outer.get("subset", [{}] if "prompt" in common else [])
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"prompt file {file}: a list of tables is needed, one per prompt")
    numbered = [(f"{file.name} entry {number}", {**common, **row}) for number, row in enumerate(rows, start=1)]
    return _all(numbered, _entry)


def _entry(where: str, table: Mapping[str, Any]) -> PromptEntry:
    for key in table:
        if key not in TABLE_KEYS and key not in TABLE_UNSERVED and key not in TABLE_SAID:
            close = nearest(key, TABLE_KEYS)
            hint = f"did you mean {close}?" if close else f"use {', '.join(TABLE_KEYS)}"
            raise UserError(f"{where}: {key} is not a key of a prompt; {hint}")
    values = {TABLE_KEYS[k]: _value(TABLE_KEYS[k], v, f"{where}: {k}") for k, v in _in_order(table, TABLE_KEYS)}
    if "prompt" not in values:
        raise UserError(f"{where}: the key prompt is missing")
    said = {TABLE_SAID[key]: str(value) for key, value in table.items() if key in TABLE_SAID}
    return PromptEntry(where=where, said=said, unserved=tuple(k for k in table if k in TABLE_UNSERVED), **values)


def _in_order(found: Mapping[str, Any], known: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Given names in the order of `known`, so that the later of two spellings of one field wins."""
    return [(name, found[name]) for name in known if name in found]


def _value(field: str, value: Any, where: str) -> Any:
    """`value` as the field's type. Raises UserError."""
    if field in ("control_images", "control_masks"):
        paths = (value,) if isinstance(value, str) else value
        if isinstance(paths, (list, tuple)) and all(isinstance(path, str) for path in paths):
            return tuple(paths)
        raise UserError(f"{where} = {value!r}: must be the path of a picture, or a list of them")
    if field in ("prompt", "negative", "image", "end_image", "control"):
        if isinstance(value, str):
            return value
        raise UserError(f"{where} = {value!r}: must be text")
    wanted, read = ("a whole number", int) if field in _WHOLE else ("a number", float)
    try:
        if isinstance(value, bool) or (read is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return read(value)
    except (TypeError, ValueError) as fault:
        raise UserError(f"{where} = {value!r}: must be {wanted}") from fault


def _all(rows: Iterable[tuple[str, Any]], make: Callable[[str, Any], PromptEntry]) -> list[PromptEntry]:
    """Every row's entry, or one error with all faults."""
    entries, faults = [], []
    for where, row in rows:
        try:
            entries.append(make(where, row))
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError("; ".join(faults))
    return entries
