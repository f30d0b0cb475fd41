"""A training run from its options: check everything cheap, open the data, load the model, train, save.

The order is that of cost: what can be wrong is found before anything large is read, and text encoders of previews are
gone before the transformer comes. Every part is a call of its own; this file only puts them in a row.
"""

from __future__ import annotations

import logging
from functools import partial

import torch

from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Family
from musubi_tuner.flow.weighting import WEIGHTS
from musubi_tuner.optim.build import described
from musubi_tuner.training import metadata, preview
from musubi_tuner.training.assemble import Assembled, assemble
from musubi_tuner.training.checkpoint import Saver, file_bytes, tell_nobody
from musubi_tuner.training.config import (
    GROUPS,
    OptimizerOptions,
    SampleOptions,
    SaveOptions,
    TimestepOptions,
)
from musubi_tuner.training.draws import Buckets
from musubi_tuner.training.events import Observer
from musubi_tuner.training.interrupts import interruptible
from musubi_tuner.training.loop import Rate, train
from musubi_tuner.training.meters import Meters
from musubi_tuner.training.model import Trainable, predictor
from musubi_tuner.training.optimizer import optimizer_and_rate
from musubi_tuner.training.prepare import Setting, prepare
from musubi_tuner.training.resume import RunFacts, StateWriter, advance, facts_of, with_departures
from musubi_tuner.training.retention import StateOptions
from musubi_tuner.training.show_timesteps import show_timesteps
from musubi_tuner.training.step import Step
from musubi_tuner.training.tracker import ProgressBar, Tracker, open_tracker, show_nowhere

__all__ = ["GROUPS", "run"]

log = logging.getLogger(__name__)


def run(family: Family, options: Resolved) -> None:
    """Train as `options` say. Raises UserError for whatever the user can mend."""
    if show_timesteps(family.spec, options):
        return
    setting = prepare(family, options)
    plan, runtime = setting.plan, setting.runtime
    prompts = _encoded_prompts(setting)
    model = assemble(setting)
    trainable = model.trainable
    optimizer, rate = optimizer_and_rate(
        options[OptimizerOptions], trainable.groups, steps=plan.max_steps, processes=runtime.world
    )
    if rate is None:
        log.warning("%s sets its own rate: lr_scheduler has no effect", type(optimizer).__name__)
    meters = Meters(runtime.device)
    step = _step(setting, model, optimizer, meters)
    facts = _resumed(setting, trainable, step, rate)
    observers = _observers(setting, step, trainable, meters, facts)
    if prompts is not None:
        observers = _with_previews(setting, observers, prompts, model, step)
    log.info("%d steps, precision %s, on %s", plan.max_steps, runtime.precision, runtime.device)
    model.dit.train()
    watching = observers if runtime.rank == 0 else observers[:1] if runtime.sharded else ()
    with interruptible(runtime) as stop, runtime.speaking():
        train(step, setting.source, plan, rate=rate, observers=watching, state=setting.state, stop=stop)
    runtime.close()
    stop.leave()


def _resumed(of: Setting, trainable: Trainable, step: Step, rate: Rate | None) -> RunFacts:
    """Put a resumed run's weights and optimizer in place; what its own states will say of it."""
    kind = "adapter" if trainable.rank is not None else "model"
    identity = {"family": of.family.spec.name, "kind": kind, "rank": trainable.rank, "alpha": trainable.alpha}
    facts = with_departures(facts_of(of.family, of.options, of.source, of.seed, identity), of.resume)
    if of.resume is not None:
        arguments = of.options[OptimizerOptions].optimizer_args
        of.resume.restore(trainable.named, step.optimizer, arguments, of.runtime)
        advance(rate, step.optimizer, of.state.step)
        log.info("going on from %s after step %d, %d epochs", of.resume.folder, of.state.step, of.state.epoch)
    return facts


def _encoded_prompts(of: Setting) -> preview.Encoded | None:
    """What previews need of the text encoder, which is gone when this returns; None without previews."""
    if of.options[SampleOptions].sample_prompts is None or of.runtime.rank != 0:
        return None
    return preview.encode(of.family, of.options, device=of.runtime.device, dit=of.opened.dit)


def _step(of: Setting, model: Assembled, optimizer: torch.optim.Optimizer, meters: Meters) -> Step:
    times, trainable = of.options[TimestepOptions], model.trainable
    trainable.watch(optimizer, meters.put)
    buckets = Buckets.of(times.num_timestep_buckets, [entry.dataset.number for entry in of.source.entries])
    return Step(
        predict=predictor(of.family, model.dit, model.training),
        parameters=trainable.parameters,
        optimizer=optimizer,
        draws=times.draws(of.seed, trainable.begin_step, buckets, of.opened.boundary),
        runtime=of.runtime,
        weight=WEIGHTS[times.weighting_scheme],
        timestep_offset=times.timestep_offset,
        max_grad_norm=of.options[OptimizerOptions].max_grad_norm,
        watch=meters.losses,
        spare=of.source.spare if of.runtime.sharded else None,
    )


def _observers(of: Setting, step: Step, trainable: Trainable, meters: Meters, run: RunFacts) -> list[Observer]:
    """Saver, tracker and progress bar; what is saved first is safe."""
    save = of.options[SaveOptions]
    facts = metadata.Facts(
        steps=of.plan.max_steps,
        epochs=of.plan.epochs(of.source.longest),
        seed=of.seed,
        precision=of.runtime.precision,
        optimizer=described(step.optimizer, of.options[OptimizerOptions].optimizer_args),
        network_dim=trainable.rank,
        network_alpha=trainable.alpha,
        network_args=trainable.arguments,
        data=of.source.metadata(),
    )
    record = partial(metadata.at, of.family.spec, of.options, facts)
    states = of.options[StateOptions]
    saver = Saver(
        of.names,
        trainable.write,
        record,
        step.optimizer,
        keep=states.retention(save.save_every_n_epochs, save.save_every_n_steps),
        size=file_bytes(trainable.parameters, save.dtype),
        states=StateWriter(run, trainable.named, step.optimizer, of.runtime),
        keep_states=states.save_state,
        last_state=states.save_state_on_train_end,
        leads=of.runtime.rank == 0,
        saved=tell_nobody if of.uploads is None else of.uploads.send,
    )
    board = open_tracker(of.options, meters.read) if of.runtime.rank == 0 else None
    uploads = [of.uploads] if of.uploads else []
    return [saver, *([board] if board else []), ProgressBar(of.plan.max_steps), *uploads]


def _with_previews(
    of: Setting, observers: list[Observer], prompts: preview.Encoded, model: Assembled, step: Step
) -> list[Observer]:
    """Previews come after the saver and before the tracker closes."""
    show = next((o.show for o in observers if isinstance(o, Tracker)), show_nowhere)
    previews = preview.Previews(
        of.family,
        of.options,
        prompts,
        model.dit,
        blocks=model.sampling,
        runtime=of.runtime,
        show=show,
        names=of.names,
        optimizer=step.optimizer,
    )
    return [observers[0], previews, *observers[1:]]
