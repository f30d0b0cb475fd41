"""The two cache commands: encode what a dataset file names, once, into files that training reads.

Fresh files are skipped by content, stale ones made anew, nothing else is touched. Items are encoded in batches of one
shape; decoding runs ahead in threads by two batches, so memory is bounded by the batch size. Every file is written
whole or not at all, so a run that is stopped goes on where it was.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved, option
from musubi_tuner.data import cache
from musubi_tuner.data.cache_keys import Part
from musubi_tuner.data.fingerprint import content_hash, file_identity, option_identity
from musubi_tuner.data.plan import Plan, Planned, make_plan, table
from musubi_tuner.data.sources import MediaItem, scan, to_encode
from musubi_tuner.data.spec import DataConfig, load
from musubi_tuner.data.view import ViewOptions, view
from musubi_tuner.data.wanted import fingerprint, media_of, sees_controls
from musubi_tuner.families.base import Family, FamilySpec, FindsFiles, Item

log = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def _dtype(text: str) -> str:
    return _SHORT.get(text, text)


@dataclass(frozen=True)
class CacheOptions:
    """Dataset and caches"""

    dataset_config: str = option("", help="dataset file (TOML or JSON)", required=True, metavar="FILE")
    device: str | None = option(None, help="where to encode, e.g. cuda:1 or cpu; CUDA when present if not given")
    batch_size: int | None = option(
        None, help="upper bound of items encoded at once; the dataset's if not given", minimum=1
    )
    num_workers: int | None = option(None, help="threads that decode ahead; processors - 1 if not given", minimum=1)
    recache: bool = option(False, help="make every cache anew")
    strict_cache: bool = option(False, help="refuse caches without a fingerprint, which another tool made")
    prune_cache: bool = option(False, help="delete caches of this family that belong to no item of the dataset file")
    skip_existing: bool = option(False, help="accepted for old command lines: fresh caches are always skipped")
    keep_cache: bool = option(False, help="accepted for old command lines: only --prune_cache deletes")


@dataclass(frozen=True)
class VaeOptions:
    """VAE"""

    vae: str | None = option(None, help="VAE checkpoint; needed unless --debug_mode is given", metavar="FILE")
    vae_dtype: str = option(
        "bfloat16",
        help="dtype that the VAE computes in, and of the cached latents",
        choices=tuple(DTYPES),
        parse=_dtype,
    )
    disable_cudnn_backend: bool = option(False, help="let torch's own CUDA kernels convolve in place of cuDNN's")


LATENT_GROUPS: tuple[type, ...] = (CacheOptions, VaeOptions, ViewOptions)
TEXT_GROUPS: tuple[type, ...] = (CacheOptions,)

Entries = Sequence[Mapping[str, Tensor]]
Encode = Callable[[Sequence[Item]], Sequence[Entries]]
"""Items of one shape to the cache entries of each."""


def cache_latents(family: Family, options: Resolved) -> None:
    """Write the latent caches of a dataset file, or show its items; raises UserError for what the user can mend."""
    chosen, vae_options = options[CacheOptions], options[VaeOptions]
    if options[ViewOptions].debug_mode is not None:
        view([scan(dataset, family.spec) for dataset in _config(chosen).datasets], options[ViewOptions])
        return
    if vae_options.vae is None:
        raise UserError("--vae is needed: the checkpoint of the VAE that encodes the pictures")
    vae_file = vae_options.vae
    if not Path(vae_file).exists():
        raise UserError(f"--vae {vae_file} is not there")
    device, dtype = pick_device(chosen.device), DTYPES[vae_options.vae_dtype]
    own = _family_options(family, options, "cache_latents")
    if vae_options.disable_cudnn_backend:
        torch.backends.cudnn.enabled = False
        if device.type != "cuda":
            log.warning("disable_cudnn_backend has no effect on %s", device)
    settings = {"vae": option_identity(vae_file), "vae_dtype": vae_options.vae_dtype, **_identities(family, own)}

    def load_encode() -> Encode:
        vae = family.load_vae(vae_file, device=device, dtype=dtype, options=own[0] if own else None)
        encoders = family.load_encoders(own[0], device=device, dtype=dtype) if own else None
        return lambda items: family.encode_latents([_moved(item, device) for item in items], vae, encoders)

    _run(family.spec, "latent", chosen, settings, load_encode)


def cache_text(family: Family, options: Resolved) -> None:
    """Write the text caches of a dataset file; raises UserError for what the user can mend."""
    chosen = options[CacheOptions]
    device = pick_device(chosen.device)
    own = _family_options(family, options, "cache_text")

    def load_encode() -> Encode:
        encoders = family.load_encoders(own[0] if own else None, device=device, dtype=torch.bfloat16)
        if encoders is None:
            raise UserError(f"{family.spec.name} was given no text encoder: see `musubi cache_text --help`")
        return lambda items: [[entry] for entry in family.encode_condition(items, encoders)]

    _run(family.spec, "text", chosen, _identities(family, own), load_encode)


def pick_device(name: str | None) -> torch.device:
    """The device of that name, CUDA when present for None. Raises UserError where it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device: use cuda, cuda:1, ... or cpu") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are here; use cpu or another index")
    return device


def _family_options(family: Family, options: Resolved, command: str) -> list[Any]:
    return [options[group] for group in family.option_groups(command)]


def _identities(family: Family, groups: Sequence[Any]) -> dict[str, str]:
    """Options of the family by what they stand for: files by content, those included that it finds by itself."""
    named = {f.name: option_identity(getattr(group, f.name)) for group in groups for f in fields(group)}
    found = family.found_files(groups[0]) if groups and isinstance(family, FindsFiles) else {}
    return {**named, **{name: file_identity(path) for name, path in found.items()}}


def _moved(item: Item, device: torch.device) -> Item:
    pixels = None if item.pixels is None else item.pixels.to(device)
    masks = tuple(None if mask is None else mask.to(device) for mask in item.masks)
    return replace(item, pixels=pixels, controls=tuple(control.to(device) for control in item.controls), masks=masks)


def _run(
    spec: FamilySpec, part: Part, chosen: CacheOptions, settings: Mapping[str, str], load_encode: Callable[[], Encode]
) -> None:
    """Plan, tell, encode, prune. Models are loaded only where there is something to encode."""
    plan = make_plan(_config(chosen), spec, part, settings, strict=chosen.strict_cache, renew=chosen.recache)
    for line in table(plan):
        log.info("%s", line)
    if plan.work:
        with torch.inference_mode():
            _encode_all(plan, spec, chosen, settings, load_encode())
    if chosen.prune_cache:
        for path in (*plan.orphans, *plan.unfinished):
            path.unlink(missing_ok=True)
        log.info("deleted %d files that belong to no item", len(plan.orphans) + len(plan.unfinished))


def _config(chosen: CacheOptions) -> DataConfig:
    config = load(chosen.dataset_config)
    for warning in config.warnings:
        log.warning("%s", warning)
    return config


def _encode_all(
    plan: Plan, spec: FamilySpec, chosen: CacheOptions, settings: Mapping[str, str], encode: Encode
) -> None:
    failed: list[str] = []
    workers = chosen.num_workers or max((os.cpu_count() or 2) - 1, 1)
    batches = _batches(plan, chosen.batch_size)
    with tqdm(total=len(plan.work), desc=f"{plan.part} caches", unit="item") as progress, _writers() as written:
        for batch in _ahead(batches, plan.part, spec, workers):
            ready = [loaded for loaded in batch if not isinstance(loaded, str)]
            failed += [loaded for loaded in batch if isinstance(loaded, str)]
            for loaded, entries in zip(ready, encode([r.item for r in ready]) if ready else [], strict=True):
                written(_write, loaded, entries, spec, plan.part, settings)
            progress.update(len(batch))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(plan.work)} items could not be decoded, the others are cached: "
            f"{'; '.join(failed[:5])}{'; ...' if len(failed) > 5 else ''}"
        )
    log.info("made %d %s caches", len(plan.work), plan.part)


_WRITERS = 8


@contextmanager
def _writers() -> Iterator[Callable[..., None]]:
    """A function that has a call made by a thread; at most two calls a thread wait.

    Each file is synced to the disk before it gets its name, which is waiting, not work: one after the other, small
    files would take ten times as long. The first exception of a call stops the block.
    """
    pending: deque[Future[None]] = deque()

    def submit(work: Callable[..., None], *arguments: Any) -> None:
        pending.append(pool.submit(work, *arguments))
        while len(pending) > 2 * _WRITERS or (pending and pending[0].done()):
            pending.popleft().result()

    with ThreadPoolExecutor(_WRITERS, "musubi-write") as pool:
        yield submit
        for future in pending:
            future.result()


def _batches(plan: Plan, cap: int | None) -> Iterator[list[Planned]]:
    """Items of one dataset and, for latents, one shape, in runs of the dataset's batch size or `cap`."""
    groups: dict[tuple[Any, ...], list[Planned]] = {}
    for planned in plan.work:
        shape = planned.item.shape if plan.part == "latent" else ()
        groups.setdefault((planned.item.dataset.number, *shape), []).append(planned)
    for members in groups.values():
        size = min(members[0].item.dataset.batch_size, cap or len(members))
        for start in range(0, len(members), size):
            yield members[start : start + size]


@dataclass(frozen=True)
class _Loaded:
    media: MediaItem
    item: Item
    hashes: Mapping[Path, str]


def _load(media: MediaItem, part: Part, spec: FamilySpec) -> _Loaded | str:
    """An item ready to encode, or the sentence that says why it cannot be."""
    try:
        hashes = {path: content_hash(path) for path in media_of(media, part, spec)}
        item = to_encode(media, spec, with_pixels=part == "latent", with_controls=sees_controls(spec, part))
        return _Loaded(media, item, hashes)
    except (ValueError, OSError) as error:
        return f"{media.path} {error}"


def _ahead(
    batches: Iterator[list[Planned]], part: Part, spec: FamilySpec, workers: int
) -> Iterator[list[_Loaded | str]]:
    """Batches with their items decoded; at most two batches wait beyond the one in use."""
    pending: deque[list[Future[_Loaded | str]]] = deque()
    with ThreadPoolExecutor(workers, "musubi-decode") as pool:
        try:
            for batch in batches:
                pending.append([pool.submit(_load, planned.item, part, spec) for planned in batch])
                if len(pending) > 2:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write(loaded: _Loaded, entries: Entries, spec: FamilySpec, part: Part, settings: Mapping[str, str]) -> None:
    media, tag = loaded.media, spec.cache_tag
    stamp = fingerprint(media, part, spec, settings, loaded.hashes.__getitem__, entries=len(entries))
    metadata = _metadata(media, part)
    for number, entry in enumerate(entries):
        section = number if len(entries) > 1 else None
        path = media.text_path(tag) if part == "text" else media.latent_path(tag, section)
        cache.write(path, entry, spec, part, fingerprint=stamp, metadata=metadata, item=str(media.path))


def _metadata(media: MediaItem, part: Part) -> dict[str, str]:
    if part == "text":
        return {"caption1": media.caption}
    size = {"width": str(media.size[0]), "height": str(media.size[1])}
    return {**size, "frame_count": str(len(media.frames))} if media.frames else size
