"""State folders: everything that a run needs to go on as if it had never stopped.

    NAME-step00000250-state/
        manifest.json       format version, position, seed, options with their hash, what was trained, on what data
        weights.safetensors the trained tensors in the precision they are trained in (float32)
        optimizer.pt        the optimizer's state, readable by `torch.load(weights_only=True)`

Noise, times, dropout and the order of the data are keyed by (seed, epoch, item) and schedules are functions of the
step, so no generator and no scheduler is stored. The weights are those that the optimizer works on: schedule-free
optimizers are not switched for it. A folder is written under another name, synced file by file and renamed, so
a folder of the right name is complete whatever happened; `manifest.json` lists the sizes of the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import musubi_tuner
from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.write import atomic_file, atomic_save_safetensors, remedy, sync_folder

FORMAT, VERSION = "musubi-tuner training state", 1
MANIFEST, WEIGHTS, OPTIMIZER = "manifest.json", "weights.safetensors", "optimizer.pt"


@dataclass(frozen=True)
class Manifest:
    """What a state says of itself.

    batch: batches done of the unfinished epoch, of each of `world` processes. groups: names of the trained tensors in
    each parameter group. identity: what must agree with a run that resumes. config: all options; config_hash: of those
    that decide about results.
    """

    step: int
    epoch: int
    batch: int
    recent: list[float]
    seed: int
    world: int
    groups: list[list[str]]
    optimizer: str
    identity: Mapping[str, Any]
    data: Mapping[str, Any]
    config: Mapping[str, Any]
    config_hash: str
    runtime: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    not_exact: list[str] = field(default_factory=list)
    """Where this run departed from one that was never stopped; empty for an exact one."""


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of option values, independent of their order."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples as lists, what JSON lacks as text."""
    return json.loads(json.dumps(value, default=str))


def write_state(folder: Path, manifest: Manifest, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
    """Write a complete state folder or none; one that is there is replaced. Raises UserError when that fails."""
    with whole_folder(folder) as part:
        atomic_save_safetensors(part / WEIGHTS, weights)
        with atomic_file(part / OPTIMIZER) as file:
            torch.save(dict(optimizer), file)
        sizes = {name: (part / name).stat().st_size for name in (WEIGHTS, OPTIMIZER)}
        text = json.dumps({"format": FORMAT, "version": VERSION, **plain(asdict(manifest)), "files": sizes}, indent=1)
        with atomic_file(part / MANIFEST) as file:
            file.write(text.encode())


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends without an exception.

    A folder of that name is moved aside first and deleted last, so at every moment a complete one is on the disk.
    """
    token = secrets.token_hex(4)
    part, aside = (target.with_name(f"{target.name}.{kind}-{token}") for kind in ("tmp", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        sync_folder(part)
        if target.exists():
            target.rename(aside)
        part.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as fault:
        raise UserError(f"cannot write {target}: {remedy(fault)}") from fault
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_state(folder: Path) -> None:
    """Remove a state folder; a kill in between leaves nothing that looks like a state."""
    aside = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, name: str) -> list[Path]:
    """Remove the unfinished files and folders that a killed run of this name left in `folder`; returns them.

    A complete state that was moved aside for a newer one which never came gets its name back.
    """
    stem = rf"{re.escape(name)}(-\d{{6}}|-step\d{{8}})?"
    unfinished = re.compile(rf"\.{stem}\.safetensors\.\d+\.[0-9a-f]{{8}}\.tmp|{stem}-state\.tmp-[0-9a-f]{{8}}")
    replaced = re.compile(rf"({stem}-state)\.old-[0-9a-f]{{8}}")
    found = []
    for path in sorted(folder.iterdir()):
        if (old := replaced.fullmatch(path.name)) and not (target := path.with_name(old[1])).exists():
            path.rename(target)
        elif old or unfinished.fullmatch(path.name):
            found.append(path)
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return found


def is_state(folder: Path) -> bool:
    """Whether `folder` is a complete state of ours."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a state of ours, its files' sizes checked. Raises UserError."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("format") != FORMAT:
            raise UserError(f"{path} does not describe a training state: --resume wants a folder like NAME-state")
        version = found.pop("version")
        if version > VERSION:
            raise UserError(
                f"state {folder} has format version {version}, this version reads up to {VERSION}: update musubi-tuner"
            )
        _check_sizes(folder, found.pop("files"))
        return Manifest(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        if isinstance(fault, UserError):
            raise
        raise UserError(f"state {folder}: {MANIFEST} cannot be read ({fault!r}): use another state") from fault


def _check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            told = "is missing" if there is None else f"has {there} bytes"
            raise UserError(f"state {folder}: {name} {told}, {size} bytes were written: copy it again, or use another")


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError."""
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint.header.tensors}


def read_optimizer(path: Path) -> dict[str, Any]:
    """The optimizer's state, as tensors and plain values alone. Raises UserError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:
        raise UserError(f"{path} cannot be read as an optimizer's state: {str(fault).splitlines()[0]}") from fault
    if not isinstance(found, dict) or not {"state", "param_groups"} <= found.keys():
        raise UserError(f"{path} does not hold an optimizer's state")
    return found


def state_bytes(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a state folder, nearly: the weights and the tensors of the optimizer."""
    kept = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in (*parameters, *kept)) + (1 << 20)


def require_space(folder: Path, needed: int) -> None:
    """Raises UserError where the disk of `folder` has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e6:.1f} MB free and {needed / 1e6:.1f} MB are to be written: nothing was written; "
            "free some space or keep fewer files (--save_last_n_steps, --save_last_n_epochs)"
        )


def versions() -> dict[str, str]:
    """What made a state."""
    return {"torch": torch.__version__, "musubi_tuner": musubi_tuner.__version__}
