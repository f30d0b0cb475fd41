"""Video to video: sampling begins from a clip at the noise level of the strength, with the last steps of the grid."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.data import video
from musubi_tuner.families import registry
from musubi_tuner.flow import solvers
from musubi_tuner.flow.schedules import linear
from musubi_tuner.sampling import asked, generate, outputs, source_video
from real_media import CLIPS

CLIP = CLIPS / "carphone_pristine.mp4"


def test_the_last_steps_of_a_schedule_are_its_end():
    whole = linear(5, 3.0)
    part = whole.last(2)
    assert torch.equal(part.sigmas, whole.sigmas[-3:])
    assert torch.equal(part.times, whole.times[-2:])
    assert torch.equal(whole.last(5).sigmas, whole.sigmas)


@pytest.mark.parametrize(
    ("steps", "strength", "left"), [(10, 0.8, 8), (10, 0.3, 3), (10, 1.0, 10), (4, 0.7, 2), (50, 0.58, 29)]
)
def test_strength_is_the_part_of_the_steps_that_is_made(steps, strength, left):
    assert source_video.steps_left(steps, strength) == left


def test_a_strength_that_leaves_no_step_is_refused():
    with pytest.raises(UserError, match=r"--strength 0\.05 of 10 steps leaves none: use at least 0\.1"):
        source_video.steps_left(10, 0.05)


def latents_by_hand(toy, frames, size, *, steps, shift, strength, seed, solver):
    """The clip's latents, mixed with the noise of the seed, walked by the solver's last steps."""
    pixels = torch.from_numpy(np.array(video.read_frames(CLIP, range(frames), size)))
    clip = toy.Vae().encode(pixels.float().permute(3, 0, 1, 2)[None] / 127.5 - 1)[0]
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    grid = solvers.get(solver).schedule(steps, shift)
    left = int(steps * strength + 1e-9)
    sigma = float(grid.sigmas[-left - 1])

    def velocity(x, t):
        return (0.7 * x + toy.number_of("a dog")).tanh() + t

    start = (1 - sigma) * 2.0 * clip + sigma * noise  # the toy's cache is half of the transformer's scale
    return solvers.get(solver).solve(velocity, start, grid.last(left))


@pytest.fixture
def world(world, toy):
    """The toy's cached latents are in half the transformer's scale."""
    from dataclasses import replace

    fields = tuple(replace(f, factor=2.0) if f.name == "latents" else f for f in toy.SPEC.cache_fields)
    world.family.spec = replace(toy.SPEC, cache_fields=fields)
    return world


@pytest.mark.parametrize("solver", ["vanilla", "unipc", "dpm++"])
@pytest.mark.shows("video_path", "strength")
def test_a_real_video_is_sampled_from(world, toy, solver):
    words = f"--video_path {CLIP} --strength 0.5 --video_length 9 --video_size 32 64 --infer_steps 4 --flow_shift 3"
    words += f" --seed 5 --guidance_scale 1 --output_type latent --sample_solver {solver}"
    (path,) = world("--prompt", "a dog", *words.split())
    latents, values = outputs.read_latents(str(path), "toy")
    assert (values["video"], values["strength"]) == (str(CLIP), 0.5)
    expected = latents_by_hand(toy, 9, (64, 32), steps=4, shift=3.0, strength=0.5, seed=5, solver=solver)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_clip_gives_what_each_gives_alone(world, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog --d 1\na small cat --d 2\n", encoding="utf-8")
    words = f"--from_file {prompts} --video_path {CLIP} --strength 0.75 --video_length 5 --video_size 32 32"
    found = []
    for batch in ("1", "2"):
        for path in world(*words.split(), "--output_type", "latent", "--sample_batch_size", batch):
            found.append(outputs.read_latents(str(path), "toy"))
    by_seed = {}
    for latents, values in found:
        by_seed.setdefault(values["seed"], []).append(latents)
    for alone, together in ((one, two) for one, *_, two in by_seed.values()):
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


@pytest.fixture
def folder_clip(tmp_path):
    """A clip of seven frames, as a folder of pictures."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for n in range(7):
        Image.new("RGB", (32, 32), (30 * n, 0, 0)).save(folder / f"{n}.png")
    return folder


def test_the_length_is_the_clips_where_none_is_asked_for(world, folder_clip):
    words = ("--prompt", "x", "--seed", "1", "--output_type", "latent", "--video_size", "32", "32")
    (path,) = world(*words, "--video_path", folder_clip)
    assert outputs.read_latents(str(path), "toy")[1]["frames"] == 5, "the task's"
    for name in ("5.png", "6.png", "4.png"):
        (folder_clip / name).unlink()
    found = [outputs.read_latents(str(p), "toy")[1]["frames"] for p in world(*words, "--video_path", folder_clip)]
    assert sorted(found) == [1, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--video_length 9", "has 7 frames, 9 are asked for: give --video_length 5 or less"),
        ("--strength 0.1", r"--strength 0\.1 of 4 steps leaves none"),
        ("--strength 0", "strength"),
        ("--strength 1.5", "strength"),
    ],
)
def test_what_cannot_be_made_of_a_video_is_told_before_a_model_is_loaded(world, folder_clip, words, message):
    with pytest.raises(UserError, match=message):
        world("--prompt", "x", "--video_path", folder_clip, *words.split())
    assert world.family.loaded == ()
    with pytest.raises(UserError, match=r"--video_path .*none\.mp4 does not exist"):
        world("--prompt", "x", "--video_path", folder_clip / "none.mp4")


def test_what_a_video_or_strength_does_nothing_for_is_told(world, folder_clip, tmp_path, caplog):
    words = ("--prompt", "x", "--seed", "1", "--output_type", "latent")
    with caplog.at_level(logging.WARNING):
        world(*words, "--strength", "0.5")
    assert "--strength has no effect without --video_path" in caplog.text
    family = registry.get("framepack")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    argv = ["--save_path", str(tmp_path), *words, "--video_path", str(folder_clip), "--image_path"]
    groups = (*generate.GROUPS, *family.option_groups("generate"))
    options = parse(groups, [*argv, str(tmp_path / "a.png")], prog="generate", description="")
    with caplog.at_level(logging.WARNING):
        (request,) = asked.make_requests(family, options)
    assert request.video is None
    assert "--video_path has no effect: this model goes on from pictures" in caplog.text
