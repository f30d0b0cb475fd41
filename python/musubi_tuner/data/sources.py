"""Sources: the items that a dataset's folder or list holds, and those left out, each with its reason.

Only headers are opened here: a scan of ten thousand pictures takes seconds and finds what would stop the work later.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import controls, images, video
from musubi_tuner.data.buckets import Buckets, Size, nearest_sizes
from musubi_tuner.data.cache_keys import latent_name, text_name
from musubi_tuner.data.controls import Control
from musubi_tuner.data.listing import EXTENSIONS, Candidate, LeftOut, candidates
from musubi_tuner.data.spec import DatasetSpec
from musubi_tuner.families.base import FamilySpec, Item


@dataclass(frozen=True)
class MediaItem:
    """A picture, or a clip of a video, with its caption, its controls and its place in the bucket scheme."""

    dataset: DatasetSpec
    path: Path
    caption: str
    size: Size
    """Width and height of the file."""
    bucket: Size
    stem: str
    """What the names of its latent caches begin with."""
    frames: tuple[int, ...] = ()
    """Frames of the file that the clip holds; empty for a picture."""
    controls: tuple[Control, ...] = ()
    """Of a clip: clips of which the same frames are taken."""
    targets: tuple[Path, ...] = ()
    """Further target pictures, which follow the first as frames do."""
    text_stem: str = ""
    """What the name of its text cache begins with, where clips of one video share it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height, width that are encoded."""
        return (len(self.frames) or 1 + len(self.targets), self.bucket[1], self.bucket[0])

    def said(self, spec: FamilySpec) -> dict[str, Any]:
        """The dataset's values of the keys that the family reads; defaults too, but for None."""
        values = {key: getattr(self.dataset, key) for key in spec.dataset_keys}
        return {key: value for key, value in values.items() if value is not None}

    def latent_path(self, tag: str, section: int | None = None) -> Path:
        return self.dataset.cache_folder / latent_name(self.stem, self.size, tag, section)

    def text_path(self, tag: str) -> Path:
        return self.dataset.cache_folder / text_name(self.text_stem or self.stem, tag)


@dataclass(frozen=True)
class Scan:
    """What a dataset holds."""

    dataset: DatasetSpec
    items: tuple[MediaItem, ...]
    left_out: tuple[LeftOut, ...]


def scan(dataset: DatasetSpec, spec: FamilySpec) -> Scan:
    """The items of a dataset for a family.

    Raises:
        UserError: the resolution does not suit the family, a list is malformed, or no item is left.
    """
    check_resolution(dataset, spec)
    buckets = Buckets(dataset.resolution, dataset.enable_bucket, dataset.bucket_no_upscale, spec.resolution_step)
    grouped = dataset.multiple_target and "multiple_target" in spec.dataset_keys
    found = list(candidates(dataset, grouped=grouped))
    with_controls = controls.most(spec) != 0 and _has_controls(dataset, found)
    items: list[MediaItem] = []
    left_out: list[LeftOut] = []
    for entry in found:
        if isinstance(entry, LeftOut):
            left_out.append(entry)
            continue
        try:
            if controls.most(spec) != 0:
                controls.check_count(entry.controls, spec, wanted=with_controls)
            items += _items(dataset, entry, buckets, spec)
        except ValueError as error:
            left_out.append(LeftOut(entry.path, str(error)))
    if not items:
        raise UserError(_nothing(dataset, left_out))
    return Scan(dataset, tuple(items), tuple(left_out))


def _has_controls(dataset: DatasetSpec, found: Sequence[Candidate | LeftOut]) -> bool:
    """Whether a dataset is one with controls: then an item without one is left out."""
    named = any(isinstance(entry, Candidate) and entry.controls for entry in found)
    return dataset.control_directory is not None or named


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
    kinds = ", ".join(sorted(EXTENSIONS[dataset.kind]))
    folder = dataset.directory
    nested = folder is not None and any(path.is_dir() for path in folder.iterdir())
    hint = "; its subfolders are not searched: give each its own [[datasets]]" if nested else ""
    return f'{dataset.where}: "{dataset.media}" holds no {dataset.kind}s ({kinds}){hint}'


def _items(dataset: DatasetSpec, found: Candidate, buckets: Buckets, spec: FamilySpec) -> list[MediaItem]:
    """One item of a picture, one for each window of a video. Raises ValueError with the reason for none."""
    beside = found.controls if controls.most(spec) != 0 else ()
    if dataset.kind == "image":
        size = images.image_size(found.path)
        bucket = buckets.choose(size)
        sized = tuple(_image_control(path, bucket, dataset, buckets.step) for path in beside)
        for path in found.targets:
            _image_target(path)
        return [
            MediaItem(
                dataset, found.path, found.caption, size, bucket, found.stem, controls=sized, targets=found.targets
            )
        ]
    info = video.probe(found.path)
    kept = video.at_rate(found.path, info, dataset.source_fps, spec.target_fps)
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
    clips = [kept[window.start : window.start + window.count] for window in windows]
    sized = tuple(_video_control(path, bucket, max(clip[-1] for clip in clips)) for path in beside)
    return [
        MediaItem(
            dataset,
            found.path,
            found.caption,
            info.size,
            bucket,
            clip_stem(found.stem, window.start, window.count),
            tuple(clip),
            sized,
            text_stem=found.stem,
        )
        for window, clip in zip(windows, clips, strict=True)
    ]


def clip_stem(stem: str, start: int, count: int) -> str:
    """What the cache names of a clip begin with."""
    return f"{stem}_{start:05d}-{count:03d}"


def _image_control(path: Path, bucket: Size, dataset: DatasetSpec, step: int) -> Control:
    try:
        return Control(path, controls.size_of(images.image_size(path), bucket, dataset, step))
    except ValueError as error:
        raise ValueError(f"its control {path.name} {error}") from error


def _image_target(path: Path) -> None:
    try:
        images.image_size(path)
    except ValueError as error:
        raise ValueError(f"its target {path.name} {error}") from error


def _video_control(path: Path, bucket: Size, last: int) -> Control:
    """A control clip, which must reach frame `last`."""
    try:
        frames = video.probe(path).frames
    except ValueError as error:
        raise ValueError(f"its control {path.name} {error}") from error
    if frames <= last:
        raise ValueError(f"its control {path.name} has {frames} frames, {last + 1} are needed")
    return Control(path, bucket)


def read_pixels(item: MediaItem) -> Tensor:
    """Pixels `[3, F, H, W]` float32 in [-1, 1], in the item's bucket.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return torch.cat([_pixels(path, item.frames, item.bucket) for path in (item.path, *item.targets)], dim=1)


def read_controls(item: MediaItem) -> tuple[Tensor, ...]:
    """The controls' pixels, as `read_pixels`, each in its own size.

    Raises:
        ValueError: one cannot be decoded.
    """
    found = []
    for control in item.controls:
        try:
            found.append(_pixels(control.path, item.frames, control.size))
        except ValueError as error:
            raise ValueError(f"has a control, {control.path.name}, that {error}") from error
    return tuple(found)


def read_masks(item: MediaItem) -> tuple[Tensor | None, ...]:
    """Of each control its opacity `[1, F, H, W]` float32 in [0, 1] in its own size; None for an opaque one and a clip.

    Raises:
        ValueError: one cannot be decoded.
    """
    found: list[Tensor | None] = []
    for control in item.controls:
        alpha = None if item.frames else images.read_alpha(control.path, control.size)
        found.append(None if alpha is None else torch.from_numpy(np.array(alpha)).float().div_(255.0)[None, None])
    return tuple(found)


def _pixels(path: Path, frames: Sequence[int], size: Size) -> Tensor:
    pixels = video.read_frames(path, frames, size) if frames else images.read_image(path, size)[None]
    own = torch.from_numpy(np.array(pixels))  # a copy: memory of Pillow's is read-only
    return own.permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_encode(item: MediaItem, spec: FamilySpec, *, with_pixels: bool, with_controls: bool = False) -> Item:
    """The item as the encode functions of a family take it."""
    frames, height, width = item.shape
    return Item(
        item.caption,
        read_pixels(item) if with_pixels else None,
        read_controls(item) if with_controls else (),
        frames=frames,
        height=height,
        width=width,
        masks=read_masks(item) if with_controls and spec.control_masks else (),
        said=item.said(spec),
    )
