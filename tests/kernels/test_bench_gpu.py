"""The GPU benchmark runs to its end on the CPU, checks before it reports, and fails when a product is wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def smoke(*words: str, code: str | None = None, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Runs the benchmark's smoke mode, or `code` with its modules importable."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py")] if code is None else [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS), "MUSUBI_KERNELS_CACHE": "off"}
    return subprocess.run(
        [*command, "--smoke", *words], capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )


def test_smoke_runs_every_product_by_every_way(tmp_path: Path) -> None:
    done = smoke("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    ran = {(row["what"], row["m"]): set(row["figures"]) for row in rows}
    for what in ("forward", "dx", "step"):
        for m in (1, 40):
            wanted = {"auto", "triton fused", "triton panel", "plain bf16", "usual"}
            assert wanted <= ran[what, m]
        assert "triton small" in ran[what, 1]
    for what in ("quantize", "dequantize"):
        assert {"auto", "triton", "usual"} <= ran[what, 0]
    assert all(figure["microseconds"] is None for row in rows for figure in row["figures"].values())


def test_nothing_is_reported_when_a_product_is_wrong(tmp_path: Path) -> None:
    code = (
        "import sys, gpu, gpu_contestants as c\n"
        "c.fp8_linear = lambda x, q, scale: c.F.linear(x, c.undo(q, scale)) * 1.02\n"
        "sys.exit(gpu.main(sys.argv[1:]))\n"
    )
    done = smoke("--out", str(tmp_path), code=code)
    assert done.returncode == 1
    found = re.findall(r"(\w+) by .*, M=(\d+), N=96, K=128: relative error (\S+)", done.stderr)
    assert {(product, m) for product, m, _ in found} == {("forward", "1"), ("forward", "20")}
    assert all(0.017 < float(error) < 0.023 for _, _, error in found), "two hundredths too much were planted"
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("what", ["backwards", "forward,nothing"])
def test_an_unknown_product_is_refused(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("gpu").parse(["--what", what])
    assert "choose from forward, dx, step, quantize, dequantize, dynamic" in capsys.readouterr().err
