"""A draw depends on its name alone: not on order, on the global generator or on what was drawn before."""

import subprocess
import sys

import torch

from musubi_tuner.flow import keyed


def test_a_draw_is_the_same_whenever_it_is_asked_for():
    first = keyed.normal((4, 3), 7, 0, 12, "noise")
    torch.manual_seed(123)
    keyed.uniform((100,), 7, 0, 13, "t")
    assert torch.equal(first, keyed.normal((4, 3), 7, 0, 12, "noise"))


def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    keyed.normal((8,), 1, "x")
    assert torch.equal(before, torch.get_rng_state())


def test_every_part_of_the_key_matters_and_parts_do_not_run_together():
    keys = [(1, 2, "noise"), (1, 2, "t"), (1, 3, "noise"), (2, 2, "noise"), (12, "noise"), ("1", "2", "noise")]
    assert len({keyed.seed_of(*key) for key in keys}) == len(keys)
    assert keyed.seed_of(1, 23) != keyed.seed_of(12, 3)


def test_seeds_do_not_depend_on_the_process():
    """Python's own hash of strings is salted per process; ours must not be."""
    code = "from musubi_tuner.flow.keyed import seed_of; print(seed_of(5, 'item', 'noise'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == keyed.seed_of(5, "item", "noise")
    assert 0 <= int(printed) < 2**63


def test_draws_have_the_distribution_they_name():
    x = keyed.normal((200_000,), 0, "check")
    u = keyed.uniform((200_000,), 0, "check")
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert u.dtype == torch.float64
    quantiles = torch.quantile(u[:100_000], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), rtol=0, atol=0.01)
