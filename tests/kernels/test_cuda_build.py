"""What the build with nvcc gives, as far as no device is needed: targets, registers, size, loading, errors.

Skipped, with the reason, where nvcc was not there when the package was built.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from host_cuda import ROOT
from musubi_kernels import _native, backends

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
LARGEST = 1_000_000
"""Bytes of the compiled module as a wheel packs it; measured: see docs/kernels.md."""


@pytest.fixture(scope="module")
def module() -> Path:
    """The compiled module's file, with CUDA bodies."""
    if NVCC is None:
        pytest.skip("nvcc is not installed, so the module has no CUDA bodies")
    spec = importlib.util.find_spec("musubi_kernels._C")
    assert spec is not None, "nvcc is there, but the package was built without a compiled module: did its build fail?"
    assert spec.origin is not None
    return Path(spec.origin)


@pytest.fixture(scope="module")
def usage(module: Path) -> dict[str, list[dict[str, int]]]:
    """kernel symbol -> what cuobjdump says of it, once for each target."""
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if tool is None:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            pytest.skip("no cuobjdump: neither CUDA's tools nor triton, which brings one, are installed")
        tool = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    done = subprocess.run([tool, "-res-usage", str(module)], capture_output=True, text=True, timeout=120, check=True)
    table: dict[str, list[dict[str, int]]] = {}
    for name, numbers in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", done.stdout + done.stderr):
        table.setdefault(name, []).append({key: int(n) for key, n in re.findall(r"(\w+):(\d+)", numbers)})
    return table


def test_every_target_is_there(module: Path, usage: dict[str, list[dict[str, int]]]) -> None:
    assert NVCC is not None
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [target for target in TARGETS if target in known]
    assert str(_native.module().cuda.targets).split() == wanted
    assert {len(rows) for rows in usage.values()} == {len(wanted)}
    assert "built for sm_80" in backends()["cuda"]


def test_no_kernel_spills(usage: dict[str, list[dict[str, int]]]) -> None:
    assert len(usage) > 20
    spilled = {name: row for name, rows in usage.items() for row in rows if row["STACK"] or row["LOCAL"]}
    assert not spilled


def test_every_kernel_has_been_run_on_the_cpu(usage: dict[str, list[dict[str, int]]], host_run: Path) -> None:
    done = subprocess.run([host_run / "host_cuda_tests_89", "kernels"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = set(re.findall(r"^_Z\w+$", done.stdout, re.MULTILINE))
    assert ran == set(usage)


def test_the_module_stays_small(module: Path) -> None:
    assert len(zlib.compress(module.read_bytes())) <= LARGEST


def test_the_module_needs_no_cuda_library(module: Path) -> None:
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    needed = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert "cuda" not in needed


def test_it_loads_without_a_driver_and_a_launch_says_what_is_wrong(module: Path) -> None:
    code = (
        "import musubi_kernels._C as module\n"
        "try:\n"
        "    module.cuda.dequantize(0, 0, 16, 2, 64, 64, 16, 0, 0, 64, 0, 0, 16, 1)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    hidden = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=hidden, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.match(r"dequantize with M = 1, N = 2, K = 64: CUDA says: \w", done.stdout), done.stdout
