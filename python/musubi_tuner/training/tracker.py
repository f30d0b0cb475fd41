"""What a run shows of itself: the progress bar and the trackers, all observers.

The names `loss/current`, `loss/average`, `loss/epoch`, `lr/...` and the bar's `avr_loss` are frozen: users' plots and
wrappers read them. The folder of a run is `logging_dir / <log_prefix><date> / <log_tracker_name>`. A `Tracker` sends
the same numbers to every board that was asked for; a board is where they go (TensorBoard, Weights & Biases).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.config.toml_file import read_entries
from musubi_tuner.training.config import LogOptions
from musubi_tuner.training.events import EpochRecord, Quiet, State, StepRecord

DEFAULT_NAME = "network_train"


class Show(Protocol):
    """Where previews are shown: `show(tag, pixels, step, fps)`, pixels `[3, F, H, W]` float in [0, 1] on the CPU."""

    def __call__(self, tag: str, pixels: Tensor, step: int, fps: float, /) -> None: ...


def show_nowhere(_tag: str, _pixels: Tensor, _step: int, _fps: float) -> None:
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

    def stopped(self, state: State) -> None:
        self.finish(state)


class Board(Protocol):
    """Where numbers and pictures go."""

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...
    def epoch(self, loss: float, epoch: int, step: int) -> None: ...
    def picture(self, tag: str, frame: Tensor, step: int) -> None:
        """frame: [H, W, 3] uint8."""
        ...

    def clip(self, tag: str, frames: Tensor, step: int, fps: float) -> None:
        """frames: [F, H, W, 3] uint8."""
        ...

    def config(self, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """An event file in `folder`. arguments: of torch's SummaryWriter."""

    def __init__(self, folder: Path, arguments: Mapping[str, Any] | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as fault:
            raise UserError("logging_dir needs TensorBoard: `pip install tensorboard`, or leave it out") from fault
        self.folder = folder
        try:
            self._writer = SummaryWriter(str(folder), **(arguments or {}))
        except TypeError as fault:
            raise UserError(
                f"log_tracker_config: TensorBoard's writer refuses {dict(arguments or {})}: {fault}"
            ) from fault

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def epoch(self, loss: float, epoch: int, _step: int) -> None:
        self._writer.add_scalar("loss/epoch", loss, epoch)

    def picture(self, tag: str, frame: Tensor, step: int) -> None:
        self._writer.add_image(tag, frame, step, dataformats="HWC")

    def clip(self, tag: str, frames: Tensor, step: int, fps: float) -> None:
        """As a picture that moves: torch's own `add_video` needs a library for the same."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        _, height, width, _ = frames.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif(frames, fps))
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def config(self, values: Mapping[str, Any]) -> None:
        """The option values as a table."""
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in sorted(values.items()))
        self._writer.add_text("options", f"| option | value |\n|---|---|\n{rows}")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb. arguments: of `wandb.init`. key: used for this run alone, stored and shown nowhere."""

    def __init__(self, folder: Path | None, project: str, arguments: Mapping[str, Any], key: str | None) -> None:
        try:
            import wandb
        except ImportError as fault:
            raise UserError(
                "log_with = wandb needs Weights & Biases: `pip install wandb`, or use --log_with tensorboard"
            ) from fault
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        # The record of the command line would hold a key that was given there, and the repository is not ours to tell.
        settings = wandb.Settings(api_key=key, x_disable_meta=True, disable_git=True, save_code=False)
        given = {"project": project, "dir": None if folder is None else str(folder), **arguments}
        try:
            self._run = wandb.init(settings=settings, **given)
        except (TypeError, wandb.errors.Error) as fault:
            told = str(fault) if key is None else str(fault).replace(key, "***")
            raise UserError(
                f"Weights & Biases does not start: {told}; WANDB_MODE=offline keeps the run local"
            ) from None
        self._image, self._video = wandb.Image, wandb.Video
        self._run.define_metric("loss/epoch", step_metric="epoch")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def epoch(self, loss: float, epoch: int, step: int) -> None:
        self._run.log({"loss/epoch": loss, "epoch": epoch}, step=step)

    def picture(self, tag: str, frame: Tensor, step: int) -> None:
        self._run.log({tag: self._image(frame.numpy())}, step=step)

    def clip(self, tag: str, frames: Tensor, step: int, fps: float) -> None:
        self._run.log({tag: self._video(io.BytesIO(gif(frames, fps)), format="gif")}, step=step)

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update({key: list(v) if isinstance(v, tuple) else v for key, v in values.items()})

    def close(self) -> None:
        self._run.finish()


class Tracker(Quiet):
    """Scalars of every step and epoch, previews as images, on every board. extra: more numbers of the step."""

    def __init__(self, boards: Sequence[Board], extra: Callable[[], Mapping[str, float]] | None = None) -> None:
        self.boards, self._extra = tuple(boards), extra

    def step_end(self, record: StepRecord) -> None:
        values = {"loss/current": record.loss, "loss/average": record.average, "grad_norm": record.grad_norm}
        values |= {f"lr/{name}": rate for name, rate in record.rates.items()}
        values |= {"time/seconds_per_step": record.seconds, **(self._extra() if self._extra else {})}
        for board in self.boards:
            board.numbers(values, record.step)

    def epoch_end(self, record: EpochRecord) -> None:
        for board in self.boards:
            board.epoch(record.loss, record.epoch, record.step)

    def finish(self, _state: State) -> None:
        for board in self.boards:
            board.close()

    def stopped(self, state: State) -> None:
        self.finish(state)

    def show(self, tag: str, pixels: Tensor, step: int, fps: float) -> None:
        """An image, or a clip that moves."""
        frames = pixels.clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).contiguous()  # [F, H, W, 3]
        for board in self.boards:
            if len(frames) == 1:
                board.picture(tag, frames[0], step)
            else:
                board.clip(tag, frames, step, fps)


def gif(frames: Tensor, fps: float) -> bytes:
    """frames: [F, H, W, 3] uint8, as a picture file that moves and begins anew."""
    first, *rest = (Image.fromarray(frame.numpy()) for frame in frames)
    file = io.BytesIO()
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return file.getvalue()


def run_folder(logging_dir: str, prefix: str | None, name: str | None, now: time.struct_time | None = None) -> Path:
    """The log folder of a run that starts now."""
    date = time.strftime("%Y%m%d%H%M%S", now or time.localtime())
    return Path(logging_dir).expanduser() / f"{prefix or ''}{date}" / (name or DEFAULT_NAME)


def tracker_config(path: str | None) -> dict[str, dict[str, Any]]:
    """`[tensorboard]` and `[wandb]` of a `--log_tracker_config` file: arguments of their writers. Raises UserError."""
    found: dict[str, dict[str, Any]] = {"tensorboard": {}, "wandb": {}}
    if path is None:
        return found
    for entry in read_entries(Path(path)):
        if entry.section not in found:
            where = f"{path} line {entry.line}: {entry.key}"
            raise UserError(f"{where} stands in section [{entry.section}]: use [tensorboard] and [wandb]")
        found[entry.section][entry.key] = entry.value
    return found


def open_tracker(options: Resolved, extra: Callable[[], Mapping[str, float]] | None = None) -> Tracker | None:
    """The tracker that the options ask for, in the folder of a run that starts now."""
    chosen = options[LogOptions]
    kinds = chosen.boards
    if not kinds:
        return None
    arguments = tracker_config(chosen.log_tracker_config)
    folder = None
    if chosen.logging_dir is not None:
        folder = run_folder(chosen.logging_dir, chosen.log_prefix, chosen.log_tracker_name)
    boards: list[Board] = []
    if "tensorboard" in kinds and folder is not None:
        boards.append(TensorBoard(folder, arguments["tensorboard"]))
    if "wandb" in kinds:
        named = {"name": chosen.wandb_run_name} if chosen.wandb_run_name else {}
        project = chosen.log_tracker_name or DEFAULT_NAME
        boards.append(WeightsAndBiases(folder, project, {**arguments["wandb"], **named}, chosen.wandb_api_key))
    if chosen.log_config:
        for board in boards:
            board.config(options.as_dict())
    return Tracker(boards, extra)
