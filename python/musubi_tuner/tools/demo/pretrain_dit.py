"""Pre-training of the demo's DiT: full fine-tuning of a small Wan from noise, through the project's own loop.

Images first, then images with a small share of clips (mixed from the start, the digits came out worse in the same
time), at last mostly clips: the first cycle left all of 200 pictures readable, but of the clips' first frames one in
seven; the second brought a half, the third four in five. The weights that are shipped are an exponential average,
which costs nothing and samples better.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.flow import keyed
from musubi_tuner.tools.demo.shelf import DigitBatches
from musubi_tuner.training.events import Observer, Quiet, State, StepRecord
from musubi_tuner.training.loop import Plan, train
from musubi_tuner.training.runtime import LocalRuntime
from musubi_tuner.training.step import KeyedDraws, Predict, Step


@dataclass(frozen=True)
class Cycle:
    """`steps` steps under one rise and fall of the rate; a share of the batches holds clips."""

    steps: int
    rate: float
    clip_share: float
    images_first: float = 0.0
    """Share of the steps before clips come in."""


@dataclass(frozen=True)
class DitRecipe:
    """What made the shipped DiT."""

    seed: int = 20261124
    cycles: tuple[Cycle, ...] = (
        Cycle(steps=4200, rate=1.5e-3, clip_share=0.12, images_first=0.6),
        Cycle(steps=2400, rate=8e-4, clip_share=0.7),
        Cycle(steps=3600, rate=1e-3, clip_share=0.75),
    )
    last_rate: float = 3e-5
    warmup: int = 150
    average: float = 0.999
    save_every: int = 250

    @property
    def steps(self) -> int:
        return sum(cycle.steps for cycle in self.cycles)

    def mix(self, batches: int) -> tuple[tuple[int, float], ...]:
        """(epoch, share of clip batches from it on) for epochs of `batches` steps."""
        starts, done = [], 0
        for cycle in self.cycles:
            starts.append((1 + math.ceil((done + cycle.steps * cycle.images_first) / batches), cycle.clip_share))
            done += cycle.steps
        return tuple(starts)

    def rate_at(self, step: int) -> float:
        """In each cycle: linear warm-up, then half a cosine down to `last_rate`."""
        for cycle in self.cycles:
            if step < cycle.steps:
                break
            step -= cycle.steps
        if step < self.warmup:
            return cycle.rate * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, cycle.steps - self.warmup))
        return self.last_rate + (cycle.rate - self.last_rate) * 0.5 * (1 + math.cos(math.pi * done))

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rate_at(step)


def initialize(dit: nn.Module, seed: int) -> None:
    """Fill a transformer on the meta device: seeded Glorot weights, unit norms, no biases, a silent head."""
    tensors = {name: _initial(name, p.shape, seed) for name, p in dit.named_parameters()}
    dit.load_state_dict(tensors, assign=True)
    dit.requires_grad_(True)


def _initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    if name == "head.head.weight" or name.endswith("bias"):
        return torch.zeros(shape)
    if "modulation" in name:
        return keyed.normal(shape, seed, "dit", name) / math.sqrt(shape[-1])
    if len(shape) == 1:
        return torch.ones(shape)
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    bound = math.sqrt(6 / (fan_in + fan_out))
    return (2 * keyed.uniform(shape, seed, "dit", name, dtype=torch.float32) - 1) * bound


class Average(Quiet):
    """Keeps an exponential average of the weights, and the run's whole state on disk."""

    def __init__(self, dit: nn.Module, optimizer: torch.optim.Optimizer, recipe: DitRecipe, file: Path) -> None:
        self.dit, self.optimizer, self.recipe, self.file = dit, optimizer, recipe, file
        self.weights = {name: p.detach().clone() for name, p in dit.named_parameters()}
        self.state = State()

    def start(self, state: State) -> None:
        self.state = state

    @torch.no_grad()
    def step_end(self, record: StepRecord) -> None:
        decay = min(self.recipe.average, (record.step + 1) / (record.step + 10))
        for name, p in self.dit.named_parameters():
            self.weights[name].lerp_(p, 1 - decay)
        if record.step % self.recipe.save_every == 0 or record.step == self.recipe.steps:
            self.save()

    def save(self) -> None:
        content = {
            "dit": self.dit.state_dict(),
            "average": self.weights,
            "optimizer": self.optimizer.state_dict(),
            "position": (self.state.step, self.state.epoch, self.state.batch),
        }
        part = self.file.with_suffix(".part")
        torch.save(content, part)
        part.replace(self.file)

    def resume(self, batches: int) -> State:
        """Take everything from the file, where there is one; where the run stands in epochs of `batches`."""
        if not self.file.exists():
            return State()
        content = torch.load(self.file, weights_only=True)
        self.dit.load_state_dict(content["dit"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.weights = content["average"]
        step, epoch, batch = content["position"]
        return State(step, epoch + 1, 0) if batch == batches else State(step, epoch, batch)


class Report(Quiet):
    """A line every hundred steps, image and clip losses apart: their levels differ, so one mean would mislead."""

    def __init__(self, clip_batch: int) -> None:
        self.clip_batch, self.started = clip_batch, time.perf_counter()
        self.images: list[float] = []
        self.clips: list[float] = []

    def step_end(self, record: StepRecord) -> None:
        (self.clips if record.items == self.clip_batch else self.images).append(record.loss)
        if record.step % 100:
            return
        parts = {"images": self.images, "clips": self.clips}
        told = "  ".join(f"{kind} {sum(values) / len(values):.4f}" for kind, values in parts.items() if values)
        print(f"{record.step:6d}  {time.perf_counter() - self.started:6.0f} s  loss {told}", flush=True)
        self.images.clear()
        self.clips.clear()


def pretrain(
    dit: nn.Module,
    predict: Predict,
    source: DigitBatches,
    recipe: DitRecipe,
    file: Path,
    *,
    observers: tuple[Observer, ...] = (),
) -> dict[str, Tensor]:
    """The averaged weights after `recipe.steps`; goes on from `file` where that is there.

    predict: the velocity of `dit`; source: mixed as `recipe.mix` says.
    """
    parameters = list(dit.parameters())
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate_at(0), betas=(0.9, 0.99))
    average = Average(dit, optimizer, recipe, file)
    step = Step(
        predict=predict,
        parameters=parameters,
        optimizer=optimizer,
        draws=KeyedDraws(recipe.seed),
        runtime=LocalRuntime("cpu"),
    )
    train(
        step,
        source,
        Plan(recipe.steps),
        rate=recipe.set_rate,
        observers=(average, Report(source.clip_batch), *observers),
        state=average.resume(len(source)),
    )
    return average.weights
