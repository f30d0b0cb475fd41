"""How contestants are timed on a CPU, and what this machine can do at most.

Contestants take turns in one process on one thread; what counts is the lower quartile of their CPU time, since wall
times on shared machines mean little. The machine's own limits are measured in the same sitting: reading memory that no
cache holds, copying it, and arithmetic in registers (`arithmetic.cpp`, compiled for this processor on the spot).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from musubi_kernels import _native, backends

Call = Callable[[], object]
_memchr = ctypes.CDLL(None).memchr
_memchr.argtypes, _memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p


def in_turn(
    calls: Mapping[str, Call], *, rounds: int = 9, least_seconds: float = 0.15, most_seconds: float = 12.0
) -> dict[str, float]:
    """Lower quartile of CPU seconds of each call, measured one after the other after one warm-up.

    At least `rounds` times, then on until the first has taken `least_seconds` in all or a second is over; calls so
    long that a row would take more than `most_seconds` are measured three times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    first = next(iter(times.values()))
    began = time.perf_counter()

    def enough() -> bool:
        passed = time.perf_counter() - began
        if passed > most_seconds:
            return len(first) >= 3
        return len(first) >= rounds and (sum(first) >= least_seconds or passed >= 1.0)

    while not enough():
        for name, call in calls.items():
            start = time.thread_time()
            call()
            times[name].append(time.thread_time() - start)
    return {name: sorted(taken)[len(taken) // 4] for name, taken in times.items()}


def rotating(calls: list[Call]) -> Call:
    """One call that goes round `calls`, so that each finds its data where the others have left it."""
    turn = 0

    def call() -> object:
        nonlocal turn
        turn += 1
        return calls[turn % len(calls)]()

    return call


def read(ones: torch.Tensor) -> None:
    """Reads bytes that are all 1 once, by libc's search for one that is 2."""
    _memchr(ones.data_ptr(), 2, ones.nbytes)


def into_new(source: torch.Tensor, size: int) -> torch.Tensor:
    """A new tensor of `size` bytes, made by torch: a contiguous tensor of bytes, and zeros behind it."""
    target = torch.empty(size, dtype=torch.uint8)
    target[: source.numel()].copy_(source)
    target[source.numel() :].zero_()
    return target


def by_libc(source: torch.Tensor, size: int) -> torch.Tensor:
    """The same by libc, which writes large results past the caches; torch does not."""
    target = torch.empty(size, dtype=torch.uint8)
    _written(target.data_ptr(), source, size)
    return target


def in_fresh_pages(source: torch.Tensor, size: int) -> None:
    """The same by libc in memory that the system has just made, with pages of 2 MiB where it has them: what any
    operation must do whose result is new and too large for the allocator to have kept."""
    page = 2 << 20
    pages = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without such pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    target = torch.frombuffer(pages, dtype=torch.uint8)
    _written(target.data_ptr() + -target.data_ptr() % page, source, size)


def _written(address: int, source: torch.Tensor, size: int) -> None:
    ctypes.memmove(address, source.data_ptr(), source.nbytes)
    ctypes.memset(address + source.nbytes, 0, size - source.nbytes)


def cache_bytes() -> int:
    """The last-level cache; 32 MiB where the system does not tell."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(path.read_text().strip().rstrip("K")) << 10 for path in sizes), default=32 << 20)


def native_isa() -> str | None:
    """The instruction set of the bodies in use, None without the compiled module."""
    return _native.isa_name() if backends()["native"].startswith("available") else None


@dataclass(frozen=True)
class Limits:
    """Measured on one thread: bytes per second, and FLOP/s of the fastest instruction that the body in use has."""

    read: float
    copy: float
    flops: float
    no_flops: str = ""
    """Why `flops` is 0."""

    def sentence(self) -> str:
        arithmetic = f"{self.flops / 1e9:.0f} GFLOP/s" if self.flops else f"arithmetic not measured: {self.no_flops}"
        return f"DRAM read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s, {arithmetic}"


def measure_limits() -> Limits:
    """Both bandwidths over memory twice the size of the last-level cache (at most 1 GiB), and the arithmetic.

    A copy of n bytes moves 2n. The faster of two ways to read counts.
    """
    source = torch.ones(min(1 << 30, 2 * cache_bytes()), dtype=torch.uint8)
    target = torch.ones_like(source)
    floats = source.view(torch.float32)
    calls = {"search": lambda: read(source), "sum": floats.sum, "copy": lambda: target.copy_(source)}
    taken = in_turn(calls, rounds=7)
    reading, copying = source.nbytes / min(taken["search"], taken["sum"]), 2 * source.nbytes / taken["copy"]
    try:
        return Limits(reading, copying, peak_flops())
    except (OSError, subprocess.SubprocessError) as error:
        return Limits(reading, copying, 0.0, str(error))


def peak_flops() -> float:
    """FLOP/s of one thread in registers, as `arithmetic` computes; its best of seven.

    Raises:
        OSError: no C++ compiler, or a processor that the compiler's flag does not know.
    """
    call, operations = arithmetic()
    best = 0.0
    for _ in range(7):
        start = time.thread_time()
        call()
        best = max(best, operations / (time.thread_time() - start))
    return best


def arithmetic(kind: str | None = None) -> tuple[Call, float]:
    """A call that only computes, in registers, and how many floating-point operations that is: as a contestant it tells
    the machine's limit in the same turn. Products of bf16 pairs for the body that uses them, else `kind` "float32".

    Raises:
        OSError: no C++ compiler, or a processor that the compiler's flag does not know.
    """
    kind = kind or ("bf16" if native_isa() == "avx512bf16" else "float32")
    library, operations = _arithmetic(), ctypes.c_double()

    def call() -> None:
        library.run(kind == "bf16", 1_000_000, ctypes.byref(operations))

    call()
    return call, operations.value


def arithmetic_in_turn(calls: dict[str, Call], kind: str | None = None) -> tuple[dict[str, float], float]:
    """`in_turn` of these calls, and FLOP/s in registers as computed in their turns; 0 where that is not measured."""
    try:
        compute, operations = arithmetic(kind)
    except (OSError, subprocess.SubprocessError):
        return in_turn(calls), 0.0
    times = in_turn({**calls, "arithmetic": compute})
    return times, operations / times.pop("arithmetic")


_VECTORS: Final = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mfma"),
    "avx512vbmi": ("-mavx512f", "-mfma"),
    "avx512bf16": ("-mavx512f", "-mfma", "-mavx512bf16"),
}
"""What the probe is compiled with, by the body that it is the limit of."""


@functools.cache
def _arithmetic() -> ctypes.CDLL:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "arithmetic.so"
        source = Path(__file__).with_name("arithmetic.cpp")
        flags = _VECTORS.get(native_isa() or "", ())
        command = [compiler, "-O3", *flags, "-shared", "-fPIC", "-o", str(built), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return ctypes.CDLL(str(built))


def machine() -> str:
    """One line: processor, instruction set, torch."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    isa = native_isa() or "reference"
    return f"{model}, one thread, {isa}, torch {torch.__version__}, python {platform.python_version()}"


def peak_bytes(call: Call, *, warm: bool = False) -> float:
    """How far the resident set rises during `call`, which runs once before unless it is `warm`; NaN where the kernel
    does not tell.

    Memory that the allocator kept from earlier calls is given back first, or it would be used unseen.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return float("nan")

    def kilobytes(key: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])

    if not warm:
        call()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    reset.write_text("5")
    before = kilobytes("VmRSS")
    call()
    return max(0, kilobytes("VmHWM") - before) * 1024.0
