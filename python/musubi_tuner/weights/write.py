"""Files appear whole or not at all.

`atomic_file` gives a temporary file in the target's folder and renames it over the target once its bytes are on the
disk; a crash, a full disk or an exception leaves the old file as it was. `atomic_save_safetensors` writes tensors
through it one at a time, so saving needs no second copy of them in memory.

The order of tensors in the file is the safetensors writer's own (data type, then name), so a hash over the data part
is the same as that of a file written by that library.
"""

import errno
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.sources import SAFETENSORS_DTYPES, bytes_of

_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_RANK: Mapping[torch.dtype, int] = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES.values())}


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes `path` when the block ends without an exception.

    The folder is made if needed. Raises UserError when the disk is full or the place cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {remedy(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (any device, any layout) as a safetensors file, atomically.

    Metadata values must be strings; ValueError names one that is not, and a data type that the format lacks.
    """
    order = file_order(tensors)
    header = file_header(tensors, metadata)
    with atomic_file(path) as file:
        file.write(header)
        for name in order:
            file.write(_data(tensors[name]))


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of their data: widest data types first, then by name."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _RANK:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}: safetensors holds {', '.join(_NAMES.values())}")
    return sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))


def file_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """The bytes before the data: length, JSON, padding to a multiple of 8."""
    entries: dict[str, object] = {}
    if metadata:
        wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
        if wrong:
            raise ValueError(f"metadata {wrong[0]!r} is {type(metadata[wrong[0]]).__name__}: values must be strings")
        entries["__metadata__"] = dict(metadata)
    offset = 0
    for name in file_order(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the data part of the file that `tensors` make: independent of all metadata."""
    digest = hashlib.sha256()
    for name in file_order(tensors):
        digest.update(_data(tensors[name]))
    return digest.hexdigest()


def _data(tensor: Tensor) -> memoryview:
    return bytes_of(tensor.detach().cpu().contiguous())


def sync_folder(folder: Path) -> None:
    """Put the rename itself on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems refuse to sync a folder; the file itself is synced
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def remedy(error: OSError) -> str:
    """What the user can do about a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another folder (the old file, if any, is untouched)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission; choose a folder that you may write to"
    return f"{error.strerror or error}"
