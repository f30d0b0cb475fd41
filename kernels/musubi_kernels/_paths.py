"""Which way a product on FP8 weights goes on a GPU, measured once for a class of shapes.

Three ways exist. `small` reads the weight once and multiplies a few rows with it; `fused` decodes the weight inside a
tiled product; `panel` dequantises a bounded part of the weight in one pass and leaves the product to cuBLAS (see
`_panel`). Which is fastest depends on the rows M of the activation and on the ratio of our tiles to cuBLAS on that very
card, so the first call of a class is timed each way and the result kept: in memory, and in a small JSON file, so that
the next run begins with it and takes the same ways. A class is (device, backend, product, dtype, N, K, M up to the next
power of two); ragged lengths therefore measure nothing anew.

    MUSUBI_KERNELS_PATH=auto|small|fused|panel   pins one way
    MUSUBI_KERNELS_TUNE=0                        measures nothing: table, then the rule of thumb below
    MUSUBI_KERNELS_CACHE=FILE|off                where the measurements are kept
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Final, Literal, get_args

import torch

from musubi_kernels._eager import settings

Way = Literal["small", "fused", "panel"]
WAYS: Final[tuple[Way, ...]] = get_args(Way)

WAY_VARIABLE: Final = "MUSUBI_KERNELS_PATH"
TUNE_VARIABLE: Final = "MUSUBI_KERNELS_TUNE"
CACHE_VARIABLE: Final = "MUSUBI_KERNELS_CACHE"
FORMAT_VERSION: Final = 1

SMALL_ROWS: Final = 32
"""Up to here a product is bound by reading the weight, whatever the card."""
_CROSSOVER: Final = {(8, 9): 4096, (12, 0): 4096}
"""Rows from which the panel is expected to win, by compute capability; 1024 elsewhere. The consumer cards have little
cuBLAS to lose: their tensor cores are slow beside their memory (modelled; the measurement overrides it)."""
_ROUNDS: Final = 5
_BUSY_SIDE: Final = 4096
_BUSY_PRODUCTS: Final = 4
"""Together 0.7 ms on an H200, more than the host needs for a call; 64 MB for as long as a class is measured."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What decides the way: `product` names the op and direction (`fp8_linear`, `fp8_linear_dx`, ...)."""

    product: str
    backend: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device

    def group(self) -> tuple[Any, ...]:
        """The shape class as it is looked up in every call, where making the line of the file would cost too much."""
        return self.product, self.backend, bucket(self.m), self.n, self.k, self.dtype, self.device

    def key(self) -> str:
        """The shape class in words: one line of the file."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{_device_name(self.device)}|{self.backend}|{self.product}|{dtype}|N{self.n}|K{self.k}|M{bucket(self.m)}"
        )


def bucket(m: int) -> int:
    """M rounded up to a power of two."""
    return 1 << max(0, m - 1).bit_length()


def run(sizes: Sizes, ways: Mapping[Way, Callable[[], Any]]) -> Any:
    """The result of the way that serves `sizes`; `ways` holds those that can. A first call may time them all."""
    names = tuple(ways)
    group = (*sizes.group(), settings())
    known = (*group, names)
    settled = _SETTLED.get(known)
    if settled is not None:
        return ways[settled]()
    chosen, _ = decide(sizes, names)
    if chosen is None:
        if not _may_measure(sizes.device):
            return ways[rule_of_thumb(sizes, names)]()
        chosen = _measured(sizes, ways)
    _SETTLED[known] = chosen
    if chosen == "panel" and len(names) > 1:
        _PANELS.add(group)
    return ways[chosen]()


def by_panels(product: str, backend: str, m: int, q: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether products of q [N, K] and m rows of x or dY (`like` it) are known to go by panels.

    A caller that asks first saves itself the list of ways (10 to 20 µs on the host). Never for so few rows that `small`
    may be among them for one tensor and not for another, as their addresses are.
    """
    if m <= SMALL_ROWS:
        return False
    n, k = q.shape
    return (product, backend, bucket(m), n, k, like.dtype, like.device, settings()) in _PANELS


def _measured(sizes: Sizes, ways: Mapping[Way, Callable[[], Any]]) -> Way:
    try:
        times = {way: _seconds(call, sizes.device) for way, call in ways.items()}
    except torch.OutOfMemoryError:
        return rule_of_thumb(sizes, tuple(ways))  # no room to measure in; asked again in the next run
    best = min(times, key=times.__getitem__)
    _TABLE.put(sizes.key(), best, times)
    return best


def decide(sizes: Sizes, ways: tuple[Way, ...]) -> tuple[Way | None, str]:
    """(the way that is settled, why), or (None, what would happen) where the first call would measure."""
    pin = _pinned()
    if pin is not None:
        if pin not in ways:
            raise ValueError(
                f"{WAY_VARIABLE} = {pin}: {sizes.backend} cannot take {sizes.product} with M={sizes.m} that way; "
                f"use auto or {', '.join(ways)}"
            )
        return pin, f"pinned by {WAY_VARIABLE}"
    if len(ways) == 1:
        return ways[0], "the only way for these sizes"
    known = _TABLE.get(sizes.key())
    if known in ways:
        return known, f"measured before for M <= {bucket(sizes.m)}"
    if _tuning() and sizes.device.type == "cuda":
        return None, "to be measured at the first call"
    return rule_of_thumb(sizes, ways), "by the rule of thumb"


def tell(sizes: Sizes, ways: tuple[Way, ...]) -> str:
    """`decide` as a phrase for `explain`."""
    way, why = decide(sizes, ways)
    return f"{way or ' or '.join(ways)} ({why})"


def rule_of_thumb(sizes: Sizes, ways: tuple[Way, ...]) -> Way:
    """What is taken without a measurement: by M alone."""
    crossover = _CROSSOVER.get(_capability(sizes.device), 1024)
    order: tuple[Way, ...] = ("panel", "fused", "small")
    if sizes.m <= SMALL_ROWS:
        order = ("small", "fused", "panel")
    elif sizes.m < crossover:
        order = ("fused", "panel", "small")
    return next(way for way in order if way in ways)


def forget() -> None:
    """Drop what was measured or read in this process; the file stays."""
    _TABLE.clear()
    _SETTLED.clear()
    _PANELS.clear()


def _pinned() -> Way | None:
    word = os.environ.get(WAY_VARIABLE, "auto") or "auto"
    if word == "auto":
        return None
    if word not in WAYS:
        raise ValueError(f"{WAY_VARIABLE} = {word!r}: no such way; use auto, {', '.join(WAYS)}")
    return word


def _tuning() -> bool:
    word = os.environ.get(TUNE_VARIABLE, "1") or "1"
    if word not in ("0", "1"):
        raise ValueError(f"{TUNE_VARIABLE} = {word!r}: use 1 (measure a new class of shapes once) or 0")
    return word == "1"


def _may_measure(device: torch.device) -> bool:
    """Timing synchronises, which a stream in capture forbids."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call on the device; the first call (it may compile) is not counted.

    The device is given products to do while the call is put into its queue. Without them a short call is over before
    its next launch arrives, and the time is the host's: on an H200 a way of two launches and 11 µs looked slower than
    one of 53.
    """
    with torch.cuda.device(device):
        call()
        side = torch.zeros((_BUSY_SIDE, _BUSY_SIDE), dtype=torch.bfloat16, device=device)
        out = torch.empty_like(side)
        times = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(_BUSY_PRODUCTS):
                torch.mm(side, side, out=out)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[_ROUNDS // 2]


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cache_file() -> File | None:
    """Where measurements are kept, or None for `off`."""
    word = os.environ.get(CACHE_VARIABLE, "")
    if word == "off":
        return None
    if word:
        return File(word)
    home = os.environ.get("XDG_CACHE_HOME")
    return (File(home) if home else File.home() / ".cache") / "musubi_kernels" / "paths.json"


class _Table:
    """The measured ways, read from the file at the first question; every new row is written at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] | None = None

    def get(self, key: str) -> Way | None:
        with self._lock:
            row = self._read().get(key)
        return row["way"] if row else None

    def put(self, key: str, way: Way, seconds: Mapping[Way, float]) -> None:
        micros = {name: round(value * 1e6, 2) for name, value in seconds.items()}
        with self._lock:
            self._read()[key] = {"way": way, "microseconds": micros}
            self._write()

    def clear(self) -> None:
        with self._lock:
            self._rows = None

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._rows is None:
            self._rows = _rows_in(cache_file())
        return self._rows

    def _write(self) -> None:
        file = cache_file()
        if file is None or self._rows is None:
            return
        # another process may have measured other classes meanwhile
        self._rows = _rows_in(file) | self._rows
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".new")
            with os.fdopen(handle, "w") as new:
                json.dump({"version": FORMAT_VERSION, "rows": self._rows}, new, indent=1, sort_keys=True)
            File(name).replace(file)
        except OSError as error:
            _say_once("unwritable", f"{file} cannot be written ({error}): kernel ways are measured anew in each run")


def _rows_in(file: File | None) -> dict[str, dict[str, Any]]:
    if file is None or not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        rows = content["rows"] if content["version"] == FORMAT_VERSION else {}
        return {key: row for key, row in rows.items() if row["way"] in WAYS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _say_once("damaged", f"{file} is not readable ({error}): kernel ways are measured again and it is rewritten")
        return {}


_said: set[str] = set()


def _say_once(what: str, sentence: str) -> None:
    if what not in _said:
        _said.add(what)
        _log.warning("%s", sentence)


_TABLE: Final = _Table()
_SETTLED: Final[dict[tuple[Any, ...], Way]] = {}
"""What `run` need not decide again: 1 µs a call in place of 20."""
_PANELS: Final[set[tuple[Any, ...]]] = set()
"""The classes among them that go by panels and could go otherwise."""
