"""Checkpointing as a way of running blocks: equal to the bit, also with dropout, tuples and another run inside."""

import pytest
import torch
from torch import nn

from musubi_tuner.flow import keyed
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import direct


class Noisy(nn.Module):
    """h -> dropout(tanh(w h)) + ctx; takes a tensor, or a tuple of which both parts go on."""

    def __init__(self, index):
        super().__init__()
        self.weight = nn.Parameter(keyed.normal((6, 6), "checkpointing", index) / 2)

    def forward(self, h, ctx):
        if isinstance(h, tuple):
            return self(h[0], ctx) + h[1], h[1] * 0.5
        return nn.functional.dropout(torch.tanh(h @ self.weight), 0.3, training=True) + ctx


def run_once(run, h):
    blocks = [Noisy(i) for i in range(3)]
    ctx = keyed.normal((6,), "checkpointing", "ctx").requires_grad_()
    leaves = [part.clone().requires_grad_() for part in (h if isinstance(h, tuple) else (h,))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        y = run(blocks, tuple(leaves) if isinstance(h, tuple) else leaves[0], ctx)
        torch.rand(7)  # what comes after must not move the masks of the second forward pass
        sum(part.square().sum() for part in (y if isinstance(y, tuple) else (y,))).backward()
    values = y if isinstance(y, tuple) else (y,)
    return [*values, ctx.grad, *(leaf.grad for leaf in leaves), *(block.weight.grad for block in blocks)]


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_values_and_gradients_are_equal_to_the_bit(cpu_offload, parts):
    h = tuple(keyed.normal((4, 6), "checkpointing", "h", i) for i in range(parts))
    h = h if parts > 1 else h[0]
    plain, again = run_once(direct, h), run_once(checkpointed(cpu_offload=cpu_offload), h)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_run_inside_is_used():
    """Any way of running blocks may be wrapped; it sees as many blocks as there are."""
    seen = []

    def counting(blocks, h, ctx):
        seen.append(len(blocks))
        return direct(blocks, h, ctx)

    h = keyed.normal((4, 6), "checkpointing", "h")
    assert torch.equal(run_once(checkpointed(counting), h)[0], run_once(direct, h)[0])
    assert sum(seen) == 3


def test_without_gradients_nothing_is_kept_or_wrapped():
    seen = []
    block = Noisy(0)

    def recording(blocks, h, ctx):
        seen.extend(blocks)
        return h

    with torch.no_grad():
        checkpointed(recording)([block], torch.zeros(1, 6), torch.zeros(6))
    assert seen == [block]
