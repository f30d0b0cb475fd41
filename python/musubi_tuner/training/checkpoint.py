"""When and what a run saves: `name-000004.safetensors` after epochs, `name-step00000250.safetensors` after steps, and
`name.safetensors` at the end. Files are whole or absent; the names are frozen, since users' scripts look for them.

A `Saved` turns the trained thing into a file: `lora_file` for adapters, `model_file` for all weights in the layout of
the checkpoint they came from. Resumable states are another matter, for which `State` is the one object to store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import AdapterSet
from musubi_tuner.adapters.files import save_lora
from musubi_tuner.config.errors import UserError
from musubi_tuner.optim.build import evaluating
from musubi_tuner.training.events import EpochRecord, Quiet, State, StepRecord
from musubi_tuner.weights.reader import Header
from musubi_tuner.weights.write import atomic_save_safetensors, data_sha256

log = logging.getLogger(__name__)

Write = Callable[[Path, Mapping[str, str]], None]
"""(path, metadata): write the weights as they are now."""


@dataclass(frozen=True)
class Names:
    """The files of a run in `folder`."""

    folder: Path
    name: str

    def epoch(self, epoch: int) -> Path:
        return self.folder / f"{self.name}-{epoch:06d}.safetensors"

    def step(self, step: int) -> Path:
        return self.folder / f"{self.name}-step{step:08d}.safetensors"

    @property
    def last(self) -> Path:
        return self.folder / f"{self.name}.safetensors"


@dataclass(frozen=True)
class Saver(Quiet):
    """Saves after every n-th epoch (but the last) and step, and at the end.

    metadata: (step, epoch) -> entries. optimizer: switched to the weights that are to be saved while they are written.
    """

    names: Names
    write: Write
    metadata: Callable[[int, int], Mapping[str, str]]
    optimizer: torch.optim.Optimizer
    every_epochs: int | None = None
    every_steps: int | None = None

    def step_end(self, record: StepRecord) -> None:
        if self.every_steps and record.step % self.every_steps == 0:
            self._save(self.names.step(record.step), record.step, record.epoch)

    def epoch_end(self, record: EpochRecord) -> None:
        if self.every_epochs and record.epoch % self.every_epochs == 0 and not record.last:
            self._save(self.names.epoch(record.epoch), record.step, record.epoch)

    def finish(self, state: State) -> None:
        self._save(self.names.last, state.step, state.epoch)

    def _save(self, path: Path, step: int, epoch: int) -> None:
        with evaluating(self.optimizer):
            self.write(path, self.metadata(step, epoch))
        log.info("saved %s", path)


def lora_file(adapters: AdapterSet, dtype: torch.dtype | None) -> Write:
    """Writes the adapter; `dtype` None keeps the trained precision (float32)."""
    return lambda path, metadata: save_lora(path, adapters.state_dict(dtype), metadata)


def model_file(
    model: nn.Module, header: Header, rename: Callable[[str], str | None], dtype: torch.dtype | None
) -> Write:
    """Writes all weights under the keys of the checkpoint `header`, in its dtypes or in `dtype`; its own metadata
    (the architecture of unusual models) is kept."""
    keys = {name: key for key in header.tensors if (name := rename(key)) is not None}

    def write(path: Path, metadata: Mapping[str, str]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            key = keys[name]
            kept = header.tensors[key].dtype
            tensors[key] = tensor.to(dtype if dtype is not None and kept.is_floating_point else kept)
        digest = {"sshs_model_hash": data_sha256(tensors)}
        atomic_save_safetensors(path, tensors, {**header.metadata, **metadata, **digest})

    return write


def output_folder(path: str) -> Path:
    """The folder, made if needed, after a test that it can be written to. Raises UserError."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".musubi-write-test"
        probe.touch()
        probe.unlink()
    except OSError as fault:
        raise UserError(f"output_dir = {path}: cannot be written ({fault.strerror}); choose another folder") from fault
    return folder


def output_name(name: str) -> str:
    """The base name, which must be a plain file name. Raises UserError."""
    plain = name.removesuffix(".safetensors")
    if not plain or Path(plain).name != plain or plain == "..":
        raise UserError(f"output_name = {name!r}: use a plain file name; the folder is --output_dir")
    return plain
