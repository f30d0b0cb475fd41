"""What a cache command is going to do: which items need which files, told in a short table before any work starts."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.cache import Verdict, judge
from musubi_tuner.data.cache_keys import Part, latent_pattern
from musubi_tuner.data.cached import latent_files
from musubi_tuner.data.controls import without_effect
from musubi_tuner.data.fingerprint import content_hash
from musubi_tuner.data.sources import MediaItem, Scan, scan
from musubi_tuner.data.spec import DataConfig
from musubi_tuner.data.wanted import fingerprint
from musubi_tuner.families.base import FamilySpec


@dataclass(frozen=True)
class Planned:
    """An item whose cache is to be made, and why."""

    item: MediaItem
    why: Verdict


@dataclass(frozen=True)
class Plan:
    """A cache command's work over a whole dataset file."""

    part: Part
    tag: str
    scans: tuple[Scan, ...]
    work: tuple[Planned, ...]
    fresh: int
    foreign: int
    without_effect: tuple[tuple[str, ...], ...]
    """Keys of each dataset that change nothing for the family."""
    orphans: tuple[Path, ...]
    """Caches of this part and family in the cache folders that belong to no item."""
    unfinished: tuple[Path, ...]
    """Temporary files of such caches, which a killed run left behind."""


def make_plan(
    config: DataConfig, spec: FamilySpec, part: Part, settings: Mapping[str, str], *, strict: bool, renew: bool
) -> Plan:
    """Scan the datasets and judge the caches that are there.

    Args:
        settings: model identities and options that the caches depend on.
        strict: refuse caches without a fingerprint.
        renew: make every cache anew.

    Raises:
        UserError: a dataset without usable items, or what `strict` refuses.
    """
    scans = tuple(scan(dataset, spec) for dataset in config.datasets)
    hashed = lru_cache(maxsize=None)(content_hash)  # the clips of one video share its hash
    work: list[Planned] = []
    states: Counter[str] = Counter()
    seen: set[Path] = set()
    for item in (item for found in scans for item in found.items):
        if part == "text" and (path := item.text_path(spec.cache_tag)) in seen:
            continue  # another clip of the same video
        if part == "text":
            seen.add(path)
        verdict = Verdict("stale", "--recache") if renew else _verdict(item, spec, part, settings, hashed)
        states[verdict.state] += 1
        if verdict.state in ("missing", "stale"):
            work.append(Planned(item, verdict))
    if strict and states["foreign"]:
        raise UserError(
            f"{states['foreign']} {part} caches carry no fingerprint (another tool made them) and --strict_cache "
            "refuses them: make them anew with --recache"
        )
    orphans = tuple(_orphans(scans, part, spec.cache_tag))
    unfinished = tuple(_unfinished(scans, part, spec.cache_tag))
    idle = tuple(without_effect(dataset, spec) for dataset in config.datasets)
    return Plan(part, spec.cache_tag, scans, tuple(work), states["fresh"], states["foreign"], idle, orphans, unfinished)


def _verdict(
    item: MediaItem, spec: FamilySpec, part: Part, settings: Mapping[str, str], hashed: Callable[[Path], str]
) -> Verdict:
    files = [item.text_path(spec.cache_tag)] if part == "text" else latent_files(item, spec.cache_tag)
    if not files[0].is_file():
        return Verdict("missing", "it is not there")
    wanted = fingerprint(item, part, spec, settings, hashed)
    verdicts = [judge(path, wanted, spec, part) for path in files]
    worst = max(verdicts, key=lambda verdict: ("fresh", "foreign", "missing", "stale").index(verdict.state))
    if worst.state == "fresh" and worst.entries != len(files):
        return Verdict("stale", f"{len(files)} of its {worst.entries} files are there")
    return worst


def _orphans(scans: Sequence[Scan], part: Part, tag: str) -> Iterator[Path]:
    for found in scans:
        folder = found.dataset.cache_folder
        if not folder.is_dir():
            continue
        if part == "text":
            owned = {item.text_path(tag) for item in found.items}
        else:
            owned = {path for item in found.items for path in (item.latent_path(tag), *latent_files(item, tag))}
        for path in sorted(folder.iterdir()):
            if _is_cache(path.name, part, tag) and path not in owned:
                yield path


def _is_cache(name: str, part: Part, tag: str) -> bool:
    return name.endswith(f"_{tag}_te.safetensors") if part == "text" else bool(latent_pattern(tag).fullmatch(name))


def _unfinished(scans: Sequence[Scan], part: Part, tag: str) -> Iterator[Path]:
    for folder in {found.dataset.cache_folder for found in scans}:
        for path in sorted(folder.glob(".*.tmp")) if folder.is_dir() else ():
            match = _TEMPORARY.fullmatch(path.name)
            if match and _is_cache(match["target"], part, tag):
                yield path


_TEMPORARY = re.compile(r"\.(?P<target>.+)\.\d+\.[0-9a-f]{8}\.tmp")
"""Names that `weights.write` gives to files until they are whole."""


def table(plan: Plan) -> list[str]:
    """The plan in a few lines: datasets, buckets, what is left out and why, what is to be made."""
    pairs = zip(plan.scans, plan.without_effect, strict=True)
    lines = [line for found, idle in pairs for line in _dataset_lines(found, idle)]
    reasons = Counter(planned.why.reason for planned in plan.work if planned.why.state == "stale")
    missing = sum(planned.why.state == "missing" for planned in plan.work)
    made = [f"{missing} missing"] if missing else []
    made += [f"{count} stale: {reason}" for reason, count in reasons.most_common(3)]
    counts = [f"{len(plan.work)} to make" + (f" ({'; '.join(made)})" if made else ""), f"{plan.fresh} fresh"]
    if plan.foreign:
        counts.append(f"{plan.foreign} without fingerprint, taken as they are (--recache makes them anew)")
    lines.append(f"{plan.part} caches: {', '.join(counts)}")
    if plan.orphans:
        names = f"{len(plan.orphans)} {plan.part} caches belong to no item, e.g. {plan.orphans[0].name}"
        lines.append(f"{names}: left alone (--prune_cache deletes them)")
    if plan.unfinished:
        lines.append(
            f"{len(plan.unfinished)} unfinished files of a run that was killed, e.g. {plan.unfinished[0].name}: left "
            "alone (--prune_cache deletes them)"
        )
    return lines


def _dataset_lines(found: Scan, idle: Sequence[str]) -> Iterator[str]:
    buckets = Counter(f"{width}x{height}x{frames}" for frames, height, width in (item.shape for item in found.items))
    sizes = ", ".join(f"{name}: {count}" for name, count in sorted(buckets.items())[:8])
    more = f", and {len(buckets) - 8} more" if len(buckets) > 8 else ""
    yield (
        f"dataset {found.dataset.number} ({found.dataset.media}): {len(found.items)} items in {len(buckets)} buckets "
        f"(width x height x frames) {sizes}{more}"
    )
    yield f"  caches in {found.dataset.cache_folder}"
    beside = sum(len(item.controls) for item in found.items)
    if beside:
        yield f"  {beside} controls, from {found.dataset.control_directory or found.dataset.media}"
    empty = sum(not item.caption for item in found.items)
    if empty:
        yield f"  {empty} captions are empty"
    reasons: dict[str, list[str]] = {}
    for entry in found.left_out:
        reasons.setdefault(entry.reason, []).append(entry.path.name)
    for reason, names in reasons.items():
        yield f"  left out: {len(names)} x {reason}, e.g. {names[0]}"
    if idle:
        yield f"  without effect here: {', '.join(idle)}"
