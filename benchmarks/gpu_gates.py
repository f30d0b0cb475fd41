"""What every compiled GPU kernel must be, checked on its machine code, and how reports compare with a baseline.

Each function returns sentences, one for each miss; an empty list is a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gpu_compile import Report
from gpu_sass import SHARED_LIMIT

DRIFT = 0.05
"""How far instructions per matrix instruction may move from the baseline, either way."""

# Instructions of a warp in one K step of the fused forward at 128 x 128 x 64 with 8 warps that a trial reached, by
# (target, type of x). They are upper limits.
TRIAL_TILE = (128, 128, 64)
TRIAL_WARPS = 8
TRIAL = {
    (80, "bf16"): 452,
    (86, "bf16"): 452,
    (89, "bf16"): 452,
    (89, "fp16"): 330,
    (90, "bf16"): 180,
    (90, "fp16"): 132,
    (100, "bf16"): 147,
    (120, "bf16"): 380,
}


def misses(report: Report) -> list[str]:
    """What is wrong with one kernel at one target."""
    if report.error:
        return [f"{report.key}: does not compile: {report.error}"]
    found = []
    if report.spill_loads or report.spill_stores:
        found.append(f"spills: {report.spill_loads} loads and {report.spill_stores} stores of local memory")
    limit = SHARED_LIMIT[report.target] * 1024
    if report.shared > limit:
        found.append(f"{report.shared} bytes of shared memory, a block on sm_{report.target} has at most {limit}")
    if report.hot:
        found += _hot_misses(report)
    return [f"{report.key}: {words}" for words in found]


def _hot_misses(report: Report) -> list[str]:
    found = []
    if report.slow_conversions:
        found.append(f"{report.slow_conversions} F2F conversions in the hot loop")
    wanted = expected_mma(report)
    if not any(wanted in name for name in report.mma):
        found.append(f"matrix instructions {sorted(report.mma) or 'none'} in the hot loop, expected {wanted}")
    if report.wide_copies < 1:
        found.append("no asynchronous copies of 16 bytes or whole tiles")
    return found


def expected_mma(report: Report) -> str:
    """The part of an opcode's name that a product kernel must show: the widest unit that its tile can use."""
    letter = {"fp8_linear_dynamic": "Q", "int8_linear_dynamic": "I"}.get(report.op, "H")
    if letter == "Q" and report.rows < 64 and report.target in (90, 100):
        return "HMMA"  # their FP8 units start at 64 rows; Triton widens short tiles, which wait for memory anyway
    if report.target == 90 and report.rows >= 64 and report.warps >= 4:
        return f"{letter}GMMA"
    if report.target == 100 and report.rows >= 64:
        return f"UTC{letter}MMA"
    return f"{letter}MMA"


def baseline_rows(reports: Iterable[Report]) -> dict[str, dict[str, float]]:
    """What is stored of the hot kernels."""
    return {
        report.key: {
            "per_mma": round(report.per_mma, 4),
            "per_step": round(report.per_step, 1),
            "registers": report.registers,
        }
        for report in sorted(reports, key=lambda r: r.key)
        if report.hot and not report.error
    }


def drifts(reports: Iterable[Report], baseline: Mapping[str, Any], triton_version: str) -> list[str]:
    """Where the hot loops differ from the stored ones."""
    if baseline.get("triton") != triton_version:
        return [
            f"the baseline was written with Triton {baseline.get('triton')}, this is {triton_version}: look at the "
            "report, then run `python benchmarks/gpu_static.py --update`"
        ]
    rows, now = baseline["rows"], baseline_rows(reports)
    found = [f"{key}: not in the baseline; run with --update" for key in sorted(set(now) - set(rows))]
    found += [
        f"{key}: in the baseline, and no longer compiled; run with --update" for key in sorted(set(rows) - set(now))
    ]
    for key in sorted(set(rows) & set(now)):
        before, after = rows[key]["per_mma"], now[key]["per_mma"]
        if abs(after - before) > DRIFT * before:
            found.append(
                f"{key}: {after:.3f} instructions per matrix instruction, {before:.3f} in the baseline "
                f"({after / before - 1:+.0%}, allowed {DRIFT:.0%}); mend it, or run with --update and say why"
            )
    return found


def trial_misses(reports: Iterable[Report], kinds: Mapping[str, str]) -> list[str]:
    """Fused forwards at the trial's tile that need more instructions than the trial did, or are not there at all.

    Args:
        reports: of the forward kernels with block scales.
        kinds: the type of x by the report's key.
    """
    best: dict[tuple[int, str], float] = {}
    for report in reports:
        if report.tile == TRIAL_TILE and report.warps == TRIAL_WARPS and report.steps and report.key in kinds:
            slot = (report.target, kinds[report.key])
            best[slot] = min(best.get(slot, float("inf")), report.per_step)
    found = []
    for (target, kind), limit in TRIAL.items():
        reached = best.get((target, kind))
        if reached is None:
            found.append(f"sm_{target} {kind}: no forward at {TRIAL_TILE} with {TRIAL_WARPS} warps")
        elif reached > limit:
            found.append(f"sm_{target} {kind}: {reached:.0f} instructions a K step, the trial's {limit}")
    return found
