"""Training over two experts: one adapter, each batch on one side of the boundary, by the expert of that side."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner.adapters.attach import attach
from musubi_tuner.config.errors import UserError
from musubi_tuner.data.batches import Batch
from musubi_tuner.flow import keyed
from musubi_tuner.nn.experts import Experts, transformers
from musubi_tuner.training.config import TimestepOptions
from musubi_tuner.training.draws import Buckets, KeyedDraws
from musubi_tuner.weights.write import atomic_save_safetensors
from tiny_models import TINY, tiny_dit
from training_place import FAMILY, losses_in, make_place, tensors_in, train_noting_losses
from training_server import Server

CPU = torch.device("cpu")
BOUNDARY = ("--timestep_boundary", "500")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`dit.safetensors` is the expert for low noise, `high.safetensors` the other one, with weights of its own."""
    root = make_place(tmp_path_factory.mktemp("experts"))
    state = {key: value + 0.02 * keyed.normal(value.shape, "high", key) for key, value in weights(root).items()}
    atomic_save_safetensors(root / "high.safetensors", state, {"musubi.config": metadata()})
    return root


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "dit.safetensors")


def metadata() -> str:
    return json.dumps(TINY["wan"].sizes)


def both(place: Path, *words: str) -> list[str]:
    return ["--dit_high_noise", str(place / "high.safetensors"), *BOUNDARY, *words]


@pytest.mark.parametrize(("expert", "side"), [("dit", ("--max_timestep", "400")), ("high", ("--min_timestep", "600"))])
@pytest.mark.shows("dit_high_noise", "timestep_boundary")
def test_times_of_one_side_train_with_the_expert_of_that_side(place, tmp_path, caplog, expert, side):
    """To the bit as a run with that expert alone; and the other expert gives other losses."""
    words = ("--max_train_steps", "3", *side)
    two = train_noting_losses(place, tmp_path / "two", *words, *both(place))
    assert "never trained on" in caplog.text
    alone = train_noting_losses(place, tmp_path / "one", *words, "--dit", str(place / f"{expert}.safetensors"))
    other = "high" if expert == "dit" else "dit"
    wrong = train_noting_losses(place, tmp_path / "wrong", *words, "--dit", str(place / f"{other}.safetensors"))
    assert two == alone != wrong
    a, b = (tensors_in(tmp_path / name / "study.safetensors") for name in ("two", "one"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    """Three epochs over both experts on scaled FP8, with on-demand buckets, checkpointing and states."""
    out = tmp_path_factory.mktemp("whole")
    train_noting_losses(place, out, *WORDS, *both(place))
    return out


WORDS = ("--max_train_epochs", "3", "--save_every_n_steps", "2", "--save_state", "--num_timestep_buckets", "4")
WORDS += ("--fp8_base", "--fp8_scaled", "--gradient_checkpointing", "--timestep_sampling", "shift")


def test_a_run_over_both_resumes_to_the_bit(place, whole, tmp_path):
    train_noting_losses(place, tmp_path, *WORDS, *both(place), "--resume", str(whole / "study-step00000004-state"))
    assert losses_in(tmp_path) == {step: line for step, line in losses_in(whole).items() if step > 4}
    a, b = (tensors_in(folder / "study.safetensors") for folder in (whole, tmp_path))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(value.abs().sum() > 0 for key, value in a.items() if "lora_up" in key)


def test_the_file_is_that_of_one_network(whole):
    """One adapter for both: the keys of a LoRA for one transformer."""
    alone = attach(tiny_dit("wan"), FAMILY.spec.adapter, rank=4)
    assert set(tensors_in(whole / "study.safetensors")) == set(alone.state_dict())


@pytest.mark.shows("offload_inactive_dit")
def test_offloading_on_the_cpu_is_said_to_have_no_effect_and_has_none(place, whole, tmp_path, caplog):
    train_noting_losses(place, tmp_path, *WORDS, *both(place), "--offload_inactive_dit")
    assert "offload_inactive_dit has no effect: the model computes on the CPU" in caplog.text
    assert losses_in(tmp_path) == losses_in(whole)


def test_two_processes_give_the_losses_of_the_joint_batch(place, tmp_path):
    """Each process takes the expert of its own batch's side; the shared factors get the mean of the gradients."""
    words = ["--max_train_epochs", "2", "--num_timestep_buckets", "4", *both(place)]
    server = Server()
    try:
        one, two = tmp_path / "one", tmp_path / "two"
        assert server.end(server.start(place, one, [*words, "--gradient_accumulation_steps", "2"])) == 0
        codes = [server.end(pid) for pid in server.pair(place, two, words)]
        assert codes == [0, 0], (two / "log.txt").read_text()
    finally:
        server.close()
    rows = [[[float(word) for word in line.split()] for line in losses_in(out).values()] for out in (one, two)]
    torch.testing.assert_close(torch.tensor(rows[1]), torch.tensor(rows[0]), rtol=1e-6, atol=0)


def test_shared_factors_train_and_follow_in_both():
    low, high = tiny_dit("wan"), tiny_dit("wan")
    with torch.no_grad():
        high.head.head.weight.mul_(1.5)
    experts = Experts(lambda: low, lambda: high, boundary=0.5, device=CPU, rest="device")
    adapters = attach(low, FAMILY.spec.adapter, rank=2)
    adapters.share(high)
    assert len({id(p) for p in adapters.parameters()}) == len(adapters.parameters()) == 60
    trained = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapters.parameters()}, "the same objects"
    x, cond = keyed.normal((1, 16, 2, 4, 6), "x"), FAMILY.collate([TINY["wan"].entry(3)])
    for t in (0.1, 0.9):
        v = FAMILY.predict(experts.at(t), x, torch.tensor([t]), cond)
        v.square().mean().backward()
    assert all(p.grad is not None for p in adapters.parameters())
    before = FAMILY.predict(high, x, torch.tensor([0.9]), cond)
    with torch.no_grad():
        for _, parameter in adapters.named_parameters():
            parameter.add_(0.1)
    changed = FAMILY.predict(high, x, torch.tensor([0.9]), cond)
    with adapters.disabled():
        base = FAMILY.predict(high, x, torch.tensor([0.9]), cond)
    assert torch.equal(base, before), "up is zero at first"
    assert not torch.equal(changed, before)
    adapters.detach()
    assert torch.equal(base, FAMILY.predict(high, x, torch.tensor([0.9]), cond))
    assert list(transformers(experts)) == [low, high]


@pytest.mark.parametrize("buckets", [None, 5])
def test_a_batch_lies_on_one_side_and_the_times_keep_their_distribution(buckets):
    from scipy.stats import kstest

    count, size, boundary = 4000, 4, 0.875
    draws = KeyedDraws(1, buckets=Buckets.of(buckets, [0] * count), boundary=boundary)
    found = []
    for start in range(0, count, size):
        t = draws.t(Batch(torch.zeros(size, 1, 1, 2, 2), {}, tuple(range(start, start + size)), 1, start))
        assert bool((t >= boundary).all()) or bool((t < boundary).all())
        found.append(t)
    assert kstest(torch.cat(found), "uniform").statistic < 0.06, "sides are drawn a thousand times"


def test_the_boundary_is_compared_with_what_the_model_is_told():
    """With --timestep_offset 1 a t just below the boundary is told as one at it: the batch is the high expert's."""
    draws = TimestepOptions(timestep_offset=1).draws(1, None, None, 0.875)
    assert draws.boundary == pytest.approx(0.874)
    assert TimestepOptions().draws(1, None, None, None).boundary is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--timestep_boundary", "0"), "timestep_boundary"),
        (("--full_finetune",), "--full_finetune trains the weights of one transformer: leave out --dit_high_noise"),
        (("--dit_high_noise", "gone.safetensors"), "gone.safetensors"),
    ],
)
def test_what_cannot_go_together_is_a_sentence_before_any_model_is_read(place, tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        train_noting_losses(place, tmp_path, *both(place), *words)


def test_a_task_of_one_transformer_needs_to_be_told_the_boundary(place, tmp_path):
    with pytest.raises(UserError, match=r"--task t2v-14B, which has one transformer: .*t2v-A14B: 875, i2v-A14B: 900"):
        train_noting_losses(place, tmp_path, "--dit_high_noise", str(place / "high.safetensors"))


def test_two_files_that_are_no_pair_are_refused(place, tmp_path):
    state = {key: value.contiguous() for key, value in tiny_dit("wan", num_layers=2).state_dict().items()}
    sizes = json.dumps(TINY["wan"].sizes | {"num_layers": 2})
    atomic_save_safetensors(tmp_path / "other.safetensors", state, {"musubi.config": sizes})
    words = ("--dit_high_noise", str(tmp_path / "other.safetensors"), *BOUNDARY)
    with pytest.raises(UserError, match=r"dit.safetensors and .*other.safetensors are not two experts of one model"):
        train_noting_losses(place, tmp_path / "out", *words)


def test_one_expert_of_a_task_of_two_is_told_its_range(place, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train_noting_losses(place, tmp_path / "a", "--task", "t2v-A14B", "--max_train_steps", "1")
        assert "give --max_timestep 875 for the one for low noise, --min_timestep 875 for the other" in caplog.text
        caplog.clear()
        train_noting_losses(
            place, tmp_path / "b", "--task", "t2v-A14B", "--max_train_steps", "1", "--max_timestep", "875", *BOUNDARY
        )
    assert "has two experts" not in caplog.text
    assert "without dit_high_noise there is no effect of timestep_boundary" in caplog.text
