"""Fixtures of the kernel tests: every body that this machine has as a parameter, and the recorded FP8 cases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from golden_data import REFERENCE
from host_cuda import build_host_run
from kernel_checks import Fp8Cases, bodies
from musubi_kernels import _native
from musubi_kernels._backends import missing
from musubi_kernels._op import OPS
from musubi_kernels.ops.fp8_linear import call
from musubi_kernels.ops.fp8_quantize import call as dequantize_call


@pytest.fixture(autouse=True)
def unsettled() -> None:
    """Each test chooses backends anew: some change what the machine has."""
    for op in OPS.values():
        op.forget()
    call.forget()
    dequantize_call.forget()


@pytest.fixture(params=bodies())
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pins one body for the test: the reference, or the compiled module with one instruction set."""
    backend, _, isa = request.param.partition("-")
    monkeypatch.setenv("MUSUBI_KERNELS", backend)
    if isa:
        monkeypatch.setenv(_native.ISA_VARIABLE, isa)
    return request.param


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where the compiled module is not built, and lets dispatch choose otherwise."""
    reason = missing("native")
    if reason:
        pytest.skip(reason)
    monkeypatch.delenv("MUSUBI_KERNELS", raising=False)


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Torch's own products on a device, which panels use: float32 means float32, and where cuBLAS shares a 16-bit
    product out over K, its parts are added in float32. (By default they are rounded to 16 bits first.)"""
    flags = torch.backends.cuda.matmul
    kinds = ("bf16", "fp16")
    names = ("allow_tf32", *(f"allow_{kind}_reduced_precision_reduction" for kind in kinds))
    before = {name: getattr(flags, name) for name in names}
    for name in names:
        setattr(flags, name, False)
    yield
    for name, value in before.items():
        setattr(flags, name, value)


@pytest.fixture(scope="session")
def fp8_cases() -> Fp8Cases:
    """The 443 recorded quantisations."""
    folder = REFERENCE / "behaviour"
    rows = json.loads((folder / "fp8_cases.json").read_text())["cases"]
    return Fp8Cases(rows, load_file(folder / "fp8_cases.safetensors"))


@pytest.fixture(scope="session")
def host_run() -> Path:
    """Where the CUDA kernels are built for the CPU; skips with the reason where they cannot be."""
    return build_host_run(
        "host-cuda", ["host_cuda", "host_cuda_tests_80", "host_cuda_tests_89"], "-DCMAKE_BUILD_TYPE=Release"
    )
