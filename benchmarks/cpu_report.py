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
        cells += [", ".join((*_besides(row), *_possible(row, factor))), row.verdict(factor)]
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


def _possible(row: Row, factor: float) -> Iterable[str]:
    """What the machine allows where a gate asks for more, and how much of that is reached."""
    for gate in row.beyond(factor):
        yield f"{gate.name} {gate.possible:.3g} possible, {gate.share:.0%} of it"


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

    forward = [row for row in rows if row.what == "forward"]
    if not forward:
        return
    peers = [name for name in forward[0].ratios if name not in IN_COLUMNS]
    figure, axes = plt.subplots(1, 3 if peers else 2, figsize=(15.5 if peers else 11, 4.4), layout="constrained")
    by_shape = {f"{n} x {k}": [r for r in forward if (r.n, r.k) == (n, k)] for n, k in {(r.n, r.k): 0 for r in forward}}
    for axis, name in zip(axes, IN_COLUMNS, strict=False):
        wanted = {r.m: g.wanted for r in forward if r.k % 64 == 0 for g in r.gates if g.name == f"x {name}"}
        draw(axis, {label: {r.m: r.ratios[name] for r in line} for label, line in by_shape.items()}, wanted)
    axes[0].set_title("over the usual path: dequantise, then F.linear", fontsize=9)
    axes[1].set_title("over plain bf16 F.linear", fontsize=9)
    if peers:
        label, line = next(iter(by_shape.items()))
        draw(axes[2], {name: {r.m: r.ratios[name] for r in line} for name in peers}, {})
        axes[2].set_title(f"over other packages, {label}", fontsize=9)
    figure.suptitle(f"Their time over ours. {title}", fontsize=9)
    figure.savefig(folder / "kernels.png", dpi=120)
    plt.close(figure)


def draw(axis: Any, lines: Mapping[str, Mapping[int, float]], wanted: Mapping[int, float]) -> None:
    """Ratios over rows of x, one line each, and the gate dashed."""
    for label, line in lines.items():
        axis.plot(list(line), list(line.values()), "o-", label=label, markersize=4, linewidth=1.2)
    if wanted:
        axis.plot(sorted(wanted), [wanted[m] for m in sorted(wanted)], "k--", linewidth=1, label="gate")
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="rows of x")
    sizes = sorted({m for line in lines.values() for m in line})
    axis.set_xticks(sizes, [str(m) for m in sizes], fontsize=7)
    lowest, highest = axis.get_ylim()
    ticks = [each for each in (0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if lowest <= each <= highest]
    axis.set_yticks(ticks, [f"{each:g}" for each in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=7)
