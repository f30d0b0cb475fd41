"""The dataset file: what a user wrote, checked whole, as frozen values.

A file is `[general]` plus one `[[datasets]]` table per folder or list; a value of a dataset wins over `[general]`,
which wins over the default. Every fault of a file is found before one is reported, and the report names the file,
the section, the key, the given value, what is allowed and, for a misspelt key, the nearest known one. Nothing here
opens a picture: folders are listed in `sources`.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.spec_keys import KEYS, MEDIA, RENAMED, SHARED, SPECIAL, Check, Fault, Kind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class DatasetSpec:
    """One `[[datasets]]` table with `[general]` and the defaults filled in."""

    number: int
    """Position in the file, from 1."""
    where: str
    """File and section, for messages."""
    kind: Kind
    directory: Path | None = None
    """Folder of pictures or clips; None when `jsonl` lists them."""
    jsonl: Path | None = None
    cache_directory: Path | None = None
    """As written; see `cache_folder`."""
    resolution: tuple[int, int] = (960, 544)
    """Width, height."""
    caption_extension: str | None = None
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    target_frames: tuple[int, ...] = (1,)
    frame_extraction: str = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None
    control_directory: Path | None = None
    """Controls by the names of the items; see `controls`."""
    no_resize_control: bool = False
    control_resolution: tuple[int, int] | None = None
    multiple_target: bool = False
    """Pictures `name_0`, `name_1`, ... are further targets of the item `name`."""
    fp_latent_window_size: int = 9
    fp_1f_clean_indices: tuple[int, ...] | None = None
    fp_1f_target_index: int | None = None
    fp_1f_no_post: bool = False
    special: tuple[str, ...] = ()
    """Which of the keys `SPECIAL` the file gives."""

    @property
    def media(self) -> Path:
        """The folder, or the list file, that names the items."""
        path = self.directory or self.jsonl
        if path is None:
            raise ValueError(f"{self.where} was not validated: it names neither a folder nor a list")
        return path

    @property
    def cache_folder(self) -> Path:
        """Where cache files go: `cache_directory`, else the folder of the media."""
        return self.cache_directory or self.media

    @property
    def caption_suffix(self) -> str:
        """Ending of caption files; `.txt` when the file does not say."""
        return self.caption_extension or ".txt"


@dataclass(frozen=True)
class DataConfig:
    """A whole dataset file."""

    path: Path
    datasets: tuple[DatasetSpec, ...]
    warnings: tuple[str, ...] = ()


@dataclass
class _Reader:
    """Collects the faults of one file while its tables are checked."""

    name: str
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def fault(self, section: str, text: str) -> None:
        self.faults.append(f"{section}: {text}" if section else text)

    def table(self, given: Mapping[str, Any], checks: Mapping[str, Check], section: str) -> dict[str, Any]:
        """The known keys of a table with valid values; the others become faults."""
        found: dict[str, Any] = {}
        for key, value in given.items():
            if key not in checks:
                self.fault(section, _unknown(key, checks, section))
                continue
            try:
                found[key] = checks[key](value)
            except Fault as fault:
                self.fault(section, f"{key} = {_shown(value)}: {fault}")
        return found

    def dataset(self, number: int, given: Any, general: Mapping[str, Any]) -> DatasetSpec | None:
        """One `[[datasets]]` table; None when it cannot be understood at all."""
        section = f"[[datasets]] {number}"
        if not isinstance(given, dict):
            self.fault(section, "a table is needed")
            return None
        media = [key for key in MEDIA if key in given]
        if len(media) != 1:
            self.fault(section, _which_media(media, given))
            return None
        kind = MEDIA[media[0]]
        values = {**general, **self.table(self.renamed(given, section), KEYS[kind], section)}
        is_list = media[0].endswith("_jsonl_file")
        if is_list and "cache_directory" not in given:
            self.fault(section, f"{media[0]} needs a cache_directory: a list of files has no folder of its own")
        if media[0] not in values:
            return None
        spec = DatasetSpec(number, f"{self.name}, {section}", kind)
        spec = replace(spec, **{"jsonl" if is_list else "directory": values.pop(media[0])})
        return replace(spec, special=tuple(key for key in SPECIAL if key in values), **values)

    def renamed(self, given: Mapping[str, Any], section: str) -> dict[str, Any]:
        """`given` under the present names of keys that were once spelt otherwise."""
        result = {key: value for key, value in given.items() if key not in RENAMED}
        for old in given:
            if old in RENAMED:
                self.warnings.append(f"{self.name}, {section}: {old} is now called {RENAMED[old]}")
                result.setdefault(RENAMED[old], given[old])
        return result


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(key: str) -> str:
    """A key as it may stand in a line: one with control characters is shown escaped."""
    return key if key.isprintable() else json.dumps(key)


def _unknown(key: str, checks: Mapping[str, Check], section: str) -> str:
    if section == "[general]" and any(key in keys for keys in KEYS.values()):
        return f"{key} belongs in [[datasets]]; [general] takes {', '.join(checks)}"
    other = [kind for kind, keys in KEYS.items() if key in keys and keys is not checks]
    if section != "[general]" and other:
        return f"{key} is for {other[0]} datasets only"
    near = get_close_matches(key, checks, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(checks))}"
    return f"{_plain(key)} is not a known key: {hint}"


def _which_media(found: list[str], given: Mapping[str, Any]) -> str:
    if found:
        return f"{' and '.join(found)} exclude each other: make a [[datasets]] table for each"
    near = [(key, match) for key in given for match in get_close_matches(key, MEDIA, n=1)]
    hint = f"; did you mean {near[0][1]} by {_plain(near[0][0])}?" if near else ""
    return f"names no pictures or clips: give one of {', '.join(MEDIA)}{hint}"


def _parsed(text: str, name: str) -> dict[str, Any]:
    """The tables of a TOML file, or of a JSON file by its ending."""
    try:
        loaded = json.loads(text) if name.lower().endswith(".json") else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{name} cannot be parsed: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{name} holds no tables: [general] and [[datasets]] are expected")
    return loaded


def _read(text: str, path: Path) -> tuple[_Reader, tuple[DatasetSpec, ...]]:
    reader = _Reader(path.name)
    loaded = _parsed(text.removeprefix("\ufeff"), path.name)
    for key in loaded:
        if key not in ("general", "datasets"):
            reader.fault("", f"{_plain(key)} stands outside [general] and [[datasets]], the two sections there are")
    general = loaded.get("general", {})
    tables = loaded.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(tables, list):
        raise UserError(f"{path.name}: [general] must be a table and [[datasets]] a list of tables, in double brackets")
    values = reader.table(general, SHARED, "[general]")
    if not tables:
        reader.fault("", "no [[datasets]] section: add one with image_directory or video_directory")
    found = [reader.dataset(number, table, values) for number, table in enumerate(tables, start=1)]
    return reader, tuple(spec for spec in found if spec is not None)


def _report(path: Path, faults: list[str]) -> None:
    if len(faults) == 1:
        raise UserError(f"{path}: {faults[0]}")
    if faults:
        raise UserError(f"{path} has {len(faults)} faults:\n" + "\n".join(f"  {fault}" for fault in faults))


def parse(text: str, path: Path) -> DataConfig:
    """The dataset file `path` whose content is `text`; folders are not looked at.

    Raises:
        UserError: naming every fault of the file at once.
    """
    reader, datasets = _read(text, path)
    _report(path, reader.faults)
    return DataConfig(path, datasets, tuple(reader.warnings))


def load(path: str | Path, *, need_media: bool = True) -> DataConfig:
    """Read and check a dataset file, with its folders.

    Relative paths are taken from the working folder, or from the file's own folder where only that has the media.

    Args:
        need_media: False accepts a missing media folder where its cache folder is there (training from caches).

    Raises:
        UserError: naming every fault of the file at once, missing folders included.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"dataset file {path} is not there: check --dataset_config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"dataset file {path} cannot be read as text: {error}") from error
    reader, datasets = _read(text, path)
    placed = tuple(_placed(spec, path.parent) for spec in datasets)
    for spec in placed:
        _check_folders(reader, spec, need_media)
    _check_cache_folders(reader, placed)
    _report(path, reader.faults)
    return DataConfig(path, placed, tuple(reader.warnings))


def _placed(spec: DatasetSpec, beside: Path) -> DatasetSpec:
    """Relative paths of a dataset tied to the working folder, or to `beside` where only that has the media."""
    known = [path for path in (spec.media, spec.cache_folder) if path.exists() or (beside / path).exists()]
    base = beside if known and not known[0].exists() else Path()
    return replace(
        spec,
        directory=base / spec.directory if spec.directory else None,
        jsonl=base / spec.jsonl if spec.jsonl else None,
        cache_directory=base / spec.cache_directory if spec.cache_directory else None,
        control_directory=_where(spec.control_directory, beside) if spec.control_directory else None,
    )


def _where(path: Path, beside: Path) -> Path:
    return path if path.exists() or not (beside / path).exists() else beside / path


def _check_folders(reader: _Reader, spec: DatasetSpec, need_media: bool) -> None:
    section, media = f"[[datasets]] {spec.number}", spec.media
    there = media.is_dir() if spec.directory is not None else media.is_file()
    if not there and (need_media or not spec.cache_folder.is_dir()):
        wanted = f"{spec.kind}_directory" if spec.directory is not None else f"{spec.kind}_jsonl_file"
        is_other = "is not a folder" if spec.directory is not None and media.exists() else "is not there"
        reader.fault(section, f'{wanted} = "{media}" {is_other} (working folder {Path.cwd()})')
    control = spec.control_directory
    if control is not None and not control.is_dir() and (need_media or control.exists()):
        reason = "is not a folder" if control.exists() else "is not there"
        reader.fault(section, f'control_directory = "{control}" {reason} (working folder {Path.cwd()})')
    if spec.cache_folder.exists() and not spec.cache_folder.is_dir():
        reader.fault(section, f'cache_directory = "{spec.cache_folder}" is a file: a folder is needed')


def _check_cache_folders(reader: _Reader, datasets: tuple[DatasetSpec, ...]) -> None:
    """Two datasets with one cache folder would overwrite each other's files."""
    owner: dict[Path, int] = {}
    for spec in datasets:
        folder = spec.cache_folder.resolve()
        first = owner.setdefault(folder, spec.number)
        if first != spec.number:
            reader.fault(
                f"[[datasets]] {spec.number}",
                f'keeps its caches in "{folder}" like [[datasets]] {first}: give each its own cache_directory',
            )
