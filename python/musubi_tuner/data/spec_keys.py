"""What each key of a dataset file may hold: one check per key, in one table per kind of dataset.

A check takes the value as the file has it and gives the value as the code wants it, or raises `Fault` with the rest of
the sentence `key = value: ...`.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

Kind = Literal["image", "video"]
EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")


class Fault(Exception):
    """What is wrong with one value; the text continues `key = value: `."""


def _integer(value: Any, *, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Fault(f"a whole number is needed, {minimum} or more")
    if value < minimum:
        raise Fault(f"must be {minimum} or more")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Fault("true or false is needed, without quotes")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise Fault("a number above 0 is needed")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Fault("a text in quotes is needed")
    return value


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser()


def _extension(value: Any) -> str:
    text = _text(value)
    if not text.startswith("."):
        raise Fault(f'must start with a dot, e.g. ".{text}"')
    return text


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value, value]
    if not isinstance(value, list) or len(value) != 2:
        raise Fault("[width, height] or one whole number is needed")
    width, height = (_integer(side, minimum=16) for side in value)
    return (width, height)


def _integers(value: Any, *, minimum: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise Fault("a list of whole numbers is needed, e.g. [1, 25]")
    return tuple(_integer(item, minimum=minimum) for item in value)


def _extraction(value: Any) -> str:
    text = _text(value)
    if text not in EXTRACTIONS:
        near = get_close_matches(text, EXTRACTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Fault(f"use one of {', '.join(EXTRACTIONS)}{hint}")
    return text


Check = Callable[[Any], Any]

SHARED: Mapping[str, Check] = {
    "resolution": _size,
    "caption_extension": _extension,
    "batch_size": _integer,
    "num_repeats": _integer,
    "enable_bucket": _flag,
    "bucket_no_upscale": _flag,
}
"""Keys of `[general]`, and of every dataset."""

_DATASET: Mapping[str, Check] = {**SHARED, "cache_directory": _path, "control_directory": _path}
_IMAGE: Mapping[str, Check] = {
    "image_directory": _path,
    "image_jsonl_file": _path,
    "multiple_target": _flag,
    "fp_latent_window_size": _integer,
    "fp_1f_clean_indices": lambda value: _integers(value, minimum=0),
    "fp_1f_target_index": lambda value: _integer(value, minimum=0),
    "fp_1f_no_post": _flag,
    "no_resize_control": _flag,
    "control_resolution": _size,
}
_VIDEO: Mapping[str, Check] = {
    "video_directory": _path,
    "video_jsonl_file": _path,
    "target_frames": lambda value: _integers(value, minimum=1),
    "frame_extraction": _extraction,
    "frame_stride": _integer,
    "frame_sample": _integer,
    "max_frames": _integer,
    "source_fps": _number,
    "fp_latent_window_size": _integer,
}
KEYS: Mapping[Kind, Mapping[str, Check]] = {"image": {**_DATASET, **_IMAGE}, "video": {**_DATASET, **_VIDEO}}
MEDIA: Mapping[str, Kind] = {
    "image_directory": "image",
    "image_jsonl_file": "image",
    "video_directory": "video",
    "video_jsonl_file": "video",
}
RENAMED: Mapping[str, str] = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
"""Earlier spellings; the present one wins where a table has both."""

SPECIAL = (
    "multiple_target",
    "fp_latent_window_size",
    "fp_1f_clean_indices",
    "fp_1f_target_index",
    "fp_1f_no_post",
)
"""Keys that only families which name them in `FamilySpec.dataset_keys` read."""
