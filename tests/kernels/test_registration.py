"""The operators as torch sees them: opcheck, gradcheck, one node under compile, and what autograd holds."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from kernel_checks import relative
from musubi_kernels import fp8_linear, fp8_linear_dynamic, fp8_lora_linear, lora_linear, quantize_fp8

N, K, RANK = 12, 64, 3


def tensors(dtype: torch.dtype, *, grad: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (2, 3, K), "w": (N, K), "bias": (N,), "down": (RANK, K), "up": (N, RANK)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    q, scale = quantize_fp8(torch.randn(N, K, generator=generator))
    if grad:
        made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    return {**made, "q": q.view(torch.uint8), "scale": scale, "mask": torch.rand(2, 3, RANK, generator=generator)}


def op_calls(dtype: torch.dtype) -> dict[str, tuple[object, ...]]:
    """Arguments for every operator of the package."""
    t = tensors(dtype)
    flat = tensors(dtype, grad=False)
    h, grad = torch.rand(6, RANK).to(dtype), torch.rand(2, 3, N).to(dtype)
    mask = t["mask"].to(dtype)
    low = (flat["down"], flat["up"], mask, 0.5)
    return {
        "fp8_quantize": (flat["w"].float(), "block", 32, torch.bfloat16, "e4m3", ""),
        "fp8_dequantize": (t["q"], t["scale"], "e4m3", torch.bfloat16),
        "fp8_linear": (t["x"], t["q"], t["scale"], t["bias"], "e4m3"),
        "fp8_linear_dynamic": (t["x"], t["q"], t["scale"], t["bias"], "e4m3", "int8"),
        "fp8_linear_dx": (grad.requires_grad_(), t["q"], t["scale"], "e4m3"),
        "fp8_lora_linear": (t["x"], t["q"], t["scale"], t["bias"], t["down"], t["up"], mask, 0.5, "e4m3"),
        "fp8_lora_linear_backward": (grad.detach(), flat["x"], h, t["q"], t["scale"], *low, "e4m3", True),
        "lora_linear": (t["x"], t["w"], t["bias"], t["down"], t["up"], mask, 0.5),
        "lora_linear_backward": (grad.detach(), flat["x"], h, flat["w"], *low, True, True),
    }


@pytest.mark.parametrize("name", sorted(op_calls(torch.float32)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_passes_all_its_tests(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.musubi_kernels, name).default, op_calls(dtype)[name])


def test_every_operator_is_checked() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("musubi_k")}
    assert {name.split(".")[0] for name in registered} == set(op_calls(torch.float32))


def test_gradcheck_of_the_float64_reference() -> None:
    t = tensors(torch.float64)
    q, scale, mask = t["q"].view(torch.float8_e4m3fn), t["scale"], t["mask"]
    x, w, bias, down, up = (t[name] for name in ("x", "w", "bias", "down", "up"))
    assert gradcheck(lambda x, b: fp8_linear(x, q, scale, b), (x, bias))
    assert gradgradcheck(lambda x, b: fp8_linear(x, q, scale, b), (x, bias))
    assert gradcheck(
        lambda x, b, d, u: fp8_lora_linear(x, q, scale, b, d, u, scale=0.7, mask=mask), (x, bias, down, up)
    )
    assert gradcheck(lambda x, w, b, d, u: lora_linear(x, w, b, d, u, scale=0.7, mask=mask), (x, w, bias, down, up))


def test_native_gradients_equal_the_float64_references(native: None) -> None:
    exact, ours = tensors(torch.float64), tensors(torch.float32)
    results = []
    for t in (exact, ours):
        q = t["q"].view(torch.float8_e4m3fn)
        y = fp8_lora_linear(t["x"], q, t["scale"], t["bias"], t["down"], t["up"], scale=0.7, mask=t["mask"])
        (y * torch.arange(N)).square().sum().backward()
        results.append([y.detach(), *(t[name].grad for name in ("x", "bias", "down", "up"))])
    for want, got in zip(*results, strict=True):
        assert relative(got, want) < 2e-6


@pytest.mark.parametrize("which", ["fp8", "fp8_dynamic", "fp8_lora", "dense_lora"])
def test_compile_sees_one_node_and_gives_eager_gradients(which: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    t = tensors(torch.float32)
    q = t["q"].view(torch.float8_e4m3fn)

    def call(x: torch.Tensor) -> torch.Tensor:
        if which == "fp8":
            return fp8_linear(x, q, t["scale"], t["bias"])
        if which == "fp8_dynamic":
            return fp8_linear_dynamic(x, q, t["scale"], t["bias"])
        if which == "fp8_lora":
            return fp8_lora_linear(x, q, t["scale"], t["bias"], t["down"], t["up"], scale=0.7)
        return lora_linear(x, t["w"], t["bias"], t["down"], t["up"], scale=0.7)

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 7):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
        eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager, traced = call(eager_x), compiled(compiled_x)
        torch.testing.assert_close(traced, eager, rtol=0, atol=0)
        eager.square().sum().backward()
        traced.square().sum().backward()
        torch.testing.assert_close(compiled_x.grad, eager_x.grad, rtol=0, atol=0)
    assert len(graphs) == 1
    ours = [node for node in graphs[0].graph.nodes if "musubi_kernels" in str(node.target)]
    products = [node for node in graphs[0].graph.nodes if "linear" in str(node.target) or "matmul" in str(node.target)]
    assert len(ours) == 1
    assert products == ours


def test_aot_autograd_compiles_forward_and_backward_for_any_batch(native: None) -> None:
    t = tensors(torch.float32)
    q = t["q"].view(torch.float8_e4m3fn)

    def call(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return fp8_lora_linear(x, q, t["scale"], t["bias"], down, up, scale=0.7).relu()

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=graphs, dynamic=True)
    for batch in (2, 5, 3):
        grads = []
        for run in (call, compiled):
            x = torch.randn(batch, 3, K, generator=torch.Generator().manual_seed(batch))
            inputs = [each.detach().clone().requires_grad_() for each in (x, t["down"], t["up"])]
            run(*inputs).square().sum().backward()
            grads.append([each.grad for each in inputs])
        for eager, traced in zip(*grads, strict=True):
            torch.testing.assert_close(traced, eager, rtol=0, atol=0)
    assert graphs.frame_count == 1, "one graph for all batches"


def held(call: object) -> dict[int, tuple[int, torch.dtype]]:
    """Bytes and dtype of every distinct storage that autograd saves during `call()`."""
    storages: dict[int, tuple[int, torch.dtype]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()  # type: ignore[operator]
    return storages


def test_autograd_holds_fp8_bytes_and_scales_only(body: str) -> None:
    n, k, m, rank = 256, 512, 48, 4
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, scale = quantize_fp8(w)
    x = torch.randn(m, k).bfloat16().requires_grad_()
    down, up = torch.zeros(rank, k).requires_grad_(), torch.zeros(n, rank).requires_grad_()
    weights = q.numel() + 2 * scale.numel()
    plain = held(lambda: fp8_linear(x, q, scale))
    assert sum(size for size, _ in plain.values()) == weights
    branch = held(lambda: fp8_lora_linear(x, q, scale, None, down, up, scale=1.0))
    small = 2 * x.numel() + 2 * m * rank + 4 * (down.numel() + up.numel())
    assert sum(size for size, _ in branch.values()) == weights + small


def test_a_dense_weights_branch_holds_its_small_tensors_only() -> None:
    n, k, m, rank = 256, 512, 48, 4
    w, x = torch.randn(n, k).bfloat16(), torch.randn(m, k).bfloat16().requires_grad_()
    down, up = torch.zeros(rank, k).requires_grad_(), torch.zeros(n, rank).requires_grad_()
    kept = held(lambda: lora_linear(x, w, None, down, up, scale=1.0))
    assert kept.pop(w.untyped_storage().data_ptr())[0] == w.nbytes
    assert sum(size for size, _ in kept.values()) == x.nbytes + 2 * m * rank + down.nbytes + up.nbytes


def test_quantised_activations_are_not_held() -> None:
    q, scale = quantize_fp8(torch.ones(24, 128).bfloat16())
    x = torch.ones(16, 128).bfloat16().requires_grad_()
    kept = held(lambda: fp8_linear_dynamic(x, q, scale))
    assert sum(size for size, _ in kept.values()) == q.numel() + 2 * scale.numel()


def test_frozen_inputs_hold_nothing(body: str) -> None:
    q, scale = quantize_fp8(torch.ones(8, 64))
    assert held(lambda: fp8_linear(torch.ones(2, 64), q, scale)) == {}
