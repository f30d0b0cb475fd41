"""The C++ tests, built by the same CMake file and run: every body against double loops, the codes, the pool.

Also under sanitizers, and for another processor.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROSS = "aarch64-linux-gnu-g++"


@pytest.fixture(scope="session")
def cmake() -> str:
    found = shutil.which("cmake")
    if found is None or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no cmake or no C++ compiler")
    return found


def build(cmake: str, name: str, *options: str) -> Path:
    """The C++ tests, built in a folder that is kept, so that a second run builds nothing."""
    folder = ROOT / "build" / name
    run(cmake, "-S", str(ROOT), "-B", str(folder), "-DMUSUBI_TESTS=ON", *options)
    run(cmake, "--build", str(folder), "--parallel", "2")
    return folder / "csrc_tests"


def run(*command: str, seconds: int = 500) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_cpp_tests_pass_without_a_warning(cmake: str) -> None:
    tests = build(cmake, "csrc-tests", "-DMUSUBI_WERROR=ON", "-DCMAKE_BUILD_TYPE=Release")
    assert "all C++ tests passed" in run(str(tests))


@pytest.mark.slow
def test_cpp_tests_pass_under_sanitizers(cmake: str) -> None:
    options = ("-DMUSUBI_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
    assert "all C++ tests passed" in run(str(build(cmake, "csrc-sanitized", *options)))


@pytest.mark.slow
def test_cpp_tests_build_for_aarch64_and_pass_where_they_can_run(cmake: str) -> None:
    """Other processors have the scalar bodies. Needs a cross compiler (Debian's g++-aarch64-linux-gnu); the result runs
    where qemu's user mode is there too (qemu-user-static), for a minute or two."""
    if shutil.which(CROSS) is None:
        pytest.skip(f"no {CROSS}")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}")
    options = ("-DMUSUBI_WERROR=ON", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    tests = build(cmake, "csrc-aarch64", *system, *options)
    assert int.from_bytes(tests.read_bytes()[18:20], "little") == 183, "not an executable for aarch64"
    emulator = next((found for name in ("qemu-aarch64-static", "qemu-aarch64") if (found := shutil.which(name))), None)
    if emulator is None:
        pytest.skip("built; no qemu-aarch64 to run it")
    assert "all C++ tests passed" in run(emulator, str(tests))
