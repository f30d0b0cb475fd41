"""Thirty training steps of a tiny model against recorded ones: loss, gradient norm and final LoRA of every run.

Everything goes through the real parts: the loader with its FP8, the family's model, the adapter, the step, the loop and
the optimizer. Only noise and t are given, through `Draws`. Tolerances are those stated beside the data.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from golden_data import REFERENCE, golden
from musubi_tuner.adapters.attach import AdapterSet, attach
from musubi_tuner.data.batches import Batch
from musubi_tuner.families import registry
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.optim.build import build_optimizer, evaluating, sets_its_own_rate
from musubi_tuner.optim.schedules import Schedule, curve
from musubi_tuner.training.events import Quiet, StepRecord
from musubi_tuner.training.loop import Plan, train
from musubi_tuner.training.run import predictor
from musubi_tuner.training.runtime import LocalRuntime
from musubi_tuner.training.step import Step
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.write import atomic_save_safetensors
from training_toys import GivenDraws

FAMILY = registry.get("wan")
STEPS = 30
RUNS = {
    # name: timestep offset, FP8 block size (0: none), clipping norm
    "A": (0, 0, 1.0),
    "B": (1, 0, 1.0),
    "A_fp8": (0, 64, 1.0),
    "B_fp8": (1, 64, 1.0),
    "A_fp8_block32": (0, 32, 1.0),
    "A_clip025": (0, 0, 0.25),
    "A_loraplus": (0, 0, 1.0),
    "A_schedulefree": (0, 0, 1.0),
}


@pytest.fixture(scope="module")
def data() -> tuple[dict[str, Tensor], dict]:
    with safe_open(REFERENCE / "trajectories/wan2_1_t2v_traj_a.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 the reader is no mapping
        return tensors, json.loads(file.metadata()["json"])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The frozen base as a user's checkpoint: weights, and sizes in its metadata."""
    case = golden("wan2_1_t2v_a")
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "freq_dim", "eps")
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    sizes = {name: case.config[name] for name in names}
    atomic_save_safetensors(path, case.weights, {"musubi.config": json.dumps(sizes)})
    return path


class Recorded:
    """The stored steps as one epoch of thirty batches."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.latents, self.index, self.text = (tensors[k] for k in ("step.latents", "step.cond_index", "cond.context"))

    def __len__(self) -> int:
        return STEPS

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for i in range(start, STEPS):
            yield Batch(self.latents[i], {"text": self.text[int(self.index[i])]}, (2 * i, 2 * i + 1), number, i)


class History(Quiet):
    """Losses and norms of every step, the adapter after ten, and the gradients of the first step."""

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters, self.losses, self.norms = adapters, [], []
        self.after_ten: dict[str, Tensor] = {}

    def step_end(self, record: StepRecord) -> None:
        self.losses.append(record.loss)
        self.norms.append(record.grad_norm)
        if record.step == 10:
            self.after_ten = self.adapters.state_dict()


def load(base: Path, block_size: int) -> nn.Module:
    fp8 = Fp8Policy(FAMILY.spec.fp8, block_size=block_size) if block_size else None
    with open_checkpoint(base) as checkpoint:
        dit = FAMILY.build_dit(checkpoint.header)
        policy = WeightPolicy(torch.float32, fp8)
        materialize(dit, checkpoint, rename=FAMILY.rename_dit_key, policy=policy, progress=False)
    return dit


def adapted(base: Path, tensors: dict[str, Tensor], block_size: int = 0) -> tuple[nn.Module, AdapterSet]:
    dit = load(base, block_size)
    adapters = attach(dit, FAMILY.spec.adapter, rank=4, alpha=2.0)
    adapters.load({key.removeprefix("lora0."): value for key, value in tensors.items() if key.startswith("lora0.")})
    return dit.train(), adapters


def step_of(
    dit, adapters, tensors, *, offset: float, max_norm: float, run: Run = direct, kind="AdamW", ratio=None
) -> Step:
    arguments = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = build_optimizer(kind, adapters.parameter_groups(1e-3, ratio), arguments, rate=1e-3)
    return Step(
        predict=predictor(FAMILY, dit, run),
        parameters=adapters.parameters(),
        optimizer=optimizer,
        draws=GivenDraws(tensors["step.noise"], tensors["step.t"].double()),
        timestep_offset=offset,
        max_grad_norm=max_norm,
    )


@pytest.fixture(scope="module")
def results(data, base):
    """Every run, made once."""
    tensors, _ = data
    found = {}
    for name, (offset, block_size, max_norm) in RUNS.items():
        dit, adapters = adapted(base, tensors, block_size)
        history = History(adapters)
        kind = "schedulefree.AdamWScheduleFree" if name == "A_schedulefree" else "AdamW"
        ratio = 4.0 if name == "A_loraplus" else None
        step = step_of(dit, adapters, tensors, offset=offset, max_norm=max_norm, kind=kind, ratio=ratio)
        rate = Schedule(curve("constant", steps=STEPS, rate=1e-3))
        own = sets_its_own_rate(step.optimizer)
        train(step, Recorded(tensors), Plan(STEPS), rate=None if own else rate, observers=[history])
        with evaluating(step.optimizer):
            found[name] = (history, adapters.state_dict())
    return found


def distance(mine: dict[str, Tensor], tensors: dict[str, Tensor], stage: str) -> tuple[float, float, float]:
    """(norm relative to the distance moved, median element difference, decay test) as the data's README defines."""
    keys = [key for key in mine if not key.endswith(".alpha")]
    off = {key: mine[key] - tensors[f"{stage}.{key}"] for key in keys}
    moved = {key: tensors[f"{stage}.{key}"] - tensors[f"lora0.{key}"] for key in keys}
    flat = torch.cat([part.flatten() for part in off.values()])
    downs = [key for key in keys if "lora_down" in key]
    shrunk = sum(float((off[key] * tensors[f"lora0.{key}"]).sum()) for key in downs)
    start = sum(float((tensors[f"lora0.{key}"] ** 2).sum()) for key in downs)
    norm = float(flat.norm() / torch.cat([part.flatten() for part in moved.values()]).norm())
    return norm, float(flat.abs().median()), abs(shrunk / start)


def worst(found: list[float], expected: Tensor) -> float:
    mine = torch.tensor(found, dtype=torch.float64)
    return float(((mine - expected) / expected).abs().max())


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_gradient_norms_follow_the_recorded_run(results, data, name):
    history, _ = results[name]
    assert len(history.losses) == STEPS
    assert worst(history.losses, data[0][f"{name}.loss"]) < 1e-5
    assert worst(history.norms, data[0][f"{name}.grad_norm"]) < 6e-5


@pytest.mark.parametrize("name", RUNS)
def test_the_adapter_arrives_where_the_recorded_run_did(results, data, name):
    history, final = results[name]
    relative, median, decay = distance(final, data[0], f"{name}.lora30")
    assert relative < 2e-3
    assert median < 5e-7
    assert decay < 2e-5
    if f"{name}.lora10.{next(iter(final))[: -len('.alpha')]}.lora_up.weight" in data[0]:
        assert distance(history.after_ten, data[0], f"{name}.lora10")[0] < 2e-3


@pytest.mark.parametrize("name", ["A", "A_fp8"])
def test_the_first_step_agrees_in_prediction_and_gradients(data, base, name):
    """Forward to 1e-6 in the loss and 2e-5 in the prediction; gradients of the up factors, exact zeros of the down."""
    tensors, _ = data
    dit, adapters = adapted(base, tensors, RUNS[name][1])
    step = step_of(dit, adapters, tensors, offset=0, max_norm=0)
    first = next(Recorded(tensors).epoch(1))
    loss = step.loss(first)
    assert loss.item() == pytest.approx(float(tensors[f"{name}.loss"][0]), rel=1e-6)
    loss.backward()
    for key, parameter in adapters.named_parameters():
        if "lora_down" in key:
            assert not parameter.grad.any()
        else:
            expected = tensors[f"{name}.grad0.{key}"]
            assert float((parameter.grad - expected).norm() / expected.norm()) < 6e-5
    t = tensors["step.t"][0].double()
    x_t = (1 - t).view(-1, 1, 1, 1, 1) * first.latents + t.view(-1, 1, 1, 1, 1) * tensors["step.noise"][0]
    with torch.no_grad():
        v = step.predict(x_t.float(), t, first.cond)
    assert float((v - tensors[f"{name}.pred0"]).norm() / tensors[f"{name}.pred0"].norm()) < 2e-5


@pytest.mark.parametrize("block_size", [64, 32])
def test_quantised_bytes_and_scales_are_the_recorded_ones(data, base, block_size):
    listed = data[1]["fp8"]["quantised"]
    expected = listed.get(f"block_size_{block_size}", listed)
    state = load(base, block_size).state_dict()
    assert expected
    for key, facts in expected.items():
        scale = state[key.replace(".weight", ".scale_weight")]
        assert list(scale.shape) == facts["scale_shape"]
        assert sha256(state[key]) == facts["weight_sha256"]
        assert sha256(scale.float()) == facts["scale_sha256"]


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_checkpointing_changes_no_bit(data, base):
    """Three steps with recomputed activations equal three steps without, to the bit."""
    finals = []
    for run in (direct, checkpointed(direct)):
        dit, adapters = adapted(base, data[0], 64)
        step = step_of(dit, adapters, data[0], offset=0, max_norm=1.0, run=run)
        train(step, Recorded(data[0]), Plan(3))
        finals.append(adapters.state_dict())
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def test_autocast_stays_close(data, base):
    """bf16 autocast over the float32 base: within twice what the data's README measured (4.4e-3)."""
    dit, adapters = adapted(base, data[0])
    step = step_of(dit, adapters, data[0], offset=0, max_norm=1.0)
    history = History(adapters)
    step = replace(step, runtime=LocalRuntime("cpu", "bf16"))
    train(step, Recorded(data[0]), Plan(10), observers=[history])
    difference = worst(history.losses, data[0]["A.loss"][:10])
    assert 1e-6 < difference < 8.8e-3
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
