"""`--fp8_report`: how much every FP8 weight lost against the checkpoint, layer by layer.

The checkpoint is read a second time, one weight after the other, and compared with what the slot computes with. The
table says what `--fp8_exclude` would buy; weights that an adapter was merged into are compared without it, and marked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from musubi_tuner.nn.linear import Fp8Linear
from musubi_tuner.weights.keys import Rename
from musubi_tuner.weights.reader import Checkpoint
from musubi_tuner.weights.write import atomic_file

log = logging.getLogger(__name__)

WORST = 5


@dataclass(frozen=True)
class Row:
    """One weight. error: Frobenius norm of the difference over that of the weight. bytes_saved: against bf16."""

    name: str
    error: float
    bytes_saved: int

    @property
    def decibel(self) -> float:
        """Signal to quantisation noise."""
        return -20 * math.log10(self.error) if self.error > 0 else math.inf


def measure(model: nn.Module, checkpoint: Checkpoint, rename: Rename) -> list[Row]:
    """A row for each FP8 slot of `model` whose weight the file holds in high precision, worst first."""
    slots = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, Fp8Linear)}
    rows = []
    for key, info in checkpoint.header.tensors.items():
        slot = slots.get(rename(key) or "")
        if slot is None or info.dtype.itemsize == 1:
            continue
        exact = checkpoint.read(key).to(slot.weight.device, torch.float32)
        error = torch.linalg.vector_norm(slot.dequantized() - exact) / torch.linalg.vector_norm(exact).clamp(min=1e-30)
        held = slot.weight.nbytes + slot.scale_weight.nbytes
        rows.append(Row((rename(key) or key), float(error), 2 * exact.numel() - held))
    return sorted(rows, key=lambda row: -row.error)


def write(rows: Sequence[Row], path: Path) -> None:
    """All rows as a table of tabs, and the worst of them to the log."""
    lines = ["weight\trelative_error\tsqnr_db\tbytes_saved"]
    lines += [f"{r.name}\t{r.error:.6g}\t{r.decibel:.2f}\t{r.bytes_saved}" for r in rows]
    with atomic_file(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    mean = sum(r.error for r in rows) / max(1, len(rows))
    log.info("FP8 error of %d weights: mean %.2e; all in %s; the worst:", len(rows), mean, path)
    for row in rows[:WORST]:
        log.info("  %s: %.2e (%.1f dB), saves %.1f MB", row.name, row.error, row.decibel, row.bytes_saved / 1e6)
