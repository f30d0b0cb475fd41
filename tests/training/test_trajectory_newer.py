"""The thirty recorded steps of the model of version 2.2, whose time embedding was computed for each token: loss,
gradient norm and final LoRA of each run. The recipe, and what more is compared, is that of `test_trajectory.py`."""

import json

import pytest
import torch
from safetensors import safe_open

from golden_data import REFERENCE, golden
from musubi_tuner.adapters.attach import attach
from musubi_tuner.data.batches import Batch
from musubi_tuner.families import registry
from musubi_tuner.optim.build import build_optimizer
from musubi_tuner.optim.schedules import Schedule, curve
from musubi_tuner.training.events import Quiet
from musubi_tuner.training.loop import Plan, train
from musubi_tuner.training.model import predictor
from musubi_tuner.training.step import Step
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.write import atomic_save_safetensors
from training_toys import GivenDraws

FAMILY = registry.get("wan")
RUNS = {"A": (0, 0, 1.0), "B": (1, 0, 1.0), "A_fp8": (0, 64, 1.0), "B_fp8": (1, 64, 1.0), "A_clip025": (0, 0, 0.25)}
"""Timestep offset, FP8 block size (0: none), clipping norm."""


@pytest.fixture(scope="module")
def data():
    with safe_open(REFERENCE / "trajectories/wan2_2_t2v_traj_a.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 the reader is no mapping


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    case = golden("wan2_2_t2v_a")
    sizes = {name: case.config[name] for name in ("num_heads", "text_len")}
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    atomic_save_safetensors(path, case.weights, {"musubi.config": json.dumps(sizes)})
    return path


class Recorded:
    """The stored steps as one epoch of thirty batches."""

    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return 30

    def epoch(self, number, start=0):
        for i in range(start, 30):
            text = self.data["cond.context"][int(self.data["step.cond_index"][i])]
            yield Batch(self.data["step.latents"][i], {"text": text}, (2 * i, 2 * i + 1), number, i)


class History(Quiet):
    def __init__(self) -> None:
        self.losses, self.norms = [], []

    def step_end(self, record) -> None:
        self.losses.append(record.loss)
        self.norms.append(record.grad_norm)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_follows_the_recorded_one(data, base, name):
    offset, block_size, max_norm = RUNS[name]
    with open_checkpoint(base) as checkpoint:
        dit = FAMILY.build_dit(checkpoint.header)
        policy = WeightPolicy(torch.float32, Fp8Policy(FAMILY.spec.fp8, block_size=64) if block_size else None)
        materialize(dit, checkpoint, rename=FAMILY.rename_dit_key, policy=policy, progress=False)
    adapters = attach(dit, FAMILY.spec.adapter, rank=4, alpha=2.0)
    adapters.load({key.removeprefix("lora0."): value for key, value in data.items() if key.startswith("lora0.")})
    arguments = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    step = Step(
        predict=predictor(FAMILY, dit.train()),
        parameters=adapters.parameters(),
        optimizer=build_optimizer("AdamW", adapters.parameter_groups(1e-3), arguments, rate=1e-3),
        draws=GivenDraws(data["step.noise"], data["step.t"].double()),
        timestep_offset=offset,
        max_grad_norm=max_norm,
    )
    history = History()
    rate = Schedule(curve("constant", steps=30, rate=1e-3))
    train(step, Recorded(data), Plan(30), rate=rate, observers=[history])
    for found, expected, tolerance in (
        (history.losses, data[f"{name}.loss"], 1e-5),
        (history.norms, data[f"{name}.grad_norm"], 6e-5),
    ):
        assert float(((torch.tensor(found, dtype=torch.float64) - expected) / expected).abs().max()) < tolerance
    final = {key: value for key, value in adapters.state_dict().items() if not key.endswith(".alpha")}
    off = torch.cat([(value - data[f"{name}.lora30.{key}"]).flatten() for key, value in final.items()])
    moved = torch.cat([(data[f"{name}.lora30.{key}"] - data[f"lora0.{key}"]).flatten() for key in final])
    assert float(off.norm() / moved.norm()) < 2e-3
    assert float(off.abs().median()) < 5e-7
