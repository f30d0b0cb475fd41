"""Cache files: judged by what they hold, written whole or not at all, read by field name.

Names and keys are those of existing caches (`cache_keys`). A file of ours also carries a fingerprint in its metadata
(`fingerprint`); `judge` compares it with what would be made now. A file without one, made by the established tool, is
judged by what it shows: architecture, keys and latent size.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import controls
from musubi_tuner.data.cache_keys import Part, find_fields, to_keys
from musubi_tuner.data.fingerprint import Fingerprint
from musubi_tuner.families.base import FamilySpec
from musubi_tuner.weights.write import atomic_save_safetensors

FORMAT_VERSION = "1.0.1"
"""`format_version` in the metadata, as in existing files."""
FINGERPRINT_KEY = "musubi.cache"


@dataclass(frozen=True)
class CacheHeader:
    """What a cache file says of itself without its tensors being read."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_header(path: Path) -> CacheHeader:
    """Keys, shapes and metadata of a cache file.

    Raises:
        ValueError: cannot be read as a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
            return CacheHeader(shapes, dict(file.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"it cannot be read ({error})") from error


State = Literal["fresh", "foreign", "stale", "missing"]


@dataclass(frozen=True)
class Verdict:
    """fresh: as it would be made now. foreign: no fingerprint, but it fits. stale: to be made anew, and why."""

    state: State
    reason: str = ""
    entries: int = 1


def judge(path: Path, wanted: Fingerprint, spec: FamilySpec, part: Part, *, ignore: Collection[str] = ()) -> Verdict:
    """Whether the cache at `path` is what `wanted` describes; `ignore` names fields of it that are not known."""
    if not path.is_file():
        return Verdict("missing", "it is not there")
    try:
        header = read_header(path)
    except ValueError as error:
        return Verdict("stale", str(error))
    reason = misfit(header, wanted.bucket, spec, part) or _other_controls(header, wanted, spec, part)
    if reason:
        return Verdict("stale", reason)
    if FINGERPRINT_KEY not in header.metadata:
        return Verdict("foreign")
    found = Fingerprint.parse(header.metadata[FINGERPRINT_KEY])
    if found is None:
        return Verdict("stale", "it was made by another version")
    differences = found.differences(wanted, ignore=ignore)
    return Verdict("stale" if differences else "fresh", "; ".join(differences), found.entries)


def misfit(header: CacheHeader, bucket: tuple[int, int], spec: FamilySpec, part: Part) -> str:
    """Why a file cannot serve whatever its fingerprint: architecture, keys, latent size; empty when it can."""
    given = header.metadata.get("architecture", spec.architecture)
    if given != spec.architecture:
        return f"it is for {given}, not {spec.architecture}"
    found = find_fields(header.shapes, spec.cache_fields, part)
    present = {item.field.name for item in found.values()}
    absent = [f.name for f in spec.cache_fields if f.file == part and f.required and f.name not in present]
    if absent:
        return f"it holds no {', '.join(absent)}"
    latents = [header.shapes[key] for key, item in found.items() if item.name == "latents"]
    if part == "latent" and bucket != (0, 0):
        height, width = (side * spec.latents.spatial for side in latents[0][-2:])
        if (width, height) != bucket:
            return f"its latents are for {width} x {height}, now {bucket[0]} x {bucket[1]} is wanted"
    return ""


def _other_controls(header: CacheHeader, wanted: Fingerprint, spec: FamilySpec, part: Part) -> str:
    """Why a latent cache does not hold the controls of its item; empty when it does."""
    found = find_fields(header.shapes, spec.cache_fields, part).values()
    held = sum(item.field.name == controls.FIELD for item in found)
    if part == "text" or not controls.cached(spec) or held == len(wanted.controls):
        return ""
    return f"it holds {held} controls, now {len(wanted.controls)} are wanted"


def write(
    path: Path,
    entry: Mapping[str, Tensor],
    spec: FamilySpec,
    part: Part,
    *,
    fingerprint: Fingerprint,
    metadata: Mapping[str, str],
    item: str,
) -> None:
    """Write one cache file whole or not at all. `entry` is by field name; `item` is what messages call it.

    Raises:
        UserError: the tensors hold NaN or infinity (nothing is replaced by 0).
    """
    fault = _not_finite(entry)
    if fault:
        raise UserError(
            f"{item}: {fault}, so no cache was written: check the model file, and try a wider dtype "
            "(e.g. --vae_dtype float32)"
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in to_keys(entry, spec.cache_fields, part).items()}
    header = {"architecture": spec.architecture, "format_version": FORMAT_VERSION, **metadata}
    atomic_save_safetensors(path, tensors, {**header, FINGERPRINT_KEY: fingerprint.dump()})


def _not_finite(entry: Mapping[str, Tensor]) -> str:
    for name, tensor in entry.items():
        if tensor.is_floating_point():
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                return f"{bad} of the {tensor.numel()} values of {name} are NaN or infinite"
    return ""


def read(path: Path, spec: FamilySpec, part: Part) -> dict[str, Tensor]:
    """Tensors of a cache file by field name; `image` fields as `[C, 1, H, W]`, fields with a factor as float32 in the
    transformer's scale. Keys of no field are left out.

    Raises:
        UserError: the file cannot be read, or holds NaN or infinity.
    """
    entry: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key, (field, name) in find_fields(list(file.keys()), spec.cache_fields, part).items():
                tensor = file.get_tensor(key)
                tensor = tensor if field.factor == 1.0 else tensor.float() * field.factor
                entry[name] = tensor.unsqueeze(1) if field.layout == "image" and tensor.ndim == 3 else tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"cache {path} cannot be read ({error}): make it anew with --recache") from error
    fault = _not_finite(entry)
    if fault:
        raise UserError(f"cache {path}: {fault}: make it anew with --recache")
    return entry
