"""The runner of the device tests keeps reasons: of failures, and of what a time limit cut."""

from __future__ import annotations

from pathlib import Path

import pytest

import run_gpu

CASES = """
import pytest, time

pytestmark = pytest.mark.MARK

def test_right(): pass

def test_wrong(): assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="no device")
def test_skipped(): pass
""".replace("MARK", "gpu")  # so that this file is not taken for one with device tests
DYING = CASES + "\ndef test_that_dies(): import os; os._exit(3)\n"


def test_failures_are_told_with_their_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_device.py"
    file.write_text(CASES)
    assert run_gpu.main([str(file), "--out", str(tmp_path / "out"), "--", "-p", "no:cacheprovider"]) == 1
    said = capsys.readouterr().out
    assert "test_device: 1 passed, 1 failed, 1 skipped" in said
    assert "test_wrong: AssertionError: one is not two" in said
    assert (tmp_path / "out" / "failures.txt").read_text() in said


def test_a_file_that_crashes_keeps_what_it_had_found(tmp_path: Path) -> None:
    file = tmp_path / "test_device.py"
    file.write_text(DYING)
    outcome = run_gpu.run_file(file, tmp_path, 600.0)
    assert outcome.passed == 1
    assert "test_wrong: E AssertionError: one is not two" in outcome.failures[0]
    assert "no report, exit code 3" in outcome.failures[-1]
    assert "test_that_dies" in (tmp_path / "test_device.log").read_text()


def test_a_file_past_its_limit_is_ended_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "test_device.py"
    file.write_text(CASES)
    assert "ended after 0.01 s" in run_gpu.run_file(file, tmp_path, 0.01).failures[-1]


def test_all_device_tests_are_found() -> None:
    names = {path.name for path in run_gpu.device_files()}
    assert {"test_gpu.py", "test_gpu_cuda.py", "test_gpu_end_to_end.py"} <= names
    assert Path(__file__).name not in names
