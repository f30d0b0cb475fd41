"""The two kinds of checkpoint file behind `reader`: safetensors by positioned reads, pickles by `weights_only`.

Each source lists its tensors when it is opened and fills a caller's buffer later. Faults of a file are told in one
`UserError` sentence that leads to the remedy: an unfinished download, a web page saved as weights, a Git LFS pointer.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""Names of the file format, in the order by which its writers sort (ascending)."""


_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where and what a tensor is. `start`: byte offset in `file` (0 for pickles, which are addressed by name)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """One opened file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read_into(self, key: str, first_row: int, out: Tensor) -> None:
        """Fill `out` (contiguous, CPU, the tensor's dtype) from row `first_row` on."""
        ...

    def close(self) -> None: ...


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; writing to them writes the tensor."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def some(names: Iterable[str], limit: int = 6) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")


class SafetensorsFile:
    """8 bytes of header length, a JSON header, then the data (https://github.com/huggingface/safetensors)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # unbuffered: a read goes from the page cache into the tensor's own memory, once
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"checkpoint {path}: cannot be opened ({error.strerror})") from error
        self._lock = threading.Lock()
        self.tensors: Mapping[str, TensorInfo]
        self.metadata: Mapping[str, str]
        try:
            self.tensors, self.metadata = self._parse()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read_into(self, key: str, first_row: int, out: Tensor) -> None:
        info = self.tensors[key]
        row = info.nbytes // info.shape[0] if info.shape else info.nbytes
        view = bytes_of(out)
        offset = info.start + first_row * row
        try:
            got = _read_fully(self._file, view, offset, self._lock)
        except OSError as error:
            raise UserError(f"checkpoint {self.path}: reading {key!r} failed ({error.strerror})") from error
        if got != len(view):
            raise UserError(f"checkpoint {self.path} became shorter while it was read (at {key!r})")

    def _parse(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(9)
        length = struct.unpack("<Q", head[:8])[0] if len(head) == 9 else 0
        if not 2 <= length <= _MAX_HEADER or head[8:] != b"{":
            raise UserError(f"checkpoint {self.path}: {_what_it_is(self.path, size)}")
        if size < 8 + length:
            raise UserError(f"checkpoint {self.path} is cut off inside its header ({size:,} bytes); download it again")
        try:
            entries = json.loads(head[8:] + self._file.read(length - 1))
            metadata = {str(k): str(v) for k, v in (entries.pop("__metadata__", None) or {}).items()}
            found = {key: self._info(key, entry, 8 + length) for key, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"checkpoint {self.path}: {_what_it_is(self.path, size)}") from error
        end = max((info.start + info.nbytes for info in found.values()), default=8 + length)
        if end > size:
            raise UserError(
                f"checkpoint {self.path} is cut off: its header promises {end:,} bytes, it has {size:,}; "
                "download it again"
            )
        return found, metadata

    def _info(self, key: str, entry: Mapping[str, Any], data: int) -> TensorInfo:
        name, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        if name not in SAFETENSORS_DTYPES:
            raise UserError(
                f"checkpoint {self.path}: tensor {key!r} has data type {name}, which is not read; "
                "use the BF16, F16 or F32 release of the model"
            )
        begin, end = entry["data_offsets"]
        info = TensorInfo(shape, SAFETENSORS_DTYPES[name], self.path, data + begin)
        if begin < 0 or min(shape, default=1) < 0 or end - begin != info.nbytes:
            raise UserError(
                f"checkpoint {self.path} is damaged: tensor {key!r} ({name} {list(shape)}) is said to take "
                f"{end - begin:,} bytes in place of {info.nbytes:,}; download it again"
            )
        return info


def _read_fully(file: BinaryIO, view: memoryview, offset: int, lock: threading.Lock) -> int:
    """Fill `view` from `offset`; the bytes got, fewer only at the end of the file. Safe from several threads."""
    done = 0
    while done < len(view):
        # 1 GiB a call: the kernel's own limit is just under 2 GiB
        part = view[done : done + (1 << 30)]
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [part], offset + done)
        else:
            with lock:
                file.seek(offset + done)
                count = file.readinto(part) or 0  # type: ignore[attr-defined]
        if count == 0:
            break
        done += count
    return done


def _what_it_is(path: Path, size: int) -> str:
    """Why a file that should be safetensors is none, in words that lead to the remedy."""
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    if size == 0:
        return "the file is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself"
    if start[:1] == b"<":
        return "this is a web page, not a checkpoint; the download needs a login or another address"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "this is a pickle named .safetensors; rename it to .pth"
    if start.startswith(b"GGUF"):
        return "GGUF files are not read; use the .safetensors release of the model"
    return f"no safetensors header ({size:,} bytes); the file is damaged or of another kind, download it again"


class PickleFile:
    """A torch pickle read with `weights_only=True`; one wrapper level (`state_dict`, `model`, `module`) is opened."""

    def __init__(self, path: Path) -> None:
        self._tensors = _load_pickle(path)
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(tuple(value.shape), value.dtype, path) for key, value in self._tensors.items()
        }

    def close(self) -> None:
        self._tensors = {}

    def read_into(self, key: str, first_row: int, out: Tensor) -> None:
        source = self._tensors[key]
        out.copy_(source[first_row : first_row + out.shape[0]] if source.dim() else source)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be opened ({error.strerror})") from error
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged and unsafe files
        first = str(error).strip().splitlines()
        raise UserError(
            f"checkpoint {path} cannot be read as weights only ({first[0] if first else type(error).__name__}); "
            "it is damaged or holds code: use the .safetensors release"
        ) from error
    for wrapper in ("state_dict", "model_state", "model", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
