"""LoRA files: written whole or not at all, with the hashes that model libraries index them by.

`sshs_model_hash` is the SHA-256 of the data part, so it does not depend on the metadata. `sshs_legacy_hash` is the
first 8 digits of the SHA-256 of 64 KiB at offset 1 MiB of the file as it would be with its `ss_` metadata only; older
tools know files by it. Both are always written, and always match the tensors beside them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.adapters.formats import is_adapter_file
from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.sources import bytes_of, some
from musubi_tuner.weights.write import atomic_save_safetensors, data_sha256, file_header, file_order

MODEL_HASH = "sshs_model_hash"
LEGACY_HASH = "sshs_legacy_hash"

_LEGACY_START, _LEGACY_LENGTH = 1 << 20, 1 << 16


def save_lora(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `tensors` (cast to `dtype` if given) and `metadata` with both hashes, atomically."""
    cast = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    atomic_save_safetensors(path, cast, {**(metadata or {}), **hashes(cast, metadata or {})})


def load_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a LoRA file, and its metadata. UserError where the file is something else."""
    with open_checkpoint(path) as checkpoint:
        header = checkpoint.header
        if not is_adapter_file(header.tensors):
            raise UserError(
                f"LoRA file {path} holds no LoRA factors; its tensors are {some(header.tensors, 3)}: is it a "
                "checkpoint, or an adapter of another kind?"
            )
        return {key: checkpoint.read(key) for key in header.tensors}, dict(header.metadata)


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a file of `tensors` (contiguous, on the CPU) and `metadata`."""
    return {MODEL_HASH: data_sha256(tensors), LEGACY_HASH: _legacy_hash(tensors, metadata)}


def _legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    header = file_header(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    digest = hashlib.sha256()
    position = 0
    for part in (memoryview(header), *(bytes_of(tensors[name]) for name in file_order(tensors))):
        first = max(0, _LEGACY_START - position)
        last = _LEGACY_START + _LEGACY_LENGTH - position
        if last > first:
            digest.update(part[first:last])
        position += len(part)
    return digest.hexdigest()[:8]
