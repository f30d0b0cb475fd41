"""Sources: the items that a dataset's folder or list holds, and those left out, each with its reason.

Only headers are opened here: a scan of ten thousand pictures takes seconds and finds what would stop the work later.
Order is that of file names (or of the list), so item numbers do not depend on the file system.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import images, video
from musubi_tuner.data.buckets import Buckets, Size, nearest_sizes
from musubi_tuner.data.cache_keys import latent_name, text_name
from musubi_tuner.data.fingerprint import text_hash
from musubi_tuner.data.spec import DatasetSpec
from musubi_tuner.families.base import FamilySpec, Item

VIDEO_EXTENSIONS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg"})


@dataclass(frozen=True)
class MediaItem:
    """A picture, or a clip of a video, with its caption and its place in the bucket scheme."""

    dataset: DatasetSpec
    path: Path
    caption: str
    size: Size
    """Width and height of the file."""
    bucket: Size
    stem: str
    """What its cache names begin with."""
    frames: tuple[int, ...] = ()
    """Frames of the file that the clip holds; empty for a picture."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height, width that are encoded."""
        return (len(self.frames) or 1, self.bucket[1], self.bucket[0])

    def latent_path(self, tag: str, section: int | None = None) -> Path:
        return self.dataset.cache_folder / latent_name(self.stem, self.size, tag, section)

    def text_path(self, tag: str) -> Path:
        return self.dataset.cache_folder / text_name(self.stem, tag)


@dataclass(frozen=True)
class LeftOut:
    """A file of the dataset that gives no item, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Scan:
    """What a dataset holds."""

    dataset: DatasetSpec
    items: tuple[MediaItem, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Candidate:
    path: Path
    stem: str
    caption: str


def scan(dataset: DatasetSpec, spec: FamilySpec) -> Scan:
    """The items of a dataset for a family.

    Raises:
        UserError: the resolution does not suit the family, a list is malformed, or no item is left.
    """
    check_resolution(dataset, spec)
    buckets = Buckets(dataset.resolution, dataset.enable_bucket, dataset.bucket_no_upscale, spec.resolution_step)
    items: list[MediaItem] = []
    left_out: list[LeftOut] = []
    for found in _candidates(dataset):
        if isinstance(found, LeftOut):
            left_out.append(found)
            continue
        try:
            items += _items(dataset, found, buckets, spec)
        except ValueError as error:
            left_out.append(LeftOut(found.path, str(error)))
    if not items:
        raise UserError(_nothing(dataset, left_out))
    return Scan(dataset, tuple(items), tuple(left_out))


def _candidates(dataset: DatasetSpec) -> Iterator[_Candidate | LeftOut]:
    try:
        yield from _listed(dataset) if dataset.jsonl is not None else _in_folder(dataset)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{dataset.where}: "{dataset.media}" cannot be read: {error}') from error


def check_resolution(dataset: DatasetSpec, spec: FamilySpec) -> None:
    """Raises UserError where the one size of a dataset without buckets is none that the family can encode."""
    step = spec.latents.spatial * spec.latents.patch[2], spec.latents.spatial * spec.latents.patch[1]
    if dataset.enable_bucket or not any(side % part for side, part in zip(dataset.resolution, step, strict=True)):
        return
    near = " or ".join(f"[{width}, {height}]" for width, height in nearest_sizes(dataset.resolution, step))
    raise UserError(
        f"{dataset.where}: resolution = {list(dataset.resolution)}: {spec.name} needs multiples of "
        f"{step[0]} x {step[1]}: use {near}, or enable_bucket = true"
    )


def _nothing(dataset: DatasetSpec, left_out: Sequence[LeftOut]) -> str:
    reasons = Counter(entry.reason for entry in left_out)
    if reasons:
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        return f'{dataset.where}: nothing in "{dataset.media}" can be used: {why}'
    kinds = ", ".join(sorted(_extensions(dataset)))
    folder = dataset.directory
    nested = folder is not None and any(path.is_dir() for path in folder.iterdir())
    hint = "; its subfolders are not searched: give each its own [[datasets]]" if nested else ""
    return f'{dataset.where}: "{dataset.media}" holds no {dataset.kind}s ({kinds}){hint}'


def _extensions(dataset: DatasetSpec) -> frozenset[str]:
    return images.EXTENSIONS if dataset.kind == "image" else VIDEO_EXTENSIONS


def _in_folder(dataset: DatasetSpec) -> Iterator[_Candidate | LeftOut]:
    """The media files of a folder, by name, with the text of their caption files."""
    stems = _Stems()
    kinds = _extensions(dataset)
    for path in sorted(p for p in dataset.media.iterdir() if p.suffix.lower() in kinds and p.is_file()):
        caption = path.with_name(path.stem + dataset.caption_suffix)
        if not caption.is_file():
            yield LeftOut(path, f"no caption file (its name with the ending {dataset.caption_suffix})")
            continue
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            yield LeftOut(path, f"its caption file is no UTF-8 text ({error})")
            continue
        yield _Candidate(path, stems.unique(path.stem, path.name), text)


def _listed(dataset: DatasetSpec) -> Iterator[_Candidate | LeftOut]:
    """The entries of a JSONL file: `{"image_path": ..., "caption": ...}`, `video_path` for clips.

    Relative paths are taken from the working folder, or from the list's own folder where only that has the file.
    """
    stems = _Stems()
    key = f"{dataset.kind}_path"
    lines = dataset.media.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, caption = _entry(line, key, f"{dataset.media}, line {number}")
        beside = dataset.media.parent / path
        place = beside if not path.exists() and beside.exists() else path
        if not place.is_file():
            yield LeftOut(path, "the list names it but it is not there")
            continue
        yield _Candidate(place, stems.unique(path.stem, str(path)), caption)


def _entry(line: str, key: str, where: str) -> tuple[Path, str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in (key, "caption")):
        raise UserError(f'{where}: an object with the texts "{key}" and "caption" is needed, given {line.strip()[:80]}')
    return Path(entry[key]).expanduser(), entry["caption"].strip()


class _Stems:
    """Distinct cache stems: the first file of a stem keeps it, later ones get a hash of their path."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def unique(self, stem: str, path: str) -> str:
        found = stem if stem not in self.taken else f"{stem}~{text_hash(path)[:8]}"
        self.taken.add(found)
        return found


def _items(dataset: DatasetSpec, found: _Candidate, buckets: Buckets, spec: FamilySpec) -> list[MediaItem]:
    """One item of a picture, one for each window of a video. Raises ValueError with the reason for none."""
    if dataset.kind == "image":
        size = images.image_size(found.path)
        return [MediaItem(dataset, found.path, found.caption, size, buckets.choose(size), found.stem)]
    info = video.probe(found.path)
    kept = video.kept_frames(info.frames, dataset.source_fps, spec.target_fps)
    windows = video.windows(
        len(kept),
        dataset.frame_extraction,
        targets=dataset.target_frames,
        stride=dataset.frame_stride,
        samples=dataset.frame_sample,
        max_frames=dataset.max_frames,
        temporal=spec.latents.temporal,
    )
    if not windows:
        raise ValueError(f"too short: {len(kept)} frames, target_frames = {list(dataset.target_frames)}")
    bucket = buckets.choose(info.size)
    return [
        MediaItem(
            dataset,
            found.path,
            found.caption,
            info.size,
            bucket,
            f"{found.stem}_{window.start:05d}-{window.count:03d}",
            tuple(kept[window.start : window.start + window.count]),
        )
        for window in windows
    ]


def read_pixels(item: MediaItem) -> Tensor:
    """Pixels `[3, F, H, W]` float32 in [-1, 1], in the item's bucket.

    Raises:
        ValueError: the file cannot be decoded.
    """
    if item.frames:
        pixels = video.read_frames(item.path, item.frames, item.bucket)
    else:
        pixels = images.read_image(item.path, item.bucket)[None]
    own = torch.from_numpy(np.array(pixels))  # a copy: memory of Pillow's is read-only
    return own.permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_encode(item: MediaItem, *, with_pixels: bool) -> Item:
    """The item as a family's encode functions take it."""
    frames, height, width = item.shape
    pixels = read_pixels(item) if with_pixels else None
    return Item(item.caption, pixels, frames=frames, height=height, width=width)
