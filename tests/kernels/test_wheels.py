"""Wheels built with a compiler hold the compiled module, those built without are pure; both import and run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
import torch
import musubi_kernels
assert musubi_kernels.__file__.startswith(sys.argv[1]), musubi_kernels.__file__
torch.manual_seed(0)
x, w = torch.randn(3, 128).bfloat16(), torch.randn(70, 128).bfloat16()
q, scale = musubi_kernels.quantize_fp8(w)
exact = x.double() @ (q.float().double() * scale.double().repeat_interleave(64, 1).view(70, 128)).T
error = (musubi_kernels.fp8_linear(x, q, scale).double() - exact).norm() / exact.norm()
assert error < 2.7e-3, error
print(musubi_kernels.backends()["native"])
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("variables", "compiled"),
    [({"MUSUBI_CUDA": "0"}, True), ({"MUSUBI_PURE": "1"}, False), ({"CXX": "/no/compiler"}, False)],
    ids=["with a compiler", "pure on purpose", "without a compiler"],
)
def test_wheels_import_and_run(variables: Mapping[str, str], compiled: bool, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MUSUBI_", "PYTHON"))}
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    build += ["-C", f"build-dir={tmp_path / 'build'}"]
    done = subprocess.run(build, env=environment | dict(variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("none-any.whl") != compiled, wheel.name
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("musubi_kernels/_C.") for name in archive.namelist()) == compiled
        archive.extractall(place)
    run = [sys.executable, "-c", RUN, str(place)]
    told = subprocess.run(
        run, env=environment | {"PYTHONPATH": str(place)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("available" if compiled else "not available"), told.stdout
    if not compiled:
        assert "the compiled module is not built" in told.stderr, "said once, when the first op runs"
