"""From requests to pixels: noise, denoising, decoding. Previews, generation and tools are callers of this file.

`denoise` is the one loop: a schedule, a solver, guidance over the branches of a model. A `Sampler` holds a transformer
that is loaded (with or without adapters) and renders any number of requests with it, several in a batch where they
have one size; what a request gives does not depend on its neighbours but for the rounding of batched products.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.guidance_steps import GuidanceSteps
from musubi_tuner.families.base import Conditioning, Dit, Family, OwnSampling, Tools, Vae
from musubi_tuner.flow import solvers
from musubi_tuner.flow.schedules import Schedule
from musubi_tuner.flow.solvers import Solve, Velocity
from musubi_tuner.nn.experts import Experts
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.sampling import source_video
from musubi_tuner.sampling.guidance import (
    Branch,
    Guide,
    classifier_free,
    classifier_free_joint,
    guide_of,
    on_device,
    without_blocks,
)
from musubi_tuner.sampling.models import Prompts
from musubi_tuner.sampling.outputs import to_bytes
from musubi_tuner.sampling.pictures import KEPT, Pictures
from musubi_tuner.sampling.request import Request, initial_noise
from musubi_tuner.sampling.step_cache import StepCache


def _direct() -> Run:
    return direct


@torch.no_grad()
def denoise(
    family: Family,
    dit: Dit,
    noise: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    *,
    schedule: Schedule,
    solver: Solve,
    guidance: float | Guide = 1.0,
    both: Conditioning | None = None,
    make_run: Callable[[], Run] = _direct,
    dtype: torch.dtype | None = None,
    progress: str | None = None,
) -> Tensor:
    """Latents [B, C, F, H, W] float32 at sigma = 0, from `noise` of that shape, on its device.

    Args:
        cond, uncond: conditionings of the B samples; `uncond` is needed when `guidance`, a scale or a whole plan of
            them, is not 1.
        both: conditioning of 2B samples, `cond`'s first: guidance then takes one call per step in place of two.
        make_run: makes the way of running the blocks of each branch, so that a step cache begins anew in each.
        dtype: compute dtype (autocast); None leaves it to the weights.
        progress: label of the progress bar; None: no bar.

    Raises ValueError when guidance has no second branch.
    """

    guide = guidance if isinstance(guidance, Guide) else Guide((guidance,) * len(schedule))

    def branch(conditioning: Conditioning, run: Run | None = None) -> Velocity:
        return Branch(family, dit, on_device(conditioning, noise.device), run or make_run(), dtype)

    if not guide.guided:
        velocity = branch(cond)
    elif both is not None:
        velocity = classifier_free_joint(branch(both), guide)
    elif uncond is not None:
        pair = branch(cond), branch(uncond)
        lesser = None
        if guide.skipping:
            lesser = branch(uncond if guide.in_uncond else cond, without_blocks(guide.layers, make_run()))
        velocity = classifier_free(*pair, guide, lesser)
    else:
        raise ValueError(f"guidance {guidance} needs a conditioning without the prompt (uncond or both)")
    with tqdm(total=len(schedule), desc=progress, unit="step", disable=progress is None, leave=None) as bar:

        def tick(_done: int, _x: Tensor) -> None:
            bar.update()

        return solver(velocity, noise.float(), schedule, tick)


@dataclass(frozen=True)
class Sampler:
    """A loaded transformer to sample with. dtype, make_run: as in `denoise`.

    joint: guidance by one call of twice the batch; faster where a model is small for its device, for more memory.
    options: the family's own, for one that samples in its own way. cache: of steps, fresh for each branch of each run.
    steps: guidance in some steps only, or with blocks left out.
    """

    family: Family
    dit: Dit
    device: torch.device
    dtype: torch.dtype | None = None
    make_run: Callable[[], Run] = _direct
    joint: bool = False
    options: Any = None
    cache: StepCache | None = None
    steps: GuidanceSteps = field(default_factory=GuidanceSteps)

    def latents(
        self,
        requests: Sequence[Request],
        prompts: Prompts,
        pictures: Pictures | None = None,
        *,
        batch: int = 1,
        progress: bool = True,
    ) -> Iterator[tuple[Request, Tensor]]:
        """(request, its latents [C, F, H, W], float32 on the CPU) in the order given, `batch` of a kind together.

        Raises UserError for a size that the model's grid cannot hold, before anything is sampled.
        """
        for request in requests:
            request.shape(self.family.spec.latents)
        done = 0
        for group in _batches(requests, batch):
            label = f"{_numbers(done, len(group))}/{len(requests)}" if len(requests) > 1 else "sampling"
            shown = label if progress else None
            if isinstance(self.family, OwnSampling):
                found = [self._by_family(self.family, r, prompts, pictures or {}, shown) for r in group]
            else:
                found = self._together(group, prompts, pictures or {}, shown)
            _require_finite(found, group)
            done += len(group)
            yield from zip(group, found, strict=True)

    def _together(
        self, group: Sequence[Request], prompts: Prompts, pictures: Pictures, label: str | None
    ) -> list[Tensor]:
        """Latents of requests that differ in prompt and seed only."""
        first, seen = group[0], [dict(pictures.get(r, {})) for r in group]
        clips = [found.pop("video") for found in seen] if first.video else []
        kept = [found.pop(KEPT).tolist() if KEPT in found else None for found in seen]
        with_prompt = [{**_entry(r, prompts[r.prompt]), **p} for r, p in zip(group, seen, strict=True)]
        without = [{**_entry(r, prompts[r.negative]), **p} for r, p in zip(group, seen, strict=True) if first.guided]
        frames = [None if of is None else of[0] for of in kept]
        noise = torch.stack([initial_noise(r, self.family.spec, n) for r, n in zip(group, frames, strict=True)])
        begin = torch.stack(clips) if clips else None
        found = self._denoised(first, noise, with_prompt, without, label, begin=begin)
        return [x if of is None else x[:, of[1] : of[1] + 1] for x, of in zip(found, kept, strict=True)]

    def _by_family(
        self, family: OwnSampling, request: Request, prompts: Prompts, pictures: Pictures, label: str | None
    ) -> Tensor:
        """Latents of a request whose family has a loop of its own around `denoise`."""
        draws = torch.Generator().manual_seed(request.seed)
        without = [_entry(request, prompts[request.negative])] if request.guided else []

        def part(noise: Tensor, fields: Mapping[str, Tensor], text: str) -> Tensor:
            with_prompt = _entry(request, prompts[text])
            texts = [{**with_prompt, **fields}], [{**entry, **fields} for entry in without]
            return self._denoised(request, noise[None], *texts, label)[0]

        tools = Tools(part, lambda shape: torch.randn(tuple(shape), generator=draws))
        return family.generate(self.options, request.item(request.prompt), pictures.get(request, {}), tools)

    def _denoised(
        self,
        first: Request,
        noise: Tensor,
        with_prompt: Sequence[Mapping[str, Tensor]],
        without: Sequence[Mapping[str, Tensor]],
        label: str | None,
        *,
        begin: Tensor | None = None,
    ) -> Tensor:
        """Latents of `noise: [B, C, F, H, W]` by the settings of `first`, on the CPU.

        begin: latents of clips to begin from, of that shape.
        """
        solver, collate = solvers.get(first.solver), self.family.collate
        schedule = solver.schedule(first.steps, first.shift)
        if begin is not None:
            schedule = schedule.last(source_video.steps_left(first.steps, first.strength))
            noise = source_video.begin(begin, noise, schedule)
        guide, joint = self._guide(first, schedule), self.joint and first.guided and self.steps == GuidanceSteps()
        with evaluating(self.dit):
            return denoise(
                self.family,
                self.dit,
                noise.to(self.device),
                collate(with_prompt),
                collate(without) if without and not joint else None,
                schedule=schedule,
                solver=solver.solve,
                guidance=guide,
                both=collate([*with_prompt, *without]) if joint else None,
                make_run=self._make_run(schedule),
                dtype=self.dtype,
                progress=label,
            ).cpu()

    def _guide(self, first: Request, schedule: Schedule) -> Guide:
        """Guidance by step: of two experts each has its own. A step cache counts calls, so it sees all of them."""
        high = self._high_steps(schedule)
        scales = [first.guidance_high if high_now else first.guidance for high_now in high]
        told = [first.guidance if scale is None else scale for scale in scales]
        return guide_of(self.steps, told, every=self.cache is not None, rescale=first.rescale)

    def _make_run(self, schedule: Schedule) -> Callable[[], Run]:
        """Ways of running the blocks, the branch with the prompt first."""
        cache, inner = self.cache, self.make_run
        if cache is None:
            return inner
        branches, switch = count(), sum(self._high_steps(schedule))
        return lambda: cache.run(len(schedule), inner(), branch=next(branches), switch=switch)

    def _high_steps(self, schedule: Schedule) -> list[bool]:
        """The steps in which the transformer for high noise predicts."""
        boundary = self.dit.boundary if isinstance(self.dit, Experts) else None
        return [boundary is not None and t >= boundary for t in schedule.times.tolist()]


@torch.no_grad()
def decode(vae: Vae, latents: Tensor, device: torch.device) -> Tensor:
    """Pixels [B, 3, F, H, W] in [-1, 1], float32 on the CPU, of `latents: [B, C, F, H, W]`."""
    return vae.decode(latents.to(device)).float().clamp(-1, 1).cpu()


def render(
    sampler: Sampler,
    vae: Vae,
    requests: Sequence[Request],
    prompts: Prompts,
    pictures: Pictures | None = None,
    *,
    batch: int = 1,
    progress: bool = True,
) -> list[Tensor]:
    """Sample and decode: for each request its frames [F, H, W, 3], uint8 on the CPU.

    `prompts` holds a condition for every text of the requests (`models.encode` or `models.encode_prompts`).
    """
    frames: list[Tensor] = []
    found = sampler.latents(requests, prompts, pictures, batch=batch, progress=progress)
    for _, pairs in groupby(found, key=lambda pair: pair[1].shape):
        same_size = [latents for _, latents in pairs]
        for start in range(0, len(same_size), batch):
            pixels = decode(vae, torch.stack(same_size[start : start + batch]), sampler.device)
            frames += [to_bytes(clip) for clip in pixels]
    return frames


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, every submodule's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(requests: Sequence[Request], batch: int) -> Iterator[list[Request]]:
    """Neighbours that can share a batch, at most `batch` of them."""
    if batch < 1:
        raise ValueError(f"batch of {batch} requests: at least 1")
    for _, group in groupby(requests, key=lambda r: replace(r, prompt="", negative="", seed=0)):
        same = list(group)
        yield from (same[start : start + batch] for start in range(0, len(same), batch))


def _entry(request: Request, condition: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The condition of a text, with the guidance that the transformer is told."""
    told = request.embedded_guidance
    return condition if told is None else {**condition, "guidance": torch.tensor(told, dtype=torch.float32)}


def _numbers(done: int, count: int) -> str:
    return f"sampling {done + 1}" if count == 1 else f"sampling {done + 1}-{done + count}"


def _require_finite(latents: Sequence[Tensor], group: Sequence[Request]) -> None:
    for request, sample in zip(group, latents, strict=True):
        if not bool(torch.isfinite(sample).all()):
            raise UserError(
                f"the model gave inf or NaN for {request.prompt[:60]!r} (seed {request.seed}): check the LoRA and its "
                "multiplier, lower --guidance_scale, or leave --fp8 out"
            )
