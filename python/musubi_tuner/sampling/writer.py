"""The files of a generate command: named by time and seed, written as the output type asks."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Family
from musubi_tuner.sampling import outputs
from musubi_tuner.sampling.options import ModelOptions, OutputOptions
from musubi_tuner.sampling.request import Request
from musubi_tuner.weights.reader import open_checkpoint

log = logging.getLogger(__name__)


@dataclass
class Writer:
    """Names and writes the files of a run: `<date>-<time>_<seed>` with `.mp4`, `.png`, `_latent.safetensors`, or a
    folder of frames."""

    family: str
    folder: Path
    chosen: OutputOptions
    stamp: str
    taken: set[str]

    @staticmethod
    def checked(family: Family, options: Resolved) -> "Writer":
        """The writer of a command; raises UserError where the folder or the VAE cannot serve."""
        chosen, models = options[OutputOptions], options[ModelOptions]
        folder = Path(chosen.save_path)
        writer = Writer(family.spec.name, folder, chosen, time.strftime("%Y%m%d-%H%M%S"), set())
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--save_path {folder} is a file: give the folder that samples go to")
        if folder.suffix.lower() in (".mp4", ".png", ".safetensors", ".webp", ".jpg"):
            raise UserError(f"--save_path {folder} looks like a file: give a folder, files are named by time and seed")
        if writer.wants_pixels:
            if models.vae is None:
                raise UserError("--vae is required to decode samples; without one, use --output_type latent")
            with open_checkpoint(models.vae):
                pass
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(f"--save_path {folder} cannot be made: {fault.strerror}") from fault
        return writer

    @property
    def wants_pixels(self) -> bool:
        return self.chosen.output_type != "latent"

    def stem(self, request: Request) -> str:
        """A name for the files of a request that no file has."""
        found = outputs.free_stem(self.folder, f"{self.stamp}_{request.seed}", self.taken)
        self.taken.add(found)
        return found

    def latents(self, request: Request, stem: str, latents: Tensor) -> None:
        """Write latents, where they are asked for."""
        if self.chosen.output_type in ("latent", "both", "latent_images"):
            path = self.folder / f"{stem}_latent.safetensors"
            outputs.write_latents(path, latents, request, self.family, metadata=not self.chosen.no_metadata)
            log.info("wrote %s", path)

    def pixels(self, request: Request, stem: str, frames: Tensor) -> None:
        """Write `frames: [F, H, W, 3]` as the output type asks."""
        frames = frames[: len(frames) - min(self.chosen.trim_tail_frames, len(frames) - 1)]
        text = None if self.chosen.no_metadata else outputs.describe(request)
        for path in self._written(stem, frames, request.fps, text):
            log.info("wrote %s", path)

    def _written(self, stem: str, frames: Tensor, fps: int, text: dict[str, str] | None) -> Iterator[Path]:
        path = self.folder / stem
        if len(frames) == 1:
            outputs.write_png(path.with_name(f"{stem}.png"), frames[0], text)
            yield path.with_name(f"{stem}.png")
        elif self.chosen.output_type in ("images", "latent_images"):
            outputs.write_frames(path, frames, text)
            yield path
        else:
            outputs.write_video(path.with_name(f"{stem}.mp4"), frames, fps, text)
            yield path.with_name(f"{stem}.mp4")
