"""`fp8_linear` and its input gradient by Triton: launchers, tiles by processor, and which of them serves how many rows.

`small` is bound by reading W once, `fused` decodes W inside the product, `panel` decodes W to a bounded buffer and
leaves the product to cuBLAS: a fused kernel that multiplies slower than cuBLAS loses once the product, not the bytes of
W, is what takes time. Every launch goes to the current stream of x's device and waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from musubi_kernels import _cuda, _eager, _panel, _paths, _triton
from musubi_kernels._pin import pinned
from musubi_kernels._triton import Shipped, Tile, cdiv
from musubi_kernels.ops.fp8_linear import cuda
from musubi_kernels.ops.fp8_linear.tiles import SUM_TILE, VECTOR_ROWS, VECTOR_TILE, tile_for, tiles
from musubi_kernels.ops.fp8_quantize.cuda import dequantize as cuda_dequantize
from musubi_kernels.ops.fp8_quantize.triton import dequantize

SMALL_ROWS: Final = 32
"""The rows of the tallest tile of `small`."""
CUDA_ROWS: Final = 8
"""Up to here `small` is left to CUDA C++ where the module has it."""


def refuses(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> str | None:
    """Why the kernels cannot serve a forward, or None."""
    return _triton.refuses(x, q, scale, bias)


def refuses_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> str | None:
    """Why the kernels cannot serve an input gradient, or None."""
    return _triton.refuses(grad, q, scale)


def tells(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> str:
    """Which way a forward takes, and why."""
    return tell(Product(_triton.matrix(x), q, scale, fmt, bias))


def tells_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> str:
    """Which way an input gradient takes, and why."""
    return tell(Product(_triton.matrix(grad), q, scale, fmt, transposed=True))


def tell(call: Product) -> str:
    """The way of a product, and why."""
    return _paths.tell(sizes(call), tuple(ways(call)))


def fp8_linear(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, fmt: str
) -> torch.Tensor:
    """y = x @ (q * scale)^T + bias in x's dtype."""
    return run(x, q, scale, fmt, bias=bias)


def fp8_linear_dx(grad: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, fmt: str) -> torch.Tensor:
    """dX = dY @ (q * scale) in dY's dtype."""
    return run(grad, q, scale, fmt, transposed=True)


def run(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    *,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    low: torch.Tensor | None = None,
    tail: torch.Tensor | None = None,
    strength: float = 1.0,
) -> torch.Tensor:
    """x @ W^T (or x @ W where `transposed`) + bias + strength * low @ tail, as [..., outputs] in x's dtype.

    `low` [M, R] has x's dtype; `tail` is up^T as up [N, R], or down [R, K] where `transposed`.
    """
    flat, codes = _triton.matrix(x), _triton.matrix(q)
    y: torch.Tensor
    if _paths.by_panels(_name(low is not None, transposed), "triton", flat.shape[0], codes, flat):
        y = _by_panels(flat, codes, scale, fmt, bias, transposed, low, tail, strength)
    else:
        call = Product(flat, codes, scale, fmt, bias, transposed, low, tail, strength)
        y = _paths.run(sizes(call), ways(call))
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[1])


@dataclass(frozen=True)
class Product:
    """One product as the three paths take it: x [M, inputs] and q [N, K] with contiguous rows, the rest as in `run`."""

    x: torch.Tensor
    q: torch.Tensor
    scale: torch.Tensor
    fmt: str
    bias: torch.Tensor | None = None
    transposed: bool = False
    low: torch.Tensor | None = None
    tail: torch.Tensor | None = None
    strength: float = 1.0

    @property
    def kind(self) -> str:
        """`bf16`, `fp16` or `fp32`."""
        return _triton.KINDS[self.x.dtype]

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.q.shape[1] if self.transposed else self.q.shape[0]

    def empty(self) -> torch.Tensor:
        """Room for the result, [M, outputs]."""
        return torch.empty((self.x.shape[0], self.outputs), dtype=self.x.dtype, device=self.x.device)


def sizes(call: Product) -> _paths.Sizes:
    """What decides the way of this product."""
    (m, _), (n, k) = call.x.shape, call.q.shape
    name = _name(call.low is not None, call.transposed)
    return _paths.Sizes(name, "triton", m, n, k, call.x.dtype, call.x.device)


def _name(branch: bool, transposed: bool) -> str:
    return f"fp8_{'lora_linear' if branch else 'linear'}{'_dx' if transposed else ''}"


def ways(call: Product) -> dict[_paths.Way, Callable[[], torch.Tensor]]:
    """The ways that can serve it, each giving [M, outputs]. Tensor cores round float32: it has no fused product."""
    found: dict[_paths.Way, Callable[[], torch.Tensor]] = {"panel": partial(panel, call)}
    m = call.x.shape[0]
    if m == 0 or call.q.numel() == 0:
        return found
    if call.kind == "fp32":
        if m <= VECTOR_ROWS and call.low is None and not call.transposed:
            found["small"] = partial(small, call)
        return found
    if m <= SMALL_ROWS:
        found["small"] = partial(small, call)
    found["fused"] = partial(fused, call)
    return found


# -- small and fused: W decoded inside the product --------------------------------------------------------------------


def small(call: Product, tile: Tile | None = None) -> torch.Tensor:
    """The product for few rows: one float32 sum per weight for float32 x, tensor cores on a short tile otherwise."""
    if call.kind == "fp32":
        return vector(call)
    if tile is None and _cuda_is_better(call):
        return cuda.small(call.x, call.q, call.scale, call.bias, call.fmt)
    return fused(call, tile, short=True)


def _cuda_is_better(call: Product) -> bool:
    """Whether the kernel in CUDA C++ is there and the faster one: 1.3 to 1.7 times for a row on an H200, and no longer
    at 16. It knows no branch and no gradient."""
    few = call.x.shape[0] <= CUDA_ROWS and not call.transposed and call.low is None
    return few and _with_cuda(_eager.settings()) and cuda.small_serves(call.x, call.q, call.scale)


def fused(call: Product, tile: Tile | None = None, *, short: bool = False) -> torch.Tensor:
    """The product in one launch, for float16 and bfloat16; `tile` overrides the table (for measurements)."""
    x, q, scale = call.x, call.q, call.scale
    m, n, k = x.shape[0], q.shape[0], q.shape[1]
    rank, low, tail = _low_rank(call)
    target = _triton.capability(x.device)
    made = _prepare(
        call.transposed,
        tile or tile_for(target, m, call.outputs, transposed=call.transposed, short=short),
        target,
        (call.fmt, call.kind, scale.dtype),
        (n, k, tuple(scale.shape), scale.stride()),
        _aligned(q),
        call.bias is not None,
        rank,
    )
    y = call.empty()
    parts = made.parts if short or tile is not None else 1
    out = y if parts == 1 else torch.empty((parts, m, call.outputs), dtype=torch.float32, device=x.device)
    codes = q.view(torch.int32) if made.words else q
    strides = (x.stride(0), codes.stride(0), made.by_row, made.by_block, low.stride(0), tail.stride(0), y.stride(0))
    grid = (cdiv(m, made.bm) * made.across, parts)
    constants = made.constants[parts > 1]
    kernels = _triton.kernels("fp8_linear")
    with _triton.on_device(x):
        if call.transposed:
            kernels._fp8_linear_dx_kernel[grid](
                x, codes, scale, low, tail, out, m, n, k, rank, call.strength, *strides, **constants
            )
        else:
            bias = x if call.bias is None else call.bias
            kernels._fp8_linear_fwd_kernel[grid](
                x, codes, scale, bias, low, tail, out, m, n, k, rank, call.strength, *strides, **constants
            )
        if parts > 1:
            size = y.numel()
            kernels._fp8_linear_sum_kernel[(cdiv(size, SUM_TILE),)](out, y, size, parts, B=SUM_TILE, num_warps=4)
    return y


@dataclass(frozen=True)
class Prepared:
    """What a launch needs besides tensors, the same for all calls of a layer with rows of one bucket."""

    bm: int
    across: int
    parts: int
    words: bool
    by_row: int
    by_block: int
    constants: tuple[dict[str, Any], dict[str, Any]]


@functools.lru_cache(maxsize=4096)
def _prepare(
    transposed: bool,
    tile: Tile,
    target: int,
    types: tuple[str, str, torch.dtype],
    layer: tuple[int, int, tuple[int, ...], tuple[int, ...]],
    aligned: bool,
    bias: bool,
    rank: int,
) -> Prepared:
    n, k, shape, stride = layer
    scales = _triton.layout_of(k, shape, stride)
    width, outputs, inputs = (tile.bn, k, n) if transposed else (tile.bk, n, k)
    otherwise = "row" if not transposed else "one" if scales.layout == "tensor" else "step"
    how, block, groups = _triton.step_of(scales, width, k, otherwise=otherwise)
    if tile.after and how == "step" and groups == 1 and not transposed:
        how = "after"
    even = inputs % tile.bk == 0 and (not transposed or k % tile.bn == 0)
    words = even and how != "each" and prefers_words(target, tile, types[1]) and aligned and block % 4 == 0
    case = Case(*types, how, block, groups, even, words, bias, rank)
    make = dx_constants if transposed else forward_constants
    stages = stages_for(tile, how, target, branch_dx=transposed and rank > 0)
    options = {"num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": True}
    both = [{**make(tile, target, case), "PARTS": split, **options} for split in (False, True)]
    across = cdiv(outputs, tile.bn)
    return Prepared(
        tile.bm,
        across,
        parts_for(across, cdiv(inputs, tile.bk)) if tile.split else 1,
        both[0]["WORDS"],
        scales.by_row,
        scales.by_block,
        (both[0], both[1]),
    )


def parts_for(programs: int, steps: int) -> int:
    """Into how many parts a short product shares its steps: some 500 programs, at least four steps in each."""
    parts = 1
    while parts < 16 and 2 * parts * programs <= 640 and steps >= 8 * parts:
        parts *= 2
    return parts


def stages_for(tile: Tile, how: str, target: int, *, branch_dx: bool) -> int:
    """Steps in flight: a look-up for each weight keeps a tile of scales as wide as floats beside the codes, and with
    the usual number of steps takes more shared memory than all but sm_90 and sm_100 have (16 rows by 64: registers).
    `branch_dx`: the input gradient with a branch, whose fourth step spills on sm_120 in the tile of 64 rows."""
    if branch_dx and target == 120 and tile.bm == 64:
        return min(tile.stages, 3)
    if how != "each" or (target in (90, 100) and (tile.bm, tile.bn) != (16, 64)):
        return tile.stages
    return min(tile.stages, 2)


def prefers_words(target: int, tile: Tile, kind: str) -> bool:
    """Whether codes are read as words: where the tile goes to tensor cores from registers.

    The products of sm_90 and sm_100 read decoded weights from shared memory or tensor memory in any case. float16 x on
    sm_90 spills with words in the widest short tile.
    """
    if target == 90 and kind == "fp16" and (tile.bm, tile.bn) == (16, 64):
        return False
    return target not in (90, 100) or tile.bm < 64


def _aligned(q: torch.Tensor) -> bool:
    """Whether rows of codes can be read as aligned 32-bit words, four to a load."""
    return q.stride(0) % 16 == 0 and q.data_ptr() % 16 == 0 and q.storage_offset() % 4 == 0 and q.shape[1] % 4 == 0


def _low_rank(call: Product) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(rank, low, tail), with rank 0 and stand-ins where there is no branch."""
    if call.low is None or call.tail is None:
        return 0, call.x, call.x
    return call.low.shape[1], _triton.matrix(call.low), _triton.matrix(call.tail)


def vector(call: Product) -> torch.Tensor:
    """The product for a row or two, all in float32."""
    kernels = _triton.kernels("fp8_linear")
    (m, k), n = call.x.shape, call.q.shape[0]
    tile = VECTOR_TILE if _triton.capability(call.x.device) else Tile(1, 16, 64, 4, 1)
    scales = _triton.scales_of(call.q, call.scale)
    how, block, groups = _triton.step_of(scales, tile.bk, k, otherwise="row")
    tile = vector_tile(tile, how)
    types, even = (call.fmt, call.kind, call.scale.dtype), k % tile.bk == 0
    case = Case(*types, how, block, groups, even, False, call.bias is not None, 0)
    y = call.empty()
    with _triton.on_device(call.x):
        kernels._fp8_linear_rows_kernel[(cdiv(n, tile.bn), m)](
            call.x,
            call.q,
            call.scale,
            call.x if call.bias is None else call.bias,
            y,
            n,
            k,
            call.x.stride(0),
            call.q.stride(0),
            scales.by_row,
            scales.by_block,
            y.stride(0),
            **vector_constants(tile, _triton.capability(call.x.device), case),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return y


def vector_tile(tile: Tile, how: str) -> Tile:
    """Half the step where each weight's scale is looked up, which spills on sm_90 with a whole one."""
    return replace(tile, bk=tile.bk // 2) if how == "each" else tile


# -- panel: W decoded a part at a time, products by torch -------------------------------------------------------------


def panel(call: Product) -> torch.Tensor:
    """The product by torch on parts of the decoded weight."""
    return _by_panels(
        call.x, call.q, call.scale, call.fmt, call.bias, call.transposed, call.low, call.tail, call.strength
    )


def _by_panels(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    fmt: str,
    bias: torch.Tensor | None,
    transposed: bool,
    low: torch.Tensor | None,
    tail: torch.Tensor | None,
    strength: float,
) -> torch.Tensor:
    decode = cuda_dequantize if _with_cuda(_eager.settings()) else dequantize

    def panels(codes: torch.Tensor, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return decode(codes, part, fmt, dtype)

    y = _panel.input_gradient(x, q, scale, panels) if transposed else _panel.product(x, q, scale, bias, panels)
    if low is not None and tail is not None:
        tail = tail.to(y.dtype)
        y.addmm_(low, tail if transposed else tail.t(), alpha=strength)
    return y


@functools.lru_cache(maxsize=64)
def _with_cuda(_: str) -> bool:
    """Whether, while the environment is as given, bodies in CUDA C++ are there too: in the module, and nothing pinned.

    Panels are decoded by them: the same bits in the same time on the device, but a call costs the host less than
    half (14 µs against 32, on the host of an H200).
    """
    return pinned() is None and not _triton.interpreting() and _cuda.missing() is None


# -- the registry: what can be launched --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What besides the tile decides a kernel's code: format, types, where scales apply, evenness, bias and rank."""

    fmt: str
    kind: str
    scale: torch.dtype
    how: str
    block: int
    groups: int
    even: bool
    words: bool
    bias: bool
    rank: int


def _constants(tile: Tile, target: int, case: Case) -> dict[str, Any]:
    scaled = case.how in ("step", "each")
    split = scaled and _triton.needs_split(case.kind, case.scale)
    how = _triton.decoder_for(target, case.fmt, case.kind, scaled=scaled, split=split)
    words = case.words and how.words != ""
    return {
        "E5M2": case.fmt == "e5m2",
        "WORDS": words,
        "ASM": how.words if words else how.bytes,
        "SPLIT": split,
        "BEFORE": how.before,
        "AFTER": how.after,
        "SCALES": case.how,
        "BLOCK": case.block,
        "GROUPS": case.groups,
        "EVEN": case.even,
        "HAS_LOW": case.rank > 0,
        "PARTS": False,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "BR": 16 if case.rank <= 16 else 32 if case.rank <= 32 else 64,
        "GROUP": tile.group,
    }


def forward_constants(tile: Tile, target: int, case: Case) -> dict[str, Any]:
    """The constexprs of the forward kernel."""
    return {**_constants(tile, target, case), "HAS_BIAS": case.bias, "SWAP": tile.swap}


def dx_constants(tile: Tile, target: int, case: Case) -> dict[str, Any]:
    """The constexprs of the input gradient's kernel."""
    return _constants(tile, target, case)


def vector_constants(tile: Tile, target: int, case: Case) -> dict[str, Any]:
    """The constexprs of the float32 kernel for a row or two."""
    how = _triton.decoder_for(target, case.fmt, "fp16", scaled=False, split=False)
    return {
        "E5M2": case.fmt == "e5m2",
        "ASM": how.bytes,
        "BEFORE": how.before,
        "SCALES": case.how,
        "BLOCK": case.block,
        "GROUPS": case.groups,
        "EVEN": case.even,
        "HAS_BIAS": case.bias,
        "BN": tile.bn,
        "BK": tile.bk,
    }


def shipped() -> Iterator[Shipped]:
    """Every kernel and tile of this op, with the types that matter first (`core`) and the rest."""
    for target in _triton.TARGETS:
        for transposed in (False, True):
            for tile in tiles(target, transposed=transposed):
                yield from _shipped_tile(target, tile, transposed)
        yield from _shipped_rows(target)
    yield from _shipped_sum()


def _shipped_sum() -> Iterator[Shipped]:
    function = _triton.kernels("fp8_linear")._fp8_linear_sum_kernel
    for kind in ("bf16", "fp16", "fp32"):
        yield Shipped(
            name=f"fp8_linear_sum-{kind}",
            function=function,
            signature={"parts": "*fp32", "y": f"*{kind}", "size": "i32", "count": "i32"},
            constexprs={"B": SUM_TILE},
            num_warps=4,
            num_stages=3,
            targets=_triton.TARGETS,
            op="fp8_linear",
            aligned=("parts", "y", "size"),
            core=kind == "bf16",
        )


def _shipped_rows(target: int) -> Iterator[Shipped]:
    kernels = _triton.kernels("fp8_linear")
    function = kernels._fp8_linear_rows_kernel
    fp32, groups = torch.float32, max(1, VECTOR_TILE.bk // 64)
    for case in (
        Case("e4m3", "fp32", fp32, "step", 64, groups, True, False, True, 0),
        Case("e4m3", "fp32", torch.bfloat16, "step", 64, groups, True, False, False, 0),
        Case("e5m2", "fp32", fp32, "row", 1 << 30, 1, True, False, True, 0),
        Case("e4m3", "fp32", fp32, "each", 48, 1, False, False, True, 0),
    ):
        tile = vector_tile(VECTOR_TILE, case.how)
        constants = vector_constants(tile, target, case)
        types = {"x": "fp32", "q": "u8", "scale": _triton.KINDS[case.scale], "bias": "fp32", "y": "fp32"}
        yield Shipped(
            name=f"fp8_linear_rows-{tile.name}-fp32-{case.fmt}-{case.how}-{_triton.KINDS[case.scale]}"
            f"{'' if case.even else '-ragged'}",
            function=function,
            signature={n: f"*{types[n]}" if n in types else "i32" for n in function.arg_names if n not in constants},
            constexprs=constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            targets=(target,),
            op="fp8_linear",
            aligned=(*types, "K", "x_stride", "q_stride", "y_stride"),
            core=case.how == "step" and case.scale == fp32,
        )


def _shipped_tile(target: int, tile: Tile, transposed: bool) -> Iterator[Shipped]:
    kernels = _triton.kernels("fp8_linear")
    function = kernels._fp8_linear_dx_kernel if transposed else kernels._fp8_linear_fwd_kernel
    integers = [name for name in function.arg_names if name.endswith("_stride")]
    cases = [(case, False) for case in _cases(tile, target, transposed)]
    for case, parts in (*cases, *[(case, True) for case, _ in cases[:2] if tile.split]):
        constants = (dx_constants if transposed else forward_constants)(tile, target, case) | {"PARTS": parts}
        wide = {"x": case.kind, "grad": case.kind, "y": case.kind, "dx": case.kind, "low": case.kind, "bias": case.kind}
        types = {
            **wide,
            **({"y": "fp32", "dx": "fp32"} if parts else {}),
            "q": "i32" if constants["WORDS"] else "u8",
            "scale": _triton.KINDS[case.scale],
            "up": "fp32",
            "down": "fp32",
        }
        signature = {
            name: f"*{types[name]}" if name in types else "fp32" if name == "strength" else "i32"
            for name in function.arg_names
            if name not in constants
        }
        plain = (
            case.fmt == "e4m3"
            and case.even
            and case.words == prefers_words(target, tile, case.kind)
            and case.how in ("step", "after")
            and not case.bias
        )
        yield Shipped(
            name=f"fp8_linear_{'dx' if transposed else 'fwd'}-{tile.name}-{case.kind}-{case.fmt}-{case.how}"
            f"-{_triton.KINDS[case.scale]}{'-words' if case.words else ''}{'-lora' if case.rank else ''}"
            f"{'-parts' if parts else ''}",
            function=function,
            signature=signature,
            constexprs=constants,
            num_warps=tile.warps,
            num_stages=stages_for(tile, case.how, target, branch_dx=transposed and case.rank > 0),
            targets=(target,),
            op="fp8_linear" if not case.rank else "fp8_lora_linear",
            note=tile.why,
            aligned=(*(t for t in types if t in function.arg_names), "N", "K", *integers),
            hot=True,
            core=plain,
        )


def _cases(tile: Tile, target: int, transposed: bool) -> Iterator[Case]:
    words = prefers_words(target, tile, "bf16")
    step = "after" if tile.after else "step"
    width = tile.bn if transposed else tile.bk
    whole = "one" if transposed else "row"
    bf16, fp32 = torch.bfloat16, torch.float32
    groups = max(1, width // 64)
    yield Case("e4m3", "bf16", bf16, step, 64, groups, True, words, False, 0)
    yield Case("e4m3", "bf16", bf16, step, 64, groups, True, words, False, 32)
    yield Case("e4m3", "bf16", fp32, step, 64, groups, True, words, False, 0)
    yield Case("e4m3", "fp16", bf16, step, 64, groups, True, prefers_words(target, tile, "fp16"), False, 0)
    yield Case("e5m2", "bf16", bf16, step, 64, groups, True, words, not transposed, 0)
    yield Case("e4m3", "bf16", fp32, whole, 1 << 30, 1, True, words, not transposed, 0)
    if words:  # for rows that are not aligned
        yield Case("e4m3", "bf16", bf16, step, 64, groups, True, False, False, 0)
    yield Case("e4m3", "bf16", fp32, "each", 48, 1, False, False, not transposed, 0)
