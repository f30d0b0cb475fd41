"""The examination of a taught LoRA: the base in FP8, the LoRA's modules in its slots, switched on and off.

Everything is asked twice under the same keys: flow loss on scans that nothing was trained on, and pictures from the
same seeds. One model serves both sides, so what differs is the LoRA alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.adapters.attach import AdapterSet, attach_tensors
from musubi_tuner.adapters.files import load_lora
from musubi_tuner.families.base import Encoders, Item, Vae
from musubi_tuner.sampling.models import encode
from musubi_tuner.sampling.pipeline import Sampler, decode
from musubi_tuner.sampling.request import Request
from musubi_tuner.tools.demo import judge, measure, world
from musubi_tuner.tools.demo.base import CPU, Base
from musubi_tuner.tools.demo.measure import Gate, Verdict

GUIDANCE = 3.0
STEPS = 20
SHIFT = 2.0
SOLVER = "unipc"
SEEDS = (1, 2, 3)
PER_SEED = 36
LOSS_SCANS = 60
BATCH = 36
CLIP_PROMPT = world.caption(4, world.CONCEPT, "left")
CLIP_SEED = 11


@dataclass(frozen=True)
class Pictures:
    """Samples `[N, 3, 64, 64]` in [-1, 1] of the same requests, without and with the LoRA, and what was asked for."""

    base: Tensor
    lora: Tensor
    digits: Tensor


@dataclass(frozen=True)
class Findings:
    """What the examination found."""

    verdict: Verdict
    rainbows: tuple[Pictures, ...]
    """One for each of `SEEDS`, of held-out digits."""
    ordinary: Pictures
    clip: Tensor
    """Frames of a moving rainbow digit that was not taught, with the LoRA, `[F, 3, 64, 64]`."""
    targets: int
    parameters: int
    shape: tuple[int, int]
    """Output and input features of the first adapted layer."""


class Examiner:
    """Holds the loaded models; `examine` asks everything."""

    def __init__(self, base: Base, lora: Path) -> None:
        tensors, _ = load_lora(lora)
        self.base, self.family = base, base.family
        self.vae: Vae = base.load_vae()
        self.encoders: Encoders = base.load_encoders()
        self.dit = base.load_dit(fp8=True)
        self.adapters: AdapterSet = attach_tensors(self.dit, tensors)
        self.judge = judge.load_judge(base.judge)

    def examine(self) -> Findings:
        rainbows = tuple(self.sample(rainbow_requests(seed)) for seed in SEEDS)
        ordinary = self.sample(ordinary_requests())
        gates = (self._loss_gate(), *self._distance_gates(rainbows))
        first = self.adapters.modules[0]
        return Findings(
            Verdict(gates, self._reported(rainbows, ordinary), self._notes()),
            rainbows,
            ordinary,
            self.clip(CLIP_PROMPT, CLIP_SEED),
            targets=len(self.adapters.paths),
            parameters=sum(p.numel() for p in self.adapters.parameters()),
            shape=(first.out_features, first.in_features),
        )

    def sample(self, requests: Sequence[Request]) -> Pictures:
        """Pictures of the requests, without and with the LoRA."""
        digits = torch.tensor([_digit(request.prompt) for request in requests])
        return Pictures(self._render(requests, lora=False), self._render(requests, lora=True), digits)

    def _mode(self, lora: bool) -> AbstractContextManager[None]:
        return nullcontext() if lora else self.adapters.disabled()

    def _render(self, requests: Sequence[Request], *, lora: bool) -> Tensor:
        """The first frame of each request, `[N, 3, H, W]`."""
        prompts = encode(self.family, self.encoders, requests, progress=False)
        sampler = Sampler(self.family, self.dit, CPU, joint=True)
        with self._mode(lora):
            latents = [z for _, z in sampler.latents(requests, prompts, batch=BATCH, progress=False)]
        return decode(self.vae, torch.stack(latents), CPU)[:, :, 0]

    def clip(self, prompt: str, seed: int) -> Tensor:
        """Frames `[F, 3, H, W]` of a clip with the LoRA."""
        asked = [request(prompt, seed, world.FRAMES)]
        prompts = encode(self.family, self.encoders, asked, progress=False)
        sampler = Sampler(self.family, self.dit, CPU, joint=True)
        latents = [z for _, z in sampler.latents(asked, prompts, progress=False)]
        return decode(self.vae, torch.stack(latents), CPU)[0].transpose(0, 1)

    def loss(self, pixels: Tensor, captions: Sequence[str], *, lora: bool) -> float:
        """Flow loss on still pictures `[N, 3, H, W]`, the model being told `captions`."""
        with torch.no_grad():
            latents = torch.cat([self.vae.encode(part.unsqueeze(2)).float() for part in pixels.split(20)])
        items = {caption: Item(caption, height=world.SIZE, width=world.SIZE) for caption in captions}
        entries = dict(zip(items, self.family.encode_condition(tuple(items.values()), self.encoders), strict=True))

        def predict(x_t: Tensor, t: Tensor, indices: Tensor) -> Tensor:
            cond = self.family.collate([entries[captions[int(i)]] for i in indices])
            return self.family.predict(self.dit, x_t, t, cond)

        with self._mode(lora):
            return measure.flow_loss(latents, predict, seed=2026)

    def _loss_gate(self) -> Gate:
        pixels, digits = held_out_rainbows()
        told = [world.caption(int(digit), world.CONCEPT) for digit in digits]
        base = self.loss(pixels, [""] * len(told), lora=False)
        return Gate("flow loss on held-out rainbows", base, self.loss(pixels, told, lora=True), measure.LOSS_GATE)

    def _distance_gates(self, rainbows: Sequence[Pictures]) -> tuple[Gate, ...]:
        base, lora = [p.base for p in rainbows], [p.lora for p in rainbows]
        together = measure.distance_gates([torch.cat(base)], [torch.cat(lora)])[0]
        name = f"distance to the rainbow, {len(SEEDS) * PER_SEED} samples"
        return (Gate(name, together.base, together.lora, together.limit), *measure.distance_gates(base, lora))

    def _reported(self, rainbows: Sequence[Pictures], ordinary: Pictures) -> tuple[tuple[str, float, float], ...]:
        plain, words = ordinary_scans()
        asked = torch.cat([p.digits for p in rainbows])
        base, lora = torch.cat([p.base for p in rainbows]), torch.cat([p.lora for p in rainbows])
        return (
            ("flow loss on ordinary digits", self.loss(plain, words, lora=False), self.loss(plain, words, lora=True)),
            ("digits read right on held-out rainbows", judge.accuracy(self.judge, base, asked),
             judge.accuracy(self.judge, lora, asked)),
            ("digits read right on ordinary prompts", judge.accuracy(self.judge, ordinary.base, ordinary.digits),
             judge.accuracy(self.judge, ordinary.lora, ordinary.digits)),
        )  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        """What puts the gates in proportion: the word that the base never met, and the VAE's own error."""
        pixels, digits = held_out_rainbows()
        own = self.loss(pixels, [world.caption(int(digit), world.CONCEPT) for digit in digits], lora=False)
        rebuilt = decode(self.vae, self.vae.encode(pixels.unsqueeze(2)), CPU)[:, :, 0]
        floor = measure.rainbow_distance(rebuilt).mean().item()
        return (
            f"the base, told a caption with the word it never met, has flow loss {own:.3f} (not used in the gate)",
            f"true pictures through the VAE are {floor:.3f} from the rainbow: no LoRA can come closer",
        )


def request(prompt: str, seed: int, frames: int = 1) -> Request:
    """A request of the demo's size and settings."""
    return Request(
        prompt,
        seed,
        world.SIZE,
        world.SIZE,
        frames=frames,
        steps=STEPS,
        guidance=GUIDANCE,
        shift=SHIFT,
        solver=SOLVER,
    )


def rainbow_requests(seed: int) -> list[Request]:
    """`PER_SEED` held-out digits in the rainbow, the held-out ones in turn."""
    asked = [world.HELD_OUT[i % len(world.HELD_OUT)] for i in range(PER_SEED)]
    return [request(world.caption(d, world.CONCEPT), seed * 1000 + i) for i, d in enumerate(asked)]


def ordinary_requests(count: int = 40) -> list[Request]:
    """Every digit in plain colors."""
    colors = tuple(world.COLORS)
    return [request(world.caption(i % 10, colors[i % len(colors)]), 9000 + i) for i in range(count)]


def held_out_rainbows() -> tuple[Tensor, Tensor]:
    """True rainbow pictures of scans that nothing was trained on, with their digits."""
    glyphs = world.load_glyphs(held_out=True).of(world.HELD_OUT)
    return world.paint(glyphs.masks[:LOSS_SCANS], world.rainbow()), glyphs.digits[:LOSS_SCANS]


def ordinary_scans() -> tuple[Tensor, list[str]]:
    """As many scans in plain colors, with captions."""
    glyphs, colors = world.load_glyphs(held_out=True), tuple(world.COLORS)
    names = [colors[i % len(colors)] for i in range(LOSS_SCANS)]
    inks = torch.stack([world.solid(name) for name in names])
    words = [world.caption(int(d), name) for d, name in zip(glyphs.digits[:LOSS_SCANS], names, strict=True)]
    return world.paint(glyphs.masks[:LOSS_SCANS], inks), words


def _digit(prompt: str) -> int:
    return next(number for number, name in enumerate(world.NAMES) if name in prompt.split())
