"""Denoising and rendering with a family that can be followed by hand."""

from itertools import pairwise

import pytest
import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.flow import schedules, solvers
from musubi_tuner.nn.runner import direct
from musubi_tuner.sampling import guidance, models, pipeline
from musubi_tuner.sampling.request import Request, initial_noise

CPU = torch.device("cpu")
REQUEST = Request("a red seven", 3, width=32, height=48, frames=5, steps=4, guidance=3.0, shift=2.0, solver="vanilla")


def sampled(toy, requests, *, dit=None, batch=1, **kwargs):
    family = toy.Family()
    prompts = models.encode(family, family.encoders, requests, progress=False)
    sampler = pipeline.Sampler(family, dit or toy.Dit(), CPU, **kwargs)
    return [latents for _, latents in sampler.latents(requests, prompts, batch=batch, progress=False)]


def by_hand(toy, request, gain=0.7):
    """Euler and guidance written out."""
    draw = torch.Generator().manual_seed(request.seed)
    x = torch.randn(3, 2, request.height // 8, request.width // 8, generator=draw)
    even = [1 - i / request.steps for i in range(request.steps + 1)]
    grid = [request.shift * t / (1 + (request.shift - 1) * t) for t in even]
    for t, after in pairwise(grid):
        cond = (gain * x + toy.number_of(request.prompt)).tanh() + t
        uncond = (gain * x + toy.number_of(request.negative)).tanh() + t
        x = x + (after - t) * (uncond + request.guidance * (cond - uncond))
    return x


def test_a_request_gives_what_the_formulas_give(toy):
    (latents,) = sampled(toy, [REQUEST])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, by_hand(toy, REQUEST), rtol=1e-5, atol=1e-6)


def test_the_negative_prompt_is_the_other_branch(toy):
    request = Request(
        "a red seven", 3, width=32, height=48, frames=5, steps=4, shift=2.0, solver="vanilla", negative="a blurry one!"
    )
    (latents,) = sampled(toy, [request])
    torch.testing.assert_close(latents, by_hand(toy, request), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(latents, by_hand(toy, REQUEST), atol=1e-3)


@pytest.mark.parametrize(("kwargs", "calls"), [({}, [1] * 8), ({"joint": True}, [2] * 4)])
@pytest.mark.shows("split_uncond")
def test_guidance_takes_two_calls_a_step_or_one_of_twice_the_batch(toy, kwargs, calls):
    """Two calls, as --split_uncond asks, unless --cfg_batch joins them."""
    dit = toy.Dit()
    (latents,) = sampled(toy, [REQUEST], dit=dit, **kwargs)
    assert dit.seen == calls
    torch.testing.assert_close(latents, by_hand(toy, REQUEST), rtol=1e-5, atol=1e-6)


def test_without_guidance_the_negative_prompt_is_neither_encoded_nor_run(toy):
    family, dit = toy.Family(), toy.Dit()
    request = Request("x", 1, width=32, height=32, steps=3, guidance=1.0, negative="never")
    prompts = models.encode(family, family.encoders, [request], progress=False)
    list(pipeline.Sampler(family, dit, CPU).latents([request], prompts, progress=False))
    assert family.encoders.asked == ["x"]
    assert dit.seen == [1, 1, 1]


def test_each_text_is_encoded_once(toy):
    family = toy.Family()
    requests = [Request(text, seed, width=32, height=32) for text in ("a", "bb") for seed in (1, 2)]
    models.encode(family, family.encoders, requests, progress=False)
    assert sorted(family.encoders.asked) == ["", "a", "bb"]


@pytest.mark.parametrize("solver", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_neighbours_do_not_change_a_request(toy, solver, batch):
    """Five requests, two of another size in between, give what each gives alone."""
    sizes = [(32, 48), (32, 48), (48, 32), (32, 48), (32, 48)]
    requests = [
        Request("a" * (i + 1), 10 + i, width=w, height=h, frames=5, steps=3, solver=solver)
        for i, (w, h) in enumerate(sizes)
    ]
    together = sampled(toy, requests, batch=batch)
    assert [tuple(x.shape) for x in together] == [(3, 2, h // 8, w // 8) for w, h in sizes]
    for request, latents in zip(requests, together, strict=True):
        torch.testing.assert_close(latents, sampled(toy, [request])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.shows("cpu_noise")
def test_the_noise_is_that_of_torchs_cpu_generator(toy):
    """What --cpu_noise asks for is always so."""
    want = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(initial_noise(REQUEST, toy.SPEC), want)


def test_a_run_is_made_for_each_branch(toy):
    made = []

    def make_run():
        made.append(0)
        number = len(made) - 1

        def run(blocks, h, ctx):
            made[number] += 1
            return direct(blocks, h, ctx)

        return run

    sampled(toy, [REQUEST], make_run=make_run)
    assert made == [4, 4], "two branches, each called once per step"


def test_pixels_are_the_decoded_latents_in_request_order(toy):
    family = toy.Family()
    requests = [
        Request("a", 1, width=32, height=48, frames=5, steps=2),
        Request("b", 2, width=32, height=32, steps=2),
        Request("c", 3, width=32, height=32, steps=2),
    ]
    prompts = models.encode(family, family.encoders, requests, progress=False)
    sampler = pipeline.Sampler(family, toy.Dit(), CPU)
    frames = pipeline.render(sampler, toy.Vae(), requests, prompts, batch=2, progress=False)
    assert [tuple(f.shape) for f in frames] == [(5, 48, 32, 3), (1, 32, 32, 3), (1, 32, 32, 3)]
    for got, latents in zip(frames, sampled(toy, requests), strict=True):
        assert got.dtype == torch.uint8
        first = ((latents[:, 0, 0, 0].clamp(-1, 1) + 1) * 127.5).round()
        assert torch.equal(got[0, 7, 7].float(), first)


def test_modes_and_the_global_generator_are_left_alone(toy):
    dit = toy.Dit()
    dit.train()
    dit.blocks[0].gain.eval()
    before = torch.get_rng_state()
    sampled(toy, [REQUEST], dit=dit)
    assert torch.equal(torch.get_rng_state(), before)
    assert (dit.training, dit.blocks.training, dit.blocks[0].gain.training) == (True, True, False)


def test_nothing_of_sampling_is_kept_for_a_backward_pass(toy):
    dit = toy.Dit()
    (latents,) = sampled(toy, [REQUEST], dit=dit)
    assert not latents.requires_grad
    dit(latents[None], torch.ones(1), torch.ones(1)).sum().backward()
    assert dit.blocks[0].gain.weight.grad is not None


def test_nan_is_told_with_the_request_that_met_it(toy):
    with pytest.raises(UserError, match=r"inf or NaN for 'a red seven' \(seed 3\)"):
        sampled(toy, [REQUEST], dit=toy.Dit(gain=float("nan")))


def test_a_size_off_the_grid_is_refused_with_the_nearest_one(toy):
    request = Request("x", 1, width=40, height=50, frames=8)
    with pytest.raises(UserError, match=r"nearest that fits: 5 frames, 48 x 32"):
        sampled(toy, [request])


def test_guidance_without_a_second_branch_is_refused(toy):
    family = toy.Family()
    schedule = solvers.get("vanilla").schedule(2, 1.0)
    cond = {"text": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"guidance 3.0 needs"):
        pipeline.denoise(
            family, toy.Dit(), torch.zeros(1, 3, 1, 2, 2), cond, schedule=schedule, solver=solvers.euler, guidance=3.0
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "seed = -1: must be 0 to"),
        ({"steps": 0}, "steps = 0: must be 1 to 1000"),
        ({"shift": 0.0}, "flow shift = 0.0: must be above 0"),
        ({"solver": "ddim"}, r"solver = ddim: must be one of unipc, unipc3, dpm\+\+, vanilla"),
    ],
)
def test_impossible_requests_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        Request(**({"prompt": "x", "seed": 1, "width": 32, "height": 32} | change))


def test_the_branch_with_blocks_left_out_runs_its_blocks_as_the_others_do(toy):
    """Where blocks rest in host memory, say, they visit the device for this branch too."""
    runs = []

    def make_run():
        runs.append(0)
        number = len(runs) - 1

        def run(blocks, h, ctx):
            runs[number] += 1
            return direct(blocks, h, ctx)

        return run

    guide = guidance.Guide((3.0,) * 4, layers=(0,), skipping=range(1, 3), away=2.0)
    cond = {"text": torch.tensor([0.5])}
    pipeline.denoise(
        toy.Family(),
        toy.Dit(),
        torch.ones(1, 3, 1, 2, 2),
        cond,
        cond,
        schedule=schedules.linear(4, 1.0),
        solver=solvers.euler,
        guidance=guide,
        make_run=make_run,
    )
    assert runs == [4, 4, 2]
