"""A family small enough to follow by hand, and folders of pictures to feed it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from musubi_tuner.data.spec_keys import SPECIAL
from musubi_tuner.families.base import (
    AdapterTargets,
    CacheField,
    FamilySpec,
    Fp8Targets,
    Item,
    LatentGeometry,
    SamplingDefaults,
)

SPEC = FamilySpec(
    name="toy",
    cache_tag="toy",
    architecture="toy",
    base_model_version="toy",
    modelspec_architecture="toy/lora",
    modelspec_implementation="none",
    latents=LatentGeometry(channels=3, spatial=8, temporal=4, patch=(1, 2, 2)),
    adapter=AdapterTargets(("Block",)),
    network_module="networks.lora",
    fp8=Fp8Targets(("blocks",)),
    blocks=("blocks",),
    cache_fields=(
        CacheField("latents", "latents", "video", "latent"),
        CacheField("text", "emb", "varlen", "text"),
    ),
    tasks={"t2v": SamplingDefaults(4, 1.0)},
    default_task="t2v",
    target_fps=16.0,
)


class ToyVae:
    """Latents are the mean of each 8 x 8 block, and of each group of frames after the first."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.batches: list[tuple[int, ...]] = []

    def to(self, device: torch.device) -> "ToyVae":
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        self.batches.append(tuple(pixels.shape))
        first, rest = pixels[:, :, :1], pixels[:, :, 1:]
        frames = [first] + [chunk.mean(2, keepdim=True) for chunk in rest.split(4, dim=2) if chunk.numel()]
        return F.avg_pool3d(torch.cat(frames, 2), (1, 8, 8)).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass
class ToyEncoders:
    """A caption's features are its code points."""

    calls: int = 0

    def to(self, device: torch.device) -> "ToyEncoders":
        return self


class ToyFamily:
    """Encodes as `ToyVae` and `ToyEncoders` say; the calls that data never makes are absent on purpose."""

    spec = SPEC

    def __init__(self) -> None:
        self.vae = ToyVae()
        self.encoders = ToyEncoders()

    def option_groups(self, command: str) -> tuple[type, ...]:
        return ()

    def load_vae(self, path: str, *, device: torch.device, dtype: torch.dtype, options=None) -> ToyVae:
        self.vae.dtype = dtype
        return self.vae

    def load_encoders(self, options, *, device, dtype):
        return self.encoders

    def encode_latents(self, items: Sequence[Item], vae: ToyVae, encoders=None) -> list[list[dict[str, Tensor]]]:
        latents = vae.encode(torch.stack([item.pixels for item in items]))
        return [[{"latents": latent}] for latent in latents]

    def encode_condition(self, items: Sequence[Item], encoders: ToyEncoders) -> list[dict[str, Tensor]]:
        encoders.calls += 1
        return [{"text": torch.tensor([[float(ord(c))] for c in item.caption] or [[0.0]])} for item in items]

    def collate(self, entries: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        assert all("latents" in entry for entry in entries)
        return {"text": [entry["text"] for entry in entries]}

    def build_dit(self, header, config=None, options=None):
        raise NotImplementedError

    def rename_dit_key(self, key: str):
        raise NotImplementedError

    def predict(self, dit, x_t, t, cond, *, run=None):
        raise NotImplementedError


class ToyEdit(ToyFamily):
    """A toy whose items may have any number of controls, cached beside the target."""

    spec = dataclasses.replace(
        SPEC,
        cache_fields=(*SPEC.cache_fields, CacheField("control", "latents_control", "video", "latent", False, True)),
    )

    def encode_latents(self, items, vae, encoders=None):
        entries = super().encode_latents(items, vae, encoders)
        for [entry], item in zip(entries, items, strict=True):
            for number, control in enumerate(item.controls):
                entry[f"control_{number}"] = vae.encode(control[None])[0]
        return entries

    def collate(self, entries):
        controls = [[entry[name] for name in sorted(entry) if name.startswith("control_")] for entry in entries]
        return {**super().collate(entries), "controls": controls}


class ToySections(ToyFamily):
    """Reads every special key, and controls with masks, which end in no cache field of their own."""

    spec = dataclasses.replace(SPEC, dataset_keys=SPECIAL, reads_controls=True, control_masks=True)

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Item] = []

    def encode_latents(self, items, vae, encoders=None):
        self.items += items
        return super().encode_latents(items, vae, encoders)


@pytest.fixture
def family() -> ToyFamily:
    return ToyFamily()


@pytest.fixture
def edit_family() -> ToyEdit:
    return ToyEdit()


@pytest.fixture
def sectioned_family() -> ToySections:
    return ToySections()


def picture(path: Path, size: tuple[int, int] = (64, 64), colour: int = 0, caption: str | None = "a picture") -> Path:
    """Write a noise picture that depends on `colour`, with its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(colour)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def make_picture():
    return picture


@pytest.fixture(scope="module")
def module_picture():
    return picture
