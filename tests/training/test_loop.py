"""The step and the loop on toy models: what they promise about accumulation, epochs, keys, clipping and resuming."""

import copy

import pytest
import torch
from torch import nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.batches import Batch
from musubi_tuner.flow import keyed
from musubi_tuner.flow.timesteps import logistic_normal
from musubi_tuner.optim.schedules import Schedule, curve
from musubi_tuner.training.events import Quiet, State
from musubi_tuner.training.loop import Plan, train
from musubi_tuner.training.step import KeyedDraws, Step
from training_toys import GivenDraws, MemorySource, Toy, items_of


class Diary(Quiet):
    def __init__(self):
        self.steps, self.epochs, self.ends = [], [], []

    def start(self, state):
        self.ends.append(("start", state.step))

    def step_end(self, record):
        self.steps.append(record)

    def epoch_end(self, record):
        self.epochs.append(record)

    def finish(self, state):
        self.ends.append(("finish", state.step))

    def stopped(self, state):
        self.ends.append(("stopped", state.step))


def step_of(model: nn.Module, **changes) -> Step:
    parameters = list(model.parameters())
    settings = {
        "predict": model,
        "parameters": parameters,
        "optimizer": torch.optim.AdamW(parameters, lr=1e-2),
        "draws": KeyedDraws(5),
    }
    return Step(**{**settings, **changes})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_half_batches_equal_the_joint_batch():
    """In float64, over several steps, also where the halves are of unequal size."""
    joint, halves = Toy(24, torch.float64), Toy(24, torch.float64)
    items = items_of(10)
    train(step_of(joint), MemorySource(items, 10), Plan(5))
    uneven = MemorySource(items, 7)  # 7 and 3 items
    train(step_of(halves), uneven, Plan(5, accumulation=2))
    torch.testing.assert_close(weights(halves), weights(joint), rtol=1e-6, atol=1e-7)
    assert float((weights(joint) - weights(Toy(24, torch.float64))).abs().max()) > 0.02


def test_the_loss_is_the_flow_matching_objective():
    """Against the formula written out, with a weight and a timestep offset."""
    seen = {}

    def predict(x_t, t, cond):
        seen.update(x_t=x_t, t=t)
        return 0.5 * x_t

    x0, noise = items_of(3), keyed.normal((3, 2, 1, 3, 4), "e")
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    draws = GivenDraws(noise[None], t[None])
    parameter = nn.Parameter(torch.zeros(1))
    step = Step(
        predict=predict,
        parameters=[parameter],
        optimizer=torch.optim.SGD([parameter], lr=1),
        draws=draws,
        weight=lambda at: 1 / at,
        timestep_offset=1,
    )
    loss = step.loss(Batch(x0, {}, (0, 1, 2), 1, 0))
    expected = 0.0
    for i in range(3):
        mixed = (1 - float(t[i])) * x0[i] + float(t[i]) * noise[i]
        torch.testing.assert_close(seen["x_t"][i], mixed)
        expected += float(((0.5 * mixed - (noise[i] - x0[i])) ** 2).mean()) / float(t[i]) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert seen["t"].dtype == torch.float64
    torch.testing.assert_close(seen["t"], t + 0.001, rtol=0, atol=1e-15)


def test_full_fine_tuning_reduces_the_loss():
    diary = Diary()
    train(step_of(Toy(24)), MemorySource(items_of(16), 8), Plan(400), observers=[diary])
    first, last = (sum(r.loss for r in part) / 40 for part in (diary.steps[:40], diary.steps[-40:]))
    assert last < 0.6 * first


def test_epochs_are_counted_and_their_rest_makes_a_step():
    diary = Diary()
    state = train(step_of(Toy(24)), MemorySource(items_of(5), 1), Plan(7, accumulation=2), observers=[diary])
    assert [r.epoch for r in diary.steps] == [1, 1, 1, 2, 2, 2, 3]
    assert [r.items for r in diary.steps] == [2, 2, 1, 2, 2, 1, 2]
    assert [(r.epoch, r.step, r.last) for r in diary.epochs] == [(1, 3, False), (2, 6, False)]
    assert diary.epochs[0].loss == pytest.approx(sum(r.loss for r in diary.steps[:3]) / 3)
    assert diary.steps[-1].average == pytest.approx(sum(r.loss for r in diary.steps[-3:]) / 3)
    assert (state.step, state.epoch, state.batch) == (7, 2, 2)
    assert diary.ends == [("start", 0), ("finish", 7)]


def test_an_epoch_that_ends_the_run_is_told_as_the_last():
    diary = Diary()
    train(step_of(Toy(24)), MemorySource(items_of(4), 2), Plan(4), observers=[diary])
    assert [(r.epoch, r.last) for r in diary.epochs] == [(1, False), (2, True)]
    assert Plan(4).epochs(2) == 2
    assert Plan(5, 3).epochs(4) == 3


@pytest.mark.parametrize(("after", "epochs"), [(2, []), (3, [1]), (4, [1])])
def test_a_run_that_is_asked_to_stop_ends_after_the_step_and_can_go_on(after, epochs):
    """An epoch that ends with that step is told first; observers hear `stopped` in place of `finish`."""
    source = MemorySource(items_of(6), 2)
    whole, part, diary = Toy(24), Toy(24), Diary()
    train(step_of(whole), source, Plan(7))
    step = step_of(part)
    state = train(step, source, Plan(7), observers=[diary], stop=lambda: len(diary.steps) == after)
    assert [record.epoch for record in diary.epochs] == epochs
    assert diary.ends == [("start", 0), ("stopped", after)]
    train(step, source, Plan(7), observers=[diary], state=state)
    assert diary.ends[2:] == [("start", after), ("finish", 7)]
    assert torch.equal(weights(part), weights(whole))
    assert [record.epoch for record in diary.epochs] == [1, 2]
    assert diary.epochs[0].loss == pytest.approx(sum(r.loss for r in diary.steps[:3]) / 3)


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_run_that_goes_on_from_its_state_equals_the_uninterrupted_one(stop):
    """To the bit: model, optimizer and state are all there is to keep."""
    source, rate = MemorySource(items_of(10), 2), Schedule(curve("cosine", steps=12, warmup=4))
    whole = Toy(24)
    train(step_of(whole), source, Plan(12, 2), rate=rate)
    part = Toy(24)
    step = step_of(part)
    state = train(step, source, Plan(stop, 2), rate=rate)
    again = Toy(24)
    again.load_state_dict(part.state_dict())
    resumed = step_of(again)
    resumed.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    train(resumed, source, Plan(12, 2), rate=rate, state=State(state.step, state.epoch, state.batch))
    assert torch.equal(weights(again), weights(whole))


def test_draws_belong_to_items_not_to_batches():
    draws = KeyedDraws(9, lambda shape: logistic_normal(0.4, 1.3))
    latents = items_of(4)
    joint = Batch(latents, {}, (4, 7, 1, 2), 3, 0)
    alone = Batch(latents[1:2], {}, (7,), 3, 5)
    assert torch.equal(draws.noise(joint)[1:2], draws.noise(alone))
    assert torch.equal(draws.t(joint)[1:2], draws.t(alone))
    other_epoch = Batch(latents[1:2], {}, (7,), 4, 5)
    assert not torch.equal(draws.noise(alone), draws.noise(other_epoch))
    assert not torch.equal(draws.t(alone), draws.t(other_epoch))
    told = []
    KeyedDraws(9, begin_step=lambda *key: told.append(key)).begin(joint)
    assert told == [(9, 3, (4, 7, 1, 2))]


def test_clipping_scales_the_update_and_reports_the_norm_before():
    norms = {}
    moved = {}
    for limit in (0.0, 0.01):
        model = Toy(24)
        before = weights(model)
        step = step_of(model, max_grad_norm=limit, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
        norms[limit] = step([next(MemorySource(items_of(4), 4).epoch(1))]).grad_norm
        moved[limit] = float((weights(model) - before).norm())
    assert norms[0.0] == norms[0.01] > 0.1
    assert moved[0.0] == pytest.approx(norms[0.0], rel=1e-4)
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)


def test_rates_are_set_before_each_step_and_told_by_group():
    model, diary = Toy(24), Diary()
    groups = [
        {"params": list(model.first.parameters()), "lr": 1e-3, "name": "unet"},
        {"params": list(model.last.parameters()), "lr": 4e-3, "name": "unet plus"},
    ]
    step = step_of(model, optimizer=torch.optim.AdamW(groups))
    rate = Schedule(curve("linear", steps=4))
    train(step, MemorySource(items_of(2), 2), Plan(4), rate=rate, observers=[diary])
    factors = [1, 0.75, 0.5, 0.25]
    assert [r.rates["unet"] for r in diary.steps] == pytest.approx([1e-3 * f for f in factors])
    assert [r.rates["unet plus"] for r in diary.steps] == pytest.approx([4e-3 * f for f in factors])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights():
    model = Toy(24)
    before = weights(model)
    items = items_of(4)
    items[2, 0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"the loss is nan: lower --learning_rate.*items 0, 1, 2, 3"):
        train(step_of(model), MemorySource(items, 4), Plan(3))
    assert torch.equal(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_sources_that_cannot_be_trained_on_are_told():
    with pytest.raises(UserError, match="no batch"):
        train(step_of(Toy(24)), MemorySource(items_of(0), 2), Plan(1))

    class Short(MemorySource):
        def __len__(self):
            return 9

        def epoch(self, number, start=0):
            yield from list(MemorySource(self.latents, 2).epoch(number))[start:]

    with pytest.raises(RuntimeError, match="promised 9 batches an epoch and gave 2"):
        train(step_of(Toy(24)), Short(items_of(4), 2), Plan(5))


def test_a_gradient_that_is_not_finite_leaves_the_step_out(caplog):
    """The weights stay as they are; the run ends when it never recovers."""
    model = Toy(24)
    before = weights(model)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    step = step_of(model, predict=lambda x_t, t, cond: Poison.apply(model(x_t, t, cond)))
    source = MemorySource(items_of(4), 4)
    train(step, source, Plan(3))
    assert torch.equal(weights(model), before)
    assert caplog.text.count("this step is left out") == 3
    with pytest.raises(UserError, match="20 steps in turn"):
        train(step, source, Plan(30))
    assert torch.equal(weights(model), before)
