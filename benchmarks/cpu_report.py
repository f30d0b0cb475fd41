"""What the CPU benchmark prints and writes: tables in Markdown, kernels.json, kernels.png."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpu_gates import Gate, Row

IN_COLUMNS = ("usual", "plain")


def table(rows: Sequence[Row], factor: float) -> str:
    """Ours with the two ratios that have gates, then other gates and figures, then the verdict."""
    lines = ["| what | N x K | M | ms | x usual | gate | x plain | gate | besides | |", "|---" * 10 + "|"]
    for row in rows:
        gates = {gate.name.removeprefix("x "): gate for gate in row.gates}
        cells = [row.what, f"{row.n} x {row.k}", str(row.m or ""), f"{row.milliseconds:.3g}" if row.ratios else ""]
        for name in IN_COLUMNS:
            cells += [f"{row.ratios[name]:.2f}" if name in row.ratios else "", _wanted(gates.get(name))]
        cells += [", ".join(_besides(row)), row.verdict(factor)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _wanted(gate: Gate | None) -> str:
    return f"{gate.wanted:.3g}" if gate else ""


def _besides(row: Row) -> Iterable[str]:
    gated = {gate.name: gate for gate in row.gates if gate.name.removeprefix("x ") not in IN_COLUMNS}
    yield from (str(gate) for gate in gated.values())
    for name, value in row.figures.items():
        if name not in gated:
            yield f"{name} {value:.3g}"


def peer_table(rows: Sequence[Row], errors: Mapping[str, float], absent: Mapping[str, str]) -> str:
    """How many times as long each peer takes as ours, by size; its error against its own weight; who is not there."""
    rows = [row for row in rows if row.what == "forward"]
    names = list(dict.fromkeys(name for row in rows for name in row.ratios if name not in IN_COLUMNS))
    lines = ["", "Time of each peer over ours (forward, bf16 x):", ""]
    if names:
        lines += [f"| N x K | M | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in rows if names else ():
        cells = [f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in names]
        lines.append(f"| {row.n} x {row.k} | {row.m} | {' | '.join(cells)} |")
    known = [f"{name} {error:.1e}" for name, error in errors.items()]
    lines += ["", f"errors against their own weights in float64: {', '.join(known) or 'none measured'}"]
    lines += [f"{name} not measured: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def memory_table(rows: Sequence[tuple[tuple[int, int, int], Mapping[str, float]]]) -> str:
    """Resident memory of one product beyond its result, MB."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for _, peaks in rows for name in peaks))
    lines = ["", "Memory of one forward beyond its result, MB:", ""]
    lines += [f"| N x K | M | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for (n, k, m), peaks in rows:
        cells = [f"{peaks[name] / 1e6:.0f}" if name in peaks else "" for name in names]
        lines.append(f"| {n} x {k} | {m} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row], factor: float) -> str:
    """How many rows with a gate hold, are at the limit, or miss."""
    verdicts = [row.verdict(factor) for row in rows if row.gates]
    held, limit, missed = (verdicts.count(verdict) for verdict in ("", "limit", "miss"))
    return (
        f"{len(verdicts)} rows with gates: {held} hold, {limit} at the limit, {missed} below {factor:g} of their gate"
    )


def save(folder: Path, title: str, rows: Sequence[Row], beside: Mapping[str, Any], factor: float) -> None:
    """kernels.json and, where matplotlib is installed, kernels.png."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [asdict(row) | {"verdict": row.verdict(factor) if row.gates else None} for row in rows]
    (folder / "kernels.json").write_text(json.dumps({"machine": title, **beside, "rows": listed}, indent=1))
    try:
        import matplotlib as mpl
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.what == "forward"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, name in zip(axes, ("plain", "usual"), strict=True):
        for (n, k), colour in zip(sorted({(row.n, row.k) for row in rows}), colours * 2, strict=False):
            line = [row for row in rows if (row.n, row.k) == (n, k)]
            axis.plot([r.m for r in line], [r.ratios[name] for r in line], "o-", color=colour, label=f"{n} x {k}", ms=4)
        wanted = {r.m: g.wanted for r in rows if r.k % 64 == 0 for g in r.gates if g.name == f"x {name}"}
        if wanted:
            axis.plot(sorted(wanted), [wanted[m] for m in sorted(wanted)], "k--", lw=1, label="gate")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        words = "plain bf16 F.linear" if name == "plain" else "dequantise, then F.linear"
        axis.set(xscale="log", yscale="log", xlabel="rows of x", ylabel=f"speed relative to {words}")
        ticks = sorted({row.m for row in rows})
        axis.set_xticks(ticks, [str(m) for m in ticks])
        axis.minorticks_off()
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "kernels.png", dpi=120)
    plt.close(figure)
