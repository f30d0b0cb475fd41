"""The lesson that the demo teaches: twelve rainbow pictures of six digits, as files that any user could have made.

Scans that pre-training never saw are painted and written as PNG with a caption beside each, and a dataset file names
their folder. Whatever is already there with the same bytes is left alone, so a second run finds its caches fresh.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.tools.demo import pictures, world

PER_DIGIT = 2
BATCH = 8
REPEATS = 2  # 24 items make three full batches


@dataclass(frozen=True)
class Lesson:
    """Where the demo's data lies."""

    folder: Path
    """Pictures and captions."""
    dataset: Path
    cache: Path

    @property
    def count(self) -> int:
        return PER_DIGIT * len(world.TAUGHT)


def prepare(output: Path) -> Lesson:
    """Write pictures, captions and the dataset file below `output`."""
    lesson = Lesson(output / "pictures", output / "dataset.toml", output / "cache")
    lesson.folder.mkdir(parents=True, exist_ok=True)
    glyphs = world.load_glyphs(held_out=True)
    for digit in world.TAUGHT:
        for number, mask in enumerate(glyphs.of((digit,)).masks[:PER_DIGIT], start=1):
            name = f"{world.NAMES[digit]}_{number}"
            _write_picture(lesson.folder / f"{name}.png", mask)
            _write_text(lesson.folder / f"{name}.txt", world.caption(digit, world.CONCEPT) + "\n")
    _write_text(lesson.dataset, dataset_text(lesson))
    return lesson


def dataset_text(lesson: Lesson) -> str:
    """The dataset file, as a user would write it."""
    return f"""# The demo's dataset: a folder of pictures, each with a caption in a text file of the same name.
[general]
resolution = [{world.SIZE}, {world.SIZE}]
caption_extension = ".txt"
batch_size = {BATCH}
enable_bucket = true

[[datasets]]
image_directory = "{lesson.folder.resolve().as_posix()}"
cache_directory = "{lesson.cache.resolve().as_posix()}"
num_repeats = {REPEATS}
"""


def _write_picture(path: Path, mask: torch.Tensor) -> None:
    pixels = world.paint(mask, world.rainbow())
    if path.exists() and torch.equal(pictures.from_image(path), _rounded(pixels)):
        return
    pictures.to_image(pixels).save(path)


def _rounded(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _write_text(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
