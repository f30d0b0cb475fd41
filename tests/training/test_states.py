"""State folders: what they hold, which go, what is refused, what is taken from the established tool, and full disks."""

import json
import logging
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.training import checkpoint
from musubi_tuner.training import state as states
from musubi_tuner.training.events import State
from musubi_tuner.training.loop import Plan
from musubi_tuner.training.resume import at_step, total_steps
from musubi_tuner.training.retention import Retention, StateOptions
from training_place import losses_in, make_place, tensors_in, train_noting_losses

STEPS = ("--max_train_steps", "6", "--save_every_n_steps", "2", "--save_state")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    """A run of six steps, three an epoch, with a state after every second one and at the end."""
    out = tmp_path_factory.mktemp("whole")
    train_noting_losses(place, out, *STEPS)
    return out


def state_of(out: Path, step: int) -> Path:
    return out / f"study-step{step:08d}-state"


def test_a_state_is_a_manifest_float32_weights_and_a_safe_optimizer_file(whole):
    folder = state_of(whole, 4)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "optimizer.pt", "weights.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["epoch"], manifest["batch"], manifest["seed"]) == (4, 1, 1, 3)
    assert manifest["identity"] == {"family": "wan", "kind": "adapter", "rank": 4, "alpha": 1.0}
    assert manifest["config"]["learning_rate"] == 1e-2
    losses = [float(line.split()[1]) for line in losses_in(whole).values()]
    assert manifest["recent"] == losses[1:4], "the losses that the average is made of"
    weights = load_file(folder / "weights.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert sorted(weights) == sorted(name for group in manifest["groups"] for name in group)
    saved = tensors_in(whole / "study-step00000004.safetensors")
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    assert float(optimizer["state"][0]["step"]) == 4
    assert manifest["files"]["optimizer.pt"] == (folder / "optimizer.pt").stat().st_size


@pytest.mark.parametrize(
    ("rule", "kept_epochs", "kept_steps"),
    [
        (Retention(1, 10), set(range(1, 9)), {10, 20, 30, 40, 50}),
        (Retention(1, 10, last_epochs=2, last_steps=15), {7, 8}, {40, 50}),
        (Retention(2, 10, last_epochs=2, last_steps=20), {6, 8}, {30, 40, 50}),
        (Retention(3, 20, last_epochs=1, last_steps=1), {6}, {40}),
    ],
)
def test_rotation_keeps_what_the_options_say(rule, kept_epochs, kept_steps):
    """k newest epoch files; step files of the last n steps before the newest."""
    epochs: set[int] = set()
    steps: set[int] = set()
    for number in range(1, 9):
        if number % rule.every_epochs == 0:
            epochs = (epochs | {number}) - {rule.old_epoch(number)}
    for number in range(1, 51):
        if number % rule.every_steps == 0:
            steps = (steps | {number}) - {rule.old_step(number)}
    assert (epochs, steps) == (kept_epochs, kept_steps)


@pytest.mark.shows("save_last_n_steps_state", "save_last_n_steps")
def test_states_have_rotation_of_their_own_or_follow_the_files():
    groups = (StateOptions,)
    words = ["--save_last_n_epochs", "4", "--save_last_n_steps", "30", "--save_last_n_steps_state", "10"]
    rule = parse(groups, words, prog="t", description="")[StateOptions].retention(1, 10)
    assert (rule.last_epochs_state, rule.last_steps_state) == (4, 10)
    assert (rule.old_step(50), rule.old_step(50, state=True)) == (10, 30)


@pytest.mark.shows("save_state", "save_last_n_epochs", "save_last_n_epochs_state")
def test_old_files_and_states_are_gone_at_the_end_of_a_run(place, tmp_path):
    words = ["--max_train_epochs", "4", "--save_every_n_epochs", "1", "--save_every_n_steps", "2", "--save_state"]
    words += ["--save_last_n_epochs", "2", "--save_last_n_epochs_state", "1", "--save_last_n_steps", "4"]
    train_noting_losses(place, tmp_path, *words)
    names = sorted(p.name for p in tmp_path.iterdir())
    files = ["study-000002", "study-000003", "study-step00000008", "study-step00000010", "study-step00000012", "study"]
    folders = ["study-000003-state", "study-step00000008-state", "study-step00000010-state"]
    folders += ["study-step00000012-state", "study-state"]
    assert names == sorted(["losses.txt", *folders, *(f"{name}.safetensors" for name in files)])


@pytest.mark.shows("save_state_on_train_end")
def test_a_state_at_the_end_alone(place, tmp_path):
    train_noting_losses(place, tmp_path, "--max_train_steps", "2", "--save_state_on_train_end")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["losses.txt", "study-state", "study.safetensors"]


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(place, whole, tmp_path, caplog):
    """More steps are no departure: the same losses as a run of that length from the start."""
    long = train_noting_losses(place, tmp_path / "long", "--max_train_steps", "8")
    with caplog.at_level(logging.INFO):
        more = train_noting_losses(
            place, tmp_path / "more", "--max_train_steps", "8", "--resume", str(whole / "study-state")
        )
    assert more == {step: long[step] for step in (7, 8)}
    assert "exact" not in caplog.text
    assert "after step 6" in caplog.text


def test_another_learning_rate_is_told_recorded_and_used(place, whole, tmp_path, caplog):
    words = ["--max_train_steps", "6", "--save_state_on_train_end", "--optimizer_args", "weight_decay=0"]
    words += ["--learning_rate", "1e-9", "--resume", str(state_of(whole, 4))]
    train_noting_losses(place, tmp_path, *words)
    assert "not an exact continuation of study-step00000004-state: at step 4: " in caplog.text
    assert "learning_rate 0.01 -> 1e-09" in caplog.text
    manifest = json.loads((tmp_path / "study-state/manifest.json").read_text())
    assert "learning_rate 0.01 -> 1e-09" in manifest["not_exact"][0]
    before, after = load_file(state_of(whole, 4) / "weights.safetensors"), tensors_in(tmp_path / "study.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.shows("reset_counters", "initial_step")
def test_counters_reset_and_initial_step(place, whole, tmp_path, caplog):
    resume = ("--resume", str(state_of(whole, 4)))
    again = train_noting_losses(place, tmp_path / "again", "--max_train_steps", "2", *resume, "--reset_counters")
    assert list(again) == [1, 2]
    assert again[1] != losses_in(whole)[1], "the weights are the state's"
    manifest_steps = train_noting_losses(place, tmp_path / "at", "--max_train_steps", "6", "--initial_step", "4")
    assert [(step, line.split()[0]) for step, line in manifest_steps.items()] == [(5, "2"), (6, "2")]
    assert at_step(7, Plan(99, accumulation=2), batches=5) == State(7, 2, 2)


def test_epochs_mean_totals_whatever_an_epoch_is_made_of():
    assert total_steps(Plan(1), 10, 100, State()) == 1000
    assert total_steps(Plan(1), 10, 100, State(230, 2, 30)) == 1000
    assert total_steps(Plan(1, accumulation=3), 10, 100, State(68, 2, 0)) == 68 + 8 * 34
    assert total_steps(Plan(1, accumulation=2), 10, 100, State(500, 5, 0)) == 750, "accumulation 1 before, 2 now"
    assert total_steps(Plan(1), 10, 100, State(999, 9, 100)) == 999


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--network_dim", "3"], r"rank = 4, this run rank = 3.*--network_weights"),
        (["--network_alpha", "2"], r"alpha = 1.0, this run alpha = 2.0"),
        (["--network_args", "exclude_patterns=[r'.*ffn.*']"], r"does not fit what this run trains: 12 differences"),
        (["--full_finetune"], r"kind = adapter, this run kind = model"),
        (["--max_train_steps", "3"], r"starts at step 4, after 1 epochs, which is beyond its end"),
        (["--reset_counters", "--initial_step", "3"], r"give one of them"),
    ],
)
def test_what_cannot_go_on_is_told(place, whole, tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        train_noting_losses(place, tmp_path, "--max_train_steps", "6", "--resume", str(state_of(whole, 4)), *words)


def test_states_that_cannot_be_read_are_told_with_those_that_can(place, whole, tmp_path):
    def resume(folder: Path) -> None:
        train_noting_losses(place, tmp_path / "out", "--max_train_steps", "6", "--resume", str(folder))

    with pytest.raises(UserError, match=r"is not a folder; complete states there: study-state, study-step"):
        resume(whole / "study-step00000003-state")
    with pytest.raises(UserError, match="holds no complete state"):
        resume(place)
    copy = shutil.copytree(state_of(whole, 4), tmp_path / "copy-state")
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    (copy / "optimizer.pt").write_bytes((copy / "optimizer.pt").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"optimizer.pt has \d+ bytes, \d+ bytes were written"):
        resume(copy)
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="has format version 2, this version reads up to 1: update"):
        resume(copy)
    manifest.write_text(text[:90])
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        resume(copy)
    with pytest.raises(UserError, match="belongs to --resume"):
        train_noting_losses(place, tmp_path / "out", "--reset_counters")


def established(folder: Path, whole: Path) -> Path:
    """The state after step 4 as accelerate lays it out: weights with alphas, the optimizer by numbers, and pickles."""
    folder.mkdir()
    ours = state_of(whole, 4)
    weights = load_file(ours / "weights.safetensors")
    names = {name.rsplit(".", 2)[0] for name in weights}
    save_file(weights | {f"{n}.alpha": torch.tensor(1.0) for n in names}, folder / "model.safetensors")
    shutil.copy(ours / "optimizer.pt", folder / "optimizer.bin")
    (folder / "random_states_0.pkl").write_bytes(b"never read")
    (folder / "scheduler.bin").write_bytes(b"never read")
    return folder


def test_an_established_state_gives_weights_optimizer_and_the_step_of_its_name(place, whole, tmp_path, caplog):
    folder = established(tmp_path / "old-step00000004-state", whole)
    with caplog.at_level(logging.INFO):
        resumed = train_noting_losses(place, tmp_path / "out", "--max_train_steps", "6", "--resume", str(folder))
    expected = losses_in(whole)
    assert {step: line.split()[1] for step, line in resumed.items()} == {s: expected[s].split()[1] for s in (5, 6)}
    assert "step 4, from the folder's name" in caplog.text
    assert "optimizer state of 60 tensors taken" in caplog.text


def test_established_counters(place, whole, tmp_path):
    words = ["--max_train_steps", "7", "--resume"]
    epoch = established(tmp_path / "old-000002-state", whole)
    assert list(train_noting_losses(place, tmp_path / "a", *words, str(epoch))) == [7], "two epochs of three steps"
    unnamed = established(tmp_path / "anything", whole)
    with pytest.raises(UserError, match="give --initial_step N"):
        train_noting_losses(place, tmp_path / "b", *words, str(unnamed))
    assert list(train_noting_losses(place, tmp_path / "b", *words, str(unnamed), "--initial_step", "5")) == [6, 7]
    (unnamed / "train_state.json").write_text('{"current_epoch": 2, "current_step": 6}')
    assert list(train_noting_losses(place, tmp_path / "c", *words, str(unnamed))) == [7]


def test_an_established_optimizer_that_does_not_fit_is_left_with_a_warning(place, whole, tmp_path, caplog):
    folder = established(tmp_path / "old-step00000004-state", whole)
    found = torch.load(folder / "optimizer.bin", weights_only=True)
    found["state"][3]["exp_avg"] = torch.zeros(5, 5)
    torch.save(found, folder / "optimizer.bin")
    train_noting_losses(place, tmp_path / "a", "--max_train_steps", "5", "--resume", str(folder))
    assert "optimizer.bin does not fit (exp_avg 3 is [5, 5]" in caplog.text
    words = ["--max_train_steps", "5", "--network_alpha", "2", "--resume", str(folder)]
    with pytest.raises(UserError, match=r"was trained with alpha = 1, this run has 2: give --network_alpha 1"):
        train_noting_losses(place, tmp_path / "b", *words)
    (folder / "optimizer.bin").write_bytes(b"\x80\x04}.")
    with pytest.raises(UserError, match=r"optimizer.bin (cannot be read|does not hold)"):
        train_noting_losses(place, tmp_path / "b", "--max_train_steps", "5", "--resume", str(folder))


def test_a_full_disk_stops_before_writing_and_says_what_is_whole(place, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    free = iter([10**9, 10**9, 10**9, 1000])
    with monkeypatch.context() as patch:
        patch.setattr(states.shutil, "disk_usage", lambda _folder: usage(next(free)))
        with pytest.raises(UserError) as fault:
            train_noting_losses(place, tmp_path, *STEPS)
    assert "MB free and" in str(fault.value)
    assert "whole are study-step00000002.safetensors, study-step00000002-state" in str(fault.value)
    assert f"go on with --resume {tmp_path / 'study-step00000002-state'}" in str(fault.value)
    resumed = train_noting_losses(
        place, tmp_path / "on", "--max_train_steps", "6", "--resume", str(state_of(tmp_path, 2))
    )
    assert list(resumed) == [3, 4, 5, 6]


@pytest.fixture
def small(tmp_path, request):
    """A file system of `request.param` KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the run's own losses.txt is still open


@pytest.mark.parametrize(("small", "sentence"), [(1600, "MB free and"), (600, "disk is full")], indirect=["small"])
def test_a_disk_that_is_really_full_harms_nothing(place, whole, small, tmp_path, monkeypatch, *, sentence):
    """Seen before writing; and met in the middle of a write, as when another program takes the space meanwhile."""
    if sentence == "disk is full":
        monkeypatch.setattr(checkpoint, "require_space", lambda *_: None)
    with pytest.raises(UserError, match=sentence) as fault:
        train_noting_losses(place, small, *STEPS)
    kept = [f"study-step0000000{n}{tail}" for n in (2, 4, 6) for tail in ("-state", ".safetensors")]
    found = sorted(path.name for path in small.iterdir() if path.name != "losses.txt")
    assert {"study-step00000002-state", "study-step00000002.safetensors"} <= set(found) < set(kept)
    assert f"whole are {found[1]}" in str(fault.value)
    for path in small.glob("*.safetensors"):
        a, b = tensors_in(path), tensors_in(whole / path.name)
        assert all(torch.equal(a[key], b[key]) for key in b)
    last = max(small.glob("*-state"))
    assert f"go on with --resume {last}" in str(fault.value)
    resumed = train_noting_losses(place, tmp_path / "on", *STEPS, "--resume", str(last))
    assert resumed == {step: line for step, line in losses_in(whole).items() if step in resumed}
    assert list(resumed)[-1] == 6


def test_a_failed_write_harms_no_earlier_state(whole, tmp_path, monkeypatch):
    """A state that is replaced stays whole when writing the new one fails at any of its syncs."""
    target = shutil.copytree(state_of(whole, 4), tmp_path / "study-state")
    manifest = states.read_manifest(target)
    weights, optimizer = (
        states.read_weights(target / "weights.safetensors"),
        states.read_optimizer(target / "optimizer.pt"),
    )
    real, calls = os.fsync, 0

    for failing in range(1, 8):
        calls = 0

        def fsync(descriptor: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr("os.fsync", fsync)
        with pytest.raises(UserError, match="disk is full"):
            states.write_state(target, manifest, weights, optimizer)
        assert states.read_manifest(target) == manifest
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("study-state.old")] == ["study-state"]


def test_a_loss_that_is_not_finite_names_the_files_of_its_batch_and_harms_nothing(place, tmp_path):
    """At the first one, in the run's third batch; what was saved before is whole."""
    broken = shutil.copytree(place, tmp_path / "place")
    (broken / "data.toml").write_text((place / "data.toml").read_text().replace(str(place), str(broken)))
    for path in broken.glob("cache/*0064x0032_wan.safetensors"):  # the only batch of its shape
        save_file({key: value * 1e30 for key, value in load_file(path).items()}, path, {"architecture": "wan"})
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"the loss is (inf|nan)") as fault:
        train_noting_losses(broken, out, *STEPS[:2], "--save_every_n_steps", "1", "--save_state")
    assert "p3_0064x0032_wan.safetensors, p4" in str(fault.value) or "p4_0064x0032_wan.safetensors, p3" in str(
        fault.value
    )
    done = len(losses_in(out)) if (out / "losses.txt").exists() else 0
    assert done < 3
    assert len(list(out.glob("*-state"))) == done
    for folder in out.glob("*-state"):
        states.read_weights(folder / "weights.safetensors")


def test_leftovers_of_this_name_alone_are_removed(tmp_path):
    rubbish = [".study-000001.safetensors.123.0a1b2c3d.tmp", "study-step00000004-state.tmp-0a1b2c3d"]
    others = [".study2-000001.safetensors.123.0a1b2c3d.tmp", "study-b-state.tmp-0a1b2c3d", "study-state.txt"]
    for name in (rubbish[0], others[0], others[2]):
        (tmp_path / name).touch()
    for name in (rubbish[1], others[1]):
        (tmp_path / name).mkdir()
    aside = tmp_path / "study-000003-state.old-0a1b2c3d"
    aside.mkdir()
    assert sorted(p.name for p in states.remove_leftovers(tmp_path, "study")) == sorted(rubbish)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "study-000003-state"])
