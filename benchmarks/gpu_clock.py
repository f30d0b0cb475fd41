"""How contestants are timed on a GPU: as CUDA graphs, replayed in turn; and what the card can do at most."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """`calls` do the same work on different copies of the weight; `once` is one of them, for its memory."""

    calls: Sequence[Call]
    kept: int = 0
    """Bytes that autograd holds for the backward, beside the weight and x."""


@dataclass(frozen=True)
class Figure:
    """Device microseconds of one call (None where nothing is timed), bytes at its peak over what was there before."""

    microseconds: float | None
    peak: int
    kept: int


@dataclass(frozen=True)
class Ceilings:
    """Measured on this card: bytes per second of a large copy (read and written), FLOP/s of a large bf16 product."""

    bytes_per_second: float = 0.0
    flops: float = 0.0

    def sentence(self) -> str:
        if not self.flops:
            return "ceilings: nothing is timed"
        copy, product = self.bytes_per_second / 1e9, self.flops / 1e12
        return f"ceilings: copy {copy:.0f} GB/s, bf16 product of 8192 cubed {product:.0f} TFLOP/s"

    def least_microseconds(self, flops: float, moved: float) -> float:
        """The roofline: no call that does `flops` and moves `moved` bytes is faster."""
        if not self.flops:
            return 0.0
        return 1e6 * max(flops / self.flops, moved / self.bytes_per_second)


class Clock(Protocol):
    """Times a row's contestants on its device."""

    device: torch.device

    def measure(self, made: Mapping[str, Contestant]) -> dict[str, Figure]:
        """A figure for each contestant."""

    def ceilings(self) -> Ceilings:
        """What this device reaches."""


class NoClock:
    """Runs every contestant once on the CPU, so that the benchmark cannot break unseen."""

    device = torch.device("cpu")

    def measure(self, made: Mapping[str, Contestant]) -> dict[str, Figure]:
        for contestant in made.values():
            for call in contestant.calls:
                call()
        return {name: Figure(None, 0, contestant.kept) for name, contestant in made.items()}

    def ceilings(self) -> Ceilings:
        return Ceilings()


class DeviceClock:
    """CUDA graphs, `rounds` replays each, in turn; medians."""

    def __init__(self, rounds: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._rounds = rounds

    def measure(self, made: Mapping[str, Contestant]) -> dict[str, Figure]:
        peaks = {name: self._peak(contestant) for name, contestant in made.items()}
        graphs = {name: captured(contestant.calls) for name, contestant in made.items()}
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(self._rounds):
            for name, graph in graphs.items():
                times[name].append(elapsed(graph.replay) / len(made[name].calls))
        return {
            name: Figure(1e6 * statistics.median(times[name]), peaks[name], contestant.kept)
            for name, contestant in made.items()
        }

    def ceilings(self) -> Ceilings:
        source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=self.device) for _ in range(2))
        copy = typical(lambda: target.copy_(source))
        a, b = (torch.randn(8192, 8192, device=self.device).bfloat16() for _ in range(2))
        return Ceilings(2 * (1 << 30) / copy, 2 * 8192**3 / typical(lambda: a @ b))

    def _peak(self, contestant: Contestant) -> int:
        """Bytes over what was allocated before, at the highest, of one call after a first one."""
        contestant.calls[0]()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.calls[0]()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def typical(call: Call) -> float:
    """Median seconds of ten calls after two."""
    return statistics.median([elapsed(call) for _ in range(12)][2:])


def elapsed(call: Call) -> float:
    """Seconds of `call` on the current stream, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, after a run of each on a side stream (compiles, tunes, makes handles)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph
