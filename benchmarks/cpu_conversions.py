"""Rows of quantise and dequantise, and what the search for better scales gains and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch

import cpu_gates as gates
from cpu_clock import Call, by_libc, in_fresh_pages, in_turn, into_new
from cpu_gates import Gate, Row, compared
from cpu_peers import usual_weight
from cpu_products import Weight, readers
from musubi_kernels import dequantize_fp8, quantize_fp8

BLOCK: Final = 64


def quantise_row(w: torch.Tensor) -> Row:
    """Against the usual quantisation in torch operations, and the bytes moved per second against those of a copy.

    Ours makes a new tensor; the copy goes into memory that exists. `clone` is the copy that makes a new tensor.
    """
    target = torch.empty_like(w)
    q, scale = quantize_fp8(w)
    calls = {
        "ours": lambda: quantize_fp8(w),
        "usual": lambda: usual_codes(w),
        "clone": w.clone,
        "copy": lambda: target.copy_(w),
    }
    stored = q.nbytes + scale.nbytes
    times, least = moving(calls, w.nbytes, stored)
    figures = speeds(w.nbytes + stored, times, least, 2 * w.nbytes / times["copy"])
    kind = str(w.dtype).removeprefix("torch.")
    share = Gate(
        "copy share", figures["copy share"], gates.COPY_SHARE, possible=figures["copy share"] * times["ours"] / least
    )
    size, wanted = (w.shape[0], w.shape[1], 0), {"usual": gates.QUANTISE[kind]}
    return compared(f"quantise {kind}", size, times, wanted, least=least, figures=figures, extra=(share,))


def moving(calls: Mapping[str, Call], source: int, size: int) -> tuple[dict[str, float], float]:
    """(times of the calls, the time that the machine needs in the same turn to read `source` bytes and write `size`
    into a new tensor, whatever it computes between).

    The fastest of three ways to write counts, and the faster of two to read what a source has more than the result.
    Each has a source of its own: one that another has just read would come from cache, as ours does not.
    """
    first, second, third = (torch.ones(min(source, size), dtype=torch.uint8) for _ in range(3))
    writing = {
        "written by torch": lambda: into_new(first, size),
        "written by libc": lambda: by_libc(second, size),
        "fresh": lambda: in_fresh_pages(third, size),
    }
    reading = readers(source - size, "the rest") if source > size else {}
    times = in_turn({**calls, **writing, **reading})
    return times, sum(min(times.pop(name) for name in ways) for ways in (writing, reading) if ways)


def usual_codes(w: torch.Tensor) -> object:
    groups = w.view(w.shape[0], -1, BLOCK) if w.shape[1] % BLOCK == 0 else w
    scale = (groups.abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-8).float()
    scaled = torch.nan_to_num(groups.float() / scale, 0.0)
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(w.shape)


def dequantise_row(w: Weight) -> Row:
    """Against the usual dequantisation, and against torch's copy of the result into a new tensor."""
    target = torch.empty_like(w.dense)
    calls = {
        "ours": lambda: dequantize_fp8(w.q, w.scale),
        "usual": lambda: usual_weight(w.q, w.scale),
        "clone": w.dense.clone,
        "copy": lambda: target.copy_(w.dense),
    }
    times, least = moving(calls, w.stored, w.dense.nbytes)
    usual, clone = gates.DEQUANTISE
    figures = speeds(w.stored + w.dense.nbytes, times, least, 2 * w.dense.nbytes / times["copy"])
    return compared("dequantise", (*w.shape, 0), times, {"usual": usual, "clone": clone}, least=least, figures=figures)


def speeds(moved: int, times: Mapping[str, float], least: float, copying: float) -> dict[str, float]:
    """Bytes per second that ours moves, beside the most that is possible, and its share of a copy into memory that
    exists."""
    ours = moved / times["ours"]
    return {"copy share": ours / copying, "GB/s": ours / 1e9, "GB/s possible": moved / least / 1e9}


def search_row(w: torch.Tensor) -> Row:
    """The search for scales against plain quantisation: `x plain` is below one, its inverse has the gate."""
    times = in_turn({"ours": lambda: quantize_fp8(w, search="mse"), "no search": lambda: quantize_fp8(w)})
    longer = times["ours"] / times["no search"]
    gate = Gate("times quantise", longer, gates.SEARCH_TIMES, most=True)
    return compared("search", (w.shape[0], w.shape[1], 0), times, {}, figures={"times quantise": longer}, extra=(gate,))


def gain_rows() -> Iterator[Row]:
    """Signal to noise of the search over plain scales, in dB, for three kinds of weights; nothing is timed.

    The mean of eight draws: how far outlier channels help depends on how many of them share a block.
    """
    for name in gates.SEARCH_GAINS:
        draws = [weight_like(name, seed) for seed in range(8)]
        plain, found = (
            sum(decibels(w, *quantize_fp8(w, search=search)) for w in draws) / len(draws) for search in (None, "mse")
        )
        gate = Gate("dB gained", found - plain, gates.SEARCH_GAINS[name])
        figures = {"dB": plain, "dB gained": found - plain}
        yield Row(f"search, {name}", *draws[0].shape, 0, 0.0, {}, (gate,), figures)


def weight_like(kind: str, seed: int) -> torch.Tensor:
    """A bf16 weight [512, 1024] of normal numbers, of Student's t with 3 degrees of freedom, or with one column in a
    hundred 30 times as large."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(512, 1024, generator=generator) * 0.02
    if kind == "Student's t(3)":
        w = w / torch.randn(3, *w.shape, generator=generator).square().mean(0).sqrt()
    if kind == "outlier channels":
        w[:, torch.randperm(w.shape[1], generator=generator)[: w.shape[1] // 100]] *= 30
    return w.bfloat16()


def decibels(w: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> float:
    """Signal to quantisation noise."""
    exact = w.double()
    error = q.float().double() * scale.double().squeeze(-1).repeat_interleave(BLOCK, 1) - exact
    return float(10 * (exact.square().sum() / error.square().sum()).log10())


def conversion_rows(weight: Weight) -> Iterator[Callable[[], Row]]:
    """One thunk a row."""
    w = weight.dense
    yield lambda: quantise_row(w)
    yield lambda: quantise_row(w.float())
    yield lambda: dequantise_row(weight)
