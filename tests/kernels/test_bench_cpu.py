"""The CPU benchmark measures what it says, tells a miss from a limit, and reports nothing when a product is wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import cpu_clock
import cpu_conversions
import cpu_gates
import cpu_products
import cpu_report
import kernels as benchmark
from cpu_gates import Gate, Row
from cpu_peers import PEERS, compiled_usual, field_of
from musubi_kernels import quantize_fp8


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every contestant runs once and takes a second; the names of each turn."""
    turns: list[list[str]] = []

    def once(calls: Mapping[str, cpu_clock.Call], **_: object) -> dict[str, float]:
        turns.append(list(calls))
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 1.0)

    for module in (cpu_products, cpu_conversions):
        monkeypatch.setattr(module, "in_turn", once)
    monkeypatch.setattr(cpu_products, "cache_bytes", lambda: 1 << 15)
    return turns


def row(*gates: Gate) -> Row:
    return Row("forward", 64, 64, 1, 1.0, {"usual": 80.0, "plain": 2.0}, gates)


def test_only_a_gate_near_the_machines_limit_is_excused_and_only_by_a_value_near_it() -> None:
    usual = Gate("x usual", 80.0, 75.0, possible=90.0)
    assert row(usual, Gate("x plain", 2.0, 3.0, possible=2.3)).verdict(1.0) == "limit"
    assert row(usual, Gate("x plain", 2.0, 3.0, possible=1.9)).verdict(1.0) == "limit", "faster than was possible"
    assert row(usual, Gate("x plain", 2.0, 3.0, possible=2.4)).verdict(1.0) == "miss", "83 % of what is possible"
    assert row(usual, Gate("x plain", 2.7, 3.0, possible=3.1)).verdict(1.0) == "limit", "87 %, and 97 % were asked for"
    assert row(usual, Gate("x plain", 2.6, 3.0, possible=3.1)).verdict(1.0) == "miss"
    assert row(usual, Gate("x plain", 2.9, 3.0, possible=3.6)).verdict(1.0) == "miss", "the machine can do it"
    assert row(usual, Gate("x plain", 2.0, 3.0)).verdict(1.0) == "miss", "nothing is known"
    assert row(usual, Gate("x plain", 2.0, 3.0, possible=2.3)).verdict(0.5) == ""
    assert row(usual, Gate("x plain", 1.2, 3.0, possible=1.3)).verdict(0.5) == "limit", "half is too much, too"
    assert row(Gate("x usual", 70.0, 75.0), Gate("x plain", 2.0, 3.0, possible=2.3)).verdict(1.0) == "miss"
    assert row(Gate("added", 2.0, 1.0, most=True, possible=1.9)).verdict(1.0) == "miss"


def test_the_machine_needs_the_longer_of_moving_and_computing() -> None:
    work = {"moved": 6e9, "operations": 8e11}
    assert cpu_gates.least_seconds(**work, speed=12e9, flops=1e12) == 0.8
    assert cpu_gates.least_seconds(**work, speed=6e9, flops=1e12) == 1.0
    assert cpu_gates.least_seconds(**work, speed=12e9) == 0.5
    assert cpu_gates.least_seconds(**work) == 0.0
    times = {"ours": 0.5, "usual": 6.0, "plain": 1.0}
    assert cpu_gates.possible(times, 0.4) == {"usual": 15.0, "plain": 2.5}
    assert cpu_gates.possible(times, 0.0) == {}
    wanted = {"usual": 20.0, "plain": 1.8}
    assert cpu_gates.compared("forward", (64, 64, 1), times, wanted).verdict(1.0) == "miss"
    limit = cpu_gates.compared("forward", (64, 64, 1), times, wanted, least=0.45)
    assert limit.verdict(1.0) == "limit", "12 of 13.3 times usual, and 2 times plain"
    assert "x usual 13.3 possible, 90% of it | limit |" in cpu_report.table([limit], 1.0)


def test_a_gate_may_ask_for_less() -> None:
    gate = Gate("added", 0.04, 0.03, most=True)
    assert gate.verdict(1.0) == "miss"
    assert gate.verdict(0.5) == ""
    assert Gate("scratch MB", 16.0, 16.0, most=True).verdict(1.0) == ""
    assert Gate("x plain", 0.0, 3.0).verdict(0.0) == ""


def test_ragged_sizes_are_asked_for_nine_tenths() -> None:
    times = {"ours": 1.0, "usual": 5.0}
    wanted = [cpu_gates.compared("forward", (9, k, 4), times, {"usual": 10.0}).gates[0].wanted for k in (128, 130)]
    assert wanted == [10.0, 9.0]
    extra = (Gate("read share", 0.8, 0.85), Gate("added", 0.043, 0.04, most=True))
    found = [cpu_gates.compared("forward", (9, k, 4), times, {}, extra=extra).verdict(1.0) for k in (128, 130)]
    assert found == ["miss", ""], "every gate, at least or at most"


@pytest.mark.parametrize(("n", "k"), [(96, 128), (50, 77)])
def test_every_row_runs_every_contestant(native: None, untimed: list[list[str]], n: int, k: int) -> None:
    weight = cpu_products.made(n, k)
    weight.peers["another"] = lambda x: torch.nn.functional.linear(x, weight.dense)
    limits = cpu_clock.Limits(1e10, 1e10, 1e11)
    thunks = [*cpu_conversions.conversion_rows(weight), *cpu_products.product_rows(weight, (1, 8, 256, 1024), limits)]
    rows = [measure() for measure in thunks]
    found = [(each.what, each.m) for each in rows]
    assert found == [
        *(("quantise bfloat16", 0), ("quantise float32", 0), ("dequantise", 0)),
        *(("forward", 1), ("forward, cold", 1), ("forward", 8), ("forward", 256), ("forward", 1024)),
        *(("dX", 256), ("dX", 1024), ("LoRA forward", 256), ("LoRA step", 256)),
        *(("LoRA forward", 1024), ("LoRA step", 1024)),
    ]
    assert all(set(each.ratios) >= {"usual", "plain", "another"} for each in rows if each.what == "forward")
    if cpu_gates.has_bf16():
        assert all(each.gates for each in rows), "a row without a gate"
        text = cpu_report.table(rows, 1.0)
        assert text.count("| miss |") == sum(each.verdict(1.0) == "miss" for each in rows) > 0


def test_nothing_is_measured_when_a_product_is_wrong(
    native: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    untimed: list[list[str]],
) -> None:
    right = cpu_products.fp8_linear
    monkeypatch.setattr(cpu_products, "fp8_linear", lambda *args: right(*args) * 1.01)
    assert benchmark.main(["--quick", "--out", str(tmp_path / "out")]) == 1
    assert "forward with M = 1: relative error 1.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert untimed == []


def test_a_miss_is_measured_again_and_then_fails(
    native: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tries = {"slow": 0, "noisy": 0}

    def measured(name: str) -> Row:
        tries[name] += 1
        ratio = 2.0 if name == "noisy" and tries[name] == 3 else 1.0
        return Row("forward", 64, 64, 4, 1.0, {"usual": ratio, "plain": 1.0}, (Gate("x usual", ratio, 2.0),))

    names = ["noisy", "slow"]
    monkeypatch.setattr(benchmark, "quick_rows", lambda: ((lambda name=name: measured(name)) for name in names))
    options = ["--quick", "--out", str(tmp_path)]
    assert benchmark.main(options) == 1
    assert tries == {"slow": 4, "noisy": 3}
    assert "2 rows with gates: 1 hold, 0 at the limit, 1 below 1 of their gate" in capsys.readouterr().out
    verdicts = [each["verdict"] for each in json.loads((tmp_path / "kernels.json").read_text())["rows"]]
    assert verdicts == ["", "miss"]
    assert (tmp_path / "kernels.png").stat().st_size > 5000
    assert benchmark.main([*options, "--gate", "0.5"]) == 0


def test_conversions_are_measured_in_a_process_of_their_own(
    native: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = benchmark.parse(["--gate", "0"])
    rows = benchmark.apart("conversions", (64, 128), options)
    assert [(each.what, each.n, each.k) for each in rows] == [
        ("quantise bfloat16", 64, 128),
        ("quantise float32", 64, 128),
        ("dequantise", 64, 128),
    ]
    assert all(each.milliseconds > 0 and each.gates and "copy share" in each.figures for each in rows)
    (lost,) = benchmark.apart("conversions", (64, 128), options, {"MUSUBI_KERNELS": "reference"})
    assert lost.verdict(1.0) == "miss", "a process that measures nothing is a miss, not a pass"
    assert "MUSUBI_KERNELS = reference pins another backend" in capsys.readouterr().out


def test_peers_are_gated_and_the_absent_are_named(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    dense = w.double()

    def wrong(_: torch.Tensor) -> object:
        return type("Wrong", (), {"call": staticmethod(lambda x: (x.double() @ dense.T) * 1.1), "dense": dense})

    monkeypatch.setitem(PEERS, "wrong", ("torch", wrong))
    monkeypatch.setitem(PEERS, "gone", ("no_such_package", wrong))
    peers = field_of(w)
    assert peers.absent["gone"] == "no_such_package is not installed"
    assert "relative error 1.00e-01" in peers.absent["wrong"]
    assert set(peers.calls) | set(peers.absent) == set(PEERS)
    for package in ("torchao", "optimum", "sdnq"):
        if importlib.util.find_spec(package) is None:
            assert any(package in reason for reason in peers.absent.values())


def test_a_compiled_usual_path_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("no compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert compiled_usual(*quantize_fp8(torch.ones(8, 64).bfloat16())) == (None, "RuntimeError: no compiler here")
