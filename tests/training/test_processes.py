"""Two processes on one machine: what they agree on, and that they train as one with the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.training import runtime
from musubi_tuner.training.loop import Plan, train
from musubi_tuner.training.runtime import LocalRuntime, launched
from musubi_tuner.training.step import KeyedDraws, Step
from training_server import held_port, launch_variables
from training_toys import MemorySource, Toy, items_of, noting_gradients

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """What two launched processes left behind."""
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, str(HERE / "two_processes.py"), str(folder)]
    with held_port() as port:
        shared = {**os.environ, **launch_variables(port.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
        ]
        assert [process.wait(timeout=300) for process in running] == [0, 0]
    return folder


def test_processes_share_numbers(pair):
    told = [json.loads((pair / f"told{rank}.json").read_text()) for rank in range(2)]
    assert told == [{"world": 2, "agreed": 100, "average": 0.5}] * 2


def test_two_processes_train_as_one_with_the_joint_batch(pair):
    model = Toy(24)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    gradients = noting_gradients(optimizer, parameters)
    step = Step(predict=model, parameters=parameters, optimizer=optimizer, draws=KeyedDraws(5), max_grad_norm=0)
    train(step, MemorySource(items_of(10), 10), Plan(4))
    for rank in range(2):
        joint = torch.load(pair / f"gradients{rank}.pt", weights_only=True)
        assert len(joint) == len(gradients) == 4
        assert float((joint[0] - gradients[0]).norm() / gradients[0].norm()) < 1e-6, "the same weights before it"
    alone = torch.cat([p.detach().flatten() for p in parameters])
    first, second = (torch.load(pair / f"weights{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    assert float((alone - torch.cat([p.flatten() for p in Toy(24).parameters()]).detach()).abs().max()) > 0.02


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1: use --fsdp_version 2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "--fp8_base"),
        ({"ACCELERATE_MIXED_PRECISION": "tf32"}, "use no, fp16 or bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"}, "needs a CUDA device"),
    ],
)
def test_launches_that_cannot_be_served_are_told(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if torch.cuda.is_available() and "fp16" in variables.values():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=sentence):
        launched()


def test_the_launcher_s_precision_holds_unless_an_option_says_otherwise(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launched().precision == "bf16"
    assert launched("no").precision == "no"
    assert LocalRuntime("cpu", "bf16").dtype == torch.bfloat16


def test_a_gradient_that_is_missing_counts_as_zero(monkeypatch):
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda flat: flat.mul_(3))  # three processes with equal gradients
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    a.grad = torch.tensor([1.0, 2.0])
    runtime.average_gradients([a, b], 3)
    assert torch.equal(a.grad, torch.tensor([1.0, 2.0]))
    assert torch.equal(b.grad, torch.zeros(3))
