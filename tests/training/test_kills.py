"""Real runs that are killed, interrupted and terminated: nothing unreadable, and the same end as without."""

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from musubi_tuner.training.state import is_state, read_manifest, read_optimizer, read_weights
from training_place import losses_in, make_place, tensors_in
from training_server import Server

WORDS = ["--max_train_steps", "9", "--save_every_n_steps", "2", "--save_every_n_epochs", "1", "--save_state"]
WORDS += ["--save_last_n_steps", "4", "--gradient_accumulation_steps", "1", "--network_dropout", "0.1"]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole(server, place, tmp_path_factory) -> tuple[Path, float]:
    """The uninterrupted run, and its seconds."""
    out = tmp_path_factory.mktemp("whole")
    pid = server.start(place, out, WORDS)
    started = time.monotonic()  # the server has imported everything by now
    assert server.end(pid) == 0, (out / "log.txt").read_text()
    return out, time.monotonic() - started


def newest_state(out: Path) -> Path | None:
    """The state that a user would go on from, after a look at every file: all that are visible are whole."""
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert len(opened.keys()) == 90, file
    states = [folder for folder in out.glob("*-state") if folder.is_dir()]
    for folder in states:
        assert is_state(folder), f"{folder} looks like a state and is none"
        read_weights(folder / "weights.safetensors")
        read_optimizer(folder / "optimizer.pt")
    return max(states, key=lambda folder: read_manifest(folder).step, default=None)


def resuming(out: Path) -> list[str]:
    state = newest_state(out)
    return [*WORDS, *(["--resume", str(state)] if state else [])]


def equal_to(whole: Path, out: Path) -> None:
    """Every loss of every step that was ever made, every file and state that is left, to the byte."""
    assert losses_in(out) == losses_in(whole)
    names = sorted(path.name for path in whole.iterdir() if path.name != "log.txt")
    assert sorted(path.name for path in out.iterdir() if path.name != "log.txt") == names
    for name in names:
        if name.endswith(".safetensors"):
            a, b = tensors_in(whole / name), tensors_in(out / name)
            assert all(torch.equal(a[key], b[key]) for key in a)
            hashes = [re.search(rb'"sshs_model_hash":"(\w+)"', (of / name).read_bytes())[1] for of in (whole, out)]
            assert hashes[0] == hashes[1]


def kill_and_go_on(server: Server, place: Path, whole: tuple[Path, float], out: Path, kills: int) -> None:
    draw = random.Random(kills)
    for number in range(kills):
        inside = number % 2 == 1  # at one of the syncs of a save, else anywhere in the run's time
        words = resuming(out) if out.exists() else WORDS
        pid = server.start(place, out, words, sync=draw.randint(1, 20) if inside else None)
        if not inside:
            time.sleep(draw.uniform(0.2, 1.0) * whole[1])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert server.end(pid) in (0, -signal.SIGKILL), (out / "log.txt").read_text()
    assert server.end(server.start(place, out, resuming(out))) == 0, (out / "log.txt").read_text()
    equal_to(whole[0], out)


def test_a_run_that_is_killed_five_times_ends_as_one_that_is_not(server, place, whole, tmp_path):
    kill_and_go_on(server, place, whole, tmp_path / "out", 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_is_not(server, place, whole, tmp_path):
    kill_and_go_on(server, place, whole, tmp_path / "out", 20)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_a_state_once_and_can_go_on(whole, tmp_path, number, code, *, server, place):
    """Also when the signal comes twice at once, as launchers pass it on. Within a step and a save: seconds here."""
    out = tmp_path / "out"
    words = [*WORDS, "--save_every_n_steps", "100", "--no-save_state"]
    pid = server.start(place, out, words)
    server.first_loss(out, pid)
    os.kill(pid, number)
    os.kill(pid, number)
    signalled = time.monotonic()
    assert server.end(pid) == code, (out / "log.txt").read_text()
    assert time.monotonic() - signalled < 10
    done = len(losses_in(out))
    assert done < 9
    folder = out / f"study-step{done:08d}-state"
    assert [path for path in out.iterdir() if path.is_dir()] == [folder]
    log = (out / "log.txt").read_text()
    assert f"stopped after step {done}; go on with --resume {folder}" in log
    assert log.count("stopping after this step") == 1
    assert not (out / "study.safetensors").exists()
    assert server.end(server.start(place, out, [*WORDS, "--resume", str(folder)])) == 0
    assert losses_in(out) == losses_in(whole[0])
    last = tensors_in(out / "study.safetensors")
    assert all(torch.equal(value, last[key]) for key, value in tensors_in(whole[0] / "study.safetensors").items())
