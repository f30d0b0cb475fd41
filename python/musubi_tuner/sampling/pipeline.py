"""From requests to pixels: noise, denoising, decoding. Previews, generation and tools are callers of this file.

`denoise` is the one loop: a schedule, a solver, guidance over the branches of a model. A `Sampler` holds a transformer
that is loaded (with or without adapters) and renders any number of requests with it, several in a batch where they
have one size; what a request gives does not depend on its neighbours but for the rounding of batched products.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Conditioning, Dit, Family, OwnSampling, Tools, Vae
from musubi_tuner.flow import solvers
from musubi_tuner.flow.schedules import Schedule
from musubi_tuner.flow.solvers import Solve, Velocity
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.sampling import source_video
from musubi_tuner.sampling.guidance import Branch, classifier_free, classifier_free_joint, on_device
from musubi_tuner.sampling.models import Prompts
from musubi_tuner.sampling.outputs import to_bytes
from musubi_tuner.sampling.pictures import Pictures
from musubi_tuner.sampling.request import Request, initial_noise
from musubi_tuner.sampling.step_cache import StepCache


def _direct() -> Run:
    return direct


def _cached(cache: StepCache, steps: int, make_run: Callable[[], Run]) -> Run:
    return cache.run(steps, make_run())


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
    guidance: float = 1.0,
    rescale: float = 0.0,
    both: Conditioning | None = None,
    make_run: Callable[[], Run] = _direct,
    dtype: torch.dtype | None = None,
    progress: str | None = None,
) -> Tensor:
    """Latents [B, C, F, H, W] float32 at sigma = 0, from `noise` of that shape, on its device.

    Args:
        cond, uncond: conditionings of the B samples; `uncond` is needed when `guidance` is not 1.
        guidance, rescale: see `sampling.guidance`.
        both: conditioning of 2B samples, `cond`'s first: guidance then takes one call per step in place of two.
        make_run: makes the way of running the blocks of each branch, so that a step cache begins anew in each.
        dtype: compute dtype (autocast); None leaves it to the weights.
        progress: label of the progress bar; None: no bar.

    Raises ValueError when guidance has no second branch.
    """

    def branch(conditioning: Conditioning) -> Velocity:
        return Branch(family, dit, on_device(conditioning, noise.device), make_run(), dtype)

    if guidance == 1.0:
        velocity = branch(cond)
    elif both is not None:
        velocity = classifier_free_joint(branch(both), guidance, rescale=rescale)
    elif uncond is not None:
        velocity = classifier_free(branch(cond), branch(uncond), guidance, rescale=rescale)
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
    """

    family: Family
    dit: Dit
    device: torch.device
    dtype: torch.dtype | None = None
    make_run: Callable[[], Run] = _direct
    joint: bool = False
    options: Any = None
    cache: StepCache | None = None

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
        with_prompt = [{**_entry(r, prompts[r.prompt]), **p} for r, p in zip(group, seen, strict=True)]
        without = [{**_entry(r, prompts[r.negative]), **p} for r, p in zip(group, seen, strict=True) if first.guided]
        noise = torch.stack([initial_noise(r, self.family.spec) for r in group])
        begin = torch.stack(clips) if clips else None
        return list(self._denoised(first, noise, with_prompt, without, label, begin=begin))

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
        solver, collate, joint = solvers.get(first.solver), self.family.collate, self.joint and first.guided
        schedule = solver.schedule(first.steps, first.shift)
        if begin is not None:
            schedule = schedule.last(source_video.steps_left(first.steps, first.strength))
            noise = source_video.begin(begin, noise, schedule)
        cache, make_run = self.cache, self.make_run
        if cache is not None:
            make_run = partial(_cached, cache, len(schedule), make_run)
        with evaluating(self.dit):
            return denoise(
                self.family,
                self.dit,
                noise.to(self.device),
                collate(with_prompt),
                collate(without) if without and not joint else None,
                schedule=schedule,
                solver=solver.solve,
                guidance=first.guidance,
                rescale=first.rescale,
                both=collate([*with_prompt, *without]) if joint else None,
                make_run=make_run,
                dtype=self.dtype,
                progress=label,
            ).cpu()


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
