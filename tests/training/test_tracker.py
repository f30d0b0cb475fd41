"""Boards: the frozen tags on each, what is asked for where, and no key in anything that is written."""

import io
import logging
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.training import checks, config
from musubi_tuner.training.events import EpochRecord, State, StepRecord
from musubi_tuner.training.meters import Meters, band_name, band_of
from musubi_tuner.training.tracker import Tracker, open_tracker, tracker_config

KEY = "0123456789abcdef0123456789abcdef01234567"
REQUIRED = ["--dit", "a.safetensors", "--dataset_config", "d.toml", "--output_dir", "o", "--output_name", "n"]


def parsed(*words: str):
    return parse(config.GROUPS, [*REQUIRED, *words], prog="train", description="")


def record(step: int) -> StepRecord:
    return StepRecord(step, 1, 0.5 / step, 0.5, 1.5, {"unet": 1e-4, "unet plus": 4e-4}, 0.25, 2)


def fed(tracker: Tracker) -> None:
    tracker.start(State())
    tracker.step_end(record(1))
    tracker.show("sample/0", torch.full((3, 1, 8, 24), 0.5), 1, 16)
    tracker.show("sample/1", torch.linspace(0, 1, 5).view(1, 5, 1, 1).expand(3, 5, 8, 8), 1, 10)
    tracker.step_end(record(2))
    tracker.epoch_end(EpochRecord(1, 2, 0.375, True))
    tracker.finish(State())


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_gets_numbers_rates_of_every_group_pictures_and_clips(tmp_path):
    meters = Meters()
    meters.losses(torch.tensor([0.1, 0.9, 0.95]), torch.tensor([1.0, 2.0, 4.0]))
    tracker = open_tracker(parsed("--logging_dir", str(tmp_path), "--log_tracker_name", "mine"), meters.read)
    assert tracker is not None
    fed(tracker)
    (folder,) = tmp_path.glob("*/mine")
    found = events(folder)
    assert [e.value for e in found.Scalars("lr/unet plus")] == pytest.approx([4e-4, 4e-4])
    assert [(e.step, e.value) for e in found.Scalars("loss/t_0750_1000")] == [(1, 3.0)]
    assert found.Scalars("loss/epoch")[0].step == 1
    assert found.Scalars("memory/peak_gib")[0].value > 0.01
    image = found.Images("sample/0")[0]
    assert (image.width, image.height) == (24, 8)
    with Image.open(io.BytesIO(found.Images("sample/1")[0].encoded_image_string)) as clip:
        assert (clip.format, clip.n_frames, clip.size, clip.info["duration"]) == ("GIF", 5, (8, 8), 100)
        clip.seek(4)
        assert clip.convert("RGB").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("t", "name"), [(0.001, "0000_0250"), (0.25, "0000_0250"), (0.2501, "0250_0500"), (1.0, "0750_1000")]
)
def test_a_band_holds_its_upper_end(t, name):
    assert band_name(band_of(t)) == name


def test_meters_start_afresh_after_each_step():
    meters = Meters()
    meters.losses(torch.tensor([0.5]), torch.tensor([1.0]))
    meters.put({"max_norm/keys_scaled": 3.0})
    assert meters.read().keys() == {"loss/t_0250_0500", "max_norm/keys_scaled", "memory/peak_gib"}
    assert meters.read().keys() == {"memory/peak_gib"}


def recorded(run: Path) -> bytes:
    return b"".join(path.read_bytes() for path in run.glob("*.wandb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")  # its own use of pydantic and protobuf
@pytest.mark.shows("log_with", "log_tracker_name", "wandb_run_name", "wandb_api_key")
def test_wandb_runs_offline_and_keeps_the_key_to_itself(tmp_path, monkeypatch, caplog, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["train", "--wandb_api_key", KEY])
    words = ["--log_with", "all", "--logging_dir", str(tmp_path / "log"), "--wandb_run_name", "third try"]
    words += ["--wandb_api_key", KEY, "--log_tracker_name", "project", "--log_config"]
    with caplog.at_level(logging.DEBUG):
        tracker = open_tracker(parsed(*words))
        assert tracker is not None
        fed(tracker)
    (run,) = (tmp_path / "log").glob("*/project/wandb/offline-run-*")
    wanted = (b"loss/current", b"lr/unet plus", b"third try", b"learning_rate")
    deadline = time.monotonic() + 60  # its service writes on its own; a busy machine lets it wait
    while not all(text in recorded(run) for text in wanted) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [text for text in wanted if text not in recorded(run)] == []
    assert list(run.glob("files/media/images/**/*.png"))
    assert list(run.glob("files/media/videos/**/*.gif"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    told = capfd.readouterr()
    assert KEY not in caplog.text + told.out + told.err
    (folder,) = (tmp_path / "log").glob("*/project")
    assert len(events(folder).Scalars("loss/current")) == 2


def test_wandb_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_tracker(parsed("--log_with", "wandb"))


@pytest.mark.shows("log_tracker_config")
def test_tracker_arguments_come_from_a_file(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text('[tensorboard]\nflush_secs = 7\n[wandb]\nentity = "we"\ntags = ["a"]\n')
    assert tracker_config(str(file)) == {"tensorboard": {"flush_secs": 7}, "wandb": {"entity": "we", "tags": ["a"]}}
    words = ["--logging_dir", str(tmp_path / "log"), "--log_tracker_config", str(file)]
    tracker = open_tracker(parsed(*words))
    assert tracker is not None
    fed(tracker)
    file.write_text("[tensorboard]\nflush_sec = 7\n")
    with pytest.raises(UserError, match="flush_sec"):
        open_tracker(parsed(*words))
    file.write_text("[comet]\na = 7\n")
    with pytest.raises(UserError, match=r"line 2: a stands in section \[comet\]: use \[tensorboard\] and \[wandb\]"):
        checks.check(parsed(*words))


def test_trackers_that_go_nowhere_are_told():
    assert open_tracker(parsed()) is None
    with pytest.raises(UserError, match="log_with = all needs a place: give --logging_dir"):
        checks.check(parsed("--log_with", "all"))
    told = checks.ineffective(parsed("--wandb_run_name", "x", "--log_prefix", "y", "--log_tracker_config", "z"))
    assert [sentence.split()[0] for sentence in told] == ["log_prefix", "log_tracker_config", "wandb_run_name"]
