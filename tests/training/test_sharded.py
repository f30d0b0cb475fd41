"""Full fine-tuning in shards over two processes (FSDP2): the numbers of one process, and whole files and states."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from musubi_tuner.training.state import read_manifest, read_optimizer, read_weights
from tiny_models import TINY
from training_place import losses_in, make_place, tensors_in
from training_server import ROOT, Server, held_port

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
WORDS = ["--full_finetune", "--max_train_epochs", "3", "--save_every_n_steps", "2", "--save_state"]
WORDS += ["--learning_rate", "1e-3", "--max_grad_norm", "0.5"]


@pytest.fixture(scope="module")
def server():
    server = Server("torch.distributed.fsdp", "torch.distributed.tensor")
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("shards"))


def run_pair(server: Server, place: Path, out: Path, words: list[str]) -> Path:
    codes = [server.end(pid) for pid in server.pair(place, out, words, **FSDP)]
    assert codes == [0, 0], (out / "log.txt").read_text()
    return out


@pytest.fixture(scope="module")
def pair(server, place, tmp_path_factory) -> Path:
    return run_pair(server, place, tmp_path_factory.mktemp("pair"), WORDS)


@pytest.fixture(scope="module")
def one(server, place, tmp_path_factory) -> Path:
    """A single process with the joint batch."""
    out = tmp_path_factory.mktemp("one")
    words = [*WORDS, "--gradient_accumulation_steps", "2"]
    assert server.end(server.start(place, out, words)) == 0, (out / "log.txt").read_text()
    return out


def numbers(out: Path, after: int = 0) -> torch.Tensor:
    return torch.tensor(
        [[float(word) for word in line.split()] for step, line in losses_in(out).items() if step > after]
    )


def near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)


def test_the_losses_are_those_of_one_process_with_the_joint_batch(one, pair):
    """Three batches an epoch: in its second step one process has nothing left and computes for the other's sake."""
    assert len(numbers(pair)) == 6
    torch.testing.assert_close(numbers(pair), numbers(one), rtol=1e-6, atol=0)
    near(tensors_in(one / "study.safetensors"), tensors_in(pair / "study.safetensors"))


def test_each_process_holds_half(pair):
    log = (pair / "log.txt").read_text()
    told = re.search(r"training ([\d,]+) parameters, ([\d,]+) of them here", log)
    assert told is not None, log
    count, here = (int(number.replace(",", "")) for number in told.groups())
    assert 0.5 * count <= here < 0.52 * count, told


def test_what_is_saved_is_one_whole_ordinary_checkpoint(place, pair):
    with safe_open(place / "dit.safetensors", "pt") as base, safe_open(pair / "study.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(base.keys())
        for key in base.keys():  # noqa: SIM118 not a mapping
            before, after = base.get_tensor(key), saved.get_tensor(key)
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert saved.metadata()["musubi.config"] == base.metadata()["musubi.config"]
    kept = [f"study-step0000000{n}{tail}" for n in (2, 4, 6) for tail in ("-state", ".safetensors")]
    names = sorted(["log.txt", "losses.txt", *kept, "study-state", "study.safetensors"])
    assert sorted(path.name for path in pair.iterdir()) == names
    assert (pair / "log.txt").read_text().count("saved ") == 8, "by one process"


def test_a_state_is_that_of_a_single_process(one, pair):
    ours, theirs = (folder / "study-step00000004-state" for folder in (pair, one))
    assert (read_manifest(ours).step, read_manifest(ours).world) == (4, 2)
    near(read_weights(theirs / "weights.safetensors"), read_weights(ours / "weights.safetensors"))
    a, b = (read_optimizer(folder / "optimizer.pt") for folder in (ours, theirs))
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, entry in a["state"].items():
        assert {name: value.shape for name, value in entry.items()} == {
            name: value.shape for name, value in b["state"][index].items()
        }
        torch.testing.assert_close(entry["exp_avg"], b["state"][index]["exp_avg"], rtol=1e-3, atol=1e-6)


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(server, place, pair, tmp_path):
    words = [*WORDS, "--resume", str(pair / "study-step00000002-state")]
    out = run_pair(server, place, tmp_path / "out", words)
    assert losses_in(out) == {step: line for step, line in losses_in(pair).items() if step > 2}
    a, b = (tensors_in(folder / "study.safetensors") for folder in (pair, out))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_shards_go_on_from_a_whole_state_and_one_process_from_theirs(server, place, one, pair, tmp_path):
    state = "study-step00000004-state"
    split = run_pair(server, place, tmp_path / "split", [*WORDS, "--resume", str(one / state)])
    torch.testing.assert_close(numbers(split), numbers(one, after=4), rtol=1e-6, atol=0)
    joined = tmp_path / "joined"
    words = [*WORDS, "--gradient_accumulation_steps", "2", "--resume", str(pair / state)]
    assert server.end(server.start(place, joined, words)) == 0, (joined / "log.txt").read_text()
    torch.testing.assert_close(numbers(joined), numbers(one, after=4), rtol=1e-6, atol=0)


def test_every_family_has_the_gradients_of_the_whole_model(server, place, tmp_path):
    """With and without checkpointing; and whole tensors go into shards and come back."""
    script = ROOT / "tests/training/shards_of_families.py"
    codes = [server.end(pid) for pid in server.pair(place, tmp_path, [str(tmp_path)], script=script, **FSDP)]
    assert codes == [0, 0], (tmp_path / "log.txt").read_text()
    for rank in range(2):
        told = json.loads((tmp_path / f"told{rank}.json").read_text())
        assert len(told) == 3 * len(TINY)
        for name in TINY:
            assert told[f"{name} plain"] < 1e-5
            assert told[f"{name} checkpointed"] < 1e-5
            assert 0.4 < told[f"{name} share"] < 0.6


@pytest.mark.slow
def test_the_launch_line_of_the_docs(place, tmp_path):
    """`accelerate launch --use_fsdp --fsdp_version 2`, on CPUs."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = "-m accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1"
    with held_port() as port:
        precision = f"--mixed_precision bf16 --dynamo_backend no --main_process_port {port.getsockname()[1]}"
        script = f"{ROOT}/src/musubi_tuner/wan_train_network.py --full_finetune --max_train_steps 2 --seed 3"
        command = [sys.executable, *f"{launch} {precision} {script}".split(), "--dit", str(place / "dit.safetensors")]
        command += ["--dataset_config", str(place / "data.toml"), "--output_dir", str(tmp_path), "--output_name", "x"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert tensors_in(tmp_path / "x.safetensors").keys() == tensors_in(place / "dit.safetensors").keys()


@pytest.mark.slow
def test_checkpointing_and_accumulation_change_nothing(server, place, tmp_path):
    words = [*WORDS[:1], *WORDS[5:], "--max_train_epochs", "2"]
    plain = run_pair(server, place, tmp_path / "plain", words)
    saving = run_pair(server, place, tmp_path / "saving", [*words, "--gradient_checkpointing"])
    torch.testing.assert_close(numbers(saving), numbers(plain), rtol=1e-6, atol=0)
    both = run_pair(server, place, tmp_path / "both", [*words, "--gradient_accumulation_steps", "2"])
    alone = tmp_path / "alone"
    assert server.end(server.start(place, alone, [*words, "--gradient_accumulation_steps", "4"])) == 0
    torch.testing.assert_close(numbers(both), numbers(alone), rtol=1e-6, atol=0)


def test_a_process_without_any_batch_takes_part(server, place, tmp_path):
    few = shutil.copytree(place, tmp_path / "few")
    for path in few.glob("cache/p[34]_*"):
        path.unlink()
    text = (few / "data.toml").read_text().replace(str(place), str(few)).replace("batch_size = 2", "batch_size = 4")
    (few / "data.toml").write_text(text)
    words = ["--full_finetune", "--max_train_steps", "3", "--learning_rate", "1e-3"]
    pair = run_pair(server, few, tmp_path / "pair", words)
    out = tmp_path / "one"
    assert server.end(server.start(few, out, words)) == 0, (out / "log.txt").read_text()
    torch.testing.assert_close(numbers(pair), numbers(out), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("number", "codes"), [pytest.param(signal.SIGKILL, [1, -9], marks=pytest.mark.slow), (signal.SIGTERM, [143, 143])]
)
def test_a_signal_to_one_process_ends_both(server, place, tmp_path, number, codes):
    out = tmp_path / "out"
    pids = server.pair(place, out, ["--full_finetune", "--max_train_steps", "400"], **FSDP)
    server.first_loss(out, *pids)
    os.kill(pids[1], number)
    assert [server.end(pid) for pid in pids] == codes, (out / "log.txt").read_text()
    log = (out / "log.txt").read_text()
    if number == signal.SIGKILL:
        assert "another process of this run has ended or cannot be reached" in log
        assert list(out.glob("*-state")) == []
    else:
        [state] = out.glob("*-state")
        assert log.count(f"go on with --resume {state}") == 1
        assert read_manifest(state).step == len(losses_in(out))


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        ([], {}, "an adapter has few: use a plain launch"),
        (["--full_finetune", "--sample_prompts", "p.txt", "--vae", "v"], {}, "with FSDP none has the whole model"),
        (["--full_finetune"], {"FSDP_VERSION": "1"}, "use --fsdp_version 2"),
        (["--full_finetune"], {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS, which is not supported: leave it"),
        (["--full_finetune"], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "FSDP and mixed_precision = fp16: use bf16"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    server, place, tmp_path, words, *, variables, sentence
):
    out = tmp_path / "out"
    if "ACCELERATE_MIXED_PRECISION" in variables:
        words = [*words, "--mixed_precision", "fp16"]
    pids = server.pair(place, out, ["--max_train_steps", "1", *words], **{**FSDP, **variables})
    codes = [server.end(pid) for pid in pids]
    assert 2 in codes
    assert set(codes) <= {1, 2}, "a process may find the other gone before it comes to its own check"
    assert sentence in (out / "log.txt").read_text()
    assert [path.name for path in out.iterdir()] == ["log.txt"]
