"""A resumed run equals the one that was never stopped, to the bit; and what may differ, what may not, what is told."""

import json
from pathlib import Path

import pytest
import torch

from training_place import make_place, tensors_in, train_noting_losses

STEPS = ("--max_train_steps", "8", "--save_every_n_steps", "2", "--save_state")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("resume"))


def state(out: Path, step: int) -> str:
    return str(out / f"study-step{step:08d}-state")


def same_later_losses(whole: dict[int, str], resumed: dict[int, str], step: int) -> None:
    assert list(resumed) == list(range(step + 1, len(whole) + 1))
    assert resumed == {number: whole[number] for number in resumed}


def same_files(one: Path, two: Path) -> None:
    a, b = tensors_in(one), tensors_in(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


CASES = {
    "mid epoch": (4, ""),
    "at the end of an epoch": (6, ""),
    "accumulation and workers": (2, "--gradient_accumulation_steps 2 --max_data_loader_n_workers 2"),
    "checkpointing on scaled FP8": (4, "--gradient_checkpointing --fp8_base --fp8_scaled"),
    "schedule-free": (4, "--optimizer_type schedulefree.AdamWScheduleFree --optimizer_args warmup_steps=3"),
    "schedule, LoRA+ and dropout": (
        4,
        "--lr_scheduler cosine --lr_warmup_steps 3 --network_args loraplus_lr_ratio=4 rank_dropout=0.2 "
        "--network_dropout 0.2",
    ),
    "a scheduler class": (4, "--lr_scheduler_type CosineAnnealingWarmRestarts --lr_scheduler_args T_0=3"),
    "AdaFactor with relative steps": (4, "--optimizer_type AdaFactor"),
    "momentum, stratified times": (
        4,
        "--optimizer_type SGD --optimizer_args momentum=0.9 --num_timestep_buckets 3 --timestep_sampling shift "
        "--discrete_flow_shift 2",
    ),
    "bf16 autocast, norms limited": (4, "--mixed_precision bf16 --scale_weight_norms 0.05"),
    "every weight": (4, "--full_finetune --learning_rate 1e-3"),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")  # torch's, from its own first step
@pytest.mark.parametrize("name", CASES)
@pytest.mark.shows("resume")
def test_a_resumed_run_equals_the_uninterrupted_one(place, tmp_path, name):
    """Losses, averages, every later file and the last one, to the bit."""
    step, words = CASES[name][0], CASES[name][1].split()
    whole = train_noting_losses(place, tmp_path / "whole", *STEPS, *words)
    assert len({line.split()[1] for line in whole.values()}) == len(whole), "no two losses are equal"
    resumed = train_noting_losses(place, tmp_path / "part", *STEPS, *words, "--resume", state(tmp_path / "whole", step))
    same_later_losses(whole, resumed, step)
    same_files(tmp_path / "whole/study-step00000008.safetensors", tmp_path / "part/study-step00000008.safetensors")
    same_files(tmp_path / "whole/study.safetensors", tmp_path / "part/study.safetensors")
    manifest = json.loads((Path(state(tmp_path / "part", 8)) / "manifest.json").read_text())
    assert manifest["not_exact"] == []
