"""How a run uses its machine: switches of CUDA's libraries, and how long processes wait for each other."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass

import torch

from musubi_tuner.config.options import option

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MachineOptions:
    """Machine"""

    cuda_allow_tf32: bool = option(False, help="multiply float32 in TF32 on CUDA: faster, ten bits of mantissa")
    cuda_cudnn_benchmark: bool = option(False, help="let cuDNN try its convolutions for every shape and keep the best")
    ddp_timeout: int | None = option(
        None, help="minutes that a process waits for the others; torch's limit if not given", minimum=1
    )

    @property
    def timeout(self) -> datetime.timedelta | None:
        return None if self.ddp_timeout is None else datetime.timedelta(minutes=self.ddp_timeout)


def prepare_machine(chosen: MachineOptions, device: torch.device) -> None:
    """Set the switches that were asked for; one that this device does not have is told by name."""
    asked = [name for name in ("cuda_allow_tf32", "cuda_cudnn_benchmark") if getattr(chosen, name)]
    if asked and device.type != "cuda":
        log.warning("%s: no effect on %s", ", ".join(asked), device)
    if chosen.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if chosen.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
