"""The model of GPU times: limits decide as they should, and nothing that it prints can be taken for a measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import roofline
from roofline import CARDS, Kernel, estimates, fused, plain

A100 = CARDS[0]
WIDE = Kernel((128, 128, 64), 8, 450.0)


def test_a_row_or_two_is_bound_by_memory_and_large_products_are_not() -> None:
    short = Kernel((16, 64, 64), 4, 180.0)
    one = fused(A100, short, 1, 8192, 8192)
    assert one.bound == "DRAM"
    least = 8192 * 8192 * (1 + 2 / 64) / 2039e9
    assert least < one.seconds < 1.3 * least
    assert fused(A100, WIDE, 8192, 8192, 8192).bound in ("issue", "tensor")


def test_more_instructions_make_a_kernel_issue_bound() -> None:
    lean, heavy = replace(WIDE, per_step=100.0), replace(WIDE, per_step=900.0)
    assert fused(A100, lean, 4096, 4096, 4096).bound == "tensor"
    found = fused(A100, heavy, 4096, 4096, 4096)
    assert found.bound == "issue"
    # 10 rounds of tiles on 108 multiprocessors, 64 steps, 8 warps of 900 instructions, 4 a clock at 1.41 GHz
    assert found.seconds == pytest.approx(10 * 64 * 8 * 900 / 4 / 1.41e9 + roofline.LAUNCH)


def test_a_tile_more_than_the_card_holds_costs_a_whole_round() -> None:
    n = 128 * A100.multiprocessors
    full = fused(A100, WIDE, 128, n, 4096).seconds - roofline.LAUNCH
    over = fused(A100, WIDE, 128, n + 128, 4096).seconds - roofline.LAUNCH
    assert over == pytest.approx(2 * full)


def test_conversions_cost_what_they_move() -> None:
    n = k = 8192
    usual = roofline.after_conversion(A100, 1, n, k, roofline.USUAL_BYTES).seconds
    panel = roofline.after_conversion(A100, 1, n, k, roofline.PANEL_BYTES).seconds
    assert usual / plain(A100, 1, n, k).seconds == pytest.approx(1 + 7.06 / 2, rel=0.05)
    assert panel < usual


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_has_kernels_and_a_sane_table(card: roofline.Card) -> None:
    previous = 0.0
    for m in roofline.ROWS:
        rows = estimates(card, m, 5120, 5120)
        base, ours, usual = rows["plain bf16"], rows["fused"], rows["usual"]
        assert base is not None
        assert ours is not None
        assert usual is not None
        assert previous <= ours.seconds
        previous = ours.seconds
        assert usual.seconds > base.seconds
        assert (rows["dynamic"] is None) == (card.target < 89)
        if m == 1:
            assert ours.seconds < base.seconds


def test_what_it_prints_says_that_it_is_modelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--card", "H100", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Modelled, not measured")
    rows = json.loads((tmp_path / "roofline.json").read_text())
    assert rows
    assert all(row["modelled"] is True for row in rows)
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_measured_rows_stand_beside_the_model(tmp_path: Path) -> None:
    figures = {
        "plain bf16": {"microseconds": 100.0},
        "triton fused": {"microseconds": 50.0},
        "other": {"microseconds": 1.0},
    }
    row = {"what": "forward", "n": 5120, "k": 5120, "m": 64, "figures": figures}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": "a card", "rows": [row, {**row, "what": "dx"}]}))
    text = roofline.compared(path, CARDS[3])
    assert text.count("| 5120 x 5120 | 64 |") == 2
    path.write_text(json.dumps({"machine": "a card", "rows": []}))
    with pytest.raises(ValueError, match="no timed forward rows"):
        roofline.compared(path, CARDS[3])


def test_a_baseline_without_the_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"rows": {}}))
    with pytest.raises(ValueError, match=r"no forward for sm_90: run gpu_static\.py --update"):
        roofline.kernels_of(90, path)
