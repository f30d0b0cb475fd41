"""Time and memory of the data layer on many small pictures: scan, caching, a second run, the start of an epoch.

    python benchmarks/data.py [--items 10000] [--folder FOLDER]

The model is a stand-in (means of 8 x 8 pixels, code points of captions), so what is timed is ours: listing, headers,
hashing, decoding, scaling, writing, checking, reading. Pictures are 96 x 96 cuts of noise, JPEG, 16 of them distinct in
content and each under its own name. Correctness first: the number of files, one latent against its picture, and every
item once in an epoch; no figure is printed where that fails. Memory is the resident anonymous memory of this process.
"""

import argparse
import dataclasses
import gc
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from musubi_tuner.config.options import parse
from musubi_tuner.data.batches import CachedBatches, open_batches
from musubi_tuner.data.build_cache import LATENT_GROUPS, TEXT_GROUPS, cache_latents, cache_text
from musubi_tuner.families import registry
from musubi_tuner.families.base import Item


class StandIn:
    """The facts of a real family over encoders that cost next to nothing."""

    spec = dataclasses.replace(registry.get("wan").spec, name="stand-in")

    def option_groups(self, _: str) -> tuple[type, ...]:
        return ()

    def load_vae(self, path: str, **_: object) -> None: ...

    def load_encoders(self, *_: object, **__: object) -> "StandIn":
        return self

    def encode_latents(self, items: Sequence[Item], *_: object) -> list[list[dict[str, Tensor]]]:
        means = F.avg_pool2d(torch.stack([item.pixels[:, 0] for item in items]), 8)
        latents = means.mean(1, keepdim=True).expand(-1, 16, -1, -1)[:, :, None].to(torch.bfloat16)
        return [[{"latents": latent.contiguous()}] for latent in latents]

    def encode_condition(self, items: Sequence[Item], _: object) -> list[dict[str, Tensor]]:
        return [{"text": torch.tensor([[float(ord(c))] * 64 for c in item.caption])} for item in items]

    def collate(self, entries: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        return {"text": [entry["text"] for entry in entries]}


@dataclass
class Watch:
    """Time of a phase and its memory, sampled 20 times a second; growth is the last quarter's over the first's."""

    samples: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def line(self, name: str, items: int) -> str:
        megabytes = [value / 2**20 for value in self.samples]
        quarter = max(len(megabytes) // 4, 1)
        early, late = max(megabytes[:quarter]), max(megabytes[-quarter:])
        rate = f"{items / self.seconds:>8.0f}" if items else " " * 8
        return f"| {name:<34} | {self.seconds:>8.2f} | {rate} | {max(megabytes):>6.0f} | {late - early:>+6.0f} |"


def resident() -> int:
    """Anonymous resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark runs on Linux")


@contextmanager
def watched() -> Iterator[Watch]:
    gc.collect()
    watch, done = Watch([resident()]), Event()

    def sample() -> None:
        while not done.wait(0.05):
            watch.samples.append(resident())

    thread = Thread(target=sample, daemon=True)
    thread.start()
    start = time.perf_counter()
    try:
        yield watch
    finally:
        watch.seconds = time.perf_counter() - start
        done.set()
        thread.join()
        watch.samples.append(resident())


def write_pictures(folder: Path, items: int) -> None:
    """`items` JPEG files of 96 x 96 pixels with captions, of 16 different contents."""
    folder.mkdir(parents=True)
    contents = []
    for seed in range(16):
        smooth = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        stream = BytesIO()
        Image.fromarray(smooth).resize((96, 96), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    for i in range(items):
        (folder / f"{i:06}.jpg").write_bytes(contents[i % 16])
        (folder / f"{i:06}.txt").write_text(f"picture {i}")


def run(command: Callable[..., None], groups: tuple[type, ...], family: StandIn, words: Sequence[str]) -> Watch:
    with watched() as watch:
        command(family, parse(groups, list(words), prog="benchmark", description=""))
    return watch


def check(source: CachedBatches, folder: Path, items: int) -> None:
    """Raises RuntimeError where what was made is not what it should be."""
    files = sum(1 for path in (folder / "c").iterdir() if path.suffix == ".safetensors")
    seen = sorted(item for batch in source.epoch(1) for item in batch.items)
    first = next(iter(source.epoch(0)))
    number = first.items[0]
    with Image.open(folder / "p" / f"{number:06}.jpg") as image:
        pixels = np.asarray(image).astype(np.float64) / 127.5 - 1
    expected = pixels.reshape(8, 12, 8, 12, 3).mean(axis=(1, 3, 4))
    error = np.abs(first.latents[0, 0, 0].numpy() - expected).max()
    if files != 2 * items or seen != list(range(items)) or error > 0.02:
        raise RuntimeError(
            f"{files} files for {items} items, {len(seen)} items in an epoch, latents off by {error:.3f}"
        )


def measure(folder: Path, items: int) -> list[str]:
    family = StandIn()
    config = folder / "data.toml"
    config.write_text(
        f'[[datasets]]\nimage_directory = "{folder}/p"\ncache_directory = "{folder}/c"\n'
        "resolution = 64\nenable_bucket = true\nbatch_size = 8\n"
    )
    (folder / "vae").write_bytes(b"weights")
    words = ["--dataset_config", str(config), "--device", "cpu"]
    latent_words = [*words, "--vae", str(folder / "vae")]
    lines = []
    for name, command, groups, given in (
        ("cache latents", cache_latents, LATENT_GROUPS, latent_words),
        ("cache text", cache_text, TEXT_GROUPS, words),
        ("cache latents again, all fresh", cache_latents, LATENT_GROUPS, latent_words),
        ("cache text again, all fresh", cache_text, TEXT_GROUPS, words),
    ):
        lines.append(run(command, groups, family, given).line(name, items))
    with watched() as watch:
        source = open_batches(config, family, seed=0, workers=2)
    lines.append(watch.line("open for training, checks included", items))
    with watched() as watch:
        next(iter(source.epoch(0)))
    lines.append(watch.line("start of an epoch to first batch", 0))
    with watched() as watch:
        for _ in source.epoch(1):
            pass
    lines.append(watch.line("read a whole epoch", items))
    check(source, folder, items)
    return lines


def machine() -> str:
    """The machine line that every figure needs."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    load = Path("/proc/loadavg").read_text().split()[0]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{model}, {cores} cores, load {load} at the end; Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--items", type=int, default=10_000)
    options.add_argument(
        "--folder", type=Path, help="where the pictures and caches go; a temporary folder if not given"
    )
    chosen = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        write_pictures(folder / "p", chosen.items)
        lines = measure(folder, chosen.items)
    print(f"{chosen.items} pictures of 96 x 96 to 64 x 64, batch 8, stand-in model, correct")
    print(machine())
    print(f"| {'phase':<34} | {'seconds':>8} | {'items/s':>8} | MB max | growth |")
    print("|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
