"""A tiny transformer with ready caches on disk, and whole runs on it, for tests that train from options."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from musubi_tuner.config.options import Resolved, parse
from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.training import run
from musubi_tuner.training.events import Quiet, StepRecord
from musubi_tuner.weights.write import atomic_save_safetensors
from tiny_models import TINY, tiny_dit

FAMILY = registry.get("wan")


def make_place(root: Path) -> Path:
    """dit.safetensors, data.toml and the caches of five items of two shapes in `root`, as other tools name them."""
    state = {key: value.contiguous() for key, value in tiny_dit("wan").state_dict().items()}
    atomic_save_safetensors(root / "dit.safetensors", state, {"musubi.config": json.dumps(TINY["wan"].sizes)})
    cache = root / "cache"
    cache.mkdir()
    for i in range(5):
        width = 48 if i < 3 else 64
        latents = keyed.normal((16, 1, 4, width // 8), "run", i)
        _write_cache(cache / f"p{i}_{width:04d}x0032_wan.safetensors", {f"latents_1x4x{width // 8}_float32": latents})
        text = keyed.normal((2 + i % 3, 24), "text", i)
        _write_cache(cache / f"p{i}_wan_te.safetensors", {"varlen_t5_float32": text})
    (root / "data.toml").write_text(
        "[general]\nresolution = [48, 32]\nbatch_size = 2\nenable_bucket = true\n"
        f'[[datasets]]\nimage_directory = "{root}/gone"\ncache_directory = "{cache}"\n'
    )
    return root


def _write_cache(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    atomic_save_safetensors(path, tensors, {"architecture": "wan", "format_version": "1.0.1", "width": "48"})


def words_of(place: Path, out: Path, *words: str) -> list[str]:
    """A command line of training: a LoRA by AdamW in float32, seed 3; later words win."""
    given = ["--dit", str(place / "dit.safetensors"), "--dataset_config", str(place / "data.toml")]
    given += ["--output_dir", str(out), "--output_name", "study", "--seed", "3", "--mixed_precision", "no"]
    return [*given, "--max_data_loader_n_workers", "0", "--learning_rate", "1e-2", *words]


def options_of(place: Path, out: Path, *words: str) -> Resolved:
    groups = (*run.GROUPS, *FAMILY.option_groups("train"))
    return parse(groups, words_of(place, out, *words), prog="train", description="")


class Losses(Quiet):
    """Stands for the progress bar: writes `step epoch loss average` of every step to a file, whole lines only."""

    path = Path()

    def __init__(self, *_: object) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step_end(self, record: StepRecord) -> None:
        line = f"{record.step} {record.epoch} {record.loss!r} {record.average!r}\n"
        os.write(self._file, line.encode())


def train_noting_losses(place: Path, out: Path, *words: str) -> dict[int, str]:
    """Run training; the rest of the line of `Losses` by step, of this and earlier runs into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    Losses.path = out / "losses.txt"
    before, run.ProgressBar = run.ProgressBar, Losses
    try:
        run.run(FAMILY, options_of(place, out, *words))
    finally:
        run.ProgressBar = before
    return losses_in(out)


def losses_in(out: Path) -> dict[int, str]:
    """Losses by step; a step that was made twice must have given the same ones."""
    found: dict[int, str] = {}
    for line in (out / "losses.txt").read_text().splitlines():
        step, rest = line.split(" ", 1)
        assert found.setdefault(int(step), rest) == rest, f"step {step} was {found[int(step)]}, then {rest}"
    return found


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)
