"""A family small enough to be followed by hand: one scalar weight, words as numbers, pixels as repeated latents."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from musubi_tuner.config.options import option, parse
from musubi_tuner.families.base import (
    AdapterTargets,
    CacheField,
    FamilySpec,
    Fp8Targets,
    LatentGeometry,
    SamplingDefaults,
)
from musubi_tuner.nn.runner import direct
from musubi_tuner.sampling import generate

SPEC = FamilySpec(
    name="toy",
    cache_tag="toy",
    architecture="toy",
    base_model_version="toy",
    modelspec_architecture="toy",
    modelspec_implementation="toy",
    latents=LatentGeometry(channels=3, spatial=8, temporal=4, patch=(1, 2, 2)),
    adapter=AdapterTargets(("Block",)),
    network_module="networks.lora",
    fp8=Fp8Targets(("blocks",)),
    blocks=("blocks",),
    cache_fields=(CacheField("latents", "latents", "video", "latent"), CacheField("text", "text", "varlen", "text")),
    tasks={"t": SamplingDefaults(steps=4, guidance=3.0, shift=2.0, size=(32, 48), frames=5, fps=8)},
    default_task="t",
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Linear(1, 1, bias=False)

    def forward(self, h: Tensor, ctx: Tensor) -> Tensor:
        return h * self.gain.weight[0, 0] + ctx


class ToyDit(nn.Module):
    """v = tanh(w x + number of the prompt) + t."""

    def __init__(self, gain: float = 0.7) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        nn.init.constant_(self.blocks[0].gain.weight, gain)
        self.seen: list[int] = []
        self.attn_mode = "sdpa"

    def forward(self, x: Tensor, t: Tensor, number: Tensor, run=direct) -> Tensor:
        self.seen.append(len(x))
        shape = (-1, 1, 1, 1, 1)
        return run(self.blocks, x, number.view(shape)).tanh() + t.to(x.dtype).view(shape)


class ToyEncoders:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def to(self, device: torch.device) -> "ToyEncoders":
        return self


class ToyVae:
    """Each latent becomes spatial x spatial pixels of 4 frames (the first latent frame: one)."""

    def to(self, device: torch.device) -> "ToyVae":
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::4, ::8, ::8]

    def decode(self, latents: Tensor) -> Tensor:
        rest = latents[:, :, 1:].repeat_interleave(4, 2)
        return torch.cat([latents[:, :, :1], rest], 2).repeat_interleave(8, 3).repeat_interleave(8, 4)


@dataclass
class ToyFamily:
    spec: FamilySpec = SPEC
    encoders: ToyEncoders = field(default_factory=ToyEncoders)

    def option_groups(self, command):
        return ()

    def load_encoders(self, options, *, device, dtype):
        return self.encoders

    def load_vae(self, path, *, device, dtype, options=None):
        return ToyVae()

    def encode_latents(self, items, vae, encoders=None):
        return [[{"latents": vae.encode(item.pixels[None])[0]}] for item in items]

    def encode_condition(self, items, encoders):
        encoders.asked += [item.caption for item in items]
        return [{"text": torch.tensor([number_of(item.caption)])} for item in items]

    def build_dit(self, header, config=None, options=None):
        with torch.device("meta"):
            return ToyDit()

    def rename_dit_key(self, key):
        return key

    def collate(self, entries):
        return {"text": torch.cat([entry["text"] for entry in entries])}

    def predict(self, dit, x_t, t, cond, *, run=direct):
        return dit(x_t, t, cond["text"], run)


def number_of(caption: str) -> float:
    """What a caption means to this family."""
    return len(caption) / 10


@pytest.fixture
def toy() -> SimpleNamespace:
    """The names of this file, for the tests of this folder."""
    return SimpleNamespace(
        SPEC=SPEC, Dit=ToyDit, Family=ToyFamily, Vae=ToyVae, Encoders=ToyEncoders, number_of=number_of
    )


@dataclass(frozen=True)
class EncoderOptions:
    """Toy encoder"""

    words: str = option("", help="nothing")


@dataclass(frozen=True)
class TaskOptions:
    """Toy model"""

    task: str = option("t", help="task")


@pytest.fixture
def world(tmp_path, toy):
    """Files of a toy model, and a function that runs the command on them."""
    save_file({"blocks.0.gain.weight": torch.full((1, 1), 0.7)}, tmp_path / "dit.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "vae.safetensors")

    class Loaded(toy.Family):
        loaded: tuple[str, ...] = ()

        def option_groups(self, command):
            return (EncoderOptions, TaskOptions)

        def load_encoders(self, options, *, device, dtype):
            assert isinstance(options, EncoderOptions)
            self.loaded += ("encoders",)
            return super().load_encoders(options, device=device, dtype=dtype)

        def load_vae(self, path, *, device, dtype, options=None):
            self.loaded += ("vae",)
            return super().load_vae(path, device=device, dtype=dtype)

    family = Loaded()

    def run(*words, dit=True, vae=True):
        argv = ["--save_path", str(tmp_path / "out"), "--device", "cpu"]
        argv += ["--dit", str(tmp_path / "dit.safetensors")] if dit else []
        argv += ["--vae", str(tmp_path / "vae.safetensors")] if vae else []
        argv += map(str, words)
        groups = (*generate.GROUPS, *family.option_groups("generate"))
        generate.run(family, parse(groups, argv, prog="generate", description=""))
        return sorted((tmp_path / "out").iterdir())

    run.family, run.folder = family, tmp_path
    return run
