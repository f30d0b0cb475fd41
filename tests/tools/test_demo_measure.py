"""The demo's measure: known velocities have known losses, and a gate fails when it must."""

import math

import pytest
import torch
from torch import Tensor

from musubi_tuner.tools.demo import measure, world


def test_flow_loss_of_the_true_velocity_is_zero_and_of_none_is_its_power() -> None:
    latents = torch.randn(7, 4, 1, 2, 2, generator=torch.Generator().manual_seed(3))

    def perfect(x_t: Tensor, t: Tensor, indices: Tensor) -> Tensor:
        # e = (x_t - (1 - t) x0) / t, so v = e - x0
        return (x_t - latents[indices]) / t.reshape(-1, 1, 1, 1, 1).float()

    def silent(x_t: Tensor, t: Tensor, indices: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    assert measure.flow_loss(latents, perfect, seed=1, size=3) < 1e-8
    expected = 1 + latents.square().mean().item()  # noise has unit power and is independent of x0
    assert measure.flow_loss(latents, silent, seed=1, draws=64) == pytest.approx(expected, rel=0.1)


def test_flow_loss_draws_the_same_numbers_whatever_the_batch() -> None:
    latents = torch.randn(5, 4, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    seen: dict[int, list[Tensor]] = {2: [], 5: []}
    for size, calls in seen.items():

        def keep(x_t: Tensor, t: Tensor, indices: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(x_t)
            return x_t

        measure.flow_loss(latents, keep, seed=9, draws=2, size=size)
    assert torch.equal(torch.cat(seen[2]), torch.cat(seen[5]))


@pytest.mark.parametrize(
    ("lora", "passed"), [(0.0, True), (0.59, True), (0.61, False), (math.nan, False), (math.inf, False)]
)
def test_gate_compares_the_share_of_the_base(lora: float, passed: bool) -> None:
    gate = measure.Gate("loss", base=1.0, lora=lora, limit=0.60)
    assert gate.passed is passed
    assert ("passed" in gate.sentence()) is passed
    assert measure.Verdict((gate,)).passed is passed


def test_no_gates_is_no_pass() -> None:
    assert not measure.Verdict(()).passed


def test_distance_gates_pass_for_rainbows_and_fail_for_plain_digits() -> None:
    masks = world.load_glyphs(held_out=True).masks[:12]
    plain = world.paint(masks, world.solid("green"))
    rainbow = world.paint(masks, world.rainbow())
    assert [gate.passed for gate in measure.distance_gates([plain, plain], [rainbow, plain])] == [True, False]
