"""Checkpoints, header first: what a file holds is known before one weight is read.

`open_checkpoint` takes what users have: a safetensors file, the first of several shards, an index, a folder, or a
`.pth`/`.pt` pickle. The header gives every tensor's shape, dtype and file; `read` fetches one tensor, or some of its
rows, by positioned reads into a buffer of its own. Nothing is memory-mapped, so what a process holds is what it asked
for and the page cache stays the kernel's business. Pickles are the exception: they are opened with
`weights_only=True` and mapped, because their storages have no other address.

Every fault of a file (missing, truncated, not a checkpoint, a shard lost) is a `UserError` of one sentence.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.sources import PickleFile, SafetensorsFile, Source, TensorInfo, some

__all__ = ["Checkpoint", "Header", "TensorInfo", "open_checkpoint"]

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLES = (".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class Header:
    """All tensors by key, the metadata of all files (the first file wins) and the files themselves."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()


class Checkpoint:
    """An open checkpoint: `header` and `read`. Close it, or use it as a context manager."""

    def __init__(self, sources: Mapping[Path, Source]) -> None:
        self._sources = dict(sources)
        self.header = _join_headers(self._sources)

    def read(self, key: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """The tensor `key`, or its rows `rows` (a slice of step 1 along the first axis), on the CPU.

        out: a contiguous CPU tensor of the result's shape and the file's dtype, to be filled in place of a new one.
        Raises KeyError for an unknown key, ValueError for bad rows, UserError when the file cannot be read.
        """
        info = self.header.tensors[key]
        shape, first = _selected_shape(key, info.shape, rows)
        if out is None:
            out = torch.empty(shape, dtype=info.dtype)
        elif tuple(out.shape) != shape or out.dtype != info.dtype or not out.is_contiguous() or out.is_cuda:
            raise ValueError(
                f"read({key!r}, out=...): out is {out.dtype} {tuple(out.shape)} on {out.device}; "
                f"a contiguous CPU tensor {info.dtype} {shape} is needed"
            )
        if out.numel():
            self._sources[info.file].read_into(key, first, out)
        return out

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        self._sources = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint at `path`: a safetensors file, any shard of a set, an `.index.json`, a folder, a pickle.

    Only headers are read. Raises UserError naming the file and what is wrong with it.
    """
    given = Path(path).expanduser()
    sources: dict[Path, Source] = {}
    try:
        for file in _files_of(given):
            sources[file] = PickleFile(file) if file.suffix.lower() in _PICKLES else SafetensorsFile(file)
        return Checkpoint(sources)
    except BaseException:
        for source in sources.values():
            source.close()
        raise


def _files_of(path: Path) -> list[Path]:
    """The files that make up the checkpoint, in order; all of them exist."""
    if path.is_dir():
        path = _file_in_folder(path)
    if not path.exists():
        raise UserError(f"checkpoint {path}: there is no such file; check the path")
    if path.name.endswith(".index.json"):
        files = _files_of_index(path)
    elif shard := _SHARD.fullmatch(path.name):
        count = int(shard["count"])
        files = [path.with_name(f"{shard['stem']}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]
    elif path.suffix.lower() in (".safetensors", ".sft", *_PICKLES):
        files = [path]
    else:
        raise UserError(
            f"checkpoint {path}: file type {path.suffix!r} is not read; use .safetensors, .sft, "
            f"an .index.json, or one of {', '.join(_PICKLES)}"
        )
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"checkpoint {path}: {len(absent)} of its {len(files)} parts are not in {path.parent}: "
            f"{some(absent)}; download the missing parts into that folder"
        )
    return files


def _file_in_folder(folder: Path) -> Path:
    """The one checkpoint of a folder: its index, its first shard, or its only file."""
    names = sorted(p for p in folder.iterdir() if p.is_file())
    indexes = [p for p in names if p.name.endswith(".safetensors.index.json")]
    shards = [p for p in names if (match := _SHARD.fullmatch(p.name)) and int(match["number"]) == 1]
    plain = [p for p in names if p.suffix == ".safetensors" and not _SHARD.fullmatch(p.name)]
    pickles = [p for p in names if p.suffix.lower() in (".pth", ".pt")]
    for found in (indexes, [*shards, *plain], pickles):
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"folder {folder} holds several checkpoints, {some([p.name for p in found])}: name one")
    raise UserError(f"folder {folder} holds no checkpoint (.safetensors, .index.json, .pth)")


def _files_of_index(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"checkpoint index {path}: no readable `weight_map` ({error}); download it again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"checkpoint index {path}: part {outside[0]!r} is not a plain file name of its folder")
    return [path.parent / name for name in names]


def _join_headers(sources: Mapping[Path, Source]) -> Header:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path, source in sources.items():
        twice = tensors.keys() & source.tensors.keys()
        if twice:
            raise UserError(f"checkpoint part {path.name} repeats tensors of another part: {some(sorted(twice))}")
        tensors.update(source.tensors)
        metadata = {**source.metadata, **metadata}
    return Header(tensors, metadata, tuple(sources))


def _selected_shape(key: str, shape: tuple[int, ...], rows: slice | None) -> tuple[tuple[int, ...], int]:
    """Shape of the rows asked for, and the first row."""
    if rows is None:
        return shape, 0
    if not shape or rows.step not in (None, 1):
        raise ValueError(f"read({key!r}, rows={rows}): rows are a slice of step 1 of the first axis; shape is {shape}")
    first, stop, _ = rows.indices(shape[0])
    return (max(stop - first, 0), *shape[1:]), first
