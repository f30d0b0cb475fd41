"""What the cache of an item should be made of now: one place for the cache commands and for training's check."""

from collections.abc import Callable, Mapping
from pathlib import Path

from musubi_tuner.data.cache_keys import Part
from musubi_tuner.data.fingerprint import Fingerprint, text_hash
from musubi_tuner.data.sources import MediaItem
from musubi_tuner.families.base import FamilySpec

Hash = Callable[[Path], str]


def sees_controls(spec: FamilySpec, part: Part) -> bool:
    """Whether this part of the cache depends on the items' controls."""
    return part == "latent" or spec.text_sees_controls


def fingerprint(
    item: MediaItem, part: Part, spec: FamilySpec, settings: Mapping[str, str], hashed: Hash, *, entries: int = 1
) -> Fingerprint:
    """What an item's cache is made of; `hashed` gives the content hash of a file."""
    controls = item.controls if sees_controls(spec, part) else ()
    beside = tuple(f"{control.size[0]}x{control.size[1]}" for control in controls)
    hashes = tuple(hashed(control.path) for control in controls)
    if part == "text":
        return Fingerprint(
            text_hash(item.caption), settings=settings, controls=beside, control_sources=hashes, entries=entries
        )
    targets = [hashed(path) for path in (item.path, *item.targets)]
    source = targets[0] if not item.targets else text_hash(" ".join(targets))
    dataset = {name: str(value) for name, value in item.said(spec).items()}
    return Fingerprint(source, item.bucket, item.frames, settings, entries, beside, hashes, dataset)


def media_of(item: MediaItem, part: Part, spec: FamilySpec) -> list[Path]:
    """The files that the cache is made of, its caption apart."""
    own = [item.path, *item.targets] if part == "latent" else []
    return own + ([control.path for control in item.controls] if sees_controls(spec, part) else [])
