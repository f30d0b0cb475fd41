"""What benchmarks/gpu.py prints and writes: a table, JSON rows and a chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpu_clock import Ceilings, Figure


@dataclass(frozen=True)
class Row:
    """One product at one size, with every contestant's figures."""

    what: str
    n: int
    k: int
    m: int
    figures: dict[str, Figure]

    @classmethod
    def of(cls, what: str, n: int, k: int, m: int, figures: Mapping[str, Figure]) -> Row:
        return cls(what, n, k, m, dict(figures))

    def ratio(self, name: str, to: str = "auto") -> float | None:
        """How many times as long `name` takes as `to`."""
        ours, theirs = self.figures.get(to), self.figures.get(name)
        if ours is None or theirs is None or not ours.microseconds or theirs.microseconds is None:
            return None
        return theirs.microseconds / ours.microseconds

    def flops(self) -> float:
        """Multiplications and additions of the base product: three products of that size in a LoRA step's two."""
        return {"step": 2.0}.get(self.what, 1.0) * 2.0 * self.m * self.n * self.k

    def moved(self) -> float:
        """The fewest bytes: the FP8 weight and its scales, x and y in bf16, each once (twice in a step)."""
        weight = self.n * self.k * (1 + 2 / 64)
        if self.what == "quantize":
            return weight + 2 * self.n * self.k
        if self.what == "dequantize":
            return weight + 2 * self.n * self.k
        return {"step": 2.0}.get(self.what, 1.0) * (weight + 2.0 * self.m * (self.n + self.k))


def machine(device: torch.device) -> str:
    """One line: card, capability, driver side, torch and Triton."""
    try:
        import triton

        compiler = f"triton {triton.__version__}"
    except ImportError:
        compiler = "no triton"
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}, {compiler}: smoke run, nothing is timed"
    card = torch.cuda.get_device_properties(device)
    shape = f"sm_{card.major}{card.minor}, {card.multi_processor_count} SMs, {card.total_memory >> 30} GiB"
    return f"{card.name} ({shape}), torch {torch.__version__}, CUDA {torch.version.cuda}, {compiler}"


def line(row: Row) -> str:
    """One row as it is measured."""
    figures = ", ".join(
        f"{name} {figure.microseconds:.1f}" if figure.microseconds is not None else f"{name} ran"
        for name, figure in row.figures.items()
    )
    return f"{row.what} N={row.n} K={row.k} M={row.m} [us]: {figures}"


def table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """The ratios as markdown."""
    lines = [
        "| what | N x K | M | us | TFLOP/s | GB/s | of roofline | x plain bf16 | x usual | fastest way | peak MB "
        "(plain, usual) | kept MB (plain, usual) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        auto = row.figures.get("auto")
        if auto is None or auto.microseconds is None:
            continue
        seconds = auto.microseconds / 1e6
        share = ceilings.least_microseconds(row.flops(), row.moved()) / auto.microseconds
        ways = {name: f.microseconds for name, f in row.figures.items() if name.split()[0] in ("triton", "cuda")}
        best = min(ways, key=lambda name: ways[name] or 0.0) if ways else ""
        cells = [
            row.what,
            f"{row.n} x {row.k}",
            str(row.m or ""),
            f"{auto.microseconds:.1f}",
            f"{row.flops() / seconds / 1e12:.0f}" if row.m else "",
            f"{row.moved() / seconds / 1e9:.0f}",
            f"{share:.2f}",
            _times(row.ratio("plain bf16")),
            _times(row.ratio("usual")),
            best,
            _three(row, "peak"),
            _three(row, "kept"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _three(row: Row, what: str) -> str:
    sizes = [getattr(row.figures[name], what) for name in ("auto", "plain bf16", "usual") if name in row.figures]
    first, *rest = (f"{size / 1e6:.1f}" for size in sizes)
    return f"{first} ({', '.join(rest)})"


def save(rows: Sequence[Row], ceilings: Ceilings, device: torch.device, folder: Path) -> None:
    """gpu.json, with the rows so far."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(device), "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1))


def chart(rows: Sequence[Row], device: torch.device, folder: Path) -> None:
    """gpu.png, where something was timed and matplotlib is installed."""
    drawn = [row for row in rows if row.m and row.ratio("plain bf16")]
    if not drawn:
        return
    try:
        import matplotlib as mpl
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    products = [what for what in ("forward", "dx", "step", "dynamic") if any(row.what == what for row in drawn)]
    figure, panes = plt.subplots(1, len(products), figsize=(5 * len(products), 4), squeeze=False)
    for what, axes in zip(products, panes[0], strict=False):
        for shape in sorted({(row.n, row.k) for row in rows if row.what == what}):
            of_shape = [row for row in rows if row.what == what and (row.n, row.k) == shape]
            points = [(row.m, row.ratio("plain bf16")) for row in of_shape if row.ratio("plain bf16")]
            axes.plot(
                [m for m, _ in points], [ratio for _, ratio in points], marker=".", label="{} x {}".format(*shape)
            )
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="rows of x (M)", title=what, ylabel="speed relative to plain bf16")
    panes[0][0].legend(fontsize=6)
    figure.suptitle(machine(device), fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "gpu.png", dpi=120)
    plt.close(figure)
