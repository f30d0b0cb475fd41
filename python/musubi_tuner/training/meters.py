"""What trackers show beside losses and rates: loss by noise level, memory, norms of the adapter.

`Meters` is filled during a step (`losses` by the step itself, `put` by hooks) and read once at its end; where nobody
reads, it does not grow. Of several processes each has its own; the tracker's is that of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

BANDS = 4
"""Bands of t with a mean loss each; four are enough to see structure and detail apart."""


class Meters:
    """Numbers of the step in progress."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums, self._counts = [0.0] * BANDS, [0] * BANDS
        self._values: dict[str, float] = {}

    def losses(self, t: Tensor, losses: Tensor) -> None:
        """t: [B] in (0, 1]; losses: [B], the weighted loss of each item."""
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self._sums[band_of(time)] += loss
            self._counts[band_of(time)] += 1

    def put(self, values: Mapping[str, float]) -> None:
        """Numbers by tag, shown with this step's."""
        self._values.update(values)

    def read(self) -> dict[str, float]:
        """All numbers by tag, and an empty table for the next step."""
        means = [
            (total / count, band)
            for band, (total, count) in enumerate(zip(self._sums, self._counts, strict=True))
            if count
        ]
        found = {f"loss/t_{band_name(band)}": mean for mean, band in means}
        found |= self._values | {"memory/peak_gib": peak_memory(self._device) / 2**30}
        self._sums, self._counts = [0.0] * BANDS, [0] * BANDS
        self._values.clear()
        return found


def band_of(t: float) -> int:
    """0 ... BANDS - 1, each band with its upper end."""
    return min(BANDS - 1, max(0, -int(-t * BANDS // 1) - 1))


def band_name(band: int) -> str:
    """`0250_0500`: t x 1000 of its ends."""
    return f"{1000 * band // BANDS:04d}_{1000 * (band + 1) // BANDS:04d}"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, or held by this process on the CPU; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
