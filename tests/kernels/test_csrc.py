"""The C++ tests, built by the same CMake file and run: every body against double loops, the codes, the pool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cmake() -> str:
    found = shutil.which("cmake")
    if found is None or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no cmake or no C++ compiler")
    return found


def test_cpp_tests_pass_without_a_warning(cmake: str) -> None:
    build = ROOT / "build" / "csrc-tests"  # kept, so that a second run builds nothing
    options = ["-DMUSUBI_TESTS=ON", "-DMUSUBI_WERROR=ON", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), *options],
        [cmake, "--build", str(build), "--parallel", "2"],
        [str(build / "csrc_tests")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all C++ tests passed" in done.stdout


@pytest.mark.slow
def test_cpp_tests_pass_under_sanitizers(cmake: str) -> None:
    build = ROOT / "build" / "csrc-sanitized"
    options = ["-DMUSUBI_TESTS=ON", "-DMUSUBI_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), *options],
        [cmake, "--build", str(build), "--parallel", "2"],
        [str(build / "csrc_tests")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
