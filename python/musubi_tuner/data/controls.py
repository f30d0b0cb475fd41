"""Controls: the pictures or clips that an item is conditioned on, found beside it and brought to their size.

In a `control_directory` the controls of `cat.png` are `cat.<any ending>` and `cat_<number>.<any ending>`, in the order
of their numbers; a control whose whole name is that of another item belongs to that item. In a list they are
`control_path`, or `control_path_0`, `control_path_1`, ... Whether controls count at all is a fact of the family: its
cache has a field named `control`, numbered where it takes several, or its spec says `reads_controls`.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.data.buckets import Size
from musubi_tuner.data.spec import DatasetSpec
from musubi_tuner.families.base import FamilySpec

FIELD = "control"
"""Name of the cache field that holds a control's latents."""

_NUMBERED = re.compile(r"(?P<stem>.+)_(?P<number>\d+)")


@dataclass(frozen=True)
class Control:
    """A control of an item and the size that it is brought to."""

    path: Path
    size: Size


def most(spec: FamilySpec) -> int | None:
    """How many controls an item of this family may have: 0, 1, or None for any number."""
    fields = [field for field in spec.cache_fields if field.name == FIELD]
    if not fields:
        return None if spec.reads_controls else 0
    return None if fields[0].numbered or spec.reads_controls else 1


def cached(spec: FamilySpec) -> bool:
    """Whether a latent cache has a field for each control."""
    return not spec.reads_controls and any(field.name == FIELD for field in spec.cache_fields)


def required(spec: FamilySpec) -> bool:
    """Whether an item without a control is of no use to the family."""
    return any(field.name == FIELD and field.required for field in spec.cache_fields)


def without_effect(dataset: DatasetSpec, spec: FamilySpec) -> tuple[str, ...]:
    """Keys of a dataset that were given and change nothing for this family."""
    given = {
        "control_directory": dataset.control_directory is not None,
        "no_resize_control": dataset.no_resize_control,
        "control_resolution": dataset.control_resolution is not None,
    }
    unread = tuple(key for key in dataset.special if key not in spec.dataset_keys)
    if most(spec) == 0:
        return (*(key for key, value in given.items() if value), *unread)
    overruled = ("control_resolution",) if dataset.no_resize_control and dataset.control_resolution else ()
    return (*overruled, *unread)


def in_folder(folder: Path, stems: Collection[str], endings: Collection[str]) -> dict[str, list[Path]]:
    """The controls of each stem in a folder, in order; folders of frames count where `endings` hold the empty text."""
    found: dict[str, list[tuple[int, str, Path]]] = {}
    for path in folder.iterdir():
        if (path.suffix.lower() if path.is_file() else "") not in endings:
            continue
        name = path.stem if path.is_file() else path.name
        numbered = _NUMBERED.fullmatch(name)
        if name in stems:
            found.setdefault(name, []).append((-1, path.name, path))
        elif numbered and numbered["stem"] in stems:
            found.setdefault(numbered["stem"], []).append((int(numbered["number"]), path.name, path))
    return {stem: [path for _, _, path in sorted(rows)] for stem, rows in found.items()}


def numbered(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Of pictures, those named `<stem>_<number>` by the stem that another one has, in the order of their numbers."""
    paths = list(files)
    stems = {path.stem for path in paths}
    found: dict[str, list[tuple[int, str, Path]]] = {}
    for path in paths:
        match = _NUMBERED.fullmatch(path.stem)
        if match and match["stem"] in stems:
            found.setdefault(match["stem"], []).append((int(match["number"]), path.name, path))
    return {stem: [path for _, _, path in sorted(rows)] for stem, rows in found.items()}


def listed(entry: Mapping[str, object], name: str) -> list[Path]:
    """The paths that a line of a list names with the keys `name`, `<name>_0`, `<name>_1`, ..., in this order.

    Raises:
        ValueError: with the key whose value is no text.
    """
    pattern = re.compile(rf"{name}(?:_(?P<number>\d+))?")
    found: list[tuple[int, Path]] = []
    for key, value in entry.items():
        match = pattern.fullmatch(key)
        if match:
            if not isinstance(value, str) or not value:
                raise ValueError(f'"{key}" must be a text, the path of a file')
            found.append((int(match["number"] or -1), Path(value).expanduser()))
    return [path for _, path in sorted(found)]


def check_count(paths: Collection[Path], spec: FamilySpec, *, wanted: bool) -> None:
    """Raises ValueError with the reason why an item with these controls is of no use; `wanted`: others have some."""
    limit = most(spec)
    if limit is not None and len(paths) > limit:
        names = ", ".join(path.name for path in list(paths)[:4])
        raise ValueError(f"{len(paths)} controls ({names}), {spec.name} takes {limit}")
    if not paths and (wanted or required(spec)):
        raise ValueError("no control of its name (control_directory, or control_path in a list)")


def size_of(size: Size, bucket: Size, dataset: DatasetSpec, step: int) -> Size:
    """What a control of `size` is brought to: the item's bucket, unless the dataset says otherwise.

    `no_resize_control` keeps its size, cut to multiples of `step`; with `control_resolution` it is `of_area`.

    Raises:
        ValueError: kept at its size and smaller than one step.
    """
    if dataset.no_resize_control:
        kept = (size[0] // step * step, size[1] // step * step)
        if not all(kept):
            raise ValueError(f"{size[0]} x {size[1]} pixels is below {step} and no_resize_control keeps its size")
        return kept
    return bucket if dataset.control_resolution is None else of_area(size, dataset.control_resolution, step)


def of_area(size: Size, resolution: Size, step: int) -> Size:
    """The size of about the area of `resolution` whose width / height is nearest to that of `size`.

    Widths w are all multiples of `step`, heights area // w cut to one; the smallest width where two are equally near.
    """
    area, ratio = resolution[0] * resolution[1], size[0] / size[1]
    widest = area // step // step * step
    ideal = math.sqrt(area * ratio)  # w / h grows with w, by a factor of 16 from half to twice the ideal
    low = min(max(int(ideal / 2) // step * step, step), widest)
    widths = range(low, min(int(2 * ideal) + step, widest) + 1, step)
    sizes = [(width, area // width // step * step) for width in widths]
    return min(sizes, key=lambda found: abs(found[0] / found[1] - ratio))


def place(paths: Iterable[Path], beside: Path, what: str) -> list[Path]:
    """Paths of a list: as they are, or beside the list where only that is there.

    Raises:
        ValueError: one is in neither place.
    """
    placed = []
    for path in paths:
        there = path if path.exists() or not (beside / path).exists() else beside / path
        if not there.exists():
            raise ValueError(f"its {what} {path} is not there")
        placed.append(there)
    return placed
