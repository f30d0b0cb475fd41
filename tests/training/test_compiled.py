"""Training with compiled blocks: one graph each, and the losses of a run without."""

import pytest
import torch
from torch import Tensor

from musubi_tuner.adapters.attach import attach
from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.compiling import CompileSettings, compile_blocks
from musubi_tuner.nn.runner import direct
from tiny_models import TINY, tiny_dit

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # Dynamo's look
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),  # rope
]


def losses(name: str, settings: CompileSettings | None, *, again: bool) -> Tensor:
    """The losses of three steps of a LoRA on a tiny transformer, `again`: with gradient checkpointing."""
    family, tiny = registry.get(name), TINY[name]
    dit = tiny_dit(name).train()
    adapters = attach(dit, family.spec.adapter, rank=4, seed=1)
    if settings is not None:
        compile_blocks(dit, family.spec.blocks, settings)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    x_t = keyed.normal((2, *tiny.latents), "compiled", "x")
    cond = family.collate([tiny.entry(3), tiny.entry(5)])
    found = []
    for _ in range(3):
        v = family.predict(dit, x_t, torch.tensor([0.3, 0.7]), cond, run=checkpointed(direct) if again else direct)
        loss = (v - x_t).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def check(name: str, backend: str, rtol: float, *, again: bool) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    expected = losses(name, None, again=again)
    counters.clear()
    compiled = losses(name, CompileSettings(backend, fullgraph=True), again=again)
    assert torch.allclose(compiled, expected, rtol=rtol, atol=0)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not counters["graph_break"]
    assert expected[2] < expected[0]
    torch.compiler.reset()


def test_compiled_blocks_give_the_same_losses_in_one_graph():
    check("wan", "aot_eager", 1e-5, again=False)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", registry.names())
def test_every_family_s_blocks_compile_with_the_inductor(name, again):
    check(name, "inductor", 1e-4, again=again)
