"""`--show_timesteps`: what a run would sample, as a picture or as text, without a model or a data set.

Draws are keyed like a run's (and stratified if it is), for latents of the family's default size; the bars of the loss
weight say how much the squared error at that t counts on average.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import FamilySpec
from musubi_tuner.flow import keyed
from musubi_tuner.flow.strata import stratified
from musubi_tuner.flow.weighting import WEIGHTS
from musubi_tuner.training.checkpoint import output_folder, output_name
from musubi_tuner.training.config import RunOptions, SaveOptions, TimestepOptions

log = logging.getLogger(__name__)

DRAWS, ROWS, COLUMNS = 100_000, 25, 60


@dataclass(frozen=True)
class Histogram:
    """By ROWS equal ranges of t, from 0 (data) to 1 (noise). shares: of the draws. weights: mean loss weight."""

    shares: Tensor
    weights: Tensor
    title: str


def histogram(times: TimestepOptions, spec: FamilySpec, seed: int) -> Histogram:
    """The times that a run of these options would draw. Raises UserError for an impossible range."""
    defaults = spec.tasks[spec.default_task]
    shape = spec.latents.shape(defaults.frames, defaults.size[1], defaults.size[0])
    u = keyed.uniform((DRAWS,), seed, "show timesteps")
    if times.stratified:
        u = stratified(u, torch.arange(DRAWS), DRAWS, times.num_timestep_buckets or 1, seed, "show timesteps")
    t = times.distribution(shape).quantile(u)
    weight = WEIGHTS[times.weighting_scheme]
    bins = (torch.ceil(t * ROWS).long() - 1).clamp(0, ROWS - 1)
    counts = torch.bincount(bins, minlength=ROWS)
    sums = torch.zeros(ROWS, dtype=torch.float64).scatter_add_(
        0, bins, torch.ones_like(t) if weight is None else weight(t)
    )
    width, height = defaults.size
    title = f"{times.timestep_sampling}, t x 1000 in {1000 * times.range[0]:g} ... {1000 * times.range[1]:g}"
    title += ", cut to the range" if times.preserve_distribution_shape else ""
    title += f", {times.num_timestep_buckets} buckets" if times.stratified else ""
    title += f"; {times.weighting_scheme} weights" if weight is not None else ""
    title += f"; {DRAWS:,} draws at {width} x {height}"
    return Histogram(counts.double() / DRAWS, torch.where(counts > 0, sums / counts.clamp(min=1), torch.nan), title)


def text(of: Histogram) -> str:
    """Bars of characters: share of the draws and the mean loss weight for each range of t x 1000."""
    longest = float(of.shares.max())
    lines = [f"timesteps: {of.title}"]
    for row in range(ROWS):
        share, weight = float(of.shares[row]), float(of.weights[row])
        bar = "#" * round(COLUMNS * share / longest)
        low, high = 1000 * row // ROWS, 1000 * (row + 1) // ROWS
        shown = "" if math.isnan(weight) else f"weight {weight:.3g}"
        lines.append(f"{low:4d} - {high:4d} {share:7.2%} {shown:<14s} {bar}".rstrip())
    return "\n".join(lines)


def image(of: Histogram, path: Path) -> None:
    """A PNG of both curves. Raises UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as fault:
        raise UserError(
            "--show_timesteps image needs matplotlib: `pip install matplotlib`, or use --show_timesteps console"
        ) from fault
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    middle = (torch.arange(ROWS) + 0.5) * 1000 / ROWS
    axes.bar(middle.tolist(), (100 * of.shares).tolist(), width=950 / ROWS, label="share of draws")
    axes.set(xlabel="t x 1000 (1000 is noise)", ylabel="%", xlim=(0, 1000))
    axes.set_title(of.title, fontsize=9)
    other = axes.twinx()
    other.plot(middle.tolist(), of.weights.tolist(), color="tab:red", marker=".", label="loss weight")
    other.set_ylabel("mean loss weight")
    other.set_ylim(bottom=0)
    figure.legend(loc="outside lower right", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def show_timesteps(spec: FamilySpec, options: Resolved) -> bool:
    """Show them if the options ask for it; True where they did and the run is to end."""
    times, save = options[TimestepOptions], options[SaveOptions]
    if times.show_timesteps is None:
        return False
    found = histogram(times, spec, options[RunOptions].seed or 0)
    if times.show_timesteps == "console":
        log.info("%s", text(found))
        return True
    path = output_folder(save.output_dir) / f"{output_name(save.output_name)}-timesteps.png"
    image(found, path)
    log.info("timesteps: %s; drawn to %s", found.title, path)
    return True
