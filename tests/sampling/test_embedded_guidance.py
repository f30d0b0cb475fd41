"""Guidance that a model is told as an input: where it comes from, and that it reaches each sample of a batch."""

import dataclasses

import pytest
import torch

from musubi_tuner.config.options import parse
from musubi_tuner.sampling import asked, generate
from musubi_tuner.sampling.pipeline import Sampler
from musubi_tuner.sampling.prompts import parse_line
from musubi_tuner.sampling.request import Request
from musubi_tuner.training import preview
from musubi_tuner.training.run import GROUPS as TRAINING

CPU = torch.device("cpu")


@pytest.fixture
def told(toy):
    """A family whose model has the input: it adds a thousandth of it to the number of the prompt, and notes it."""

    class Told(toy.Family):
        def collate(self, entries):
            self.seen.append([float(entry["guidance"]) for entry in entries])
            text = torch.cat([entry["text"] for entry in entries])
            return {"text": text + torch.stack([entry["guidance"] for entry in entries]) / 1000}

    defaults = {"t": dataclasses.replace(toy.SPEC.tasks["t"], embedded_guidance=6.0, guidance=1.0)}
    family = Told(spec=dataclasses.replace(toy.SPEC, tasks=defaults))
    family.seen = []
    return family


def requests_of(family, *words):
    argv = ["--save_path", "x", *words]
    return asked.make_requests(family, parse(generate.GROUPS, argv, prog="generate", description=""))


@pytest.mark.shows("embedded_cfg_scale")
def test_the_scale_comes_from_the_line_the_option_or_the_task(told, tmp_path):
    (tmp_path / "p.txt").write_text("a --g 2.5\nb --l 4\nc\n", encoding="utf-8")
    lines = ("--from_file", str(tmp_path / "p.txt"))
    found = [(r.embedded_guidance, r.guidance) for r in requests_of(told, *lines)]
    assert found == [(2.5, 1.0), (6.0, 4.0), (6.0, 1.0)]
    found = [(r.embedded_guidance, r.guidance) for r in requests_of(told, *lines, "--embedded_cfg_scale", "9")]
    assert found == [(2.5, 1.0), (9.0, 4.0), (9.0, 1.0)]


def test_a_model_without_the_input_takes_both_letters_for_the_other_guidance(toy, tmp_path, caplog):
    (tmp_path / "p.txt").write_text("a --g 2.5\nb --g 2.5 --l 4\nc\n", encoding="utf-8")
    lines = ("--from_file", str(tmp_path / "p.txt"), "--embedded_cfg_scale", "9")
    found = [(r.embedded_guidance, r.guidance) for r in requests_of(toy.Family(), *lines)]
    assert found == [(None, 2.5), (None, 4.0), (None, 3.0)]
    assert "--embedded_cfg_scale has no effect: this model has no embedded guidance" in caplog.text


def test_every_sample_of_a_batch_is_told_its_own_scale(told, toy):
    sampler = Sampler(told, toy.Dit(), CPU)
    prompts = {text: {"text": torch.tensor([toy.number_of(text)])} for text in ("x", "yy", "")}
    common = {"width": 32, "height": 32, "steps": 2, "solver": "vanilla", "guidance": 2.0}
    pair = [Request("x", 1, embedded_guidance=6.0, **common), Request("yy", 2, embedded_guidance=6.0, **common)]
    together = [latents for _, latents in sampler.latents(pair, prompts, batch=2, progress=False)]
    assert told.seen == [[6.0, 6.0], [6.0, 6.0]], "both branches of classifier-free guidance"
    other = dataclasses.replace(pair[0], embedded_guidance=60.0)
    (alone,) = (latents for _, latents in sampler.latents([other], prompts, progress=False))
    assert told.seen[2:] == [[60.0], [60.0]]
    assert (alone - together[0]).abs().max() > 1e-3
    joint = Sampler(told, toy.Dit(), CPU, joint=True)
    both = [latents for _, latents in joint.latents(pair, prompts, batch=2, progress=False)]
    assert told.seen[-1] == [6.0] * 4
    torch.testing.assert_close(both, together, rtol=1e-5, atol=1e-6)


def test_previews_tell_it_too(told):
    argv = ["--dit", "d", "--dataset_config", "c", "--output_dir", "o", "--output_name", "n"]
    options = parse(TRAINING, argv, prog="train", description="")
    entries = [parse_line("a --g 3", "line 1"), parse_line("b", "line 2")]
    found = preview.preview_requests(told, options, entries)
    assert [(r.embedded_guidance, r.guidance) for r in found] == [(3.0, 1.0), (6.0, 1.0)]
