"""Distributions of t against closed-form quantiles, and the operations on them against their definitions."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from musubi_tuner.flow import keyed
from musubi_tuner.flow.timesteps import (
    DISTRIBUTIONS,
    READS,
    TimestepShape,
    distribution,
    logistic_normal,
    mixture,
    mode,
    restrict,
    squeeze,
    uniform,
)

DATA = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/timesteps.json").read_text())
LEVELS = torch.tensor(DATA["percentiles"], dtype=torch.float64) / 100


def of(entry):
    p = entry["params"]
    shape = TimestepShape(
        sigmoid_scale=p["sigmoid_scale"],
        shift=p["discrete_flow_shift"],
        logit_mean=p["logit_mean"],
        logit_std=p["logit_std"],
        mode_scale=p["mode_scale"],
        density=p["weighting_scheme"],
    )
    low = 0.0 if p["min_timestep"] is None else p["min_timestep"] / 1000
    high = 1.0 if p["max_timestep"] is None else p["max_timestep"] / 1000
    return distribution(
        p["timestep_sampling"],
        (16, 1, entry["latent_h"], entry["latent_w"]),
        shape,
        low=low,
        high=high,
        truncate=p["preserve_distribution_shape"],
    )


def name_of(entry):
    changed = {k: v for k, v in entry["params"].items() if v not in (None, False, "none", 1.0, 0.0, 1.29)}
    return "-".join(str(v) for v in changed.values()) + f"-{entry['latent_h']}x{entry['latent_w']}"


def flipped(entry):
    """Whether ours selects t where the established tool selects indices, from the other end: `sigma` with a range."""
    p = entry["params"]
    return p["timestep_sampling"] == "sigma" and (p["min_timestep"] or 0) + (p["max_timestep"] or 1000) != 1000


def expected_quantiles(entry):
    """The data's, turned round where it is `flipped`."""
    q = torch.tensor(entry["exact"]["quantiles"], dtype=torch.float64)
    return (1.001 - q).flip(0) if flipped(entry) else q


@pytest.mark.parametrize("entry", DATA["entries"], ids=name_of)
def test_quantiles_equal_the_closed_form(entry):
    found = of(entry).quantile(LEVELS)
    grid = entry["params"]["timestep_sampling"] == "sigma"
    # a cell of the grid is 1e-3 wide and a quantile that lies on its edge may fall to either side
    torch.testing.assert_close(found, expected_quantiles(entry), rtol=0, atol=1.001e-3 if grid else 1e-6)


@pytest.fixture(scope="module")
def draws():
    return keyed.uniform((200_000,), 3, "t")


@pytest.mark.parametrize("entry", DATA["entries"], ids=name_of)
def test_keyed_draws_follow_the_closed_form(entry, draws):
    """200,000 draws: the share below every quantile of the data (Kolmogorov's distance at these), and the mean."""
    t = of(entry).quantile(draws)
    assert t.dtype == torch.float64
    assert t.min() > 0
    assert t.max() <= 1
    grid = entry["params"]["timestep_sampling"] == "sigma"
    expected = expected_quantiles(entry)
    counts = torch.searchsorted(t.sort().values, torch.stack([expected - grid * 1e-3, expected + 1e-9]), right=True)
    below, upto = counts.double() / len(t)  # on the grid, a share lies between those of the cell's two ends
    assert float((below - LEVELS).max()) < 0.005
    assert float((LEVELS - upto).max()) < 0.005
    mean = 1.001 - entry["exact"]["mean"] if flipped(entry) else entry["exact"]["mean"]
    assert float(t.mean()) == pytest.approx(mean, abs=0.003)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_keyed_draws_follow_their_own_cdf(name, draws):
    if name != "sigma":  # steps; the test before this one holds it to its quantiles
        dist = distribution(name, (16, 1, 96, 64), TimestepShape(shift=3.0, logit_mean=-2.0), low=0.2, truncate=True)
        t = dist.quantile(draws)
        assert stats.kstest(t.numpy(), lambda x: dist.cdf(torch.from_numpy(x)).numpy()).statistic < 0.005


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_cdf_is_the_inverse_of_the_quantile(name):
    dist = distribution(name, (16, 1, 96, 64), TimestepShape(shift=3.0, logit_mean=-2.0))
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = dist.quantile(u)
    assert bool((t.diff() >= 0).all())
    if name == "sigma":
        torch.testing.assert_close(t, torch.round(t * 1000) / 1000, rtol=0, atol=1e-12)
        assert float((dist.cdf(t) - u).min()) >= -1e-9
    else:
        torch.testing.assert_close(dist.cdf(t), u, rtol=0, atol=1e-9)


def test_sigma_uses_every_level_of_the_grid():
    dist = distribution("sigma", (16, 1, 8, 8), TimestepShape())
    t = dist.quantile((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    torch.testing.assert_close(t, torch.arange(1, 1001, dtype=torch.float64) / 1000, rtol=0, atol=1e-12)
    assert float(dist.quantile(torch.tensor(0.0))) == pytest.approx(0.001)


def test_truncation_is_the_conditional_distribution():
    """P(T <= t | a <= T <= b), also in a tail of mass 2e-6."""
    dist = logistic_normal(-2.0, 1.0)
    low, high = 0.93, 0.95
    cut = restrict(dist, low, high)
    t = torch.linspace(low, high, 11, dtype=torch.float64)
    a, b = (stats.norm.sf(math.log(x / (1 - x)) + 2) for x in (low, high))
    expected = [(a - stats.norm.sf(math.log(x / (1 - x)) + 2)) / (a - b) for x in t.tolist()]
    torch.testing.assert_close(cut.cdf(t), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    inside = cut.quantile(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    assert low <= float(inside.min())
    assert float(inside.max()) <= high


def test_squeeze_maps_the_whole_distribution_into_the_range():
    u = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(squeeze(uniform(), 0.2, 0.6).quantile(u), 0.2 + 0.4 * u, rtol=0, atol=1e-12)


def test_mode_density_is_uniform_for_scale_zero_and_refuses_to_run_backwards():
    u = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(mode(0.0).quantile(u), u)
    with pytest.raises(ValueError, match=r"-1 to 1\.752"):
        mode(2.0)


def test_mixture_of_disjoint_parts_spends_u_by_weight():
    parts = [(0.25, squeeze(uniform(), 0.0, 0.1)), (0.75, squeeze(uniform(), 0.9, 1.0))]
    t = mixture(parts).quantile(torch.tensor([0.125, 0.24, 0.26, 0.625], dtype=torch.float64))
    expected = torch.tensor([0.05, 0.096, 0.9 + 0.1 * 0.01 / 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(t, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distribution("sigmod", (1, 1, 8, 8), TimestepShape()), "use one of sigma"),
        (lambda: distribution("uniform", (1, 1, 8, 8), TimestepShape(), low=0.8, high=0.2), "range of t"),
        (lambda: restrict(logistic_normal(-9.0, 0.2), 0.9, 1.0), "mass"),
        (lambda: logistic_normal(0.0, 0.0), "above 0"),
        (lambda: mixture([(0.5, uniform())]), "add up to 1"),
    ],
)
def test_impossible_requests_are_told(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_distribution_reads_what_the_table_says():
    """Changing an option that the table does not list changes nothing; changing a listed one does."""
    u = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    base = TimestepShape(density="logit_normal")
    changed = {
        "sigmoid_scale": TimestepShape(density="logit_normal", sigmoid_scale=1.7),
        "discrete_flow_shift": TimestepShape(density="logit_normal", shift=4.0),
        "logit_mean": TimestepShape(density="logit_normal", logit_mean=1.0),
        "logit_std": TimestepShape(density="logit_normal", logit_std=2.0),
        "weighting_scheme": TimestepShape(density="mode"),
    }
    for name in DISTRIBUTIONS:
        before = distribution(name, (16, 1, 64, 64), base).quantile(u)
        moved = {
            n for n, s in changed.items() if not torch.equal(distribution(name, (16, 1, 64, 64), s).quantile(u), before)
        }
        density = {"logit_mean", "logit_std"} if name == "sigma" else set()
        assert moved == READS[name] | density
