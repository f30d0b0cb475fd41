"""Previews during training: when, what, under which names, and that the run does not notice them."""

import logging
import re
import time
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option, parse
from musubi_tuner.sampling import models, outputs, pipeline
from musubi_tuner.sampling.request import Request
from musubi_tuner.training import preview
from musubi_tuner.training.checkpoint import Names
from musubi_tuner.training.config import SampleOptions
from musubi_tuner.training.events import EpochRecord, State, StepRecord
from musubi_tuner.training.runtime import LocalRuntime

PROMPTS = "a cat --w 32 --h 48 --s 2 --d 5 --l 1.5\na dog --w 32 --h 32 --f 5 --s 2\n"


@dataclass(frozen=True)
class EncoderOptions:
    """Toy encoder"""

    words: str = option("", help="nothing")


class WatchedVae:
    """Notes where it is sent."""

    def __init__(self, inner) -> None:
        self.inner, self.sent = inner, []

    def to(self, device):
        self.sent.append(device.type)
        return self

    def decode(self, latents):
        return self.inner.decode(latents)


@pytest.fixture
def stage(tmp_path, toy):
    """Makes previews of a toy family from option words; `shown` holds what was sent to the tracker."""

    class Family(toy.Family):
        def option_groups(self, command):
            return (EncoderOptions,)

        def load_vae(self, path, *, device, dtype, options=None):
            return WatchedVae(toy.Vae())

    class Stage:
        family, folder, shown = Family(), tmp_path, []
        dit = toy.Dit()
        optimizer = torch.optim.SGD(dit.parameters(), lr=0.1)

        def options(self, *words, prompts=PROMPTS):
            path = tmp_path / "prompts.txt"
            path.write_text(prompts, encoding="utf-8")
            argv = ["--sample_prompts", str(path), "--vae", "vae.safetensors", *words]
            return parse((SampleOptions, EncoderOptions), argv, prog="train", description="")

        def previews(self, *words, prompts=PROMPTS):
            options = self.options(*words, prompts=prompts)
            self.encoded = preview.encode(self.family, options, device=torch.device("cpu"))
            return preview.Previews(
                self.family, options, self.encoded, self.dit, runtime=LocalRuntime("cpu"),
                show=lambda tag, pixels, step, _fps: self.shown.append((tag, pixels, step)),
                names=Names(tmp_path, "run"), optimizer=self.optimizer,
            )  # fmt: skip

        def files(self):
            return sorted(path.name for path in (tmp_path / "sample").glob("*"))

    return Stage()


def step(number):
    return StepRecord(number, 1, 0.5, 0.5, 1.0, {}, 0.1, 1)


def test_names_are_those_that_scripts_look_for(stage):
    previews = stage.previews("--sample_every_n_steps", "250")
    previews.step_end(step(250))
    cat, dog = stage.files()
    assert re.fullmatch(r"run_000250_00_\d{14}_5\.png", cat)
    assert re.fullmatch(r"run_000250_01_\d{14}_\d+\.mp4", dog)
    stage.previews("--sample_every_n_epochs", "2").epoch_end(EpochRecord(4, 1000, 0.5, last=False))
    assert len([n for n in stage.files() if re.fullmatch(r"run_e000004_0[01]_\d{14}_\d+\.(png|mp4)", n)]) == 2


@pytest.mark.shows("sample_prompts", "sample_at_first", "sample_every_n_epochs", "sample_every_n_steps")
def test_previews_come_when_asked(stage, monkeypatch):
    def times(*words):
        seen = []
        previews = stage.previews(*words)
        monkeypatch.setattr(previews, "_render", lambda when, step: seen.append((when, step)))
        previews.start(State())
        for number in range(1, 7):
            previews.step_end(step(number))
            if number % 3 == 0:
                previews.epoch_end(EpochRecord(number // 3, number, 0.5, last=number == 6))
        return seen

    assert times("--sample_every_n_steps", "4") == [("000004", 4)]
    assert times("--sample_every_n_epochs", "2") == [("e000002", 6)]
    assert times("--sample_every_n_steps", "1", "--sample_every_n_epochs", "2") == [("e000002", 6)]
    assert times("--sample_at_first") == [("000000", 0)]
    resumed = stage.previews("--sample_at_first")
    monkeypatch.setattr(resumed, "_render", lambda when, step: pytest.fail("a resumed run has begun already"))
    resumed.start(State(step=10))


def test_a_preview_is_what_generation_gives(stage, toy):
    stage.previews("--sample_at_first").start(State())
    request = Request("a cat", 5, width=32, height=48, fps=8, steps=2, guidance=1.5, shift=2.0)
    prompts = models.encode(stage.family, stage.family.encoders, [request], progress=False)
    sampler = pipeline.Sampler(stage.family, stage.dit, torch.device("cpu"))
    (want,) = pipeline.render(sampler, toy.Vae(), [request], prompts, progress=False)
    with Image.open(next((stage.folder / "sample").glob("run_000000_00_*.png"))) as image:
        assert torch.equal(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(48, 32, 3), want[0])
        assert image.text["prompt"] == "a cat"
    (tag, pixels, number), (_, clip, _) = stage.shown
    assert (tag, number, tuple(pixels.shape), tuple(clip.shape)) == ("sample/00", 0, (3, 1, 48, 32), (3, 5, 32, 32))
    assert torch.equal(outputs.to_bytes(pixels * 2 - 1)[0], want[0])


def test_the_weights_as_they_are_now_are_previewed(stage):
    previews = stage.previews("--sample_every_n_steps", "1")
    previews.step_end(step(1))
    with torch.no_grad():
        stage.dit.blocks[0].gain.weight.fill_(-3.0)
    previews.step_end(step(2))
    assert not torch.equal(stage.shown[0][1], stage.shown[2][1])


def test_the_run_does_not_notice(stage):
    stage.dit.train()
    stage.dit.blocks[0].eval()
    modes = [module.training for module in stage.dit.modules()]
    previews = stage.previews("--sample_at_first")
    before, weight = torch.get_rng_state(), stage.dit.blocks[0].gain.weight.clone()
    previews.start(State())
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in stage.dit.modules()] == modes
    assert torch.equal(stage.dit.blocks[0].gain.weight, weight)
    assert stage.dit.blocks[0].gain.weight.grad is None
    assert stage.encoded.vae.sent == ["cpu", "cpu"], "to the device, and back to the CPU"


def test_each_prompt_is_encoded_once_for_all_previews(stage):
    previews = stage.previews("--sample_every_n_steps", "1")
    for number in (1, 2, 3):
        previews.step_end(step(number))
    assert sorted(stage.family.encoders.asked) == ["", "a cat", "a dog"]


def test_a_prompt_without_a_seed_keeps_one_and_another_line_another(stage):
    entries = [preview.PromptEntry("x", "p.txt line 1"), preview.PromptEntry("x", "p.txt line 2")]
    options = stage.options()
    first, second = preview.preview_requests(stage.family, options, entries)
    again = preview.preview_requests(stage.family, options, entries)
    assert first.seed != second.seed
    assert again == (first, second)
    assert (first.width, first.height, first.frames, first.steps) == (256, 256, 1, 20)
    assert (first.guidance, first.shift, first.fps, first.solver) == (3.0, 2.0, 8, "unipc")


def test_sizes_off_the_grid_are_rounded_down_with_a_warning(stage, caplog):
    with caplog.at_level(logging.WARNING):
        (request,) = preview.preview_requests(
            stage.family, stage.options(), [preview.PromptEntry("x", "p.txt line 1", width=100, height=63, frames=8)]
        )
    assert (request.width, request.height, request.frames) == (96, 48, 5)
    assert "p.txt line 1: 100 x 63, 8 frames does not fit" in caplog.text


def test_a_preview_that_fails_does_not_end_the_run(stage, caplog):
    previews = stage.previews("--sample_every_n_steps", "1")
    with torch.no_grad():
        stage.dit.blocks[0].gain.weight.fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        previews.step_end(step(7))
    assert "the preview at 000007 was left out: the model gave inf or NaN" in caplog.text
    assert not (stage.folder / "sample").exists()


@pytest.mark.parametrize(
    ("words", "prompts", "message"),
    [
        ((), "x --s 0", "prompts.txt line 1: steps = 0"),
        ((), "x --q 0", "prompts.txt line 1: --q is not an option"),
        (("--vae_dtype", "int8"), PROMPTS, "vae_dtype"),
    ],
)
def test_faults_are_told_before_training(stage, words, prompts, message):
    with pytest.raises(UserError, match=message):
        stage.previews(*words, prompts=prompts)


def test_a_schedule_free_optimizer_shows_its_averaged_weights(stage):
    calls = []
    stage.optimizer.train = lambda: calls.append(("train", time.monotonic()))
    stage.optimizer.eval = lambda: calls.append(("eval", time.monotonic()))
    stage.previews("--sample_at_first").start(State())
    assert [name for name, _ in calls] == ["eval", "train"]
