"""Every Triton configuration that can be launched runs here on the CPU, with its own constants, against float64.

The registry's entries are launched directly, so that what is executed is what is compiled: the same constexprs, the
PTX of that processor included. A kernel in the sources that the registry lacks, or an entry that no driver below can
run, fails.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

import musubi_kernels
from musubi_kernels import _triton, testing
from musubi_kernels._formats import FORMATS, SMALLEST_SCALE
from musubi_kernels._triton import Shipped
from musubi_kernels.ops.fp8_linear_dynamic import reference as dynamic_reference
from musubi_kernels.ops.fp8_quantize import reference

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "u8": torch.uint8, "i8": torch.int8}
# Relative RMS against float64. A 16-bit result is rounded once, and so is each decoded weight: sqrt(2) x 2^-9 / sqrt(3)
# for bfloat16. float32 results carry float32 weights of float32 sums.
TOLERANCE = {"bf16": 2.6e-3, "fp16": 3.3e-4, "fp32": 2e-6}


@pytest.fixture(scope="module", autouse=True)
def record() -> Iterator[testing.Record]:
    with testing.patch_interpreter() as running:
        yield running


@dataclass(frozen=True)
class Case:
    """An entry with tensors for it."""

    entry: Shipped

    def kind(self, name: str) -> str:
        return self.entry.signature[name].lstrip("*")

    def dtype(self, name: str) -> torch.dtype:
        return KINDS[self.kind(name)]

    def constant(self, name: str) -> Any:
        return self.entry.constexprs.get(name)

    @property
    def fmt(self) -> str:
        return "e5m2" if self.constant("E5M2") else "e4m3"

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        self.entry.function[grid](**arguments, **self.entry.constexprs)


def _weight(case: Case, n: int, k: int) -> torch.Tensor:
    """Random codes without NaN and infinity, zeros and denormals among them."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    values = codes.view(FORMATS[case.fmt].dtype).float()
    return torch.where(torch.isfinite(values) & (values.abs() < 1000), codes, torch.zeros_like(codes))


def _stored(case: Case, codes: torch.Tensor) -> dict[str, Any]:
    """The codes as the kernel reads them, and their row stride."""
    q = codes.view(torch.int32) if case.constant("WORDS") else codes
    return {"q": q, "q_stride": q.stride(0)}


def _scales(case: Case, n: int, k: int, how: str, block: int) -> torch.Tensor:
    shape = {"row": (n, 1), "one": (1, 1)}.get(how, (n, k // block))
    return ((torch.rand(shape) + 0.5) * 0.01).to(case.dtype("scale"))


def _dense(case: Case, codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    wide = scale.double().repeat_interleave(block, 1) if scale.shape[1] > 1 else scale.double()
    return codes.view(FORMATS[case.fmt].dtype).double() * wide


def _compare(case: Case, got: torch.Tensor, want: torch.Tensor, kind: str, poor: torch.Tensor) -> None:
    """Relative RMS within tolerance, where an answer that lacks the product (`poor`) would miss by far."""
    size = want.square().mean().sqrt()
    error = (got.double() - want).square().mean().sqrt() / size
    vacuous = (poor - want).square().mean().sqrt() / size
    assert vacuous >= 0.5, f"{case.entry.name}: the test could not see a kernel that does nothing ({vacuous:.2f})"
    assert error <= TOLERANCE[kind], f"{case.entry.name}: relative error {error:.2e}, allowed {TOLERANCE[kind]:.1e}"


def _blocks(case: Case, step: int) -> tuple[int, int]:
    """(length along which scales change, block size) that the entry's SCALES, BLOCK, GROUPS and EVEN stand for."""
    if case.constant("SCALES") == "each":
        block = case.constant("BLOCK")
        return -(-(step + 1) // block) * block, block
    whole = case.constant("SCALES") in ("row", "one")
    block = step if whole else case.constant("BLOCK")
    length = 2 * max(step, block) if case.constant("EVEN") else step + 8
    return length, length if whole else block


def _rows(tile: int) -> int:
    """A ragged number of rows: two tiles of the short ones, a part of one of the tall ones, which take long."""
    return tile + 3 if tile <= 32 else tile - 5


def run_forward(case: Case) -> None:
    bm, bn, bk = (case.constant(name) for name in ("BM", "BN", "BK"))
    m, n, how = _rows(bm), bn + 5, case.constant("SCALES")
    k, block = _blocks(case, bk)
    x = torch.randn(m, k).to(case.dtype("x"))
    q, scale = _weight(case, n, k), _scales(case, n, k, how, block)
    bias = torch.randn(n).to(case.dtype("bias"))
    rank = case.constant("BR") - 3 if case.constant("HAS_LOW") else 0
    low, up = torch.randn(m, max(rank, 1)).to(case.dtype("low")), torch.randn(n, max(rank, 1)).to(case.dtype("up"))
    parts = 2 if case.constant("PARTS") else 1
    y = torch.full((parts, m, n), float("nan"), dtype=case.dtype("y"))
    tiles = -(-m // bm) * -(-n // bn)
    case.launch(
        (tiles, parts),
        **{"x": x, "scale": scale, "bias": bias, "low": low, "up": up, "y": y},
        **{"M": m, "N": n, "K": k, "rank": rank, "strength": 0.5},
        **{**_stored(case, q), "x_stride": k, "scale_row": scale.shape[1], "scale_block": int(scale.shape[1] > 1)},
        **{"low_stride": low.stride(0), "up_stride": up.stride(0), "y_stride": n},
    )
    extra = torch.zeros(m, n, dtype=torch.float64)
    if case.constant("HAS_BIAS"):
        extra += bias.double()
    if rank:
        extra += 0.5 * low.double() @ up.double().T
    _compare(case, y.sum(0), x.double() @ _dense(case, q, scale, block).T + extra, case.kind("x"), extra)


def run_input_gradient(case: Case) -> None:
    bm, bn, bk = (case.constant(name) for name in ("BM", "BN", "BK"))
    m, how = _rows(bm), case.constant("SCALES")
    k, block = _blocks(case, bn)
    n = 2 * bk if case.constant("EVEN") else bk + 7
    grad = torch.randn(m, n).to(case.dtype("grad"))
    q, scale = _weight(case, n, k), _scales(case, n, k, how, block)
    rank = case.constant("BR") - 3 if case.constant("HAS_LOW") else 0
    low, down = torch.randn(m, max(rank, 1)).to(case.dtype("low")), torch.randn(max(rank, 1), k).to(case.dtype("down"))
    parts = 2 if case.constant("PARTS") else 1
    dx = torch.full((parts, m, k), float("nan"), dtype=case.dtype("dx"))
    case.launch(
        (-(-m // bm) * -(-k // bn), parts),
        **{"grad": grad, "scale": scale, "low": low, "down": down, "dx": dx},
        **{"M": m, "N": n, "K": k, "rank": rank, "strength": 0.5},
        **{**_stored(case, q), "grad_stride": n, "scale_row": 0 if how == "one" else scale.shape[1]},
        **{"scale_block": int(scale.shape[1] > 1), "low_stride": low.stride(0), "down_stride": k, "dx_stride": k},
    )
    extra = 0.5 * low.double() @ down.double() if rank else torch.zeros(m, k, dtype=torch.float64)
    _compare(case, dx.sum(0), grad.double() @ _dense(case, q, scale, block) + extra, case.kind("grad"), extra)


def run_rows(case: Case) -> None:
    bn, bk, how = case.constant("BN"), case.constant("BK"), case.constant("SCALES")
    k, block = _blocks(case, bk)
    m, n = 2, bn + 3
    x, q, scale = torch.randn(m, k).to(case.dtype("x")), _weight(case, n, k), _scales(case, n, k, how, block)
    bias, y = torch.randn(n).to(case.dtype("bias")), torch.full((m, n), float("nan"), dtype=case.dtype("y"))
    case.launch(
        (-(-n // bn), m),
        **{"x": x, "scale": scale, "bias": bias, "y": y, "N": n, "K": k},
        **{**_stored(case, q), "x_stride": k, "scale_row": scale.shape[1], "scale_block": int(scale.shape[1] > 1)},
        y_stride=n,
    )
    extra = bias.double().expand(m, n) if case.constant("HAS_BIAS") else torch.zeros(m, n, dtype=torch.float64)
    _compare(case, y, x.double() @ _dense(case, q, scale, block).T + extra, case.kind("y"), extra)


def run_sum(case: Case) -> None:
    size, count = 2 * case.constant("B") + 7, 3
    parts, y = torch.randn(count, size), torch.zeros(size, dtype=case.dtype("y"))
    case.launch((3,), parts=parts, y=y, size=size, count=count)
    assert torch.equal(y, (parts[0] + parts[1] + parts[2]).to(y.dtype))


def run_dynamic_rows(case: Case) -> None:
    kind, rows = "int8" if case.constant("INTEGER") else "fp8", 6
    k = case.constant("BW") + 77
    x = (torch.randn(rows, k) * torch.exp2(torch.randint(-20, 12, (rows, k)).float())).to(case.dtype("x"))
    x[1], x[3, 5], x[4, 0] = 0.0, torch.inf, torch.nan
    codes = torch.zeros(rows, k + 3, dtype=case.dtype("codes"))
    factors = torch.zeros(rows)
    case.launch((rows,), x=x, codes=codes, factors=factors, K=k, x_stride=k, codes_stride=k + 3)
    want, scales = dynamic_reference.quantize_rows(x, kind)
    torch.testing.assert_close(factors, scales[:, 0], rtol=0, atol=0, equal_nan=True)
    got = codes[:, :k].float() if kind == "int8" else codes[:, :k].view(torch.float8_e4m3fn).float()
    assert torch.equal(got, want)
    assert codes[:, k:].eq(0).all()
    top = 127.0 if kind == "int8" else 448.0
    assert want.abs().amax(1).tolist() == [top, 0.0, top, 0.0, 0.0, top]


def run_dynamic_product(case: Case) -> None:
    bm, bn, bk = (case.constant(name) for name in ("BM", "BN", "BK"))
    m, n, how = _rows(bm), bn + 5, case.constant("SCALES")
    k, block = _blocks(case, bk)
    kind = "int8" if case.constant("INTEGER") else "fp8"
    wide, factors = dynamic_reference.quantize_rows(torch.randn(m, k), kind)
    wide[0], wide[0, : k // 2] = 0.0, 127.0 if kind == "int8" else 448.0  # the largest sum of a block
    factors[0] /= 64  # without which that row would be the whole norm
    codes = wide.to(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    q, scale = _weight(case, n, k), _scales(case, n, k, how, block)
    if kind == "int8":
        q[0] = torch.arange(k, dtype=torch.int64).remainder(256).to(torch.uint8)  # all codes, infinite ones included
        table = dynamic_reference.integer_codes(case.fmt).double()
        q[1] = 0x7E if case.fmt == "e4m3" else 0x7B
        dense = table[q.long()] * scale.double().repeat_interleave(1 if how == "row" else block, 1)
        dense *= FORMATS[case.fmt].largest / 127
    else:
        dense = _dense(case, q, scale, block)
    weight = q if kind == "int8" else q.view(FORMATS[case.fmt].dtype)
    bias, parts = torch.randn(n).to(case.dtype("bias")), 2 if case.constant("PARTS") else 1
    y = torch.full((parts, m, n), float("nan"), dtype=case.dtype("y"))
    case.launch(
        (-(-m // bm) * -(-n // bn), parts),
        **{"codes": codes, "factors": factors[:, 0], "q": weight, "scale": scale, "bias": bias, "y": y},
        **{"M": m, "N": n, "K": k, "codes_stride": k, "q_stride": k},
        **{"scale_row": scale.shape[1], "scale_block": int(scale.shape[1] > 1), "y_stride": n},
    )
    extra = bias.double().expand(m, n) if case.constant("HAS_BIAS") else torch.zeros(m, n, dtype=torch.float64)
    exact = factors.double() * (wide.double() @ dense.T) + extra
    _compare(case, y.sum(0), exact, case.kind("y"), extra)


def _limits(case: Case, dtype: torch.dtype) -> dict[str, float]:
    return {"largest": FORMATS[case.fmt].largest, "smallest": float(torch.tensor(SMALLEST_SCALE).to(dtype))}


def _wide_weight(case: Case, rows: int, columns: int) -> torch.Tensor:
    """Values of many sizes, a group of zeros and one of denormals among them."""
    w = torch.randn(rows, columns) * torch.exp2(torch.randint(-6, 6, (rows, columns)).float())
    w[0], w[1] = 0.0, w[1] * 1e-38
    return w.to(case.dtype("w"))


def run_quantize_groups(case: Case) -> None:
    width, rows, each = case.constant("BW"), 13, 3
    w = _wide_weight(case, rows, each * width)
    q = torch.zeros(w.shape, dtype=torch.uint8)
    scale = torch.zeros(rows, each, 1, dtype=case.dtype("scale"))
    groups = rows * each
    case.launch(
        (-(-groups // case.constant("BG")),),
        **{"w": w, "q": q, "scale": scale, "groups": groups, "width": width, "per_row": each},
        **{"w_stride": w.stride(0)},
        **_limits(case, scale.dtype),
    )
    want_q, want_scale = reference.quantize(w, "block", width, scale.dtype, case.fmt, "")
    assert torch.equal(scale, want_scale)
    assert torch.equal(q, want_q)


def run_peaks(case: Case) -> None:
    rows, width = 3, case.constant("BW") + 77
    w = _wide_weight(case, rows, width)
    w[2, 5] = float("nan")
    peaks = torch.zeros(rows)
    case.launch((rows,), w=w, peaks=peaks, width=width, w_stride=width)
    assert peaks[:2].tolist() == w[:2].float().abs().amax(1).tolist()
    assert torch.isnan(peaks[2])


def run_scales(case: Case) -> None:
    rows, together = 3, case.constant("BP") + 5
    peaks = torch.rand(rows, together) * 100
    scale = torch.zeros(rows, dtype=case.dtype("scale"))
    limits = _limits(case, scale.dtype)
    case.launch((rows,), peaks=peaks, scale=scale, together=together, **limits)
    want = (peaks.amax(1) / limits["largest"]).to(scale.dtype).clamp_min(limits["smallest"])
    assert torch.equal(scale, want)


def run_encode(case: Case) -> None:
    rows, width = 3, case.constant("BW") + 33
    w = _wide_weight(case, rows, width)
    want_q, scale = reference.quantize(w, "channel", 64, case.dtype("scale"), case.fmt, "")
    q = torch.zeros(w.shape, dtype=torch.uint8)
    grid = (-(-width // case.constant("BW")), rows)
    case.launch(grid, w=w, q=q, scale=scale, width=width, w_stride=width, scale_row=1)
    assert torch.equal(q, want_q)


def run_dequantize(case: Case) -> None:
    bm, bn, how = case.constant("BM"), case.constant("BN"), case.constant("SCALES")
    block = 24 if how == "each" else bn // case.constant("GROUPS")
    rows, columns = 2 * bm + 1, 10 * block if how == "each" else bn + block
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    scale = _scales(case, rows, columns, how, block).unsqueeze(-1)
    out = torch.zeros(rows, columns, dtype=case.dtype("out"))
    case.launch(
        (-(-rows // (2 * bm)) * -(-columns // bn),),
        **{"q": codes, "scale": scale, "out": out, "rows": rows, "columns": columns, "block": block},
        **{"q_stride": columns, "scale_row": scale.shape[1], "scale_block": 1, "out_stride": columns},
    )
    want = reference.dequantize(codes, scale, case.fmt, out.dtype)
    assert torch.equal(torch.nan_to_num(out.float(), nan=0.25), torch.nan_to_num(want.float(), nan=0.25))


DRIVERS: dict[str, Callable[[Case], None]] = {
    "_fp8_linear_fwd_kernel": run_forward,
    "_fp8_linear_dx_kernel": run_input_gradient,
    "_fp8_linear_rows_kernel": run_rows,
    "_fp8_linear_sum_kernel": run_sum,
    "_dynamic_rows_kernel": run_dynamic_rows,
    "_dynamic_product_kernel": run_dynamic_product,
    "_fp8_quantize_groups_kernel": run_quantize_groups,
    "_fp8_peaks_kernel": run_peaks,
    "_fp8_scales_kernel": run_scales,
    "_fp8_encode_kernel": run_encode,
    "_fp8_dequantize_kernel": run_dequantize,
}


@functools.cache
def distinct() -> dict[tuple[Any, ...], list[Shipped]]:
    """The registry by what decides an entry's arithmetic: kernel, constexprs and types, without warps and targets."""
    table: dict[tuple[Any, ...], list[Shipped]] = {}
    for entry in _triton.shipped():
        key = (entry.function.__name__, repr(sorted(entry.constexprs.items())), repr(sorted(entry.signature.items())))
        table.setdefault(key, []).append(entry)
    return table


def _names() -> list[str]:
    return [
        f"{entries[0].name}-sm{'-'.join(str(t) for e in entries for t in e.targets)}" for entries in distinct().values()
    ]


@pytest.mark.parametrize("entries", list(distinct().values()), ids=_names())
def test_every_configuration_computes_the_right_thing(entries: list[Shipped], record: testing.Record) -> None:
    entry = entries[0]
    name = entry.function.__name__
    assert name in DRIVERS, f"{name} has no driver in this file, so nothing has executed it"
    torch.manual_seed(len(entry.name))
    DRIVERS[name](Case(entry))
    assert record.ran(name, **entry.constexprs)


def test_every_kernel_of_the_sources_is_in_the_registry() -> None:
    sources = Path(musubi_kernels.__file__).parent.rglob("*.py")
    found = {name for path in sources for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert found, "no kernels found: the search is broken"
    assert found == {entry.function.__name__ for entry in _triton.shipped()}
