"""What a folder or a list names: media files with their captions and controls, none of them opened yet.

Order is that of file names (or of the list), so item numbers do not depend on the file system.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import controls, images
from musubi_tuner.data.fingerprint import text_hash
from musubi_tuner.data.spec import DatasetSpec
from musubi_tuner.data.spec_keys import Kind

VIDEO_EXTENSIONS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg"})
EXTENSIONS: dict[Kind, frozenset[str]] = {"image": images.EXTENSIONS, "video": VIDEO_EXTENSIONS}


@dataclass(frozen=True)
class LeftOut:
    """A file of the dataset that gives no item, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A media file that may become items."""

    path: Path
    stem: str
    """What its cache names begin with; no two of a dataset are equal."""
    caption: str
    controls: tuple[Path, ...] = ()
    targets: tuple[Path, ...] = ()
    """Further target pictures of the same item."""


def candidates(dataset: DatasetSpec, *, grouped: bool = False) -> Iterator[Candidate | LeftOut]:
    """The media files of a dataset; `grouped`: pictures `name_0`, `name_1`, ... are further targets of `name`.

    Raises:
        UserError: the folder or list cannot be read, or a line of the list is malformed.
    """
    try:
        yield from _listed(dataset, grouped) if dataset.jsonl is not None else _in_folder(dataset, grouped)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{dataset.where}: "{dataset.media}" cannot be read: {error}') from error


def _in_folder(dataset: DatasetSpec, grouped: bool) -> Iterator[Candidate | LeftOut]:
    """The media files of a folder, by name, with the text of their caption files."""
    stems = _Stems()
    kinds = EXTENSIONS[dataset.kind]
    files = sorted(p for p in dataset.media.iterdir() if p.suffix.lower() in kinds and p.is_file())
    endings = kinds if dataset.kind == "image" else kinds | {""}
    targets = controls.numbered(files) if grouped else {}
    further = {path for found in targets.values() for path in found}
    files = [path for path in files if path not in further]
    beside: dict[str, list[Path]] = {}
    if dataset.control_directory is not None:
        beside = controls.in_folder(dataset.control_directory, {path.stem for path in files}, endings)
    for path in files:
        caption = path.with_name(path.stem + dataset.caption_suffix)
        if not caption.is_file():
            yield LeftOut(path, f"no caption file (its name with the ending {dataset.caption_suffix})")
            continue
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            yield LeftOut(path, f"its caption file is no UTF-8 text ({error})")
            continue
        stem = stems.unique(path.stem, path.name)
        yield Candidate(path, stem, text, tuple(beside.get(path.stem, ())), tuple(targets.get(path.stem, ())))


def _listed(dataset: DatasetSpec, grouped: bool) -> Iterator[Candidate | LeftOut]:
    """The entries of a JSONL file: `{"image_path": ..., "caption": ...}`, `video_path` for clips, and controls.

    Relative paths are taken from the working folder, or from the list's own folder where only that has the file. A
    clip may be a folder of pictures, its frames by name.
    """
    stems = _Stems()
    key = f"{dataset.kind}_path"
    lines = dataset.media.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _entry(line, key, f"{dataset.media}, line {number}")
        path = Path(entry[key]).expanduser()
        beside = dataset.media.parent / path
        place = beside if not path.exists() and beside.exists() else path
        if not (place.is_file() or (dataset.kind == "video" and place.is_dir())):
            yield LeftOut(path, "the list names it but it is not there")
            continue
        try:
            beside_it = controls.place(entry["controls"], dataset.media.parent, "control")
            further = controls.place(entry["targets"] if grouped else (), dataset.media.parent, "target")
        except ValueError as error:
            yield LeftOut(path, str(error))
            continue
        stem, caption = stems.unique(path.stem, str(path)), entry["caption"].strip()
        yield Candidate(place, stem, caption, tuple(beside_it), tuple(further))


def _entry(line: str, key: str, where: str) -> dict[str, Any]:
    """A line's object with its `controls` and `targets` gathered. Raises UserError naming the line."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in (key, "caption")):
        raise UserError(f'{where}: an object with the texts "{key}" and "caption" is needed, given {line.strip()[:80]}')
    try:
        return {**entry, "controls": controls.listed(entry, "control_path"), "targets": controls.listed(entry, key)[1:]}
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


class _Stems:
    """Distinct cache stems: the first file of a stem keeps it, later ones get a hash of their path (and of how often
    that path came, where a list names one file several times)."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def unique(self, stem: str, path: str) -> str:
        found, again = stem, 0
        while found in self.taken:
            found = f"{stem}~{text_hash(path + (f' {again}' if again else ''))[:8]}"
            again += 1
        self.taken.add(found)
        return found
