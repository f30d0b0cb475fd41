"""Builds the CUDA kernels to run on the CPU, for the tests of `tests/kernels` (csrc/host_cuda/run.h)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADERS = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include", Path("/usr/local/cuda/include")]


def build_host_run(folder: str, targets: list[str], *options: str) -> Path:
    """The folder in which `targets` are built; the test is skipped, with the reason, where they cannot be."""
    if shutil.which("cmake") is None or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no cmake or no C++ compiler")
    if not any((headers / "cuda_fp8.h").exists() for headers in HEADERS):
        pytest.skip("CUDA's headers (cuda_fp8.h) are not installed: the kernels' source cannot be compiled here")
    build = ROOT / "build" / folder  # kept, so that a second run builds nothing
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of this run may want the same
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(build), "-DMUSUBI_HOST_CUDA=ON", "-DMUSUBI_WERROR=ON", *options],
            ["cmake", "--build", str(build), "--parallel", "2", "--target", *targets],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build
