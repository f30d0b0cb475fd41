"""Block swap with real streams: equal numbers, less device memory, pinned pages, loading that stays below the model.

`make test-gpu` runs these. `test_the_check_itself` runs the same check on the stand-in of the CPU.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from musubi_tuner.flow import keyed
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.lanes import CudaLanes, Lanes
from musubi_tuner.memory.resting import resting_bytes
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from swap_stand_in import StandIn

DEVICE = torch.device("cuda", 0)
BLOCKS, SWAPPED = 8, 6


class Block(nn.Module):
    """Frozen layers and a trained gain, on `h: [rows, width]`; large enough that a copy takes its time."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gain = nn.Parameter(torch.ones(width))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name != "gain":
                    parameter.copy_(keyed.normal(parameter.shape, "gpu swap", number, name) / width**0.5)
                    parameter.requires_grad_(False)

    def forward(self, h: Tensor, ctx: Tensor) -> Tensor:
        return h + self.down(torch.nn.functional.gelu(self.up(h * self.gain))) * ctx


def model(width: int, device: torch.device, *, resting: int) -> list[nn.Module]:
    blocks = [Block(width, number) for number in range(BLOCKS)]
    return [block.to(device) if number < BLOCKS - resting else block for number, block in enumerate(blocks)]


def passes(blocks: list[nn.Module], run: Run, width: int, device: torch.device) -> list[Tensor]:
    """Losses and gradients of six passes, with one without gradients after each."""
    found, ctx = [], torch.tensor(0.5, device=device)
    for number in range(6):
        h = keyed.normal((64, width), "gpu swap", "h", number).to(device)
        loss = run(blocks, h, ctx).square().mean()
        loss.backward()
        with torch.no_grad():
            found += [loss.detach(), run(blocks, h, ctx)]
    return [value.cpu() for value in (*found, *(block.gain.grad for block in blocks))]


def check(lanes: Lanes, width: int, *, ring: int, again: bool) -> None:
    """The numbers with swap are those without, to the bit."""
    way = checkpointed() if again else direct
    expected = passes(model(width, lanes.device, resting=0), way, width, lanes.device)
    blocks = model(width, lanes.device, resting=SWAPPED)
    swap = BlockSwap(blocks[-SWAPPED:], lanes, ring=ring)
    found = passes(blocks, swap.run(way, recomputed=again), width, lanes.device)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("again", [True, False])
def test_the_check_itself(again):
    check(StandIn(), 32, ring=2, again=again)


@pytest.mark.gpu
@pytest.mark.parametrize("again", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "ordinary"])
@pytest.mark.parametrize("ring", [1, 2, 3])
def test_numbers_are_equal_to_the_bit_on_a_device(ring, pinned, again):
    check(CudaLanes(DEVICE, pinned=pinned), 2048, ring=ring, again=again)


@pytest.mark.gpu
def test_the_device_holds_the_resident_blocks_and_the_ring():
    torch.ones(64, 64, device=DEVICE).matmul(torch.ones(64, 64, device=DEVICE))  # cuBLAS takes its workspace now
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated(DEVICE)
    blocks = model(2048, DEVICE, resting=SWAPPED)
    swap = BlockSwap(blocks[-SWAPPED:], CudaLanes(DEVICE, pinned=True), ring=2)
    size = resting_bytes(blocks[-1])
    held = torch.cuda.memory_allocated(DEVICE) - start
    assert held <= (BLOCKS - SWAPPED + 2) * size + (1 << 20)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    with torch.no_grad():
        swap.run()(blocks, torch.ones(64, 2048, device=DEVICE), torch.tensor(0.5, device=DEVICE))
    assert torch.cuda.max_memory_allocated(DEVICE) - start - held < size / 2, "activations only"


@pytest.mark.gpu
def test_pinned_memory_is_pinned_and_has_its_own_size():
    lanes = CudaLanes(DEVICE, pinned=True)
    memory = lanes.rest((3 << 20) + 256)
    assert lanes.pinned
    assert memory.is_pinned()
    assert memory.untyped_storage().nbytes() == (3 << 20) + 256
    assert not CudaLanes(DEVICE, pinned=False).rest(1 << 20).is_pinned()


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048)) for _ in range(4))


class Targets:
    include = ("blocks",)
    exclude = ("norm",)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [None, Fp8Policy(Targets())], ids=["bf16", "fp8"])
def test_what_rests_is_never_on_the_device_while_it_is_loaded(fp8, tmp_path: Path):
    """Codes and scales are those of a load to the device alone."""
    shapes = Tree().state_dict()
    weights = {key: keyed.normal(value.shape, "gpu load", key).bfloat16() for key, value in shapes.items()}
    save_file(weights, tmp_path / "m.safetensors")
    found = []
    for host in ((), ("blocks.1", "blocks.2", "blocks.3")):
        with torch.device("meta"):
            tree = Tree()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        start = torch.cuda.memory_allocated(DEVICE)
        with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
            policy = WeightPolicy(torch.bfloat16, fp8)
            materialize(tree, checkpoint, policy=policy, device=DEVICE, host=host, progress=False)
        peak = torch.cuda.max_memory_allocated(DEVICE) - start
        state = tree.state_dict()
        assert {key for key in state if state[key].device.type == "cpu"} == {
            key for key in state if key.startswith(tuple(f"{path}." for path in host))
        }
        stays = sum(value.nbytes for value in state.values() if value.device.type == "cuda")
        assert peak <= stays + (16 << 20)
        found.append({key: value.cpu() for key, value in state.items()})
    assert all(torch.equal(found[0][key].view(torch.uint8), found[1][key].view(torch.uint8)) for key in found[0])
