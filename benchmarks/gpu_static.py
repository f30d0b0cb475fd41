"""What the compiler makes of every GPU kernel, for every target, without a GPU: a report, gates and stored baselines.

Compiles each entry of the Triton registry ahead of time, reads the machine code (see gpu_sass.py), and does the same
for a plain bf16 product of the same tile, so that the cost of decoding weights shows as extra instructions. The CUDA
C++ kernels are read from the compiled module where it was built with nvcc.

    python benchmarks/gpu_static.py --out build/gpu_static     # table, report.json, report.png
    python benchmarks/gpu_static.py --check                    # exit 1 on a missed gate or a drift from the baseline
    python benchmarks/gpu_static.py --update                   # rewrite the baseline

`--all` compiles rare types too (fp16 scales, e5m2 and so on); baselines hold the core only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_compile import PLAIN, SHIPPED, Compiler, Job, Report
from gpu_gates import DRIFT, TRIAL, baseline_rows, drifts, misses, trial_misses
from gpu_native import NativeKernel, module_path, native_misses, read_object
from gpu_sass import SHARED_LIMIT

BASELINE = Path(__file__).resolve().parent / "gpu_static_baseline.json"
TARGETS = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Survey:
    """All rows: shipped kernels, plain products, CUDA kernels."""

    shipped: list[Report]
    plain: list[Report]
    native: list[NativeKernel]

    def companion(self, report: Report) -> Report | None:
        """The plain product with the same tile, launch, type and target as a forward, or None."""
        if report.kernel != "fp8_linear_fwd":
            return None
        wanted = launch_of(report)
        return next((r for r in self.plain if r.target == report.target and launch_of(r) == wanted), None)

    def missed(self) -> list[str]:
        """Every missed gate, in sentences."""
        found = [words for report in self.shipped for words in misses(report)]
        return found + native_misses(self.native, TARGETS)


def launch_of(report: Report) -> str:
    """What decides a plain product too, out of a row's name: `128x128x64-w8s3-bf16`, with `-swap` before the type."""
    tile, launch, *rest = report.config.split("-")
    kind = next((word for word in rest if word in ("bf16", "fp16", "fp32")), "")
    return "-".join([tile, launch, *(["swap"] if "swap" in rest else []), kind])


def kind_of(report: Report) -> str:
    """The type of x."""
    return launch_of(report).rpartition("-")[2]


def survey(*, everything: bool = False, plain: bool = True, only: str = "", workers: int = 2) -> Survey:
    """Compile and read the core of what is shipped, or `everything`, with `only` in its name; companions if `plain`."""
    with Compiler(workers) as compiler:
        jobs = [
            Job(SHIPPED, index, target)
            for index, entry in enumerate(compiler.entries(SHIPPED))
            if (everything or entry["core"]) and only in entry["name"]
            for target in entry["targets"]
        ]
        beside = [
            Job(PLAIN, index, target)
            for index, entry in enumerate(compiler.entries(PLAIN) if plain else [])
            for target in entry["targets"]
        ]
        reports = compiler.reports(jobs + beside)
    path = module_path()
    return Survey(reports[: len(jobs)], reports[len(jobs) :], read_object(path) if path else [])


def table(result: Survey) -> str:
    """The rows as text."""
    head = ("kernel", "config", "sm", "regs", "spill", "shared KiB", "MMA", "per step", "per MMA", "plain", "copies")
    rows = [head]
    for report in sorted(result.shipped, key=lambda r: (r.kernel, r.target, r.config)):
        if report.error:
            rows.append((report.kernel, report.config, str(report.target), "does not compile", *[""] * 7))
            continue
        beside = result.companion(report) if report.hot else None
        rows.append(
            (
                report.kernel,
                report.config,
                str(report.target),
                str(report.registers),
                str(report.spill_loads + report.spill_stores),
                f"{report.shared / 1024:.0f}/{SHARED_LIMIT[report.target]}",
                " ".join(f"{count} {name}" for name, count in report.mma.items()),
                f"{report.per_step:.0f}" if report.steps else "",
                f"{report.per_mma:.2f}" if report.mma else "",
                f"{beside.per_step:.0f}" if beside else "",
                str(report.wide_copies),
            )
        )
    return _aligned(rows) + ("\n\n" + _native_table(result.native) if result.native else "")


def _native_table(rows: list[NativeKernel]) -> str:
    lines = [("CUDA kernel", "sm", "regs", "stack", "shared")]
    for row in sorted(rows, key=lambda r: (r.kernel, r.target)):
        lines.append((row.kernel, *map(str, (row.target, row.registers, row.stack, row.shared))))
    return _aligned(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def trial_rows(result: Survey) -> list[str]:
    """How the forwards compare with the trial's counts."""
    forwards = [report for report in result.shipped if report.kernel == "fp8_linear_fwd" and report.hot]
    return trial_misses(forwards, {report.key: kind_of(report) for report in forwards})


def write(result: Survey, folder: Path) -> None:
    """report.json and report.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {
        "triton": importlib.metadata.version("triton"),
        "note": "read from machine code; nothing here was run on a GPU",
        "shipped": [{**asdict(r), "per_step": r.per_step, "per_mma": r.per_mma} for r in result.shipped],
        "plain": [{**asdict(r), "per_step": r.per_step, "per_mma": r.per_mma} for r in result.plain],
        "cuda": [asdict(row) for row in result.native],
    }
    (folder / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    _draw(result, folder / "report.png")


def _draw(result: Survey, path: Path) -> None:
    """Instructions of a warp per K step by target: the fused forwards and the plain product of the same tile."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    forwards = [
        r for r in result.shipped if r.hot and r.kernel == "fp8_linear_fwd" and r.steps and kind_of(r) == "bf16"
    ]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, target in zip(axes.flat, TARGETS, strict=True):
        rows = sorted((r for r in forwards if r.target == target), key=lambda r: (r.tile or (), r.config))
        names = [r.config for r in rows]
        beside = [result.companion(r) for r in rows]
        axis.barh(names, [r.per_step for r in rows], height=0.7, label="fused FP8 forward", color="#3b6ea5")
        plain = [b.per_step if b else 0.0 for b in beside]
        axis.barh(names, plain, height=0.3, label="plain product, same tile", color="#d9a441")
        axis.set_title(f"sm_{target}")
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    axes.flat[0].legend(fontsize=8)
    figure.suptitle("Instructions of a warp per K step, read from machine code (not measured on a GPU)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; the exit code is 1 where `--check` found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for report.json and report.png")
    parser.add_argument("--check", action="store_true", help="gates and baseline; exit 1 on a miss")
    parser.add_argument("--update", action="store_true", help="rewrite the baseline")
    parser.add_argument("--all", action="store_true", help="rare types too")
    parser.add_argument("--only", default="", metavar="WORDS", help="kernels with this in their name, no plain ones")
    parser.add_argument("--workers", type=int, default=2, help="compile processes (default 2)")
    options = parser.parse_args(arguments)
    if options.only and (options.check or options.update):
        parser.error("--only shows a part; --check and --update are about all kernels")

    started, version = time.monotonic(), importlib.metadata.version("triton")
    result = survey(everything=options.all, plain=not options.only, only=options.only, workers=options.workers)
    print(table(result))
    count = f"{len(result.shipped)} Triton, {len(result.plain)} plain, {len(result.native)} CUDA rows"
    print(f"\n{count}, Triton {version}, {time.monotonic() - started:.0f} s; nothing ran on a GPU")
    if not result.native:
        print("CUDA C++: the compiled module holds no GPU code (built without nvcc)")
    print(f"\nThe trial's counts at 128 x 128 x 64, 8 warps ({len(TRIAL)} of them):")
    print("\n".join(trial_rows(result)) or "all reached")
    if options.out:
        write(result, options.out)
    if options.update:
        rows = baseline_rows(result.shipped if not options.all else survey(workers=options.workers).shipped)
        BASELINE.write_text(json.dumps({"triton": version, "rows": rows}, indent=1) + "\n")
        print(f"wrote {len(rows)} rows to {BASELINE}")
    if not options.check:
        return 0
    found = result.missed()
    if not options.all:
        found += drifts(result.shipped, json.loads(BASELINE.read_text()), version)
    print(f"\n{len(found)} misses (drift allowed: {DRIFT:.0%})", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
