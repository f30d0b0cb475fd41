"""Whole runs by two processes: the joint batch's losses, one writer, resuming, and what happens when one is lost."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from musubi_tuner.weights.write import atomic_save_safetensors
from training_place import losses_in, make_place, tensors_in
from training_server import Server

WORDS = ["--max_train_epochs", "3", "--save_every_n_steps", "2", "--save_state"]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def pair(server, place, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pair")
    assert [server.end(pid) for pid in server.pair(place, out, WORDS)] == [0, 0], (out / "log.txt").read_text()
    return out


def numbers(out: Path) -> list[list[float]]:
    return [[float(word) for word in line.split()] for line in losses_in(out).values()]


def test_two_processes_give_the_losses_of_the_joint_batch(server, place, pair, tmp_path):
    """Three batches an epoch: in its second step one process has nothing left, and the mean is still over items."""
    out = tmp_path / "one"
    words = [*WORDS, "--gradient_accumulation_steps", "2"]
    assert server.end(server.start(place, out, words)) == 0, (out / "log.txt").read_text()
    assert len(losses_in(out)) == 6
    torch.testing.assert_close(torch.tensor(numbers(pair)), torch.tensor(numbers(out)), rtol=1e-6, atol=0)
    one, two = (tensors_in(folder / "study.safetensors") for folder in (out, pair))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)


def test_one_process_writes(pair):
    names = sorted(path.name for path in pair.iterdir())
    kept = [f"study-step0000000{n}{tail}" for n in (2, 4, 6) for tail in ("-state", ".safetensors")]
    assert names == sorted(["log.txt", "losses.txt", *kept, "study-state", "study.safetensors"])
    assert len((pair / "losses.txt").read_text().splitlines()) == 6
    assert (pair / "log.txt").read_text().count("saved ") == 8


def test_two_processes_resume_to_the_bit(server, place, pair, tmp_path):
    out = tmp_path / "out"
    words = [*WORDS, "--resume", str(pair / "study-step00000002-state")]
    assert [server.end(pid) for pid in server.pair(place, out, words)] == [0, 0], (out / "log.txt").read_text()
    assert losses_in(out) == {step: line for step, line in losses_in(pair).items() if step > 2}
    a, b = (tensors_in(folder / "study.safetensors") for folder in (pair, out))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_one_process_goes_on_where_two_stood(server, place, pair, tmp_path):
    """At the end of an epoch, which the two reach in two steps of three batches."""
    out = tmp_path / "out"
    words = [*WORDS, "--gradient_accumulation_steps", "2", "--resume", str(pair / "study-step00000002-state")]
    assert server.end(server.start(place, out, words)) == 0, (out / "log.txt").read_text()
    later = numbers(pair)[2:]
    torch.testing.assert_close(torch.tensor(numbers(out)), torch.tensor(later), rtol=1e-6, atol=0)


def test_a_process_without_any_batch_is_no_fault(server, place, tmp_path):
    few = shutil.copytree(place, tmp_path / "few")
    for path in few.glob("cache/p[34]_*"):
        path.unlink()
    text = (few / "data.toml").read_text().replace(str(place), str(few)).replace("batch_size = 2", "batch_size = 4")
    (few / "data.toml").write_text(text)
    one, two = tmp_path / "one", tmp_path / "two"
    assert server.end(server.start(few, one, ["--max_train_steps", "3"])) == 0
    codes = [server.end(pid) for pid in server.pair(few, two, ["--max_train_steps", "3"])]
    assert codes == [0, 0], (two / "log.txt").read_text()
    torch.testing.assert_close(torch.tensor(numbers(two)), torch.tensor(numbers(one)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGKILL, [1, -9]), (signal.SIGTERM, [143, 143])])
def test_a_signal_to_one_process_ends_both(server, place, tmp_path, number, codes):
    """A process that is gone is told of and nobody waits for it; one that is asked to end takes the other with it."""
    out = tmp_path / "out"
    pids = server.pair(place, out, ["--max_train_steps", "400"])
    server.first_loss(out, *pids)
    os.kill(pids[1], number)
    assert [server.end(pid) for pid in pids] == codes, (out / "log.txt").read_text()
    log = (out / "log.txt").read_text()
    states = list(out.glob("*-state"))
    if number == signal.SIGKILL:
        assert "another process of this run has ended or cannot be reached" in log
        assert states == []
    else:
        assert f"go on with --resume {states[0]}" in log


def test_a_fault_of_one_process_is_told_by_it_and_ends_both(server, tmp_path):
    """A cache that only the second process reads: its own sentence is heard, and the first does not wait for it."""
    (tmp_path / "place").mkdir()
    place = make_place(tmp_path / "place")
    for path in place.glob("cache/p*_wan.safetensors"):
        if "0064x0032" in path.name:  # the only batch of its shape
            found = tensors_in(path)
            atomic_save_safetensors(
                path, {key: value * float("nan") for key, value in found.items()}, {"architecture": "wan"}
            )
    out = tmp_path / "out"
    codes = [server.end(pid) for pid in server.pair(place, out, ["--max_train_steps", "9"])]
    log = (out / "log.txt").read_text()
    assert codes == [1, 2], log
    assert "[rank 1] error: cache " in log
    assert "NaN" in log
    assert "another process of this run has ended" in log


def test_two_processes_each_swap_their_blocks(server, place, pair, tmp_path):
    """On stand-ins for their devices, one in each process; numbers and files are those of a pair without swap."""
    out = tmp_path / "out"
    out.mkdir()
    script = Path(__file__).with_name("swapping_run.py")
    words = [str(place), str(out), *WORDS, "--blocks_to_swap", "2", "--block_swap_ring_size", "1"]
    codes = [server.end(pid) for pid in server.pair(place, out, words, script=script)]
    log = (out / "log.txt").read_text()
    assert codes == [0, 0], log
    assert log.count("2 of 3 blocks rest on the host") == 1, "the first process tells"
    assert log.count("copies to the stand-in: ") == 2
    assert losses_in(out) == losses_in(pair)
    a, b = (tensors_in(folder / "study.safetensors") for folder in (pair, out))
    assert all(torch.equal(a[key], b[key]) for key in a)
