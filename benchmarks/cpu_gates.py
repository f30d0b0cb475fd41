"""What the CPU kernels are asked to reach, and when a row holds.

The machine decides which table applies: that of AVX-512 with BF16 where the processor has it, otherwise the one row of
AVX2. A ratio is the other's time over ours, so more is better.

At the limit: with one row of x a product does nothing but read its weight, and FP8 with a scale per 64 has 33/64 of
bf16's bytes. Where plain bf16 reads its weight at a share p of memory's speed (that of a read of the same bytes in the
same turn), no FP8 product can be more than 64/33/p times as fast. A row whose gate lies beyond that is marked `limit`
where ours reads at 85 % at least. It is counted apart from misses and from what holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from cpu_clock import native_isa
from musubi_kernels import _native

Verdict = Literal["", "limit", "miss"]

AT_THE_LIMIT: Final = 0.85
BYTES_OVER_BF16: Final = 33 / 64
FORWARD: Final = {
    1: (75.0, 3.0),
    4: (40.0, 1.9),
    8: (33.0, 1.8),
    16: (17.0, 1.08),
    64: (6.5, 1.0),
    256: (2.6, 0.98),
    1024: (1.4, 1.0),
    2304: (1.4, 1.0),
}
"""Least ratio to the usual path and to plain bf16, by rows of x."""
GRADIENT: Final = {64: 0.9, 256: 0.97, 1024: 1.03, 2304: 1.03}
STEP: Final = {256: (1.8, 1.0), 1024: (1.2, 1.0), 2304: (1.2, 1.0)}
PEAK_SHARE: Final = 0.9
"""Of the machine's arithmetic, from 1,024 rows on."""
AVX2_OVER_PLAIN: Final = 3.5
"""From 48 rows on, where torch's own products have AVX2 only, too."""
OTHER_TYPES: Final = {"float32": 1.15, "float16": 3.0}
"""Least ratio to plain of the same dtype, from 48 rows on."""
BRANCH_EXTRA: Final = 0.015
"""What a LoRA branch may cost beyond its share of the arithmetic."""
QUANTISE: Final = {"bfloat16": 22.0, "float32": 16.0}
COPY_SHARE: Final = 0.55
DEQUANTISE: Final = (35.0, 1.2)
SEARCH_TIMES: Final = 12.0
SEARCH_GAINS: Final = {"normal": 1.5, "Student's t(3)": 1.8, "outlier channels": 3.5}
SCRATCH_BYTES: Final = 16 << 20
CONTENDED: Final = 1.5


@dataclass(frozen=True)
class Gate:
    """A figure and what it must reach: at least `wanted`, or at most where `most`."""

    name: str
    value: float
    wanted: float
    most: bool = False

    def holds(self, factor: float) -> bool:
        """Whether `factor` of the gate is reached; 0 asks for nothing."""
        if self.most:
            return factor == 0 or self.value * factor <= self.wanted
        return self.value >= factor * self.wanted

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} ({'<=' if self.most else '>='} {self.wanted:.3g})"


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds of ours, the others' time over ours by name, figures beside them, gates."""

    what: str
    n: int
    k: int
    m: int
    milliseconds: float
    ratios: Mapping[str, float]
    gates: tuple[Gate, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    def verdict(self, factor: float) -> Verdict:
        """Whether all gates hold, or all but the one that memory forbids, or not."""
        missed = [gate for gate in self.gates if not gate.holds(factor)]
        if not missed:
            return ""
        ours, plain = (self.figures.get(name, 0.0) for name in ("read share", "plain read share"))
        beyond = [gate.name for gate in missed if factor * gate.wanted * plain * BYTES_OVER_BF16 > 1]
        return "limit" if [gate.name for gate in missed] == beyond == ["x plain"] and ours >= AT_THE_LIMIT else "miss"


def compared(
    what: str,
    size: tuple[int, int, int],
    times: Mapping[str, float],
    wanted: Mapping[str, float],
    *,
    figures: Mapping[str, float] | None = None,
    extra: tuple[Gate, ...] = (),
) -> Row:
    """The row of `times` in seconds; gates on the ratios that `wanted` names, 0.9 of them for ragged sizes."""
    n, k, m = size
    ours = times["ours"]
    ratios = {name: taken / ours for name, taken in times.items() if name != "ours"}
    ease = 1.0 if k % 64 == 0 else 0.9
    gates = tuple(Gate(f"x {name}", ratios[name], least * ease) for name, least in wanted.items() if least)
    return Row(what, n, k, m, ours * 1e3, ratios, gates + extra, figures or {})


def has_bf16() -> bool:
    """Whether this processor has AVX-512 with BF16, and no pin forbids it."""
    isa = native_isa()
    return isa is not None and "avx512bf16" in _native.module().isas() and isa.startswith("avx512")


def forward_gates(m: int) -> dict[str, float]:
    """What a bf16 product with `m` rows must reach on this machine."""
    if not has_bf16():
        return {"plain": AVX2_OVER_PLAIN} if m >= 48 else {}
    usual, plain = FORWARD.get(m, (0.0, 0.0))
    return {"usual": usual, "plain": plain}


def applied() -> str:
    """Which table applies here, in words."""
    if has_bf16():
        return "gates: those of AVX-512 with BF16, which this processor has"
    return "gates: those of AVX2 (3.5 x plain from 48 rows on), for want of AVX-512 with BF16"
