"""Where a training run happens: device, precision, processes. The only module that knows accelerate.

The loop sees the `Runtime` protocol. `LocalRuntime` is plain torch and needs no launcher, which is what library use
and tests want; `launched` asks accelerate (its launcher's environment, its config file) which device, precision and
process group this process has, and returns the same class filled in.

Models are not wrapped for several processes: the trained tensors' gradients are averaged between backward and
clipping. A LoRA's gradients are small, and a family's `predict` may then look at any attribute of its model. Where the
launcher asks for FSDP2, a whole model that is trained is split over the processes instead (`training.shards`).
"""

from __future__ import annotations

import datetime
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.training import shards

_DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}

MOST_SKIPPED = 20
"""Steps in turn that may be left out for gradients that are not finite; after these the run is beyond help."""

log = logging.getLogger(__name__)


class Runtime(Protocol):
    """What the step needs of the place it runs in."""

    @property
    def device(self) -> torch.device: ...
    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def autocast(self) -> AbstractContextManager[None]:
        """The context of the forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        ...

    def update(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Average the gradients over processes, clip them to the joint L2 norm `max_norm` (0: no clipping), step
        (unless the norm is not finite), and clear them. Returns the norm before clipping."""
        ...

    def average(self, value: float) -> float:
        """The mean of `value` over the processes."""
        ...

    def most(self, value: int) -> int:
        """The largest `value` of all processes."""
        ...


class LocalRuntime:
    """Plain torch: autocast by `precision`, a loss scaler for fp16, gradients averaged when `world` > 1.

    sharding: settings of `fully_shard` where weights are to lie in shards; gradients are then averaged by backward.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: str = "no",
        *,
        rank: int = 0,
        world: int = 1,
        sharding: Mapping[str, Any] | None = None,
    ) -> None:
        self.device, self.precision = torch.device(device), precision
        self.rank, self.world, self._sharding = rank, world, sharding
        if precision not in ("no", *_DTYPES):
            raise UserError(f"mixed_precision = {precision!r}: use no, fp16 or bf16")
        if precision == "fp16" and self.device.type != "cuda":
            raise UserError(f"mixed_precision = fp16 needs a CUDA device, this is {self.device}: use bf16 or no")
        self._skipped = 0
        self._scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None

    @property
    def sharded(self) -> bool:
        """Whether the trained weights lie in shards: every process must then take part in every pass."""
        return self._sharding is not None

    def shard(self, model: nn.Module, blocks: Sequence[str]) -> None:
        """Split a model whose weights are all trained, where the launcher asked for that."""
        if self._sharding is not None:
            shards.split(model, blocks, self.device, self._sharding)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None without."""
        return _DTYPES.get(self.precision)

    def autocast(self) -> AbstractContextManager[None]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def update(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        if self.world > 1 and not self.sharded:
            average_gradients(parameters, self.world)
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        with _together() if self.sharded else nullcontext():
            norm = float(shards.whole(nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)))
        if self._scaler is not None:
            self._scaler.step(optimizer)
            self._scaler.update()
        elif self._usable(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _usable(self, norm: float) -> bool:
        """Whether to make the step: not with gradients that are not finite, and not many times in turn."""
        if math.isfinite(norm):
            self._skipped = 0
            return True
        self._skipped += 1
        if self._skipped == MOST_SKIPPED:
            raise UserError(f"the gradient norm was not finite for {MOST_SKIPPED} steps in turn: lower --learning_rate")
        log.warning("the gradient norm is %s: this step is left out", norm)
        return False

    def agree(self, value: int) -> int:
        """The first process's `value`, on every process."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.int64, device=self.device)
        with _together():
            dist.broadcast(shared, 0)
        return int(shared)

    def most(self, value: int) -> int:
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.int64, device=self.device)
        with _together():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this object: the loss scaler of fp16 and the count of steps left out."""
        return {"skipped": self._skipped, "scaler": None if self._scaler is None else self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; a scaler's part is left where there is none now."""
        self._skipped = int(state.get("skipped", 0))
        if self._scaler is not None and state.get("scaler"):
            self._scaler.load_state_dict(dict(state["scaler"]))

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """A user's fault in the block may be this process's alone: all but the first, which is heard anyway, log it.

        Where weights lie in shards, processes also meet inside the model: another one that is gone gets its sentence.
        """
        try:
            yield
        except UserError as fault:
            if self.rank:
                log.error("%s", fault)
            raise
        except RuntimeError as fault:
            told = isinstance(fault, ProcessLost) or not self.sharded
            if not told and (isinstance(fault, dist.DistError) or "gloo" in str(fault)):
                raise _lost(fault) from fault
            raise

    def close(self) -> None:
        """Leave the process group, at the end of a run."""
        if self.world > 1:
            dist.destroy_process_group()

    def average(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        with _together():
            dist.all_reduce(total)
        return float(total) / self.world


def average_gradients(parameters: Sequence[nn.Parameter], world: int) -> None:
    """Replace every gradient by its mean over the processes; one message per dtype. A missing gradient counts as 0."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in gradients])
        with _together():
            dist.all_reduce(flat)
        flat /= world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class ProcessLost(RuntimeError):
    """Another process of the run is gone, so none can go on."""


@contextmanager
def _together() -> Iterator[None]:
    """A call that all processes must make; what it raises when one of them is gone gets a sentence."""
    try:
        yield
    except RuntimeError as fault:
        raise _lost(fault) from fault


def _lost(fault: RuntimeError) -> ProcessLost:
    return ProcessLost(
        "another process of this run has ended or cannot be reached, so this one ends too: look for that process's own "
        f"message, mend it, and go on from the last state with --resume ({fault})"
    )


def launched(mixed_precision: str | None = None, timeout: datetime.timedelta | None = None) -> LocalRuntime:
    """The runtime of this process as accelerate's launcher set it up. `mixed_precision`: None = the launcher's.
    timeout: how long processes wait for each other, None = torch's limit.

    Raises UserError for launches that this trainer does not support (DeepSpeed, FSDP 1, fp8 autocast).
    """
    from accelerate import PartialState

    if _flag("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("the launcher asks for DeepSpeed: use a plain launch (`accelerate launch --num_processes N`)")
    sharding = _sharding() if _flag("ACCELERATE_USE_FSDP") else None
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if precision == "fp8":
        raise UserError("the launcher asks for mixed_precision = fp8: use bf16, and --fp8_base for FP8 weights")
    if sharding is not None and precision == "fp16":
        raise UserError("the launcher asks for FSDP and mixed_precision = fp16: use bf16, which needs no loss scaling")
    limit = {} if timeout is None else {"timeout": timeout}
    state = PartialState(cpu=_flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(), **limit)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != wanted:
        raise UserError(f"the launcher started {wanted} processes, but they do not know of each other: {_ON_CPUS}")
    return LocalRuntime(
        state.device,
        precision,
        rank=state.process_index,
        world=state.num_processes,
        sharding=sharding if wanted > 1 else None,
    )


def _sharding() -> dict[str, Any]:
    """The settings of `fully_shard` that the launcher's `--fsdp_*` ask for. Raises UserError for others."""
    from accelerate import FullyShardedDataParallelPlugin

    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"the launcher asks for FSDP {version}: use --fsdp_version 2, the only one that is supported")
    for variable, option in (("FSDP_OFFLOAD_PARAMS", "offload_params"), ("FSDP_ACTIVATION_CHECKPOINTING", "")):
        if _flag(variable):
            instead = "leave it out" if option else "use this trainer's --gradient_checkpointing"
            raise UserError(f"the launcher sets {variable}, which is not supported: {instead}")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    return {"reshard_after_forward": plugin.reshard_after_forward}


_ON_CPUS = "on CPUs, use `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`, or torchrun"


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")
