"""Going on from a state: what must agree, what may differ, and where the run stands.

Family, kind, targets, rank and alpha must agree. Whatever else decides about results may differ, is told in a warning
and recorded as a departure in every later state; names, places, logging, previews and the total length may differ
without a word. A state of the established tool has no manifest: its weights are taken, its optimizer where it fits, and
its position is that of `--initial_step`, of its own counter file, or of its folder's name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.data.batches import CachedBatches
from musubi_tuner.families.base import Family
from musubi_tuner.memory.plan import SwapOptions
from musubi_tuner.optim.build import parse_arguments
from musubi_tuner.training import foreign, shards
from musubi_tuner.training.config import LogOptions, SampleOptions, SaveOptions
from musubi_tuner.training.events import State
from musubi_tuner.training.hub import HubOptions
from musubi_tuner.training.loop import Plan, Rate
from musubi_tuner.training.machine import MachineOptions
from musubi_tuner.training.retention import StateOptions
from musubi_tuner.training.runtime import LocalRuntime
from musubi_tuner.training.state import (
    OPTIMIZER,
    WEIGHTS,
    Manifest,
    config_hash,
    is_state,
    plain,
    read_manifest,
    read_optimizer,
    read_weights,
    state_bytes,
    versions,
    write_state,
)
from musubi_tuner.weights.sources import some

log = logging.getLogger(__name__)

FREE_GROUPS = (SaveOptions, StateOptions, LogOptions, SampleOptions, HubOptions, MachineOptions, SwapOptions)
FREE = {
    *("max_train_steps", "max_train_epochs", "seed", "dataset_config", "max_data_loader_n_workers", "strict_cache"),
    *("gradient_checkpointing", "gradient_checkpointing_cpu_offload", "fp8_report", "show_timesteps"),
    *("network_module", "network_dim", "network_alpha", "network_weights", "dim_from_weights"),
    *("config_file", "config_compat", "print_config"),
}
"""Options that do not decide about results, or whose effect is compared by itself (seed, data, rank, alpha)."""


@dataclass(frozen=True)
class RunFacts:
    """What of a run its states record, and what a resumed run is compared with.

    identity: must agree (family, kind, alpha). config: options that decide about results; told: all of them.
    """

    identity: Mapping[str, Any]
    seed: int
    data: Mapping[str, Any]
    config: Mapping[str, Any]
    told: Mapping[str, Any]
    not_exact: Sequence[str] = ()


@dataclass(frozen=True)
class StateWriter:
    """Writes the states of a run. named: the trained tensors by the names that a file has for them."""

    facts: RunFacts
    named: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    runtime: LocalRuntime

    def size(self) -> int:
        """Bytes that a state needs, nearly."""
        return state_bytes(list(self.named.values()), self.optimizer)

    def write(self, folder: Path, state: State) -> None:
        """Write the run's state as it is. Raises UserError when that fails."""
        facts = self.facts
        manifest = Manifest(
            step=state.step,
            epoch=state.epoch,
            batch=state.batch,
            recent=state.recent,
            seed=facts.seed,
            world=self.runtime.world,
            groups=named_groups(self.optimizer, self.named),
            optimizer=class_name(self.optimizer),
            identity=facts.identity,
            data=facts.data,
            config=facts.told,
            config_hash=config_hash(facts.config),
            runtime=self.runtime.state_dict(),
            made=versions(),
            not_exact=list(facts.not_exact),
        )
        leads = self.runtime.rank == 0
        weights: dict[str, Tensor] = {}
        for name, parameter in self.named.items():  # tensors in shards are gathered by all processes, one at a time
            found = shards.whole(parameter.detach())
            if leads:
                weights[name] = found.cpu()
        optimizer = shards.gathered(self.optimizer.state_dict())
        if leads:
            write_state(folder, manifest, weights, optimizer)


def class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def named_groups(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names of each parameter group's tensors, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in named.items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


@dataclass(frozen=True)
class Resume:
    """A state to go on from; `manifest` None for one of the established tool."""

    folder: Path
    manifest: Manifest | None
    reset: bool = False
    initial_step: int | None = None

    @property
    def seed(self) -> int | None:
        """The seed to go on with where the user gives none."""
        return None if self.manifest is None or self.reset else self.manifest.seed

    def departures(self, facts: RunFacts) -> list[str]:
        """What differs from the run that wrote the state, earlier departures first.

        Raises UserError where the difference is in `identity`.
        """
        if self.manifest is None:
            foreign.check_alpha(self.folder, facts.identity.get("alpha"))
            return [f"resumed from {self.folder.name} of another tool"]
        before, now = self.manifest, plain(dict(facts.identity))
        for key, value in now.items():
            if key in before.identity and before.identity[key] != value:
                raise UserError(
                    f"state {self.folder} has {key} = {before.identity[key]}, this run {key} = {value}: give the same "
                    "options as then, or start from its weights with --network_weights"
                )
        found = []
        if self.reset:
            found.append("counters reset")
        for key, value in plain(dict(facts.config)).items():
            if key in before.config and before.config[key] != value:
                found.append(f"{key} {before.config[key]} -> {value}")
        if before.seed != facts.seed:
            found.append(f"seed {before.seed} -> {facts.seed}")
        if before.data != plain(dict(facts.data)):
            found.append("the data set changed")
        changed = {name: value for name, value in versions().items() if before.made.get(name) != value}
        found += [f"{name} {before.made.get(name)} -> {value}" for name, value in changed.items()]
        prefix = f"at step {before.step}: "
        return [*before.not_exact, *([prefix + ", ".join(dict.fromkeys(found))] if found else [])]

    def position(self, plan: Plan, batches: int, world: int) -> State:
        """Where the run stands now, for `batches` of each of `world` processes. Raises UserError where unknown."""
        if self.initial_step is not None or self.reset:
            return at_step(self.initial_step or 0, plan, batches)
        if self.manifest is None:
            epochs, steps = foreign.position(self.folder)
            return at_step(epochs * plan.steps_per_epoch(batches) if steps is None else steps, plan, batches)
        before = self.manifest
        done, whole = before.batch * before.world, before.data.get("batches")
        batch = batches if whole and done >= whole else min(done // world, batches)
        return State(before.step, before.epoch, batch, list(before.recent))

    def restore(
        self,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        arguments: Sequence[str],
        runtime: LocalRuntime,
    ) -> None:
        """Put weights and optimizer state in place. Rates and `arguments` are those of this run.

        Raises UserError where the trained tensors are others.
        """
        path = self.folder / (WEIGHTS if self.manifest is not None else foreign.WEIGHTS)
        _fill(named, foreign.without_alpha(read_weights(path)), self.folder)
        if self.manifest is not None:
            runtime.load_state_dict(self.manifest.runtime)
            if self.manifest.optimizer != class_name(optimizer):
                log.warning("the state has %s: this optimizer starts afresh", self.manifest.optimizer)
                return
            stored = read_optimizer(self.folder / OPTIMIZER)
            groups = self.manifest.groups
        elif (found := foreign.optimizer_state(self.folder, optimizer)) is not None:
            stored, groups = found, named_groups(optimizer, named)
        else:
            return
        load_optimizer(optimizer, stored, groups, named, ("lr", *parse_arguments(arguments, "optimizer_args")))


def open_resume(chosen: StateOptions) -> Resume | None:
    """The state of `--resume`, its manifest read and its files' sizes checked. Raises UserError."""
    if chosen.resume is None:
        if chosen.reset_counters:
            raise UserError("--reset_counters belongs to --resume FOLDER: give both, or neither")
        return None
    if chosen.reset_counters and chosen.initial_step:
        raise UserError("--reset_counters counts from 0 and --initial_step from elsewhere: give one of them")
    folder = Path(chosen.resume).expanduser()
    manifest = read_manifest(folder) if is_state(folder) else None
    if manifest is None and not foreign.is_state(folder):
        near = sorted(p.name for p in folder.parent.glob("*-state*") if is_state(p)) if folder.parent.is_dir() else []
        there = f"complete states there: {some(near)}" if near else f"{folder.parent} has no complete state"
        what = "holds no complete state" if folder.is_dir() else "is not a folder"
        raise UserError(f"--resume {folder}: {what}; {there}")
    return Resume(folder, manifest, chosen.reset_counters, chosen.initial_step)


def start_of(states: StateOptions, resume: Resume | None, plan: Plan, batches: int, world: int) -> State:
    """Where a run starts, new or resumed."""
    if resume is not None:
        return resume.position(plan, batches, world)
    return at_step(states.initial_step or 0, plan, batches)


def advance(rate: Rate | None, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Bring a schedule to `step`. Scheduler classes are advanced in turn, and would warn of steps without updates."""
    if rate is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rate(optimizer, step)


def facts_of(
    family: Family, options: Resolved, source: CachedBatches, seed: int, identity: Mapping[str, Any]
) -> RunFacts:
    """What a run's states say of it. Secrets among the options are left out."""
    told = {name: value for name, value in options.as_dict().items() if not name.endswith(("_key", "_token"))}
    free = {f.name for group in (*FREE_GROUPS, *family.option_groups("train")[:1]) for f in fields(group)} | FREE
    rows = [[e.dataset.number, e.dataset.batch_size, *e.shape, e.latent.name, e.text.name] for e in source.entries]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    data = {"items": source.num_items, "batches": source.total, "digest": digest}
    return RunFacts(identity, seed, data, {n: v for n, v in told.items() if n not in free}, told)


def at_step(step: int, plan: Plan, batches: int) -> State:
    """The state after `step` whole steps from the start."""
    each = plan.steps_per_epoch(batches)
    return State(step, step // each, step % each * plan.accumulation)


def total_steps(plan: Plan, epochs: int, batches: int, state: State) -> int:
    """Steps until the end of epoch `epochs` for a run that stands at `state`."""
    begun = plan.steps_per_epoch(batches - state.batch) if state.batch else 0
    whole = epochs - state.epoch - (1 if state.batch else 0)
    return state.step + (begun + whole * plan.steps_per_epoch(batches) if whole >= 0 else 0)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    named: Mapping[str, nn.Parameter],
    own: Sequence[str],
) -> None:
    """Load `stored`, whose groups have the tensors `groups`, by name; the settings `own` of each group stay as now."""
    fresh, names = optimizer.param_groups, named_groups(optimizer, named)
    before = [name for group in groups for name in group]
    after = [name for group in names for name in group]
    place = {name: i for i, name in enumerate(before)}
    state = {
        i: {key: _shard(value, named[name]) for key, value in stored["state"][place[name]].items()}
        for i, name in enumerate(after)
        if place.get(name) in stored["state"]
    }
    same = [list(group) for group in groups] == names
    kept = [{k: v for k, v in group.items() if k != "params"} for group in (stored["param_groups"] if same else fresh)]
    settings = [{key: group[key] for key in (*own, "initial_lr") if key in group} for group in fresh]
    labels = [group.get("name") for group in fresh]
    starts = [len(group) for group in names]
    indices = [list(range(sum(starts[:i]), sum(starts[: i + 1]))) for i in range(len(starts))]
    optimizer.load_state_dict(
        {"state": state, "param_groups": [{**g, "params": i} for g, i in zip(kept, indices, strict=True)]}
    )
    for group, setting, label in zip(optimizer.param_groups, settings, labels, strict=True):
        group.pop("initial_lr", None)  # a schedule sets it anew
        group.update(setting)
        if label is not None:
            group["name"] = label


def _shard(value: Any, parameter: nn.Parameter) -> Any:
    return shards.like(value, parameter) if isinstance(value, Tensor) else value


def _fill(named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], folder: Path) -> None:
    wrong = [f"{name} is not there" for name in named if name not in tensors]
    wrong += [f"{name} is not trained now" for name in tensors if name not in named]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, here {list(p.shape)}"
        for name, p in named.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    if wrong:
        raise UserError(
            f"state {folder} does not fit what this run trains: {len(wrong)} differences: {some(wrong)}; give the same "
            "--network_module, --network_dim and --network_args as then"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(shards.like(tensors[name], parameter))


def with_departures(facts: RunFacts, resume: Resume | None) -> RunFacts:
    """The facts of a run that resumes, with what it says in the log about it."""
    if resume is None:
        return facts
    departures = resume.departures(facts)
    if resume.manifest is not None and len(departures) > len(resume.manifest.not_exact):
        log.warning("not an exact continuation of %s: %s", resume.folder.name, departures[-1])
    return replace(facts, not_exact=tuple(departures))
