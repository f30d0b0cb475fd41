"""Schedules against measured grids, and their own rules."""

import json
from pathlib import Path

import pytest
import torch

from musubi_tuner.flow import schedules, solvers

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CASES = [
    c
    for c in json.loads((REFERENCE / "behaviour" / "schedules.json").read_text(encoding="utf-8"))["cases"]
    if c["family"] in ("wan", "hunyuan_video")
]
NAMES = {"euler": "vanilla"}


def case_id(case):
    return f"{case['family']}-{case['solver']}-{case['steps']}-{case['flow_shift']}"


def test_the_reference_holds_the_cases_that_are_compared():
    assert len(CASES) == 60


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_grid_and_times_are_the_measured_ones(case):
    made = solvers.get(NAMES.get(case["solver"], case["solver"])).schedule(case["steps"], case["flow_shift"])
    expected = torch.tensor(case["sigmas"], dtype=torch.float64)
    torch.testing.assert_close(made.sigmas, expected, rtol=1e-6, atol=1e-7)
    times = torch.tensor(case["timesteps"], dtype=torch.float64)
    if case.get("timesteps_dtype") == "int64":
        assert torch.equal((made.times * 1000).round(), times)
        assert torch.allclose(made.times * 1000, times, rtol=0, atol=1e-9), "whole thousandths"
    else:
        torch.testing.assert_close(made.times * 1000, times, rtol=1e-6, atol=1e-6)


def test_shift_moves_the_middle_to_s_over_one_plus_s_and_keeps_the_ends():
    for factor in (0.3, 1.0, 5.0):
        moved = schedules.shift(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), factor)
        torch.testing.assert_close(moved, torch.tensor([0.0, factor / (1 + factor), 1.0], dtype=torch.float64))


def test_shift_by_the_inverse_undoes_it():
    t = torch.linspace(0, 1, 17, dtype=torch.float64)
    torch.testing.assert_close(schedules.shift(schedules.shift(t, 5.0), 0.2), t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_every_schedule_falls_to_zero_in_the_asked_number_of_steps(name, steps):
    made = solvers.get(name).schedule(steps, 5.0)
    assert len(made) == steps
    assert made.sigmas[-1] == 0
    assert made.sigmas.dtype == made.times.dtype == torch.float64
    assert bool((made.sigmas[:-1] - made.times).abs().max() < 1e-3)


@pytest.mark.parametrize(("steps", "factor", "words"), [(0, 1.0, "0 sampling steps"), (4, 0.0, "flow shift 0.0")])
def test_impossible_schedules_are_refused(steps, factor, words):
    with pytest.raises(ValueError, match=words):
        schedules.linear(steps, factor)


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.5, 0.0], [1.0, 0.5, 0.2], [1.2, 0.5, 0.0]])
def test_a_grid_that_does_not_fall_to_zero_is_refused(sigmas):
    grid = torch.tensor(sigmas, dtype=torch.float64)
    with pytest.raises(ValueError, match="must fall from at most 1 to 0"):
        schedules.Schedule(grid, grid[:-1])


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'ddim' is not known: use one of unipc, unipc3, dpm\+\+, vanilla"):
        solvers.get("ddim")
