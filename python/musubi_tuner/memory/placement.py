"""Where tensors live: names of devices and dtypes as users write them, and giving memory back.

Nothing here is asked at import; a device is looked for when a command names one or needs its default.
"""

import gc
from collections.abc import Mapping

import torch

from musubi_tuner.config.errors import UserError

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Compute dtypes by the names that options take."""

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def dtype_name(text: str) -> str:
    """The long name of a dtype's short one (`bf16` -> `bfloat16`); others as they are."""
    return _SHORT.get(text, text)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: CUDA where there is one, else the CPU. UserError: it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as fault:
        raise UserError(f"--device {name} is no device: use cpu, cuda, or cuda:1 and the like") from fault
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine offers {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def release(device: torch.device) -> None:
    """Give freed memory back to the device, after the last reference to it is gone.

    The CPU's is free with the reference; a CUDA device keeps a cache, which is emptied here.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
