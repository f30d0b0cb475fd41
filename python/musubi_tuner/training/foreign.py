"""States of the established trainer, as accelerate lays them out: `model.safetensors`, `optimizer.bin` and others.

The weights are an adapter's in the names of its file, or the model's. The optimizer's tensors come without names, in
the order of the model's layers; they are taken where number and shapes agree with what is trained now. Pickled
generators and schedulers are never read: this trainer needs neither.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.training.state import read_optimizer, read_weights

WEIGHTS, OPTIMIZER, COUNTERS = "model.safetensors", "optimizer.bin", "train_state.json"

log = logging.getLogger(__name__)


def is_state(folder: Path) -> bool:
    """Whether `folder` has such a layout."""
    return (folder / WEIGHTS).is_file()


def position(folder: Path) -> tuple[int, int | None]:
    """(epochs, steps) done: steps from the counter file or the folder's name, else None and its epochs.

    Raises UserError where neither tells.
    """
    if (folder / COUNTERS).is_file():
        try:
            step = int(json.loads((folder / COUNTERS).read_text(encoding="utf-8"))["current_step"])
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise UserError(f"{folder / COUNTERS} cannot be read ({fault!r}): give --initial_step") from fault
        log.info("%s: step %d, as %s says", folder.name, step, COUNTERS)
        return 0, step
    if found := re.fullmatch(r".*-step(\d+)-state", folder.name):
        log.info("%s: step %d, from the folder's name", folder.name, int(found[1]))
        return 0, int(found[1])
    if found := re.fullmatch(r".*-(\d{6})-state", folder.name):
        log.info("%s: %d epochs, from the folder's name", folder.name, int(found[1]))
        return int(found[1]), None
    raise UserError(
        f"state {folder} of the established tool does not say its step: give --initial_step N (0 counts from the start)"
    )


def without_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors: an adapter's alphas are constants."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}


def check_alpha(folder: Path, alpha: float | None) -> None:
    """Raises UserError where the adapter of a state has another alpha than this run's (None: it has none)."""
    found = {float(t) for name, t in read_weights(folder / WEIGHTS).items() if name.endswith(".alpha")}
    if alpha is not None and found - {alpha}:
        told = ", ".join(f"{value:g}" for value in sorted(found))
        raise UserError(
            f"state {folder} was trained with alpha = {told}, this run has {alpha:g}: give --network_alpha {told}"
        )


def optimizer_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The optimizer's state where it fits `optimizer`; None, with the reason in a warning, where not."""
    path = folder / OPTIMIZER
    if not path.is_file():
        log.warning("%s has no %s: the optimizer starts afresh", folder.name, OPTIMIZER)
        return None
    found = read_optimizer(path)
    sizes = [len(group["params"]) for group in found["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        log.warning("%s has groups of %s tensors, this run %s: the optimizer starts afresh", path.name, sizes, own)
        return None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in found["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in found["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                told = f"{name} {index} is {list(value.shape)}, here {list(parameter.shape)}"
                log.warning("%s does not fit (%s): the optimizer starts afresh", path.name, told)
                return None
    log.info("%s: optimizer state of %d tensors taken, in the order of the layers", folder.name, len(found["state"]))
    return {"state": found["state"], "param_groups": found["param_groups"]}
