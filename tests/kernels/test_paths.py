"""The way of a GPU product: pins, the rule of thumb, measuring once per class, and the file that keeps it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from musubi_kernels import _paths

CPU = torch.device("cpu")
SIZES = _paths.Sizes("fp8_linear", "triton", 100, 64, 128, torch.bfloat16, CPU)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "deep" / "paths.json"
    monkeypatch.setenv(_paths.CACHE_VARIABLE, str(file))
    monkeypatch.delenv(_paths.WAY_VARIABLE, raising=False)
    monkeypatch.delenv(_paths.TUNE_VARIABLE, raising=False)
    monkeypatch.setattr(_paths, "_said", set())
    _paths.forget()
    yield file
    _paths.forget()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets measuring happen without a device: a call's result in the table below is its time; what was timed."""
    seconds = {"small": 3.0, "fused": 1.0, "panel": 2.0}
    timed: list[str] = []

    def take(call: Callable[[], str], device: torch.device) -> float:
        timed.append(call())
        return seconds[timed[-1]]

    monkeypatch.setattr(_paths, "_seconds", take)
    monkeypatch.setattr(_paths, "_may_measure", lambda device: True)
    return timed


def ways(*names: _paths.Way) -> dict[_paths.Way, Callable[[], str]]:
    return {name: (lambda name=name: name) for name in names or _paths.WAYS}


def test_a_class_that_goes_by_panels_is_known_for_it(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where `small` may be among the ways of one tensor and not of another, and only under the settings it had."""
    q, x = torch.empty(64, 128, dtype=torch.uint8), torch.empty(100, 128, dtype=torch.bfloat16)

    def known(m: int) -> bool:
        return _paths.by_panels("fp8_linear", "triton", m, q, x)

    assert _paths.run(SIZES, ways("panel", "small")) == "panel"
    assert known(100)
    assert known(128)
    assert not known(129)
    assert not _paths.by_panels("fp8_linear", "triton", 100, q, x.half())
    monkeypatch.setenv(_paths.WAY_VARIABLE, "panel")
    assert not known(100)
    assert _paths.run(replace(SIZES, m=20), ways("panel", "small")) == "panel"
    assert not known(20)
    monkeypatch.delenv(_paths.WAY_VARIABLE)
    assert known(100)
    _paths.forget()
    assert not known(100)
    assert _paths.run(replace(SIZES, n=65), ways()) == "fused"
    assert not _paths.by_panels("fp8_linear", "triton", 100, torch.empty(65, 128), x)


@pytest.mark.parametrize(("m", "way"), [(1, "small"), (32, "small"), (33, "fused"), (1023, "fused"), (1024, "panel")])
def test_without_a_device_m_decides(m: int, way: str) -> None:
    assert _paths.decide(replace(SIZES, m=m), _paths.WAYS)[0] == way


def test_the_rule_takes_only_what_can_serve() -> None:
    assert _paths.rule_of_thumb(replace(SIZES, m=1), ("fused", "panel")) == "fused"
    assert _paths.rule_of_thumb(replace(SIZES, m=9999), ("small", "fused")) == "fused"


def test_a_class_is_timed_once_and_the_fastest_kept(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # on the CPU nothing is to be measured: pretend that the rule of thumb does not apply
    monkeypatch.setattr(_paths, "rule_of_thumb", lambda *_: pytest.fail("a measurement was due"))
    monkeypatch.setattr(_paths, "decide", lambda sizes, names: (_paths._TABLE.get(sizes.key()), ""))
    assert _paths.run(SIZES, ways()) == "fused"
    assert measured == ["small", "fused", "panel"]
    for m in (65, 100, 128):
        assert _paths.run(replace(SIZES, m=m), ways()) == "fused"
    assert len(measured) == 3
    _paths.run(replace(SIZES, m=129), ways())
    assert len(measured) == 6


def test_what_is_settled_is_not_asked_again_until_it_is_forgotten(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _paths.run(SIZES, ways()) == "fused"
    with monkeypatch.context() as patch:
        patch.setattr(_paths, "decide", lambda *_: pytest.fail("it was settled"))
        assert _paths.run(replace(SIZES, m=70), ways()) == "fused"
    monkeypatch.setenv(_paths.WAY_VARIABLE, "panel")
    assert _paths.run(SIZES, ways()) == "panel"
    monkeypatch.delenv(_paths.WAY_VARIABLE)
    _paths._TABLE.put(SIZES.key(), "small", {})
    assert _paths.run(SIZES, ways()) == "fused"
    _paths._SETTLED.clear()
    assert _paths.run(SIZES, ways()) == "small"


class Clock:
    """Stands in for `torch.cuda`: an event's time is the sum of what was done before it."""

    now = 0.0
    done: ClassVar[list[str]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Clock.now

        def synchronize(self) -> None:
            Clock.done.append("waited")

        def elapsed_time(self, end: Clock.Event) -> float:
            return end.at - self.at


def test_a_call_is_timed_behind_work_that_fills_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock.Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_paths, "_BUSY_SIDE", 2)
    monkeypatch.setattr(Clock, "done", [])
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **words: (Clock.done.append("busy"), product(*args, **words))[1])

    def call() -> None:
        Clock.done.append("call")
        Clock.now += 3.0

    assert _paths._seconds(call, CPU) == pytest.approx(3e-3)
    assert Clock.done == ["call"] + (["busy"] * _paths._BUSY_PRODUCTS + ["call", "waited"]) * _paths._ROUNDS


def test_a_full_device_measures_nothing(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(call: Callable[[], str], device: torch.device) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(_paths, "_seconds", full)
    monkeypatch.setattr(_paths, "decide", lambda *_: (None, ""))
    assert _paths.run(SIZES, ways()) == "fused"
    assert _paths._TABLE.get(SIZES.key()) is None


def test_the_file_is_read_by_the_next_run_and_rows_of_others_survive(file: Path) -> None:
    _paths._TABLE.put(SIZES.key(), "panel", {"fused": 2e-6, "panel": 1e-6})
    content = json.loads(file.read_text())
    assert content["rows"][SIZES.key()] == {"way": "panel", "microseconds": {"fused": 2.0, "panel": 1.0}}
    content["rows"]["another card"] = {"way": "small", "microseconds": {}}
    file.write_text(json.dumps(content))
    _paths._TABLE.put(replace(SIZES, n=1).key(), "small", {})
    assert "another card" in json.loads(file.read_text())["rows"]
    _paths.forget()
    way, why = _paths.decide(SIZES, _paths.WAYS)
    assert way == "panel"
    assert "measured before" in why


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 1, "rows": {"a": {}}}', "\0"])
def test_a_damaged_file_is_said_and_replaced(file: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert _paths.decide(SIZES, _paths.WAYS)[0] == "fused"
    assert "not readable" in caplog.text
    _paths._TABLE.put(SIZES.key(), "panel", {})
    assert list(json.loads(file.read_text())["rows"]) == [SIZES.key()]


def test_a_file_of_another_version_is_not_used(file: Path) -> None:
    file.parent.mkdir()
    rows = {SIZES.key(): {"way": "panel", "microseconds": {}}}
    file.write_text(json.dumps({"version": 2, "rows": rows}))
    assert _paths.decide(SIZES, _paths.WAYS)[0] == "fused"


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv(_paths.CACHE_VARIABLE, str(tmp_path / "plain" / "paths.json"))
    _paths._TABLE.put(SIZES.key(), "panel", {})
    assert "cannot be written" in caplog.text
    assert _paths.decide(SIZES, _paths.WAYS)[0] == "panel"


def test_off_keeps_nothing_on_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_paths.CACHE_VARIABLE, "off")
    _paths._TABLE.put(SIZES.key(), "panel", {})
    assert not file.exists()
    assert _paths.decide(SIZES, _paths.WAYS)[0] == "panel"


def test_a_pin_wins_and_one_that_cannot_be_honoured_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_paths.WAY_VARIABLE, "panel")
    assert _paths.run(replace(SIZES, m=1), ways()) == "panel"
    with pytest.raises(ValueError, match=r"MUSUBI_KERNELS_PATH = panel: .* use auto or small, fused"):
        _paths.run(SIZES, ways("small", "fused"))
    monkeypatch.setenv(_paths.WAY_VARIABLE, "quick")
    with pytest.raises(ValueError, match="no such way; use auto, small, fused, panel"):
        _paths.run(SIZES, ways())


def test_an_unknown_word_for_tuning_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_paths.TUNE_VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"use 1 .* or 0"):
        _paths.decide(SIZES, _paths.WAYS)


def test_ragged_lengths_share_a_class_and_other_things_do_not() -> None:
    assert _paths.bucket(1) == 1
    assert _paths.bucket(65) == _paths.bucket(128) == 128
    keys = {SIZES.key(), replace(SIZES, n=65).key(), replace(SIZES, dtype=torch.float16).key()}
    keys |= {replace(SIZES, backend="cuda").key(), replace(SIZES, product="fp8_linear_dx").key()}
    assert len(keys) == 5
