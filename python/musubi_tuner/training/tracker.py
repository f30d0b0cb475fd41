"""What a run shows of itself: the progress bar and TensorBoard, both observers.

The names `loss/current`, `loss/average`, `loss/epoch`, `lr/...` and the bar's `avr_loss` are frozen: users' plots and
wrappers read them. The folder of a run is `logging_dir / <log_prefix><date> / <log_tracker_name>`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.training.config import LogOptions
from musubi_tuner.training.events import EpochRecord, Quiet, State, StepRecord

STRIP_FRAMES = 8
"""Frames of a clip that are shown side by side."""


class Show(Protocol):
    """Where previews are shown: `show(tag, pixels, step)`, pixels `[3, F, H, W]` float in [0, 1] on the CPU."""

    def __call__(self, tag: str, pixels: Tensor, step: int, /) -> None: ...


def show_nowhere(_tag: str, _pixels: Tensor, _step: int) -> None:
    """For runs without a tracker."""


class ProgressBar(Quiet):
    """One tqdm bar over all optimiser steps, with the average loss."""

    def __init__(self, total: int, *, disable: bool = False) -> None:
        self._bar: Any = None
        self._total, self._disable = total, disable

    def start(self, state: State) -> None:
        self._bar = tqdm(total=self._total, initial=state.step, desc="steps", smoothing=0.05, disable=self._disable)

    def step_end(self, record: StepRecord) -> None:
        self._bar.set_postfix(avr_loss=f"{record.average:.4g}", refresh=False)
        self._bar.update(1)

    def finish(self, _state: State) -> None:
        self._bar.close()


class TensorBoard(Quiet):
    """Scalars of every step and epoch, previews as images, in one event file."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as fault:
            raise UserError("logging_dir needs TensorBoard: `pip install tensorboard`, or leave it out") from fault
        self.folder = folder
        self._writer = SummaryWriter(str(folder))

    def step_end(self, record: StepRecord) -> None:
        scalars = {"loss/current": record.loss, "loss/average": record.average, "grad_norm": record.grad_norm}
        scalars |= {f"lr/{name}": rate for name, rate in record.rates.items()}
        scalars["time/seconds_per_step"] = record.seconds
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, record.step)

    def epoch_end(self, record: EpochRecord) -> None:
        self._writer.add_scalar("loss/epoch", record.loss, record.epoch)

    def finish(self, _state: State) -> None:
        self._writer.close()

    def show(self, tag: str, pixels: Tensor, step: int) -> None:
        """An image, or a clip's frames side by side."""
        frames = pixels[:, :: max(1, -(-pixels.shape[1] // STRIP_FRAMES))]
        strip = frames.permute(0, 2, 1, 3).flatten(2)  # [3, H, F*W]
        self._writer.add_image(tag, strip.clamp(0, 1), step)

    def config(self, values: Mapping[str, Any]) -> None:
        """The option values as a table."""
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in sorted(values.items()))
        self._writer.add_text("options", f"| option | value |\n|---|---|\n{rows}")


def run_folder(logging_dir: str, prefix: str | None, name: str | None, now: time.struct_time | None = None) -> Path:
    """The log folder of a run that starts now."""
    date = time.strftime("%Y%m%d%H%M%S", now or time.localtime())
    return Path(logging_dir).expanduser() / f"{prefix or ''}{date}" / (name or "network_train")


def open_tracker(options: Resolved) -> TensorBoard | None:
    """The tracker that the options ask for, in the folder of a run that starts now."""
    chosen = options[LogOptions]
    if chosen.logging_dir is None:
        return None
    board = TensorBoard(run_folder(chosen.logging_dir, chosen.log_prefix, chosen.log_tracker_name))
    if chosen.log_config:
        board.config(options.as_dict())
    return board
