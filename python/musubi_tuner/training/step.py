"""One training step, to be read in one sitting: draw, mix, predict, weigh, backward, update.

    x_t = (1 - t) x0 + t e,   loss = mean over items of w(t) (v(x_t, t) - (e - x0))^2

Nothing here knows a family, an adapter or a launcher: `predict` is any callable (x_t, t, conditioning) -> v, the
parameters may be an adapter's or the whole model's, and the numbers e and t come from a `Draws`. From a library:

    from musubi_tuner.training.loop import Plan, train
    from musubi_tuner.training.runtime import LocalRuntime
    from musubi_tuner.training.step import KeyedDraws, Step

    predict = lambda x_t, t, cond: family.predict(dit, x_t, t, cond)        # or any module of your own
    parameters = [p for p in dit.parameters() if p.requires_grad]           # full fine-tuning, or adapters.parameters()
    step = Step(
        predict=predict,
        parameters=parameters,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3),
        draws=KeyedDraws(seed=7),                                           # uniform t; or distribution=...
        runtime=LocalRuntime("cpu"),
    )
    train(step, source, Plan(max_steps=500), observers=[...])               # source: any BatchSource
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.flow import path
from musubi_tuner.flow.weighting import Weight
from musubi_tuner.sampling.guidance import on_device
from musubi_tuner.training.draws import Draws, KeyedDraws
from musubi_tuner.training.runtime import LocalRuntime, Runtime

if TYPE_CHECKING:
    from musubi_tuner.data.batches import Batch

__all__ = ["KeyedDraws", "Predict", "Step", "StepResult"]

Predict = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
"""(x_t [B, C, F, H, W] float32, t [B] float64, conditioning on the device) -> v [B, C, F, H, W]."""


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's items, averaged over processes. grad_norm: joint L2 norm before clipping."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Step:
    """Everything that one optimiser step needs; call it with the micro-batches of the step.

    weight: w(t), None for 1. timestep_offset: the model is told t + offset / 1000; mixing and target use t.
    max_grad_norm: 0 does not clip. watch: told t [B] and the loss of each item [B] (`meters.Meters.losses`).
    spare: gives a batch for passes that this process makes for others' sake alone, where weights lie in shards.
    """

    predict: Predict
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    draws: Draws
    runtime: Runtime = field(default_factory=LocalRuntime)
    weight: Weight | None = None
    timestep_offset: float = 0.0
    max_grad_norm: float = 1.0
    watch: Callable[[Tensor, Tensor], None] | None = None
    spare: Callable[[], Batch] | None = None

    def __call__(self, group: Sequence[Batch]) -> StepResult:
        """Forward and backward over `group`, each item of all processes with the same weight, then one update.

        The group may be empty where another process's is not. Raises UserError when the loss is not finite; the
        parameters are then as before the step.
        """
        share = self.runtime.average(sum(len(batch.items) for batch in group))  # of the step's items, in the mean
        idle = [] if self.spare is None else [self.spare] * (self.runtime.most(len(group)) - len(group))
        total = torch.zeros((), device=self.runtime.device)
        for batch in group:
            part = self.loss(batch) * (len(batch.items) / share)
            self.runtime.backward(part)
            total += part.detach()
        for spare in idle:
            self.runtime.backward(self.loss(spare()) * 0.0)
        loss = self.runtime.average(float(total))
        if not math.isfinite(loss):
            self.optimizer.zero_grad(set_to_none=True)
            raise UserError(f"the loss is {loss}: {_REMEDY} ({_named(group)})")
        return StepResult(loss, self.runtime.update(self.optimizer, self.parameters, self.max_grad_norm))

    def loss(self, batch: Batch) -> Tensor:
        """The weighted flow-matching loss of a batch, a scalar with gradient."""
        device = self.runtime.device
        x0, noise = batch.latents.to(device, torch.float32), self.draws.noise(batch).to(device, torch.float32)
        t = self.draws.t(batch).to(device)
        x_t, target = path.interpolate(x0, noise, t), path.velocity(x0, noise)
        cond = on_device(batch.cond, device)
        self.draws.begin(batch)
        with self.runtime.autocast():
            v = self.predict(x_t, t + self.timestep_offset / 1000, cond)
        error = (v.to(torch.float32) - target) ** 2
        if self.weight is not None:
            error = error * path.expand(self.weight(t), error)
        if self.watch is not None:
            self.watch(t, error.detach().flatten(1).mean(1))
        return error.mean()


def _named(group: Sequence[Batch]) -> str:
    """The batches of a step, for a message."""
    told = [f"batch {b.index} of epoch {b.epoch}: items {', '.join(b.names or map(str, b.items))}" for b in group[:4]]
    return "; ".join(told) or "no batch of this process"


_REMEDY = "lower --learning_rate, keep --max_grad_norm at 1, use bf16 rather than fp16, or check the cached latents"
