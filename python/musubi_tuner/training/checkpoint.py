"""When and what a run saves: `name-000004.safetensors` after epochs, `name-step00000250.safetensors` after steps, and
`name.safetensors` at the end. Files are whole or absent; the names are frozen, since users' scripts look for them.

A `Write` turns the trained thing into a file: `lora_file` for adapters, `model_file` for all weights in the layout of
the checkpoint they came from. States that a run can go on from are folders beside the files, `name-000004-state` and so
on (`training.state`). The disk is asked for room before anything is written, and old files go only after new ones are
whole; when writing fails the message says which earlier ones are.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import AdapterSet
from musubi_tuner.adapters.files import save_lora
from musubi_tuner.config.errors import UserError
from musubi_tuner.optim.build import evaluating
from musubi_tuner.training.events import EpochRecord, Quiet, State, StepRecord
from musubi_tuner.training.retention import Retention
from musubi_tuner.training.shards import whole
from musubi_tuner.training.state import remove_state, require_space
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


class States(Protocol):
    """Writes the state of a run."""

    def size(self) -> int:
        """Bytes that a state needs, nearly."""
        ...

    def write(self, folder: Path, state: State) -> None:
        """Write the run's state as it is, complete or not at all."""
        ...


def tell_nobody(_path: Path) -> None:
    """For runs that keep what they save to themselves."""


def state_of(file: Path) -> Path:
    """The state folder that belongs to a saved file."""
    return file.with_name(f"{file.stem}-state")


@dataclass
class Saver(Quiet):
    """Saves after every n-th epoch (but the last) and step, and at the end.

    metadata: (step, epoch) -> entries. optimizer: switched to the weights that are to be saved while they are written.
    size: bytes of a file, nearly. keep_states: a state with every file; last_state: one at the end. Asked to stop, it
    writes a state in any case where `states` is given. leads: False where another process writes, and `write` and
    `states` only take part in gathering what is written.
    """

    names: Names
    write: Write
    metadata: Callable[[int, int], Mapping[str, str]]
    optimizer: torch.optim.Optimizer
    keep: Retention = field(default_factory=Retention)
    size: int = 0
    states: States | None = None
    keep_states: bool = False
    last_state: bool = False
    leads: bool = True
    state: State = field(default_factory=State)
    saved: Callable[[Path], None] = tell_nobody
    """Told of every file and state that is whole."""
    whole: list[Path] = field(default_factory=list)
    """What this run has saved and not removed again."""

    def start(self, state: State) -> None:
        self.state = state

    def step_end(self, record: StepRecord) -> None:
        every = self.keep.every_steps
        if not every or record.step % every:
            return
        self._save(self.names.step(record.step), record.step, record.epoch, with_state=self.keep_states)
        self._remove(self.keep.old_step(record.step), self.names.step)
        self._remove(self.keep.old_step(record.step, state=True), lambda step: state_of(self.names.step(step)))

    def epoch_end(self, record: EpochRecord) -> None:
        every = self.keep.every_epochs
        if not every or record.epoch % every or record.last:
            return
        self._save(self.names.epoch(record.epoch), record.step, record.epoch, with_state=self.keep_states)
        self._remove(self.keep.old_epoch(record.epoch), self.names.epoch)
        self._remove(self.keep.old_epoch(record.epoch, state=True), lambda epoch: state_of(self.names.epoch(epoch)))

    def finish(self, state: State) -> None:
        self._save(self.names.last, state.step, state.epoch, with_state=self.keep_states or self.last_state)

    def stopped(self, state: State) -> None:
        if self.states is not None:
            folder = state_of(self.names.step(state.step))
            if folder not in self.whole:
                self._save_state(folder)
            if self.leads:
                log.warning("stopped after step %d; go on with --resume %s", state.step, folder)

    def _save(self, path: Path, step: int, epoch: int, *, with_state: bool) -> None:
        with self._told():
            self._make_sure_of(self.size)
            with evaluating(self.optimizer):
                self.write(path, self.metadata(step, epoch))
        self._note(path)
        if with_state:
            self._save_state(state_of(path))

    def _save_state(self, folder: Path) -> None:
        if self.states is None:
            return
        with self._told():
            self._make_sure_of(self.states.size())
            self.states.write(folder, self.state)
        self._note(folder)

    def _make_sure_of(self, size: int) -> None:
        if self.leads:
            require_space(self.names.folder, size)

    def _note(self, path: Path) -> None:
        self.whole.append(path)
        if self.leads:
            log.info("saved %s", path)
        self.saved(path)

    def _remove(self, number: int | None, path_of: Callable[[int], Path]) -> None:
        if number is None or not self.leads or not (path := path_of(number)).exists():
            return
        remove_state(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.whole = [other for other in self.whole if other != path]
        log.info("removed %s, which the newer ones replace", path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Adds to a failed write what is whole on the disk, and how to go on from it."""
        try:
            yield
        except UserError as fault:
            states = [path for path in self.whole if path.is_dir()]
            safe = f"; whole are {', '.join(p.name for p in self.whole[-3:])}" if self.whole else ""
            go_on = f"; go on with --resume {states[-1]}" if states else ""
            raise UserError(f"{fault}{safe}{go_on}") from fault


def lora_file(adapters: AdapterSet, dtype: torch.dtype | None) -> Write:
    """Writes the adapter; `dtype` None keeps the trained precision (float32)."""
    return lambda path, metadata: save_lora(path, adapters.state_dict(dtype), metadata)


def model_file(
    model: nn.Module,
    header: Header,
    rename: Callable[[str], str | None],
    dtype: torch.dtype | None,
    *,
    leads: bool = True,
) -> Write:
    """Writes all weights under the keys of the checkpoint `header`, in its dtypes or in `dtype`; its own metadata
    (the architecture of unusual models) is kept. Weights in shards are gathered one by one by all processes, of which
    one, which `leads`, writes."""
    keys = {name: key for key in header.tensors if (name := rename(key)) is not None}

    def write(path: Path, metadata: Mapping[str, str]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            key, found = keys[name], whole(tensor)
            kept = header.tensors[key].dtype
            if leads:
                tensors[key] = found.to("cpu", dtype if dtype is not None and kept.is_floating_point else kept)
        if not leads:
            return
        digest = {"sshs_model_hash": data_sha256(tensors)}
        atomic_save_safetensors(path, tensors, {**header.metadata, **metadata, **digest})

    return write


def file_bytes(parameters: Sequence[Tensor], dtype: torch.dtype | None) -> int:
    """Bytes of a file of `parameters`, nearly."""
    width = None if dtype is None else dtype.itemsize
    return sum(p.numel() * (width or p.element_size()) for p in parameters) + (1 << 16)


def output_folder(path: str) -> Path:
    """The folder, made if needed, after a test that it can be written to. Raises UserError."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name, which the run's other processes could remove
            pass
    except OSError as fault:
        raise UserError(f"output_dir = {path}: cannot be written ({fault.strerror}); choose another folder") from fault
    return folder


def output_name(name: str) -> str:
    """The base name, which must be a plain file name. Raises UserError."""
    plain = name.removesuffix(".safetensors")
    if not plain or Path(plain).name != plain or plain == "..":
        raise UserError(f"output_name = {name!r}: use a plain file name; the folder is --output_dir")
    return plain
