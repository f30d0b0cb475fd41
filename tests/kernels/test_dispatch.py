"""Choice of backends, pins, `explain`, and the errors that callers see."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest
import torch

import musubi_kernels
from musubi_kernels import (
    _op,
    backends,
    dequantize_fp8,
    explain,
    fp8_linear,
    fp8_linear_dynamic,
    fp8_lora_linear,
    fp8_mode,
    lora_linear,
    quantize_fp8,
)


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, q, scale) of a small layer."""
    q, scale = quantize_fp8(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).bfloat16())
    return torch.ones(3, 128, dtype=torch.bfloat16), q, scale


Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def test_backends_are_named_with_a_reason_each() -> None:
    table = backends()
    assert list(table) == ["native", "triton", "cuda", "reference"]
    assert table["reference"].startswith("available")
    for text in table.values():
        assert re.match(r"available: \w|not available: \w", text)


def test_explain_tells_the_choice_its_sizes_and_every_other_reason(native: None, layer: Layer) -> None:
    sentence = explain(fp8_linear, *layer)
    assert re.match(r"fp8_linear: native-\w+ on \d+ thread", sentence)
    assert "M=3, N=8, K=128, block scales, e4m3" in sentence
    for other in ("triton", "cuda"):
        assert f"{other}: not used because " in sentence
    assert "reference: could serve it too" in sentence


def test_explain_names_what_the_native_body_lacks(native: None, layer: Layer) -> None:
    x, q, scale = layer
    assert "native: not used because it has no torch.float64 body" in explain(fp8_linear, x.double(), q, scale)


def test_explain_runs_nothing_and_knows_every_function(monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:
    x, q, scale = layer
    monkeypatch.setattr(_op.Op, "__call__", lambda *_: pytest.fail("explain ran an op"))
    small = (torch.ones(2, 128), torch.ones(8, 2))
    calls = [
        (quantize_fp8, (torch.ones(2, 64),), {}),
        (dequantize_fp8, (q, scale), {}),
        (fp8_linear, layer, {}),
        (fp8_linear_dynamic, layer, {"kind": "fp8"}),
        (fp8_lora_linear, (*layer, None, *small), {"scale": 1.0}),
        (lora_linear, (x, torch.ones(8, 128), None, *small), {"scale": 1.0}),
    ]
    for function, args, kwargs in calls:
        assert explain(function, *args, **kwargs).startswith(f"{function.__name__}: ")
    with pytest.raises(ValueError, match="no backends to explain; known: dequantize_fp8"):
        explain(fp8_mode, scale)


def test_reference_can_be_pinned(monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS", "reference")
    assert "reference (pinned by MUSUBI_KERNELS)" in explain(fp8_linear, *layer)
    assert fp8_linear(*layer).shape == (3, 8)


@pytest.mark.parametrize("pin", ["triton", "cuda"])
def test_a_pin_that_cannot_be_honoured_raises(monkeypatch: pytest.MonkeyPatch, layer: Layer, pin: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the tests' own processes have an interpreter, users have not
    monkeypatch.setenv("MUSUBI_KERNELS", pin)
    with pytest.raises(ValueError, match=f"MUSUBI_KERNELS = {pin}: it cannot serve fp8_linear here because"):
        fp8_linear(*layer)


def test_a_native_pin_refuses_what_it_cannot_serve(native: None, monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:
    x, q, scale = layer
    monkeypatch.setenv("MUSUBI_KERNELS", "native")
    with pytest.raises(ValueError, match=r"because it has no torch\.float64 body"):
        fp8_linear(x.double(), q, scale)


def test_unknown_words_in_the_variables_raise(monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast': no such backend; use auto, native, triton, cuda, reference"):
        fp8_linear(*layer)


def test_an_isa_that_the_machine_lacks_raises(native: None, monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:
    monkeypatch.setenv("MUSUBI_KERNELS_ISA", "sse9")
    with pytest.raises(ValueError, match=r"'sse9': this processor and build can run scalar"):
        fp8_linear(*layer)


def test_without_a_compiled_module_the_reference_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, layer: Layer
) -> None:
    reason = "the compiled module is not built"
    monkeypatch.delenv("MUSUBI_KERNELS", raising=False)
    monkeypatch.setattr(_op, "missing", lambda backend: None if backend == "reference" else reason)
    monkeypatch.setattr(_op, "_said", set())
    with caplog.at_level(logging.WARNING):
        fp8_linear(*layer)
        fp8_linear(*layer)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("musubi_kernels")]
    assert len(said) == 1
    assert reason in said[0]


def test_importing_asks_for_no_device_and_loads_no_module() -> None:
    code = (
        "import sys, torch\n"
        "torch.cuda.is_available = lambda: sys.exit('asked for a device')\n"
        "import musubi_kernels\n"
        "assert 'musubi_kernels._C' not in sys.modules and 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names() -> None:
    assert set(musubi_kernels.__all__) == {
        "backends",
        "dequantize_fp8",
        "dynamic_error",
        "explain",
        "fp8_linear",
        "fp8_linear_dynamic",
        "fp8_lora_linear",
        "fp8_mode",
        "lora_linear",
        "quantize_fp8",
    }


X, LOW = torch.ones(3, 128), (torch.ones(2, 128), torch.ones(8, 2))
WRONG = {
    "weight not fp8": (lambda q, s: fp8_linear(X, torch.ones(8, 128), s), r"float32: an FP8 weight is"),
    "columns": (lambda q, s: fp8_linear(torch.ones(3, 64), q, s), r"x \[3, 64\] with q \[8, 128\].*must be 128"),
    "scalar x": (lambda q, s: fp8_linear(torch.ones(()), q, s), r"the last dimension of x must be 128"),
    "integer x": (lambda q, s: fp8_linear(X.int(), q, s), r"int32: expected bfloat16, float16 or float32"),
    "scale rows": (lambda q, s: fp8_linear(X, q, s[:4]), r"q \[8, 128\] with scale \[4, 2, 1\]"),
    "scale blocks": (lambda q, s: fp8_linear(X, q, torch.ones(8, 3, 1)), r"3 blocks do not divide rows of 128"),
    "scale shape": (lambda q, s: fp8_linear(X, q, torch.ones(8)), r"scale has shape \[8\]: expected \[N, K/B, 1\]"),
    "scale dtype": (lambda q, s: fp8_linear(X, q, s.double()), r"scale has dtype torch.float64"),
    "bias": (
        lambda q, s: fp8_linear(X, q, s, torch.ones(7)),
        r"float32 \[7\]: expected a floating tensor of shape \[8\]",
    ),
    "rank": (
        lambda q, s: fp8_lora_linear(X, q, s, None, torch.ones(3, 128), torch.ones(8, 2), scale=1.0),
        r"down \[3, 128\] and up \[8, 2\].*one rank R",
    ),
    "mask": (
        lambda q, s: fp8_lora_linear(X, q, s, None, *LOW, scale=1.0, mask=torch.ones(5, 2)),
        r"mask \[5, 2\]: it must broadcast to the low-rank activation \[3, 2\]",
    ),
    "fp8 in the dense op": (lambda q, s: lora_linear(X, q, None, *LOW, scale=1.0), "FP8 goes to fp8_lora_linear"),
    "mode": (
        lambda q, s: quantize_fp8(X, mode="row"),
        "'row': no such scale layout; use one of block, channel, tensor",
    ),
    "block": (lambda q, s: quantize_fp8(X, block_size=0), "block_size = 0"),
    "format": (lambda q, s: quantize_fp8(X, fmt="e3m4"), "'e3m4': no such FP8 format; use one of e4m3, e5m2"),
    "search": (lambda q, s: quantize_fp8(X, search="grid"), "'grid': use None"),
    "kind": (lambda q, s: fp8_linear_dynamic(X, q, s, kind="int4"), r"'int4': no such code .*; use int8, fp8"),
    "double weight": (lambda q, s: quantize_fp8(X.double()), "float64: only bfloat16, float16 and float32"),
    "scale type": (lambda q, s: quantize_fp8(X, scale_dtype=torch.int8), r"scale_dtype = torch.int8"),
    "dtype": (lambda q, s: dequantize_fp8(q, s, dtype=torch.int8), r"dtype = torch.int8: use bfloat16"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_argument_is_told_with_its_value(fault: str) -> None:
    call, message = WRONG[fault]
    with pytest.raises(ValueError, match=message):
        call(*quantize_fp8(torch.ones(8, 128)))
