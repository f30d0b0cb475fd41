"""A checkpoint with adapters merged into it, written as a file: one tensor at a time, whole or not at all.

The file has the keys, the layout and the metadata of the checkpoint, so whatever reads one reads the other. Merged
weights are rounded as `load` rounds them: loading the file gives to the bit what loading with the adapters gives.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.keys import Rename
from musubi_tuner.weights.load import CHUNK_BYTES, Delta, Merge
from musubi_tuner.weights.policy import FP8_FILE_DTYPES
from musubi_tuner.weights.reader import Checkpoint
from musubi_tuner.weights.sources import TensorInfo, bytes_of
from musubi_tuner.weights.write import atomic_file, file_header, file_order

MERGED_METADATA = "musubi.merged"


def save_merged(
    path: str | Path,
    checkpoint: Checkpoint,
    merges: Sequence[Merge],
    *,
    rename: Rename,
    dtype: torch.dtype | None = None,
    told: Sequence[str] = (),
    progress: bool = True,
) -> int:
    """Write the tensors of `checkpoint` that `rename` has a name for, with `merges` added; the number of merged ones.

    dtype: of floating-point tensors; None keeps each one's own. told: what was merged, for the metadata. Memory is
    that of the adapters and a few megabytes. Raises UserError for a checkpoint in FP8, a path that is no safetensors
    file or one of the checkpoint's own, and what `Checkpoint.read` and `atomic_file` raise.
    """
    header = checkpoint.header
    _check_target(Path(path), header.paths)
    names = {key: name for key in header.tensors if (name := rename(key)) is not None}
    quantized = [key for key in names if header.tensors[key].dtype in FP8_FILE_DTYPES]
    if quantized:
        raise UserError(
            f"{header.paths[0]} holds {len(quantized)} FP8 weights (first: {quantized[0]}): adapters are merged into "
            "the BF16 or FP16 release"
        )
    shapes = {name: header.tensors[key].shape for key, name in names.items()}
    deltas: dict[str, list[Delta]] = {}
    for adapter in merges:
        for name, delta in adapter.bind(shapes).items():
            deltas.setdefault(name, []).append(delta)
    layout = {key: _empty(header.tensors[key], dtype) for key in names}
    metadata = {**header.metadata, MERGED_METADATA: json.dumps(list(told))}
    total = sum(tensor.nbytes for tensor in layout.values())
    with atomic_file(path) as file, tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        file.write(file_header(layout, metadata))
        for key in file_order(layout):
            _copy(file, checkpoint, key, layout[key].dtype, deltas.get(names[key], ()))
            bar.update(layout[key].nbytes)
    return len(deltas)


def _check_target(path: Path, sources: Sequence[Path]) -> None:
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path}: a merged model is written as a .safetensors file")
    if path.exists() and any(path.samefile(source) for source in sources):
        raise UserError(f"{path} is the checkpoint itself: give another file")


def _empty(info: TensorInfo, dtype: torch.dtype | None) -> Tensor:
    """Shape and dtype in the new file."""
    wanted = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    return torch.empty(info.shape, dtype=wanted, device="meta")


def _copy(file: BinaryIO, checkpoint: Checkpoint, key: str, dtype: torch.dtype, deltas: Sequence[Delta]) -> None:
    """Write one tensor's data, in pieces of rows."""
    info = checkpoint.header.tensors[key]
    if not info.shape or not info.nbytes:
        file.write(bytes_of(checkpoint.read(key).to(dtype)))
        return
    count = info.shape[0]
    step = max(1, CHUNK_BYTES // max(1, info.nbytes // count))
    for first in range(0, count, step):
        last = min(first + step, count)
        rows = checkpoint.read(key, slice(first, last))
        for delta in deltas:
            rows = rows.float() + delta(first, last)
        file.write(bytes_of(rows.to(info.dtype).to(dtype).contiguous()))
