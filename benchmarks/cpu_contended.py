"""One row of x while other processes are busy: what a pool that waits for its workers would lose.

Four processes compute without pause, so that every worker thread waits for a core now and then. Ours with all its
threads takes turns with ours on one thread, by the clock on the wall, and so does plain bf16, whose threads wait for
each other.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
import torch.nn.functional as F

import cpu_gates as gates
from cpu_gates import Gate, Row
from cpu_products import Weight
from musubi_kernels import fp8_linear

PROCESSES: Final = 4
ROUNDS: Final = 12
CALLS: Final = 30


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """`processes` processes that compute until the end of the block; they end with it, or when this process is gone."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_compute, args=(os.getpid(),), daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    try:
        time.sleep(1.5)  # until they compute
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _compute(parent: int) -> None:
    while os.getppid() == parent:
        sum(range(1_000_000))


def contended_row(w: Weight) -> Row:
    """Median wall time with every thread over that with one, in turns, under the load."""
    x = torch.randn(1, w.shape[1]).bfloat16()
    threads = max(2, os.cpu_count() or 2)
    products: dict[str, Callable[[], object]] = {
        "ours": lambda: fp8_linear(x, w.q, w.scale),
        "plain": lambda: F.linear(x, w.dense),
    }
    taken: dict[tuple[str, int], list[float]] = {(name, count): [] for name in products for count in (threads, 1)}
    try:
        with busy(PROCESSES):
            for _ in range(ROUNDS):
                for name, count in taken:
                    torch.set_num_threads(count)
                    taken[name, count] += walls(products[name], CALLS)
    finally:
        torch.set_num_threads(1)
    middle = {key: statistics.median(times) for key, times in taken.items()}
    slower = {name: middle[name, threads] / middle[name, 1] for name in products}
    figures = {"over serial": slower["ours"], "plain over serial": slower["plain"], "threads": float(threads)}
    gate = Gate("over serial", slower["ours"], gates.CONTENDED, most=True)
    ratios = {"plain": middle["plain", threads] / middle["ours", threads]}
    return Row("forward, contended", *w.shape, 1, middle["ours", threads] * 1e3, ratios, (gate,), figures)


def walls(call: Callable[[], object], calls: int) -> list[float]:
    """Seconds on the wall of each of `calls` calls, after one more."""
    call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
