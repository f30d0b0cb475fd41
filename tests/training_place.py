"""A tiny transformer with ready caches on disk, and whole runs on it, for tests that train from options."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from musubi_tuner.config.options import Resolved, parse
from musubi_tuner.data.cache_keys import latent_name, text_name, to_keys
from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.training import run
from musubi_tuner.training.events import Quiet, StepRecord
from musubi_tuner.weights.write import atomic_save_safetensors
from tiny_models import TINY, tiny_dit

FAMILY = registry.get("wan")


def make_place(root: Path, name: str = "wan", **sizes: object) -> Path:
    """dit.safetensors, data.toml and the caches of five items of one or two shapes in `root`, as other tools name them.

    name: the family. sizes: of its tiny transformer, where they differ from the usual ones.
    """
    spec = registry.get(name).spec
    state = {key: value.contiguous() for key, value in tiny_dit(name, **sizes).state_dict().items()}
    metadata = {"musubi.config": json.dumps(TINY[name].sizes | sizes)}
    atomic_save_safetensors(root / "dit.safetensors", state, metadata)
    cache = root / "cache"
    cache.mkdir()
    texts = {field.name for field in spec.cache_fields if field.file == "text"}
    for i in range(5):
        entry = TINY[name].entry(2 + i % 3)
        text, seen = ({k: v for k, v in entry.items() if (k in texts) is is_text} for is_text in (True, False))
        width = 48 if i < 3 or seen else 64  # what a family sees beside the text has the size of 48 pixels
        frames = TINY[name].latents[1] if seen else 1
        latents = keyed.normal((16, frames, 4, width // 8), "run", i)
        for part, file, entry in (
            ("latent", latent_name(f"p{i}", (width, 32), spec.cache_tag), {"latents": latents, **seen}),
            ("text", text_name(f"p{i}", spec.cache_tag), text),
        ):
            tensors = to_keys(entry, spec.cache_fields, part)
            told = {"architecture": spec.architecture, "format_version": "1.0.1", "width": "48"}
            atomic_save_safetensors(cache / file, tensors, told)
    (root / "data.toml").write_text(
        "[general]\nresolution = [48, 32]\nbatch_size = 2\nenable_bucket = true\n"
        f'[[datasets]]\nimage_directory = "{root}/gone"\ncache_directory = "{cache}"\n'
    )
    return root


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
