"""The canary: Triton's interpreter, as the tests patch it, agrees with torch on bf16, FP8 and inline PTX.

An upgrade of Triton that changes the interpreter must fail here and not in a kernel's tolerance. Each check is also run
without the patch, to show which of them the plain interpreter fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is published for Linux only")
import triton.language as tl  # noqa: E402 (only where triton is there)

from musubi_kernels import testing  # noqa: E402
from musubi_kernels._ptx import UnknownAssembly, run_ptx  # noqa: E402
from musubi_kernels._ptx_decoders import decoder  # noqa: E402

E4M3, E5M2, BF16, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


@pytest.fixture
def patched() -> Iterator[testing.Record]:
    with testing.patch_interpreter() as record:
        yield record


@triton.jit
def _binary_kernel(x, y, out, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "add":
        r = a + b
    elif OP == "mul":
        r = a * b
    elif OP == "max":
        r = tl.maximum(a, b)
    elif OP == "fma":
        r = tl.fma(a, b, a)
    elif OP == "where":
        r = tl.where(a > b, a, b)
    elif OP == "div":
        r = a / b
    else:
        r = tl.div_rn(a, b)
    tl.store(out + i, r)


@triton.jit
def _cast_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _dot_kernel(x, y, out, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    r = tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION)
    tl.store(out + at, r.to(out.dtype.element_ty))


@triton.jit
def _reduce_kernel(x, out, OP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + at)
    tl.store(out + tl.arange(0, N), tl.max(a, axis=1) if OP == "max" else tl.sum(a, axis=1))


@triton.jit
def _atomic_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(out + i // 2, tl.load(x + i))


@triton.jit
def _asm_kernel(x, out, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    r = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [tl.load(x + i)], dtype=tl.bfloat16, is_pure=True, pack=4)
    tl.store(out + i, r)


def _floats(count: int, seed: int = 0) -> torch.Tensor:
    """Values of all sizes and both signs."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-12, 12, (count,), generator=generator)
    return torch.randn(count, generator=generator) * torch.exp2(exponent.float())


def _binary(op: str, dtype: torch.dtype = BF16) -> torch.Tensor:
    x, y = _floats(1024).to(dtype), _floats(1024, 1).to(dtype)
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, OP=op, N=1024)
    return out


def _operands(dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    return _floats(1024).to(dtype).double(), _floats(1024, 1).to(dtype).double()


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x`, padded to a power of two, cast by a kernel."""
    size = 1 << (x.numel() - 1).bit_length()
    padded = torch.zeros(size, dtype=F32).to(x.dtype)
    padded[: x.numel()] = x
    out = torch.zeros(size, dtype=F32).to(dtype)
    _cast_kernel[(1,)](padded, out, N=size)
    return out[: x.numel()]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8 if x.element_size() == 1 else torch.int16)


def _same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bit for bit, except that any NaN is as good as another."""
    numbers = ~torch.isnan(want.float())
    assert torch.equal(torch.isnan(got.float()), ~numbers)
    assert torch.equal(_bits(got)[numbers], _bits(want)[numbers])


def _halfway(dtype: torch.dtype) -> torch.Tensor:
    """float32 midpoints of neighbouring finite FP8 values, and one unit to each side: ties and near-ties."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = codes[torch.isfinite(codes)].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    far = torch.full_like(middle, float("inf"))
    return torch.cat([middle, torch.nextafter(middle, far), torch.nextafter(middle, -far)])


def check_dot() -> None:
    x, y = torch.randn(32, 32).to(BF16), torch.randn(32, 32).to(BF16)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](x, y, out, N=32, PRECISION="tf32")
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


def check_fp8_dot() -> None:
    x, y = torch.randn(32, 32).to(E4M3), torch.randn(32, 32).to(E5M2)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](x, y, out, N=32, PRECISION="tf32")
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


def check_int8_dot() -> None:
    x, y = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    out = torch.empty(32, 32, dtype=torch.int32)
    _dot_kernel[(1,)](x, y, out, N=32, PRECISION="tf32")
    assert torch.equal(out, x.int() @ y.int())


def check_tf32_dot_loses_bits() -> None:
    x, y = torch.randn(32, 32), torch.randn(32, 32)
    exact, short = torch.empty(32, 32), torch.empty(32, 32)
    _dot_kernel[(1,)](x, y, exact, N=32, PRECISION="ieee")
    _dot_kernel[(1,)](x, y, short, N=32, PRECISION="tf32")
    torch.testing.assert_close(exact, x @ y, rtol=1e-5, atol=1e-5)
    error = (short - x @ y).abs().max()
    assert 1e-4 < error < 2e-2


def check_add() -> None:
    x, y = _operands()
    _same(_binary("add"), (x + y).to(BF16))


def check_mul() -> None:
    x, y = _operands()
    _same(_binary("mul"), (x * y).to(BF16))


def check_max() -> None:
    x, y = _operands()
    _same(_binary("max"), torch.maximum(x, y).to(BF16))


def check_fma_rounds_once() -> None:
    x, y = _operands()
    _same(_binary("fma"), (x * y + x).to(BF16))


def check_comparison() -> None:
    x, y = _operands()
    _same(_binary("where"), torch.maximum(x, y).to(BF16))


def check_float32_to_bf16() -> None:
    half = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3961775e38, 1e-40, float("inf"), float("nan"), -0.0])
    x = torch.cat([_floats(4000), half])
    _same(_cast(x, BF16), x.to(BF16))


def check_bf16_to_float32() -> None:
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(BF16)
    got, want = _cast(x, F32), x.float()
    assert torch.equal(torch.nan_to_num(got, nan=1.5), torch.nan_to_num(want, nan=1.5))


def _check_encode(dtype: torch.dtype) -> None:
    x = torch.cat([_floats(4000), _halfway(dtype)])
    _same(_cast(x, dtype), x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype))
    _same(_cast(x.to(BF16), dtype), x.to(BF16).float().clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype))


def check_float32_to_e4m3() -> None:
    _check_encode(E4M3)


def check_float32_to_e5m2() -> None:
    _check_encode(E5M2)


def _check_saturates(dtype: torch.dtype, largest: int) -> None:
    x = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 0.0, -0.0, LARGEST[dtype] * 1.2])
    want = [largest, largest | 0x80, largest, largest | 0x80, 0, 0x80, largest]
    assert _bits(_cast(x, dtype)).tolist() == want
    assert torch.isnan(_cast(torch.tensor([float("nan")]), dtype).float()).all()


def check_e4m3_saturates() -> None:
    _check_saturates(E4M3, 0x7E)


def check_e5m2_saturates() -> None:
    _check_saturates(E5M2, 0x7B)


def _check_decode(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for wide in (F32, torch.float16, BF16):
        got, want = _cast(codes, wide).float(), codes.float().to(wide).float()
        numbers = ~torch.isnan(want)
        assert torch.equal(torch.isnan(got), ~numbers)
        assert torch.equal(got[numbers], want[numbers])


def check_e4m3_decodes() -> None:
    _check_decode(E4M3)


def check_e5m2_decodes() -> None:
    _check_decode(E5M2)


def check_integers_become_bf16() -> None:
    x = torch.randint(-(2**30), 2**30, (1024,), dtype=torch.int32)
    out = torch.empty(1024, dtype=BF16)
    _cast_kernel[(1,)](x, out, N=1024)
    _same(out, x.double().to(BF16))


def check_sum_of_bf16() -> None:
    x = torch.randn(16, 16).to(BF16)
    out = torch.empty(16, dtype=BF16)
    _reduce_kernel[(1,)](x, out, OP="sum", N=16)
    torch.testing.assert_close(out.float(), x.float().sum(1), rtol=3e-2, atol=3e-2)


def check_max_drops_nan() -> None:
    x = torch.randn(16, 16)
    x[2, 3] = x[4] = float("nan")
    out = torch.empty(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _reduce_kernel[(1,)](x, out, OP="max", N=16)
    want = torch.nan_to_num(x, nan=-9.0).amax(1)
    want[4] = float("nan")
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


def check_atomic_add_of_bf16() -> None:
    x = torch.randn(64).to(BF16)
    out = torch.ones(32, dtype=BF16)
    _atomic_kernel[(1,)](x, out, N=64)
    pairs = x.view(32, 2)
    _same(out, (torch.ones(32).to(BF16) + pairs[:, 0]) + pairs[:, 1])


def check_quotients() -> None:
    """`div_rn` is correctly rounded; `/` is not, and must not be relied on."""
    x, y = _operands(F32)
    exact = (x / y).float()
    assert torch.equal(_binary("div_rn", F32), exact)
    rough = _binary("div", F32)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=2.4e-7, atol=0)


def check_inline_ptx() -> None:
    """The sign and seven bits of e4m3 moved into bf16's place, times 2^120: exact but for NaN."""
    asm = """{
        .reg .b32 a, b, s, t;
        prmt.b32 a, 0, $2, 0x5040;        // bytes 0 and 1, each in the upper half of 16 bits
        prmt.b32 b, 0, $2, 0x7060;
        and.b32 s, a, 0x80008000;
        and.b32 t, a, 0x7F007F00;
        shr.u32 t, t, 4;
        or.b32 t, t, s;
        mul.rn.bf16x2 $0, t, 0x7B807B80;  // 2^120
        and.b32 s, b, 0x80008000;
        lop3.b32 t, b, 0x7F007F00, 0, 0xC0;
        shr.u32 t, t, 4;
        or.b32 t, t, s;
        mul.rn.bf16x2 $1, t, 0x7B807B80;
    }"""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8)
    out = torch.empty(256, dtype=BF16)
    _asm_kernel[(1,)](codes, out, ASM=asm, CONSTRAINTS="=r,=r,r", N=256)
    _same(out, codes.view(E4M3).float().to(BF16))


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
RIGHT_WITHOUT_THE_PATCH = {"fp8_dot", "int8_dot"}


@pytest.mark.parametrize("name", CHECKS)
def test_the_patched_interpreter_agrees_with_torch(name: str, patched: testing.Record) -> None:
    CHECKS[name]()


def _fails(check: Callable[[], None]) -> bool:
    try:
        with np.errstate(all="ignore"):
            check()
    except Exception:  # the interpreter wraps whatever went wrong
        return True
    return False


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_plain_interpreter_fails_these_checks() -> None:
    """So that the checks can fail; a check that the plain interpreter comes to pass says that the patch may shrink."""
    assert {name for name, check in CHECKS.items() if not _fails(check)} == RIGHT_WITHOUT_THE_PATCH


def test_the_patch_is_undone_and_records_what_ran() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = dict(vars(InterpreterBuilder))
    with testing.patch_interpreter() as record:
        check_add()
        assert dict(vars(InterpreterBuilder)) != before
    assert dict(vars(InterpreterBuilder)) == before
    assert record.ran("_binary_kernel", OP="add")
    assert not record.ran("_binary_kernel", OP="mul")
    assert not record.ran("_dot_kernel")


def test_another_triton_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    with (
        pytest.raises(testing.InterpreterMismatch, match=r"triton 4\.0\.0: .* written for 3\.9"),
        testing.patch_interpreter(),
    ):
        pass


def test_a_missing_internal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.delattr(InterpreterBuilder, "create_dot")
    gone = r"InterpreterBuilder\.create_dot is gone"
    with pytest.raises(testing.InterpreterMismatch, match=gone), testing.patch_interpreter():
        pass
    assert "binary_op" in vars(InterpreterBuilder)


def test_unknown_assembly_is_refused_with_its_text() -> None:
    word = np.zeros(4, np.uint32)
    with pytest.raises(UnknownAssembly, match=r"'vadd4\.u32' is not modelled(.|\n)*vadd4\.u32 \$0, \$1, \$1"):
        run_ptx("vadd4.u32 $0, $1, $1;", [word], 1)
    with pytest.raises(UnknownAssembly, match="never writes \\$1"):
        run_ptx("mov.b32 $0, $2;", [word], 2)


@pytest.mark.parametrize(
    ("asm", "inputs", "want"),
    [
        ("lop3.b32 $0, $1, $2, $3, 0xEA;", (0xF0F0, 0xFF00, 0x0003), 0xF003),  # (a & b) | c
        ("prmt.b32 $0, $1, $2, 0x0040;", (0x11223344, 0x55667788), 0x44448844),
        ("prmt.b32 $0, $1, $2, 0x8C9D;", (0x00008000, 0x0000807F), 0x0000FFFF),  # sign of a byte, spread
        ("shr.s32 $0, $1, 4;", (0x80000000,), 0xF8000000),
        ("bfe.u32 $0, $1, 4, 8;", (0x00000FF7,), 0xFF),
        ("mov.b32 $0, {$1, $2};", (0x1234, 0xABCD), 0xABCD1234),
        ("{.reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.u32.u16 $0, hi;}", (0xABCD1234,), 0xABCD),
        ("cvt.rn.f16x2.e4m3x2 $0, $1;", (0x3840,), 0x3C004000),  # 1, 2
        ("cvt.rn.bf16x2.e4m3x2 $0, $1;", (0x3840,), 0x3F804000),
        ("cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", (0x3F800000, 0x7F000000), 0x387E),
        ("cvt.rn.bf16x2.f32 $0, $1, $2;", (0x3F800000, 0x40000000), 0x3F804000),
        ("fma.rn.bf16x2 $0, $1, $2, $3;", (0x40003F80, 0x40004000, 0x3F803F80), 0x40A04040),
        ("{.reg .pred p; setp.eq.u32 p, $1, 7; @p mov.b32 $0, 1; @!p mov.b32 $0, 2;}", (8,), 2),
    ],
)
def test_ptx_opcodes_do_what_the_manual_says(asm: str, inputs: tuple[int, ...], want: int) -> None:
    registers = [np.array([value], np.uint32) for value in inputs]
    assert run_ptx(asm, registers, 1)[0].tolist() == [want]


@pytest.mark.parametrize(("way", "value"), [("bits", 480.0), ("convert", float("nan"))])
def test_what_a_nan_code_becomes_in_a_product(way: str, value: float) -> None:
    """sm_80 and sm_86 decode e4m3 by its bits, where NaN reads as 480: `quantize_fp8` writes none, and a
    check would cost two instructions for four weights."""
    how = decoder("e4m3", "fp16", way, scaled=False, split=False)
    scale = int(np.array([how.before], np.float16).view(np.uint16)[0]) * 0x10001
    codes = np.array([0x7F387EFF], np.uint32)
    results = run_ptx(how.words, [codes, np.full(1, scale, np.uint32)], 4)
    got = [float(r.astype(np.uint16).view(np.float16)[0]) * how.after for r in results]
    np.testing.assert_array_equal(got, [-value, 448.0, 1.0, value])
