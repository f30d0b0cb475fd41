"""Runs the device tests one file at a time, so that a cut run loses no reasons, and ends with a list of failures.

    python tests/run_gpu.py [--out FOLDER] [--limit SECONDS] [FILE ...] [-- pytest's own arguments]

Each file writes FOLDER/<name>.log and, case by case, FOLDER/<name>.reasons as it goes, and FOLDER/<name>.xml (JUnit) at
its end; failures.txt is rewritten after each file. A file that passes its time limit or crashes counts as a failure
beside the cases that had failed before. The exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
MARK = "pytest.mark.gpu"
REASONS_VARIABLE = "MUSUBI_TEST_REASONS"


@dataclass(frozen=True)
class Outcome:
    """One file: how many cases passed, failed and were skipped, and a line for each failure."""

    name: str
    seconds: float
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line of the summary."""
        counts = f"{self.passed} passed, {len(self.failures)} failed, {self.skipped} skipped"
        return f"{self.name}: {counts} in {self.seconds:.0f} s"


def device_files() -> list[Path]:
    """Every test file with device tests."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if MARK in path.read_text()]


def pytest_runtest_logreport(report: Any) -> None:
    """As a pytest plugin (`-p run_gpu`): write the reason of a failed case at once, where a cut run leaves it."""
    path = os.environ.get(REASONS_VARIABLE)
    if path and report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")] or [report.longreprtext]
        with Path(path).open("a") as file:
            file.write(f"{report.nodeid.rpartition('::')[2]}: {' '.join(' '.join(lines).split())[:300]}\n")


def run_file(path: Path, folder: Path, limit: float, extra: Sequence[str] = ()) -> Outcome:
    """Run one file and read what it left; a file that was cut or crashed counts as one more failure."""
    report, log, reasons = (folder / f"{path.stem}.{kind}" for kind in ("xml", "log", "reasons"))
    for old in (report, reasons):
        old.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "run_gpu", f"--junitxml={report}"]
    known = os.environ.get("PYTHONPATH")
    path_for_plugin = os.pathsep.join([str(TESTS), *([known] if known else [])])
    environment = {**os.environ, "PYTHONPATH": path_for_plugin, REASONS_VARIABLE: str(reasons.resolve())}
    started = time.monotonic()
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [*command, str(path), *extra], stdout=out, stderr=out, timeout=limit, check=False, env=environment
            )
            end = f"no report, exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"ended after {limit:g} s"
    seconds = time.monotonic() - started
    if report.exists():
        return read_report(path.stem, seconds, report)
    before = reasons.read_text().splitlines() if reasons.exists() else []
    passed = log.read_text().count(" PASSED")
    return Outcome(path.stem, seconds, passed, failures=[*before, f"{end}; {log} names the last case that began"])


def read_report(name: str, seconds: float, report: Path) -> Outcome:
    """The outcome in a JUnit file."""
    passed = skipped = 0
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        reason = next((child for child in case if child.tag in {"failure", "error"}), None)
        if reason is not None:
            words = " ".join((reason.get("message") or "").split())
            failures.append(f"{case.get('name')}: {words[:300]}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Outcome(name, seconds, passed, skipped, failures)


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line for each file, then all failures with their reasons."""
    lines = [str(outcome) for outcome in outcomes]
    lines += [f"  {outcome.name}: {failure}" for outcome in outcomes for failure in outcome.failures]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the files; 1 where a case failed or a file was cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="test files (default: all with device tests)")
    parser.add_argument("--out", type=Path, default=Path("build/test-gpu"), help="folder of the results")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one file (default 900)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    options, extra = parser.parse_args(given[:at]), given[at + 1 :]
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for path in options.files or device_files():
        outcomes.append(run_file(path, options.out, options.limit, extra))
        sys.stdout.write(f"{outcomes[-1]}\n")
        sys.stdout.flush()
        (options.out / "failures.txt").write_text(summary(outcomes) + "\n")
    sys.stdout.write(f"\n{summary(outcomes)}\n\nreports and logs: {options.out}\n")
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
