"""A model whose weights lie in shards over the processes (FSDP2): split by blocks, gathered whole for files.

Every process holds 1/N of each tensor, its gradient and its optimizer state; a block's weights are whole only while
it computes. What leaves the run is whole: `whole` gathers a tensor, one at a time, on all processes together, and
`like` takes a process's own shard of one. So files and states are those of a run by a single process, and either can
be gone on from by any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def split(model: nn.Module, blocks: Sequence[str], device: torch.device, settings: Mapping[str, Any]) -> None:
    """Shard `model` in place over all processes, each of its `blocks` as a unit and the rest as one.

    blocks: names of the model's block lists. Weights may lie on the CPU: each unit is moved to `device` when it is
    split, so no device ever holds the whole. settings: `fully_shard`'s own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name in blocks:
        for block in model.get_submodule(name).children():
            fully_shard(block, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; all of them must call it. Others are given back as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of `full`, which every process has, as a tensor that is sharded like `parameter`.

    Tensors of another shape than the parameter's (step counters) and those of whole parameters stay as they are.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(parameter, DTensor) or full.shape != parameter.shape:
        return full
    mesh = parameter.device_mesh
    local = DTensor.from_local(full.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local.redistribute(mesh, parameter.placements)


def gathered(value: Any) -> Any:
    """A nested dict or list with its tensors whole, in the same order on every process."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, Mapping):
        return {key: gathered(entry) for key, entry in value.items()}
    return [gathered(entry) for entry in value] if isinstance(value, list) else value
