"""What becomes of a weight while it is loaded: quantised to FP8, cast, or kept as the file has it.

A policy is data. `Fp8Policy.selects` decides by the model's own key (`blocks.0.ffn.0.weight`), so a repackaging
prefix in the file (`model.diffusion_model.`) cannot trip an exclude such as `mod`. Only `nn.Linear` slots compute in
FP8; a selected tensor of another kind is kept in high precision by the loader.

Checkpoints that were quantised before carry a stamp in their metadata (`musubi.fp8`); its format version is checked
here, and FP8 files of others are refused unless the policy says otherwise.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from musubi_tuner.config.errors import UserError

FP8_METADATA = "musubi.fp8"
FP8_VERSION = 1

FP8_FILE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class KeyPatterns(Protocol):
    """Substrings of keys; `families.base.Fp8Targets` is one."""

    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Fp8Policy:
    """Which weights become FP8, and how.

    scaled: quantise with scales (`mode`, `block_size`); otherwise a plain cast with the scale 1. search: None or
    "mse", see `musubi_kernels.quantize_fp8`. allow_prequantized: take FP8 files of other tools as they are.
    """

    targets: KeyPatterns
    mode: Literal["block", "channel", "tensor"] = "block"
    block_size: int = 64
    fmt: Literal["e4m3", "e5m2"] = "e4m3"
    scaled: bool = True
    search: str | None = None
    allow_prequantized: bool = False
    extra_exclude: tuple[str, ...] = ()
    """Substrings of the user (`--fp8_exclude`) beside the family's."""

    def __post_init__(self) -> None:
        if self.mode not in ("block", "channel", "tensor"):
            raise UserError(f"fp8 mode {self.mode!r}: use block, channel or tensor")
        if self.fmt not in ("e4m3", "e5m2"):
            raise UserError(f"fp8 format {self.fmt!r}: use e4m3 or e5m2")
        if not 32 <= self.block_size <= 256:
            raise UserError(f"fp8 block size {self.block_size}: use 32 to 256")

    def selects(self, key: str) -> bool:
        """True for a `.weight` key that holds an include and no exclude substring."""
        excludes = (*self.targets.exclude, *self.extra_exclude)
        return (
            key.endswith(".weight")
            and any(part in key for part in self.targets.include)
            and not any(part in key for part in excludes)
        )


@dataclass(frozen=True)
class WeightPolicy:
    """dtype: floating-point weights are cast to it; None keeps the file's. fp8: None keeps everything out of FP8."""

    dtype: torch.dtype | None = None
    fp8: Fp8Policy | None = None


@dataclass(frozen=True)
class Fp8Stamp:
    """The `musubi.fp8` entry of a quantised checkpoint of ours."""

    mode: str
    block_size: int
    fmt: str
    source_hash: str = ""
    """SHA-256 of the data of the checkpoint it was made from."""
    version: int = FP8_VERSION

    def metadata(self) -> dict[str, str]:
        body = {
            "version": self.version,
            "mode": self.mode,
            "block_size": self.block_size,
            "format": self.fmt,
            "source_hash": self.source_hash,
        }
        return {FP8_METADATA: json.dumps(body, separators=(",", ":"))}


def read_stamp(metadata: Mapping[str, str], file: object) -> Fp8Stamp | None:
    """The stamp of a checkpoint, or None. Raises UserError for one that is newer or unreadable."""
    text = metadata.get(FP8_METADATA)
    if text is None:
        return None
    try:
        body = json.loads(text)
        stamp = Fp8Stamp(
            mode=str(body["mode"]),
            block_size=int(body["block_size"]),
            fmt=str(body["format"]),
            source_hash=str(body.get("source_hash", "")),
            version=int(body["version"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {file}: its metadata {FP8_METADATA!r} cannot be read ({error})") from error
    if stamp.version > FP8_VERSION:
        raise UserError(
            f"checkpoint {file} has FP8 layout version {stamp.version}; this version reads up to {FP8_VERSION}: "
            "update musubi-tuner"
        )
    return stamp
