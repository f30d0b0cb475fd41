"""Two transformers behind one: who predicts at which noise level, and where the other one rests."""

import pytest
import torch
from torch import nn

from musubi_tuner.nn import experts as module
from musubi_tuner.nn.experts import Experts, expert_at, move_frozen, transformers

CPU = torch.device("cpu")


class Marked(nn.Module):
    """A transformer that says which one it is."""

    def __init__(self, mark: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), mark), requires_grad=False)
        self.register_buffer("scale", torch.tensor(mark))


def pair(rest="device", boundary=0.875):
    loads = []

    def load(mark):
        loads.append(mark)
        return Marked(mark)

    return Experts(lambda: load(1.0), lambda: load(2.0), boundary=boundary, device=CPU, rest=rest), loads


def test_the_high_expert_predicts_from_the_boundary_on():
    experts, loads = pair()
    found = [float(expert_at(experts, t).scale) for t in (0.0, 0.874999, 0.875, 1.0)]
    assert found == [1.0, 1.0, 2.0, 2.0]
    assert float(expert_at(experts, torch.tensor([0.9, 0.2], dtype=torch.float64)).scale) == 2.0, "the first sample's"
    assert sorted(loads) == [1.0, 2.0]
    assert len(transformers(experts)) == 2


def test_one_transformer_predicts_everywhere():
    alone = Marked(3.0)
    assert expert_at(alone, 0.99) is alone
    assert transformers(alone) == (alone,)


def test_lazy_experts_are_loaded_when_needed_and_one_is_there_at_a_time():
    experts, loads = pair("nowhere")
    assert loads == []
    assert transformers(experts) == ()
    for t in (1.0, 0.9, 0.8, 0.1):
        experts.at(t)
        assert len(transformers(experts)) == 1
    assert loads == [2.0, 1.0], "each once while it is needed"
    experts.at(1.0)
    assert loads == [2.0, 1.0, 2.0]


@pytest.mark.gpu
def test_what_trains_is_never_moved():
    model = Marked(1.0).to("cuda")
    model.down = nn.Parameter(torch.ones(2, device="cuda"))
    move_frozen(model, CPU)
    assert [model.weight.device.type, model.scale.device.type, model.down.device.type] == ["cpu", "cpu", "cuda"]


def test_the_inactive_expert_rests_on_the_cpu(monkeypatch):
    """Tensors that claim to be elsewhere: which expert was moved where is noted instead of done."""
    moved = []

    class Noting(Experts):
        pass

    def note(part, device):
        moved.append((float(part.scale), device.type))

    before, module.move_frozen = module.move_frozen, note
    try:
        experts = Noting(
            lambda: Marked(1.0), lambda: Marked(2.0), boundary=0.5, device=torch.device("meta"), rest="cpu"
        )
        assert moved == [(2.0, "cpu")]
        for t in (0.1, 0.2, 0.7, 0.8, 0.3):
            experts.at(t)
    finally:
        module.move_frozen = before
    assert moved[1:] == [(1.0, "cpu"), (2.0, "meta"), (2.0, "cpu"), (1.0, "meta")]
