"""A training run from its options: check everything cheap, open the data, load the model, train, save.

The order is that of cost: what can be wrong is found before anything large is read, and text encoders of previews are
gone before the transformer comes. Every part is a call of its own; this file only puts them in a row.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.options import Resolved
from musubi_tuner.data.batches import CachedBatches, DataOptions, open_batches
from musubi_tuner.families.base import Dit, Family
from musubi_tuner.flow.weighting import WEIGHTS
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.optim.build import described
from musubi_tuner.sampling.models import OpenDit, read_model_config
from musubi_tuner.training import config, metadata, preview
from musubi_tuner.training.checkpoint import Names, Saver, output_folder, output_name
from musubi_tuner.training.config import (
    GROUPS,
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    RunOptions,
    SampleOptions,
    SaveOptions,
    TimestepOptions,
)
from musubi_tuner.training.events import Observer
from musubi_tuner.training.loop import Plan, train
from musubi_tuner.training.model import Trainable, adapter, check_adapter, open_model, weight_policy, whole_model
from musubi_tuner.training.optimizer import optimizer_and_rate, rehearse
from musubi_tuner.training.runtime import LocalRuntime, launched
from musubi_tuner.training.step import KeyedDraws, Predict, Step
from musubi_tuner.training.tracker import ProgressBar, TensorBoard, open_tracker, show_nowhere

__all__ = ["GROUPS", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What every part of a run is made from."""

    family: Family
    options: Resolved
    runtime: LocalRuntime
    names: Names
    seed: int
    opened: OpenDit


def run(family: Family, options: Resolved) -> None:
    """Train as `options` say. Raises UserError for whatever the user can mend."""
    setting = _checked(family, options)
    source = _data(setting)
    plan = _plan(setting, source)
    rehearse(options[OptimizerOptions], options[TimestepOptions], family.spec, steps=plan.max_steps)
    prompts = _encoded_prompts(setting)
    dit, trainable = _model(setting)
    optimizer, rate = optimizer_and_rate(
        options[OptimizerOptions], trainable.groups, steps=plan.max_steps, processes=setting.runtime.world
    )
    if rate is None:
        log.warning("%s sets its own rate: lr_scheduler has no effect", type(optimizer).__name__)
    step = _step(setting, dit, trainable, optimizer)
    observers = _observers(setting, step, trainable, plan, source)
    if prompts is not None:
        observers = _with_previews(setting, observers, prompts, dit, step)
    runtime = setting.runtime
    log.info("%d steps, precision %s, on %s", plan.max_steps, runtime.precision, runtime.device)
    dit.train()
    train(step, source, plan, rate=rate, observers=observers if runtime.rank == 0 else ())
    runtime.close()


def _checked(family: Family, options: Resolved) -> Setting:
    """All that can be known to be wrong before the data is opened."""
    save, chosen = options[SaveOptions], options[RunOptions]
    config.check(options)
    for sentence in config.ineffective(options):
        log.warning("%s", sentence)
    check_adapter(options[NetworkOptions], family.spec)
    opened = open_model(family, options[ModelOptions], read_model_config(options.as_dict().get("model_config")))
    names = Names(output_folder(save.output_dir), output_name(save.output_name))
    runtime = launched(chosen.mixed_precision)
    seed = runtime.agree(secrets.randbits(32) if chosen.seed is None else chosen.seed)
    return Setting(family, options, runtime, names, seed, opened)


def _data(of: Setting) -> CachedBatches:
    data, runtime = of.options[DataOptions], of.runtime
    share = {"rank": runtime.rank, "world": runtime.world, "workers": data.workers}
    source = open_batches(data.dataset_config, of.family, seed=of.seed, strict=data.strict_cache, **share)
    for sentence in source.warnings:
        log.warning("%s", sentence)
    log.info("%d items in %d batches an epoch, seed %d", source.num_items, len(source), of.seed)
    return source


def _plan(of: Setting, source: CachedBatches) -> Plan:
    chosen = of.options[RunOptions]
    plan = Plan(chosen.max_train_steps, chosen.gradient_accumulation_steps)
    if chosen.max_train_epochs is None:
        return plan
    return Plan(of.runtime.agree(chosen.max_train_epochs * plan.steps_per_epoch(len(source))), plan.accumulation)


def _encoded_prompts(of: Setting) -> preview.Encoded | None:
    """What previews need of the text encoder, which is gone when this returns; None without previews."""
    if of.options[SampleOptions].sample_prompts is None or of.runtime.rank != 0:
        return None
    return preview.encode(of.family, of.options, device=of.runtime.device)


def _model(of: Setting) -> tuple[Dit, Trainable]:
    """The transformer and what of it is trained. Trained weights are float32 whatever the precision of the rest."""
    model, save_dtype = of.options[ModelOptions], of.options[SaveOptions].dtype
    rate = of.options[OptimizerOptions].learning_rate
    dtype = torch.float32 if model.full_finetune else of.runtime.dtype or torch.float32
    dit = of.opened.load(weight_policy(of.family.spec, model, dtype), of.runtime.device)
    if model.full_finetune:
        return dit, whole_model(dit, of.opened, rate=rate, save_dtype=save_dtype)
    network = of.options[NetworkOptions]
    return dit, adapter(dit, of.family.spec, network, rate=rate, seed=of.seed, save_dtype=save_dtype)


def _step(of: Setting, dit: Dit, trainable: Trainable, optimizer: torch.optim.Optimizer) -> Step:
    times, chosen = of.options[TimestepOptions], of.options[RunOptions]
    blocks: Run = direct
    if chosen.gradient_checkpointing:
        blocks = checkpointed(direct, cpu_offload=chosen.gradient_checkpointing_cpu_offload)
    return Step(
        predict=predictor(of.family, dit, blocks),
        parameters=trainable.parameters,
        optimizer=optimizer,
        draws=KeyedDraws(of.seed, times.distribution, trainable.begin_step),
        runtime=of.runtime,
        weight=WEIGHTS[times.weighting_scheme],
        timestep_offset=times.timestep_offset,
        max_grad_norm=of.options[OptimizerOptions].max_grad_norm,
    )


def predictor(family: Family, dit: Dit, blocks: Run = direct) -> Predict:
    """A family's transformer as the step wants it."""

    def predict(x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return family.predict(dit, x_t, t, cond, run=blocks)

    return predict


def _observers(of: Setting, step: Step, trainable: Trainable, plan: Plan, source: CachedBatches) -> list[Observer]:
    """Saver, tracker and progress bar; what is saved first is safe."""
    save = of.options[SaveOptions]
    facts = metadata.Facts(
        steps=plan.max_steps,
        epochs=plan.epochs(len(source)),
        seed=of.seed,
        precision=of.runtime.precision,
        optimizer=described(step.optimizer, of.options[OptimizerOptions].optimizer_args),
        network_dim=trainable.rank,
        network_alpha=trainable.alpha,
        network_args=trainable.arguments,
        data=source.metadata(),
    )
    record = partial(metadata.at, of.family.spec, of.options, facts)
    every = save.save_every_n_epochs, save.save_every_n_steps
    saver = Saver(of.names, trainable.write, record, step.optimizer, *every)
    board = open_tracker(of.options) if of.runtime.rank == 0 else None
    return [saver, *([board] if board else []), ProgressBar(plan.max_steps)]


def _with_previews(
    of: Setting, observers: list[Observer], prompts: preview.Encoded, dit: Dit, step: Step
) -> list[Observer]:
    """Previews come after the saver and before the tracker closes."""
    show = next((o.show for o in observers if isinstance(o, TensorBoard)), show_nowhere)
    previews = preview.Previews(
        of.family,
        of.options,
        prompts,
        dit,
        runtime=of.runtime,
        show=show,
        names=of.names,
        optimizer=step.optimizer,
    )
    return [observers[0], previews, *observers[1:]]
