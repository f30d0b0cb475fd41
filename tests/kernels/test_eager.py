"""The short way of eager calls: the same results, gradients, errors and choices as the registered operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from musubi_kernels import (
    _eager,
    dequantize_fp8,
    explain,
    fp8_linear,
    fp8_linear_dynamic,
    fp8_lora_linear,
    quantize_fp8,
)
from musubi_kernels._formats import Mode
from musubi_kernels._op import OPS
from musubi_kernels.ops.fp8_linear import call as forward
from musubi_kernels.ops.fp8_quantize import call as conversion

N, K, RANK = 20, 128, 4
Call = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (2, 5, K), "bias": (N,), "down": (RANK, K), "up": (N, RANK)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["x"] = made["x"].to(dtype)
    made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    q, scale = quantize_fp8(torch.randn(N, K, generator=generator).bfloat16())
    return {**made, "q": q, "scale": scale, "mask": torch.rand(2, 5, RANK, generator=generator)}


def plain(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return fp8_linear(t["x"], t["q"], t["scale"], t["bias"])


def branch(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return fp8_lora_linear(t["x"], t["q"], t["scale"], t["bias"], t["down"], t["up"], scale=0.7, mask=t["mask"])


def dynamic(t: dict[str, torch.Tensor]) -> torch.Tensor:
    if not explain(fp8_linear_dynamic, t["x"], t["q"], t["scale"]).startswith("fp8_linear_dynamic: native"):
        pytest.skip("this processor has no integer products, and the reference stays behind the dispatcher")
    return fp8_linear_dynamic(t["x"], t["q"], t["scale"], t["bias"])


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that were called through torch's dispatcher."""
    seen: list[str] = []
    for op in OPS.values():
        if op.name == "fp8_quantize":  # makes the test's tensors
            continue
        call = op._call
        monkeypatch.setattr(op, "_call", lambda *args, op=op, call=call: (seen.append(op.name), call(*args))[1])
    return seen


def gradients(call: Call, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for tensor in t.values():
        tensor.grad = None
    y = call(t)
    y.backward(torch.ones_like(y))
    return {"y": y.detach(), **{name: tensor.grad for name, tensor in t.items() if tensor.grad is not None}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("call", [plain, branch, dynamic])
def test_results_and_gradients_are_those_of_the_operators(
    native: None, monkeypatch: pytest.MonkeyPatch, operator_calls: list[str], call: Call, dtype: torch.dtype
) -> None:
    t = tensors(dtype)
    for _ in range(2):  # the first call settles, the second looks up
        ours = gradients(call, t)
    assert operator_calls == []
    monkeypatch.setattr(_eager, "free", lambda *_: False)
    monkeypatch.setattr(_eager, "kinds", lambda *_: None)
    through = gradients(call, t)
    assert operator_calls[0] in {"fp8_linear", "fp8_lora_linear", "fp8_linear_dynamic"}
    assert len(operator_calls) == 2
    assert ours.keys() == through.keys()
    for name, value in through.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype


@pytest.mark.parametrize("call", [plain, branch])
def test_without_gradients_nothing_is_recorded(native: None, operator_calls: list[str], call: Call) -> None:
    t = tensors()
    with torch.no_grad():
        assert call(t).grad_fn is None
    frozen = {name: tensor.detach() for name, tensor in t.items()}
    assert call(frozen).grad_fn is None
    assert call(t).grad_fn is not None
    assert operator_calls == []


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))  # type: ignore[operator]


class Subclass(torch.Tensor):
    pass


def test_whatever_watches_calls_sees_the_operator(native: None) -> None:
    t = {name: tensor.detach() for name, tensor in tensors().items()}
    plain(t)
    with Recorder() as recorder:
        plain(t)
    assert recorder.seen[-1:] == ["musubi_kernels.fp8_linear.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain(t)
    assert "musubi_kernels::fp8_linear" in {row.key for row in profile.key_averages()}
    assert type(plain({**t, "x": t["x"].as_subclass(Subclass)})) is Subclass
    with torch._subclasses.FakeTensorMode() as mode:
        assert plain({name: mode.from_tensor(tensor) for name, tensor in t.items()}).shape == (2, 5, N)
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: plain({**t, "x": x}))(t["x"]).graph
    assert sum("musubi_kernels.fp8_linear" in str(node.target) for node in graph.nodes) == 1


def test_functorch_sees_the_operator(native: None, operator_calls: list[str]) -> None:
    """Which torch's registered derivatives do not serve: its own sentence says so, as before."""
    t = {name: tensor.detach() for name, tensor in tensors(torch.float32).items()}
    plain(t)
    assert operator_calls == []
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: plain({**t, "x": x}).sum())(t["x"])
    assert operator_calls == ["fp8_linear"]


def test_a_pin_is_honoured_from_one_call_to_the_next(
    native: None, monkeypatch: pytest.MonkeyPatch, operator_calls: list[str]
) -> None:
    t = {name: tensor.detach() for name, tensor in tensors().items()}
    plain(t)
    assert operator_calls == []
    monkeypatch.setenv("MUSUBI_KERNELS", "reference")
    plain(t)
    assert operator_calls == ["fp8_linear"]
    monkeypatch.setenv("MUSUBI_KERNELS", "native")
    for isa in ("scalar", "auto"):
        monkeypatch.setenv("MUSUBI_KERNELS_ISA", isa)
        said = explain(fp8_linear, t["x"], t["q"], t["scale"])
        assert said.startswith("fp8_linear: native-" + ("scalar" if isa == "scalar" else ""))
        plain(t)
    monkeypatch.setenv("MUSUBI_KERNELS_ISA", "sse9")
    with pytest.raises(ValueError, match="'sse9': this processor"):
        plain(t)
    monkeypatch.setenv("MUSUBI_KERNELS_ISA", "auto")
    monkeypatch.setenv("MUSUBI_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast': no such backend"):
        plain(t)
    assert operator_calls == ["fp8_linear"]


def test_a_settled_shape_hides_no_error(native: None) -> None:
    t = tensors()
    plain(t), branch(t)
    wrong = {
        "x": (t["x"][..., :64], "the last dimension of x must be 128"),
        "q": (torch.ones(N, K), "an FP8 weight is"),
        "scale": (t["scale"][:3], "one row of scales per weight row"),
        "bias": (torch.ones(N + 1), r"expected a floating tensor of shape \[20\]"),
    }
    for call in (plain, branch):
        for name, (value, words) in wrong.items():
            with pytest.raises(ValueError, match=words):
                call({**t, name: value})
    with pytest.raises(ValueError, match="one rank R"):
        branch({**t, "down": torch.ones(RANK + 1, K)})
    with pytest.raises(ValueError, match="must broadcast to the low-rank activation"):
        branch({**t, "mask": torch.ones(7, RANK)})


def test_autocast_decides_the_dtype_as_before(native: None) -> None:
    t = tensors(torch.float32)
    assert plain(t).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(t).dtype == branch(t).dtype == torch.bfloat16
    assert plain(t).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_to_the_same_gradients(native: None, reentrant: bool) -> None:
    t = tensors()
    want = gradients(branch, t)
    again = gradients(lambda t: checkpoint(lambda x: branch({**t, "x": x}), t["x"], use_reentrant=reentrant), t)
    for name, value in want.items():
        assert torch.equal(again[name], value), name


def test_a_second_derivative_goes_through_the_operators(native: None, operator_calls: list[str]) -> None:
    t = tensors(torch.float32)
    y = plain(t)
    (dx,) = torch.autograd.grad(y, t["x"], (y * y).detach().requires_grad_(), create_graph=True)
    assert dx.grad_fn is not None
    assert operator_calls == ["fp8_linear_dx"]


def test_strided_tensors_give_what_their_copies_give(native: None) -> None:
    t = tensors(torch.float32)
    wide = torch.zeros(2, 5, K + 3)
    wide[..., 1:-2] = t["x"].detach()
    strided = {
        "x": wide[..., 1:-2],
        "q": torch.zeros(N, K + 32, dtype=torch.uint8)[:, :K].copy_(t["q"].view(torch.uint8)).view(torch.float8_e4m3fn),
        "scale": torch.zeros(N, 4, 1, dtype=t["scale"].dtype)[:, ::2].copy_(t["scale"]),
        "bias": torch.zeros(N, 2)[:, 0].copy_(t["bias"].detach()),
        "down": torch.zeros(K, RANK).t().copy_(t["down"].detach()),
        "up": torch.zeros(RANK, N).t().copy_(t["up"].detach()),
    }
    for call in (plain, branch):
        want = call(t).detach()
        for name, value in strided.items():
            torch.testing.assert_close(call({**t, name: value}).detach(), want, rtol=1e-6, atol=1e-6)


@pytest.fixture
def learnt(native: None) -> dict[str, torch.Tensor]:
    """Tensors whose call the compiled module has learnt to serve whole."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no C table for DLPack")
    t = {name: tensor.detach() for name, tensor in tensors().items()}
    plain(t)
    assert forward.whole(t["x"], t["q"], t["scale"], t["bias"]) is not None
    return t


def test_a_whole_call_gives_what_python_gives(learnt: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    t = learnt
    y = forward.whole(t["x"], t["q"], t["scale"], t["bias"])
    other = forward.whole(t["x"][1:, :1], t["q"], t["scale"], t["bias"])  # another batch, an offset
    monkeypatch.setattr(forward, "whole", lambda *_: None)
    assert y is not None
    assert other is not None
    assert torch.equal(y, plain(t))
    assert torch.equal(other, plain({**t, "x": t["x"][1:, :1]}))


@pytest.mark.parametrize("k", [64, 96, 128])
@pytest.mark.parametrize("mode", ["block", "channel", "tensor"])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_a_whole_call_knows_every_layout_of_scales(native: None, k: int, mode: Mode, fmt: str) -> None:
    w, x = torch.randn(9, k).bfloat16(), torch.randn(3, k)
    q, scale = quantize_fp8(w, mode=mode, block_size=32, fmt=fmt)
    first = fp8_linear(x, q, scale)
    assert torch.equal(first, fp8_linear(x, q, scale))
    exact = x.double() @ dequantize_fp8(q, scale, dtype=torch.float32).double().T
    assert torch.allclose(first.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "x": t["x"].clone().requires_grad_()},
        lambda t: {**t, "bias": t["bias"].clone().requires_grad_()},
        lambda t: {**t, "x": t["x"].float()},
        lambda t: {**t, "x": t["x"].transpose(0, 1)},
        lambda t: {**t, "x": t["x"].to("meta")},
        lambda t: {**t, "x": t["x"][..., :64]},
        lambda t: {**t, "q": t["q"].view(torch.float8_e5m2)},
        lambda t: {**t, "q": t["q"].view(torch.uint8)},
        lambda t: {**t, "scale": t["scale"].float()},
        lambda t: {**t, "scale": t["scale"][:, :1]},
        lambda t: {**t, "scale": t["scale"].flatten()},
        lambda t: {**t, "bias": t["bias"][:5]},
        lambda t: {**t, "bias": None},
        lambda t: {**t, "x": t["x"].tolist()},
    ],
)
def test_whatever_was_not_learnt_goes_on_in_python(
    learnt: dict[str, torch.Tensor], change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    t = change(learnt)
    assert forward.whole(t["x"], t["q"], t["scale"], t["bias"]) is None


def test_whoever_watches_sees_the_call(learnt: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    args = [learnt[name] for name in ("x", "q", "scale", "bias")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward.whole(*args) is None
    with torch.profiler.profile():
        assert forward.whole(*args) is None
    with TorchDispatchMode():
        assert forward.whole(*args) is None
    assert torch.func.vmap(lambda x: torch.tensor(forward.whole(x, *args[1:]) is None).expand(1))(args[0]).all()
    with monkeypatch.context() as patch:
        patch.setenv("MUSUBI_KERNELS", "reference")
        assert forward.whole(*args) is None
    assert forward.whole(*args) is not None


@pytest.mark.parametrize("mode", ["block", "channel", "tensor"])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_a_whole_dequantisation_gives_what_python_gives(
    native: None, monkeypatch: pytest.MonkeyPatch, operator_calls: list[str], mode: Mode, fmt: str
) -> None:
    q, scale = quantize_fp8(torch.randn(9, 96).bfloat16(), mode=mode, block_size=32, fmt=fmt)
    dequantize_fp8(q, scale)
    served = conversion.whole(q[2:], scale if mode == "tensor" else scale[2:])
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert served is not None
    monkeypatch.setattr(conversion, "whole", lambda *_: None)
    through = dequantize_fp8(q, scale)
    wide = dequantize_fp8(q, scale, dtype=torch.float32)
    assert operator_calls == []
    assert through.dtype == torch.bfloat16
    assert torch.equal(wide.bfloat16(), through)
    if served is not None:
        assert torch.equal(served, through[2:])
    monkeypatch.setattr(_eager, "free", lambda *_: False)
    assert torch.equal(dequantize_fp8(q, scale), through)
    assert operator_calls == ["fp8_dequantize"]


@pytest.fixture
def converted(native: None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose dequantisation the compiled module serves whole."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no C table for DLPack")
    q, scale = quantize_fp8(torch.randn(N, K).bfloat16())
    dequantize_fp8(q, scale)
    assert conversion.whole(q, scale) is not None
    return q, scale


@pytest.mark.parametrize(
    "change",
    [
        lambda q, scale: (q.view(torch.uint8), scale),
        lambda q, scale: (q[:, :64], scale[:, :1]),
        lambda q, scale: (q.flatten(), scale[0, 0, 0]),
        lambda q, scale: (q.to("meta"), scale),
        lambda q, scale: (q, scale[:3]),
        lambda q, scale: (q, scale.double()),
        lambda q, scale: (q[:, :127].contiguous(), scale),
        lambda q, scale: (q[:0], scale[:0]),
        lambda q, scale: (q.as_subclass(Subclass), scale),
        lambda q, scale: (q, None),
    ],
)
def test_a_dequantisation_that_is_not_plain_goes_on_in_python(
    converted: tuple[torch.Tensor, torch.Tensor], change: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    assert conversion.whole(*change(*converted)) is None


def test_whoever_watches_sees_the_dequantisation(
    converted: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dequantize_fp8(*converted)
    assert "musubi_kernels::fp8_dequantize" in {row.key for row in profile.key_averages()}
    with Recorder() as recorder:
        dequantize_fp8(*converted)
    assert "musubi_kernels.fp8_dequantize.default" in recorder.seen
    monkeypatch.setenv("MUSUBI_KERNELS", "reference")
    assert conversion.whole(*converted) is None
    with pytest.raises(ValueError, match="an FP8 weight is"):
        dequantize_fp8(converted[0].view(torch.uint8), converted[1])
    scale = converted[1].clone().requires_grad_()
    monkeypatch.undo()
    served = conversion.whole(converted[0], scale)
    assert served is not None
    assert not served.requires_grad
