"""Block swap on the CPU: equal numbers to the bit, and every copy and use in order, as a device would need them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import NetworkArgs, attach
from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.resting import Kept, Resting, resting_bytes
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.compiling import CompileSettings, compile_blocks
from musubi_tuner.nn.runner import Run, direct
from swap_stand_in import OutOfOrder, StandIn, storage, unseen, watching
from tiny_models import TINY, tiny_dit

FAMILIES = registry.names()


class Model:
    """A tiny transformer with a LoRA whose factors are not zero. include: patterns of its targets; the family's own."""

    def __init__(self, name: str, include: Sequence[str] = ()) -> None:
        self.family, self.tiny = registry.get(name), TINY[name]
        self.dit = tiny_dit(name).train()
        args = NetworkArgs(include_patterns=tuple(include))
        self.adapters = attach(self.dit, self.family.spec.adapter, rank=2, alpha=2, args=args)
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

    def train(self, run: Run, sampling: Run) -> list[Tensor]:
        """Losses, gradients and velocities of a step of two batches with a preview between them, and one of one."""
        optimizer, found = torch.optim.SGD([p for p in self.dit.parameters() if p.requires_grad], lr=0.1), []
        for step, batches in enumerate((2, 1)):
            for batch in range(batches):
                loss = self.velocity(run, 2 * step + batch).square().mean()
                loss.backward()
                found.append(loss.detach())
                if batch == 0:
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


def ordered(expected: list[Tensor], model: Model, swap: BlockSwap, lanes: StandIn, *, again: bool) -> None:
    """Raises where training with `swap` is out of order or gives other numbers, or leaves weights on the device."""
    with watching(lanes):
        found = model.train(swap.run(ways(again), recomputed=again), swap.run())
    assert equal(found, expected)
    assert all(storage(t) in lanes.homes for rest in swap.resting for t in rest.tensors), "weights are not at home"


WAYS = [  # checkpointed, late, blocks, ring
    (True, True, 3, 2),
    (True, False, 2, 1),
    (True, False, 1, 1),
    (False, True, 2, 1),
    (False, False, 3, 2),
    (False, True, 3, 5),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_gradients_and_previews_are_equal_to_the_bit_and_in_order(name):
    expected = {again: Model(name).train(ways(again), direct) for again in (True, False)}
    assert equal(expected[True], expected[False])
    for again, late, count, ring in WAYS:
        model, lanes = Model(name), StandIn(late=late)
        sizes = [resting_bytes(block) for block in model.blocks]
        swap = model.swap(count, lanes, ring=ring)
        ordered(expected[again], model, swap, lanes, again=again)
        assert len(lanes.slots) == min(ring, count)
        assert swap.device_bytes == sum(t.nbytes for t in lanes.slots.values()) <= min(ring, count) * max(sizes)
        assert swap.host_bytes == sum(sizes[-count:])


def gradients_of_two(model: Model, run: Run, between: Callable[[], object]) -> list[Tensor]:
    """Gradients of two passes that wait for one backward pass."""
    loss = model.velocity(run, 0).square().mean()
    between()
    (loss + model.velocity(run, 1).square().mean()).backward()
    return [p.grad.clone() for p in model.adapters.parameters()]


@pytest.mark.parametrize("fault", [False, True])
def test_two_passes_may_wait_for_backward_and_blocks_come_back_to_other_slots(fault, monkeypatch):
    """The fault: autograd keeps what it finds in a slot, in place of the block and the place in it."""
    expected = gradients_of_two(Model("wan", [r".*ffn.*"]), direct, never)
    model, lanes = Model("wan", [r".*ffn.*"]), StandIn()
    swap = model.swap(3, lanes, ring=2)
    if fault:
        monkeypatch.setattr(BlockSwap, "_keeping", lambda *_: torch.enable_grad())
    with watching(lanes), pytest.raises(OutOfOrder) if fault else nullcontext():
        assert equal(gradients_of_two(model, swap.run(), swap.slots.reverse), expected)


def never(*_: object) -> None:
    """Stands for what is left out."""


def hold_for_a_moment(swap: BlockSwap, place: int) -> object:
    slot = swap._enter(place)
    swap._leave(place)
    return slot


FAULTS = {  # what is done wrong, and whether checkpointing shows it
    "use before the copy has ended": (StandIn, "wait", never, True),
    "overwrite what is in use": (BlockSwap, "_vacant", lambda swap, keep: swap.slots[0], True),
    "copy before the use has ended": (
        BlockSwap,
        "_load",
        lambda swap, place, keep, load=BlockSwap._load: (
            [setattr(slot, "free", 0) for slot in swap.slots],
            load(swap, place, keep),
        )[1],
        True,
    ),
    "let go before backward has ended": (BlockSwap, "hold", hold_for_a_moment, True),
    "leave weights on the device": (
        Resting,
        "show",
        lambda rest, slot, show=Resting.show: slot is not None and show(rest, slot),
        True,
    ),
    "find weights at another place": (
        Kept,
        "found",
        lambda kept, memory, found=Kept.found: found(replace(kept, offset=max(0, kept.offset - 1)), memory),
        True,
    ),
    "let go of nothing": (BlockSwap, "_let_go", never, True),
}


@pytest.mark.parametrize("again", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("include", [r".*ffn.*", r"blocks\.2\..*"], ids=["some layers", "last block"])
def test_blocks_with_few_or_no_trained_layers_are_equal_to_the_bit(include, again):
    """Plain layers keep views of their weights for backward; the first trained block has no gradient before it."""
    expected, lanes = Model("wan", [include]).train(ways(again), direct), StandIn()
    model = Model("wan", [include])
    ordered(expected, model, model.swap(3, lanes, ring=2), lanes, again=again)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found(fault, monkeypatch):
    """Each of these mistakes must fail the check that the right way passes (in the test above)."""
    owner, name, wrong, again = FAULTS[fault]
    expected = Model("wan", [r".*ffn.*"]).train(ways(again), direct)
    model, lanes = Model("wan", [r".*ffn.*"]), StandIn(late=True)
    swap = model.swap(3, lanes, ring=2)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)) as found:
        ordered(expected, model, swap, lanes, again=again)
    print(fault, "->", type(found.value).__name__, str(found.value)[:100])  # noqa: T201  # which check found it


def test_a_block_that_fails_leaves_the_next_pass_as_it_should_be():
    expected = Model("wan").train(direct, direct)
    model, lanes = Model("wan"), StandIn()
    swap = model.swap(3, lanes, ring=1)

    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError("in the middle of block 1")

    ffn = model.blocks[1].ffn
    handle = ffn.register_forward_pre_hook(failing)
    for run in (swap.run(), swap.run(checkpointed(), recomputed=True)):
        with pytest.raises(torch.OutOfMemoryError):
            model.velocity(run, 0)
    handle.remove()
    handle = model.blocks[1].register_full_backward_pre_hook(failing)
    loss = model.velocity(swap.run(), 0).sum()
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    handle.remove()
    for parameter in model.dit.parameters():
        parameter.grad = None
    ordered(expected, model, swap, lanes, again=False)


class Whole(Model):
    """A tiny transformer whose own weights are trained, in the later two thirds or all."""

    def __init__(self, name: str, part: str = "") -> None:
        self.family, self.tiny = registry.get(name), TINY[name]
        self.dit = tiny_dit(name).train()
        for key, parameter in self.dit.named_parameters():
            parameter.requires_grad_(part in key)


@pytest.mark.parametrize("again", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize(("name", "part"), [("wan", ""), ("wan", "blocks.1."), ("hunyuan_video", "")])
def test_weights_that_are_trained_are_copied_anew_after_every_step(name, part, again):
    """Their gradients are on the host when backward has ended, added up over batches."""
    expected = Whole(name, part).train(ways(again), direct)
    model, lanes = Whole(name, part), StandIn(late=again)
    swap = model.swap(3, lanes, ring=2, trained=True)
    found = []
    with watching(lanes):
        run = swap.run(ways(again), recomputed=again)
        with pytest.MonkeyPatch.context() as patch:  # the optimizer works on the host, where the weights rest
            step = torch.optim.SGD.step
            patch.setattr(torch.optim.SGD, "step", lambda *args: outside(step, *args))
            found = model.train(run, swap.run())
    assert equal(found, expected)
    assert all(storage(t) in lanes.homes for rest in swap.resting for t in rest.tensors)
    assert not any(rest.gradients for rest in swap.resting)


def outside(step: Callable[..., object], *args: object) -> object:
    with unseen():
        return step(*args)


def test_a_stale_copy_of_trained_weights_is_found(monkeypatch):
    expected = Whole("wan").train(direct, direct)
    model = Whole("wan")
    swap = model.swap(3, StandIn(), ring=3, trained=True)
    monkeypatch.setattr(swap, "trained", False)  # slots are then taken to be current
    assert not equal(model.train(swap.run(), swap.run()), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_input_layers_rest_while_the_blocks_run(name):
    expected = Model(name).train(direct, direct)
    model, lanes, seen = Model(name), StandIn(), []
    modules = [model.dit.get_submodule(path) for path in model.family.spec.inputs]
    swap = BlockSwap(model.blocks[-2:], lanes, ring=2, inputs=modules)

    def looking(blocks: Sequence[nn.Module], h: object, ctx: object) -> object:
        seen.append({storage(p) in lanes.homes for module in modules for p in module.parameters()})
        return direct(blocks, h, ctx)

    with watching(lanes):
        assert equal(model.train(swap.run(looking), swap.run(looking)), expected)
    assert seen
    assert all(states == {True} for states in seen)
    called = {id(job.source.untyped_storage()) for job in lanes.copies}
    assert {id(rest.memory.untyped_storage()) for rest in swap.resting} <= called


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's look
@pytest.mark.parametrize("again", [pytest.param(True, marks=pytest.mark.slow), False], ids=["checkpointed", "kept"])
def test_compiled_blocks_find_their_weights_in_any_slot(again):
    from torch._dynamo.utils import counters

    settings, graphs = CompileSettings("aot_eager", fullgraph=True), []
    torch.compiler.reset()
    counters.clear()
    plain = Model("wan")
    compile_blocks(plain.dit, plain.family.spec.blocks, settings)
    expected = plain.train(ways(again), direct)
    graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    counters.clear()
    model, lanes = Model("wan"), StandIn()
    compile_blocks(model.dit, model.family.spec.blocks, settings)
    swap = model.swap(2, lanes, ring=1)
    found = model.train(swap.run(ways(again), recomputed=again), swap.run())
    graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert graphs[0] == graphs[1] > 0, "the blocks share one compilation as without swap"
    assert equal(found, expected)
    assert len(lanes.copies) > 8


def test_what_cannot_be_a_ring_is_told():
    with pytest.raises(ValueError, match="0 blocks in a ring of 2 slots"):
        BlockSwap([], StandIn())
    with pytest.raises(ValueError, match="1 blocks in a ring of 0 slots"):
        BlockSwap([nn.Linear(2, 2)], StandIn(), ring=0)
    with pytest.raises(ValueError, match="a block of 4352 bytes joins slots of 512"):
        BlockSwap([nn.Linear(2, 2).requires_grad_(False)], StandIn()).join([nn.Linear(32, 32).requires_grad_(False)])


def test_two_models_that_take_turns_share_the_slots():
    """As two experts by noise level do: other weights, one ring, every number as without swap."""

    def pair() -> list[Model]:
        models = [Model("wan"), Model("wan")]
        with torch.no_grad():
            for parameter in models[1].dit.parameters():
                parameter.mul_(0.9)
        return models

    def turns(models: list[Model], run: Run) -> list[Tensor]:
        return [value for turn in range(2) for model in models for value in model.train(run, run)[: 3 + turn]]

    expected = turns(pair(), direct)
    models, lanes = pair(), StandIn()
    swap = models[0].swap(2, lanes, ring=2)
    swap.join(models[1].blocks[-2:])
    with watching(lanes):
        assert equal(turns(models, swap.run()), expected)
    assert len(lanes.slots) == 2
    assert len(swap.resting) == 4
