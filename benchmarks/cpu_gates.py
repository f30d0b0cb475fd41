"""What the CPU kernels are asked to reach, and when a row holds.

The machine decides which table applies: that of AVX-512 with BF16 where the processor has it, otherwise the one row of
AVX2. A ratio is the other's time over ours, so more is better.

At the limit: a gate may ask for what this machine cannot do, whatever the kernel, or for all but all of it. Reaching
it would take more bytes a second than the machine itself moves in the same turn (a read of as many bytes, a copy into
fresh memory), or more multiply-adds a second than it computes in registers. `least_seconds` is the time that the
machine needs for the bytes and the arithmetic of a row and nothing else, `possible` what the ratios would be in that
time. No ratio asks for more than 85 % of that, which is what the table asks of one row of x from memory: a row that
does not reach its gate but 85 % of what is possible is marked `limit`, and counted apart from misses and from what
holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from cpu_clock import native_isa
from musubi_kernels import _native

Verdict = Literal["", "limit", "miss"]

AT_THE_LIMIT: Final = 0.85
"""Of what is possible: no ratio asks for more."""
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
    """A figure and what it must reach: at least `wanted`, or at most where `most`.

    possible: the most that this machine allows, None where that is not known; not for a gate that asks for less.
    """

    name: str
    value: float
    wanted: float
    most: bool = False
    possible: float | None = None

    def verdict(self, factor: float) -> Verdict:
        """Whether `factor` of the gate is reached, or the machine's limit is near, or not; 0 asks for nothing."""
        if factor == 0 or (self.value * factor <= self.wanted if self.most else self.value >= factor * self.wanted):
            return ""
        return "limit" if not self.most and self.share >= AT_THE_LIMIT else "miss"

    @property
    def share(self) -> float:
        """Of what is possible; 0 where that is not known."""
        return self.value / self.possible if self.possible else 0.0

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
        """Whether all gates hold, or all but those that are the machine's limit, or not."""
        found = {gate.verdict(factor) for gate in self.gates}
        return "miss" if "miss" in found else "limit" if "limit" in found else ""

    def beyond(self, factor: float) -> tuple[Gate, ...]:
        """The gates not reached that ask for more than 85 % of what the machine can do, ours near enough or not."""
        return tuple(
            gate
            for gate in self.gates
            if gate.verdict(factor)
            and gate.possible is not None
            and AT_THE_LIMIT * gate.possible < factor * gate.wanted
        )


def least_seconds(*, moved: float = 0.0, speed: float = 0.0, operations: float = 0.0, flops: float = 0.0) -> float:
    """The time below which the machine can do no row: `moved` bytes at `speed` bytes a second, as measured in the same
    turn, or `operations` at `flops` a second, whichever takes longer. A speed of 0 is not known and says nothing."""
    return max(moved / speed if speed else 0.0, operations / flops if flops else 0.0)


def possible(times: Mapping[str, float], least: float) -> dict[str, float]:
    """The others' time over `least` seconds by name: what ours could reach at most. Nothing where `least` is 0."""
    return {name: taken / least for name, taken in times.items() if name != "ours"} if least > 0 else {}


def compared(
    what: str,
    size: tuple[int, int, int],
    times: Mapping[str, float],
    wanted: Mapping[str, float],
    *,
    least: float = 0.0,
    figures: Mapping[str, float] | None = None,
    extra: tuple[Gate, ...] = (),
) -> Row:
    """The row of `times` in seconds; gates on the ratios that `wanted` names, and `extra`; 0.9 of all for ragged sizes.

    least: what the machine needs for this row (`least_seconds`), 0 where that is not known.
    """
    n, k, m = size
    ours = times["ours"]
    ratios = {name: taken / ours for name, taken in times.items() if name != "ours"}
    ease = 1.0 if k % 64 == 0 else 0.9
    most = possible(times, least)
    gates = tuple(
        Gate(f"x {name}", ratios[name], asked * ease, possible=most.get(name))
        for name, asked in wanted.items()
        if asked
    )
    eased = tuple(replace(gate, wanted=gate.wanted / ease if gate.most else gate.wanted * ease) for gate in extra)
    return Row(what, n, k, m, ours * 1e3, ratios, gates + eased, figures or {})


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
