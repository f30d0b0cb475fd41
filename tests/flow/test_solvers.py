"""Solvers against measured trajectories on toy fields, and against flows whose end is known in closed form."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner.flow import schedules, solvers

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
TRAJECTORIES = [
    c
    for c in json.loads((REFERENCE / "behaviour" / "schedules.json").read_text(encoding="utf-8"))["cases"]
    if c["family"] in ("wan", "hunyuan_video") and "trajectory" in c
]
GOLDEN = load_file(REFERENCE / "golden" / "samplers_a.safetensors")
TOY = {"hunyuan_euler": ("vanilla", 6, 7.0), "wan_unipc": ("unipc", 8, 5.0), "wan_dpmpp": ("dpm++", 8, 3.0)}


def walk(solver, velocity, x, schedule):
    """All samples of a run, the first included, and the times asked for."""
    samples, times = [x], []

    def asked(x, t):
        times.append(t)
        return velocity(x, t)

    end = solver.solve(asked, x, schedule, lambda _, x: samples.append(x))
    assert torch.equal(end, samples[-1])
    return torch.stack(samples), times


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_the_reference_holds_the_trajectories_that_are_compared():
    assert len(TRAJECTORIES) == 20


@pytest.mark.parametrize("case", TRAJECTORIES, ids=lambda c: f"{c['family']}-{c['solver']}-{c['flow_shift']}")
def test_toy_trajectory_is_the_measured_one(case):
    solver = solvers.get({"euler": "vanilla"}.get(case["solver"], case["solver"]))
    want = torch.tensor(case["trajectory"]["samples"])
    schedule = solver.schedule(case["steps"], case["flow_shift"])
    samples, times = walk(solver, lambda x, t: 0.5 * x - 0.2 * t + 0.1 * (3 * x).sin(), want[0].clone(), schedule)
    assert times == schedule.times.tolist()
    assert samples.dtype == torch.float32
    assert relative(samples, want) < 1e-6


@pytest.mark.parametrize("key", TOY)
def test_golden_trajectory_is_reached(key):
    name, steps, factor = TOY[key]
    solver = solvers.get(name)
    schedule = solver.schedule(steps, factor)
    torch.testing.assert_close(schedule.sigmas, GOLDEN[f"out.{key}.sigmas"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(schedule.times * 1000, GOLDEN[f"out.{key}.timesteps"], rtol=1e-6, atol=1e-6)
    w, b = GOLDEN["in.w"], GOLDEN["in.b"]
    samples, _ = walk(solver, lambda x, t: (x * w).tanh() + t * b, GOLDEN["in.x"], schedule)
    want = GOLDEN[f"out.{key}.trajectory"]
    assert relative(samples[1:], want) < 2e-6
    assert relative(samples[-1], GOLDEN[f"out.{key}.final"]) < 2e-6


SECTIONS = [
    c
    for c in json.loads((REFERENCE / "behaviour" / "schedules.json").read_text(encoding="utf-8"))["cases"]
    if c["family"] == "framepack"
]


def test_the_reference_holds_the_sections_that_are_compared():
    assert len(SECTIONS) == 24
    assert sum("trajectory" in c for c in SECTIONS) == 2


@pytest.mark.parametrize("case", SECTIONS, ids=lambda c: f"{c['steps']}-{c['sequence_length']}-{c['flow_shift']}")
def test_sections_walk_the_measured_grid_to_the_measured_end(case):
    solver = solvers.get("unipc3")
    schedule = solver.schedule(case["steps"], math.exp(case["mu"]))
    torch.testing.assert_close(schedule.sigmas, torch.tensor(case["sigmas"]).double(), rtol=1e-6, atol=1e-7)
    told = torch.tensor(case["timesteps_fed_to_model"]).double()
    torch.testing.assert_close(schedule.times * 1000, told, rtol=1e-6, atol=1e-4)
    if "trajectory" in case:
        found = case["trajectory"]
        asked = []

        def velocity(x, t):
            asked.append(x)
            return 0.5 * x - 0.2 * t + 0.1 * (3 * x).sin()

        end = solver.solve(velocity, torch.tensor(found["start"]), schedule)
        assert relative(torch.stack(asked), torch.tensor([call[1:] for call in found["calls"]])) < 2e-6
        assert relative(end, torch.tensor(found["result"])) < 2e-6


@pytest.mark.parametrize(("key", "steps"), [("framepack_unipc", 7), ("framepack_unipc_shift", 5)])
def test_golden_clean_predictions_are_reached(key, steps):
    """The fixture keeps the clean prediction of every step; the last one is the result."""
    solver = solvers.get("unipc3")
    mu = {"framepack_unipc": 0.8798437499999999, "framepack_unipc_shift": math.log(10)}[key]
    schedule = solver.schedule(steps, math.exp(mu))
    torch.testing.assert_close(schedule.sigmas, GOLDEN[f"out.{key}.sigmas"], rtol=1e-6, atol=1e-7)
    w, b = GOLDEN["in.w"], GOLDEN["in.b"]
    cleans = []

    def velocity(x, t):
        v = (x * w).tanh() + t * b
        cleans.append(x - t * v)
        return v

    end = solver.solve(velocity, GOLDEN["in.x"], schedule)
    assert relative(torch.stack(cleans), GOLDEN[f"out.{key}.trajectory"]) < 2e-6
    assert relative(end, GOLDEN[f"out.{key}.final"]) < 2e-6


def gaussian_velocity(x, t, *, spread):
    """Exact velocity of the flow from N(0, 1) to N(0, spread^2): dx/dt = x (t - (1-t) spread^2) / variance(t)."""
    return x * (t - (1 - t) * spread**2) / (t**2 + (1 - t) ** 2 * spread**2)


ORDER = {
    "vanilla": (solvers.euler, 1.0),
    "dpm++": (solvers.dpm_solver_2m, 2.0),
    "unipc, order 1 with corrector": (partial(solvers.unipc, order=1), 2.0),
    "unipc, order 2 with corrector": (partial(solvers.unipc, order=2), 3.0),
    "unipc, order 2, B1": (partial(solvers.unipc, order=2, linear_base=True), 3.0),
}


@pytest.mark.parametrize("name", ORDER)
def test_error_falls_with_the_order_of_the_solver(name):
    """On the Gaussian flow x(sigma) = x(1) sqrt(sigma^2 + (1-sigma)^2 s^2) exactly; the walk ends at sigma = 0.1."""
    solve, order = ORDER[name]
    spread, x = 0.6, torch.tensor([1.0, -0.7], dtype=torch.float64)

    def size(sigma):
        return math.sqrt(sigma**2 + (1 - sigma) ** 2 * spread**2)

    def error(steps):
        half_log_snr = torch.linspace(-2.2, 2.2, steps + 1, dtype=torch.float64)
        sigmas = torch.cat([torch.sigmoid(-half_log_snr), torch.zeros(1, dtype=torch.float64)])
        seen = {}
        solve(
            partial(gaussian_velocity, spread=spread),
            x,
            schedules.Schedule(sigmas, sigmas[:-1]),
            lambda done, x: seen.update({done: x}),
        )
        exact = x * size(float(sigmas[steps])) / size(float(sigmas[0]))
        return float((seen[steps] - exact).abs().max())

    coarse, fine = error(40), error(160)
    assert fine < coarse
    measured = math.log(coarse / fine) / math.log(4)
    assert measured == pytest.approx(order, abs=0.35), f"error {coarse:.2e} -> {fine:.2e}"


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 25])
def test_a_point_is_reached_exactly_whatever_the_steps(name, steps):
    """Where all data is one point c, v = (x - c) / t points to it from everywhere."""
    solver = solvers.get(name)
    schedule = solver.schedule(steps, 3.0)
    told = dict(zip(schedule.times.tolist(), schedule.sigmas.tolist(), strict=False))
    target = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    noise = torch.tensor([1.5, 0.1, -0.4], dtype=torch.float64)
    end = solver.solve(lambda x, t: (x - target) / told[t], noise, schedule)
    torch.testing.assert_close(end, target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_from_pure_noise_stays_finite(order):
    """At sigma = 1 the log-SNR is infinite; the step there is of first order."""
    schedule = schedules.linear(6, 1.0)
    x = torch.tensor([0.4, -2.0], dtype=torch.float64)
    end = solvers.unipc(partial(gaussian_velocity, spread=0.6), x, schedule, order=order)
    torch.testing.assert_close(end, 0.6 * x, rtol=0.2, atol=0)


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_a_batch_of_two_is_two_batches(name):
    solver = solvers.get(name)
    schedule = solver.schedule(5, 5.0)
    x = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(7))
    both = solver.solve(lambda x, t: x.sin() - t, x, schedule)
    for i in range(2):
        assert torch.equal(both[i : i + 1], solver.solve(lambda x, t: x.sin() - t, x[i : i + 1], schedule))
