"""What training reads: the cache files that belong to a dataset file, each checked before the first step.

Where the media are at hand, items are those of a scan and each must have its caches, fit for it. Where only the cache
folder is there (a dataset cached elsewhere), the items are the caches found in it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import controls
from musubi_tuner.data.cache import CacheHeader, Verdict, judge, misfit, read_header
from musubi_tuner.data.cache_keys import Part, find_fields, latent_name, latent_pattern, text_name
from musubi_tuner.data.fingerprint import content_hash, modified
from musubi_tuner.data.sources import MediaItem, scan
from musubi_tuner.data.spec import DataConfig, DatasetSpec
from musubi_tuner.data.wanted import fingerprint, media_of
from musubi_tuner.families.base import FamilySpec


@dataclass(frozen=True)
class CachedItem:
    """One latent cache and the text cache that goes with it."""

    dataset: DatasetSpec
    latent: Path
    text: Path
    shape: tuple[int, int, int]
    """Frames, height, width of the latents: only equal shapes share a batch."""
    has_control: bool = False
    fields: frozenset[str] = frozenset()
    """Fields of the latent cache."""


@dataclass
class _Faults:
    """What is wrong with the caches of a run, collected so that it is told at once."""

    missing: list[Path] = field(default_factory=list)
    stale: list[tuple[Path, str]] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)

    def note(self, path: Path, verdict: Verdict) -> bool:
        """Record a verdict; True where the file can be used."""
        if verdict.state == "missing":
            self.missing.append(path)
        elif verdict.state == "stale":
            self.stale.append((path, verdict.reason))
        elif verdict.state == "foreign":
            self.foreign.append(path)
        return verdict.state in ("fresh", "foreign")

    def check(self, spec: FamilySpec, config: DataConfig) -> None:
        """Raises UserError when a cache is missing or stale, with the commands that make it."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} cache files are missing, e.g. {self.missing[0]}")
        if self.stale:
            path, reason = self.stale[0]
            parts.append(f"{len(self.stale)} do not fit, e.g. {path} ({reason})")
        if parts:
            raise UserError(
                f"{'; '.join(parts)}: run `musubi cache_latents {spec.name} --dataset_config {config.path}` and "
                f"`musubi cache_text {spec.name} --dataset_config {config.path}` with their model files"
            )


def find_cached(config: DataConfig, spec: FamilySpec, *, strict: bool = False) -> tuple[list[CachedItem], list[str]]:
    """All cached items of a dataset file, in a stable order, and warnings.

    Raises:
        UserError: a cache is missing, unreadable or made of something else; with `strict`, also one without a
            fingerprint, and a dataset whose media are not there to compare with.
    """
    faults = _Faults()
    items: list[CachedItem] = []
    warnings = list(config.warnings)
    for dataset in config.datasets:
        if dataset.media.exists():
            items += _of_scan(dataset, spec, faults)
            continue
        if strict:
            raise UserError(f"{dataset.where}: {dataset.media} is not there, so --strict_cache cannot compare caches")
        found = _of_folder(dataset, spec, faults)
        items += found
        warnings.append(
            f"{dataset.where}: {dataset.media} is not there: training on the {len(found)} caches in "
            f"{dataset.cache_folder} as they are"
        )
    faults.check(spec, config)
    if faults.foreign:
        told = f"{len(faults.foreign)} cache files carry no fingerprint, e.g. {faults.foreign[0]}"
        if strict:
            raise UserError(f"{told}: --strict_cache refuses them; make them anew with --recache")
        warnings.append(f"{told}: taken as they are, since architecture, keys and sizes fit")
    return items, warnings


def _of_scan(dataset: DatasetSpec, spec: FamilySpec, faults: _Faults) -> list[CachedItem]:
    items = []
    for media in scan(dataset, spec).items:
        text = media.text_path(spec.cache_tag)
        usable = faults.note(text, _verdict(text, media, spec, "text"))
        for latent in latent_files(media, spec.cache_tag):
            if faults.note(latent, _verdict(latent, media, spec, "latent")) and usable:
                items.append(_item(dataset, latent, text, read_header(latent), spec))
    return items


def latent_files(media: MediaItem, tag: str) -> list[Path]:
    """The latent cache of an item, or the numbered ones of its sections where those are there instead."""
    single = media.latent_path(tag)
    if single.exists():
        return [single]
    sections = [media.latent_path(tag, 0)]
    while sections[-1].exists():
        sections.append(media.latent_path(tag, len(sections)))
    return sections[:-1] or [single]


def _verdict(path: Path, media: MediaItem, spec: FamilySpec, part: Part) -> Verdict:
    """As `judge`; media files that are older than the cache are taken to be unchanged and not read again."""
    if not path.exists():
        return Verdict("missing", "it is not there")
    made = path.stat().st_mtime_ns
    older = all(modified(file) <= made for file in media_of(media, part, spec))
    wanted = fingerprint(media, part, spec, {}, (lambda _: "") if older else content_hash)
    unread = {"control_sources"} | ({"source"} if part == "latent" else set())
    return judge(path, wanted, spec, part, ignore={"settings"} | (unread if older else set()))


def _of_folder(dataset: DatasetSpec, spec: FamilySpec, faults: _Faults) -> list[CachedItem]:
    """Every latent cache of the family's tag in the cache folder, with its text cache."""
    items = []
    for path in folder_latents(dataset.cache_folder, spec.cache_tag):
        name = latent_pattern(spec.cache_tag).fullmatch(path.name)
        stem = name["stem"] if name else path.stem
        stem = _CLIP.sub("", stem) if dataset.kind == "video" else stem
        text = path.with_name(text_name(stem, spec.cache_tag))
        header = _usable(path, faults, lambda header: misfit(header, (0, 0), spec, "latent"))
        if not text.is_file():
            faults.missing.append(text)
        elif _usable(text, faults, lambda header: misfit(header, (0, 0), spec, "text")) and header:
            items.append(_item(dataset, path, text, header, spec))
    if not items and not faults.missing and not faults.stale:
        raise UserError(
            f"{dataset.where}: neither {dataset.media} nor caches named {latent_name('*', (0, 0), spec.cache_tag)} "
            f"(with the size of each picture) in {dataset.cache_folder} are there"
        )
    return items


_CLIP = re.compile(r"_\d{5,}-\d{3,}(-\d{4})?$")
"""What the name of a clip's latent cache adds to that of its video: first frame, length, section."""


def folder_latents(folder: Path, tag: str) -> list[Path]:
    """Latent caches of an architecture tag in a folder, by name."""
    pattern = latent_pattern(tag)
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _usable(path: Path, faults: _Faults, fault: Callable[[CacheHeader], str]) -> CacheHeader | None:
    try:
        header = read_header(path)
    except ValueError as error:
        faults.stale.append((path, str(error)))
        return None
    reason = fault(header)
    if reason:
        faults.stale.append((path, reason))
        return None
    return header


def _item(dataset: DatasetSpec, latent: Path, text: Path, header: CacheHeader, spec: FamilySpec) -> CachedItem:
    """The item of a latent cache whose header was read."""
    found = find_fields(header.shapes, spec.cache_fields, "latent")
    shape: Sequence[int] = next(header.shapes[key] for key, item in found.items() if item.name == "latents")
    frames, height, width = (1, *shape[1:]) if len(shape) == 3 else shape[1:]
    has_control = any(item.field.name == controls.FIELD for item in found.values())
    names = frozenset(item.name for item in found.values())
    return CachedItem(dataset, latent, text, (frames, height, width), has_control, names)
