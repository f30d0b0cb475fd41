"""Block swap on the CPU: equal numbers to the bit, and every copy and use in order, as a device would need them."""

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import attach
from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.memory.block_swap import BlockSwap, resting_bytes
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.compiling import CompileSettings, compile_blocks
from musubi_tuner.nn.runner import Run, direct
from swap_stand_in import OutOfOrder, StandIn, storage, watching
from tiny_models import TINY, tiny_dit

FAMILIES = registry.names()


class Model:
    """A tiny transformer with a LoRA whose factors are not zero."""

    def __init__(self, name: str, **targets: object) -> None:
        self.family, self.tiny = registry.get(name), TINY[name]
        self.dit = tiny_dit(name).train()
        self.adapters = attach(self.dit, self.family.spec.adapter, rank=2, alpha=2, **targets)
        with torch.no_grad():
            for key, parameter in self.adapters.named_parameters():
                parameter.copy_(keyed.normal(parameter.shape, "swap", key) * 0.1)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for name in self.family.spec.blocks for block in self.dit.get_submodule(name).children()]

    def swap(self, count: int, lanes: StandIn, **how: object) -> BlockSwap:
        return BlockSwap(self.blocks[-count:], lanes, **how)

    def velocity(self, run: Run, number: int) -> Tensor:
        x = keyed.normal((2, *self.tiny.latents), "swap", "x", number)
        cond = self.family.collate([self.tiny.entry(4), self.tiny.entry(2)])
        return self.family.predict(self.dit, x, torch.tensor([0.3, 0.8], dtype=torch.float64), cond, run=run)

    def train(self, run: Run, sampling: Run, *, steps: int = 2) -> list[Tensor]:
        """Losses, gradients and velocities of steps of two batches, each step after a preview."""
        optimizer, found = torch.optim.SGD([p for p in self.dit.parameters() if p.requires_grad], lr=0.1), []
        for step in range(steps):
            for batch in range(2):
                loss = self.velocity(run, 2 * step + batch).square().mean()
                loss.backward()
                found.append(loss.detach())
                with torch.no_grad():
                    found += [self.velocity(sampling, 9), self.velocity(sampling, 10)]
            found += [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            optimizer.step()
            optimizer.zero_grad()
        return found


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def ways(again: bool) -> Run:
    return checkpointed() if again else direct


@pytest.mark.parametrize("again", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_gradients_and_previews_are_equal_to_the_bit_and_in_order(name, late, again):
    expected = Model(name).train(ways(again), direct)
    for count, ring in ((1, 1), (2, 1), (2, 2), (3, 2), (3, 5)):
        model, lanes = Model(name), StandIn(late=late)
        largest = max(resting_bytes(block) for block in model.blocks)
        swap = model.swap(count, lanes, ring=ring)
        with watching(lanes):
            found = model.train(swap.run(ways(again), recomputed=again), swap.run())
        assert equal(found, expected), (count, ring)
        assert len(lanes.slots) == min(ring, count)
        assert swap.device_bytes == sum(t.nbytes for t in lanes.slots.values()) <= min(ring, count) * largest
        assert all(storage(t) in lanes.homes for rest in swap.resting for t in rest.tensors)
