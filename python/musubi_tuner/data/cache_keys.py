"""Names of cache files and keys of their tensors, as existing caches have them.

A key is `[varlen_]<content>[_<F>x<H>x<W>]_<dtype>`; masks carry no dtype. The family's `CacheField` table is the only
map between these keys and the names that `Conditioning` has.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from musubi_tuner.families.base import CacheField

Part = Literal["latent", "text"]

_SIZE = r"\d+x\d+x\d+"
_DTYPES = "float64|float32|bfloat16|float16|int64|int32|int16|int8|uint8|bool"


def latent_name(stem: str, size: tuple[int, int], tag: str, section: int | None = None) -> str:
    """Name of a latent cache: stem, original width and height, architecture tag; sections are numbered."""
    mark = "" if section is None else f"-{section:04d}"
    return f"{stem}{mark}_{size[0]:04d}x{size[1]:04d}_{tag}.safetensors"


def text_name(stem: str, tag: str) -> str:
    """Name of a text cache."""
    return f"{stem}_{tag}_te.safetensors"


def latent_pattern(tag: str) -> re.Pattern[str]:
    """Matches names of latent caches: groups `stem`, `width`, `height`."""
    return re.compile(rf"(?P<stem>.+)_(?P<width>\d{{4,}})x(?P<height>\d{{4,}})_{re.escape(tag)}\.safetensors")


class Found(NamedTuple):
    """A key of a cache file that is a field's; `name` carries the number of a numbered field."""

    field: CacheField
    name: str


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`: the form in keys."""
    return str(dtype).removeprefix("torch.")


def to_keys(entry: Mapping[str, Tensor], fields: Sequence[CacheField], part: Part) -> dict[str, Tensor]:
    """Tensors of a cache file by key, from tensors by field name.

    Raises:
        ValueError: a required field is absent, a name is no field, or a tensor has not the layout's rank.
    """
    known = {f.name: f for f in fields if f.file == part}
    keys: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in entry.items():
        base, number = _split(name, known)
        if base not in known:
            raise ValueError(f"{name} is no field of the {part} cache: {', '.join(known)}")
        used.add(base)
        stem = known[base].key + (f"_{number}" if number else "")
        keys[_key(stem, known[base], tensor, entry)] = tensor
    absent = [f.name for f in known.values() if f.required and f.name not in used]
    if absent:
        raise ValueError(f"the {part} cache needs {', '.join(absent)}: given {', '.join(entry) or 'nothing'}")
    return keys


def _split(name: str, known: Mapping[str, CacheField]) -> tuple[str, str]:
    """Field name and number of `name`; ("", "") where it is neither a plain nor a numbered field."""
    base, _, number = name.rpartition("_")
    if base in known and known[base].numbered and number.isdigit():
        return base, number
    return (name, "") if name in known and not known[name].numbered else ("", "")


def _key(stem: str, field: CacheField, tensor: Tensor, entry: Mapping[str, Tensor]) -> str:
    dtype = dtype_name(tensor.dtype)
    if field.layout in ("mask", "plain", "varlen"):
        return {"mask": stem, "plain": f"{stem}_{dtype}", "varlen": f"varlen_{stem}_{dtype}"}[field.layout]
    sized = entry["latents"] if field.layout == "history" else tensor
    rank = 3 if field.layout == "image" else 4
    if tensor.ndim != rank or sized.ndim != rank:
        raise ValueError(f"{field.name} has shape {tuple(tensor.shape)}: layout {field.layout} has {rank} dimensions")
    frames, height, width = (1, *sized.shape[1:]) if rank == 3 else sized.shape[1:]
    return f"{stem}_{frames}x{height}x{width}_{dtype}"


def find_fields(keys: Iterable[str], fields: Sequence[CacheField], part: Part) -> dict[str, Found]:
    """The field behind each key of a cache file; keys of no field are left out."""
    found: dict[str, Found] = {}
    for key in keys:
        for field in fields:
            match = _pattern(field).fullmatch(key) if field.file == part else None
            if match:
                found[key] = Found(field, f"{field.name}_{match['number']}" if field.numbered else field.name)
                break
    return found


@lru_cache(maxsize=256)
def _pattern(field: CacheField) -> re.Pattern[str]:
    stem = re.escape(field.key) + (r"_(?P<number>\d+)" if field.numbered else "")
    dtype = f"(?:{_DTYPES})"
    body = {"mask": stem, "plain": f"{stem}_{dtype}", "varlen": f"varlen_{stem}_{dtype}"}
    return re.compile(body.get(field.layout, f"{stem}_{_SIZE}_{dtype}"))
