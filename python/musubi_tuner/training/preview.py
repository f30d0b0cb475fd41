"""Previews: the prompts of a file, rendered by the generation pipeline while a run goes on.

Prompts are encoded and the VAE is read before the transformer is loaded, so a fault in either costs no training and
the text encoder's memory is free again. Rendering leaves the run as it was: every module's mode is restored, no
global random number is drawn, and the VAE goes back to the CPU. A preview that fails is told and left out; it does not
end the run.

Files lie in `<output_dir>/sample` as `<name>_<e000004 | 000250>_<prompt>_<time>_<seed>.png` or `.mp4`, which users'
scripts look for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Dit, Encoders, Family, HasExperts, OwnSampling, Vae
from musubi_tuner.flow import keyed
from musubi_tuner.memory.placement import DTYPES, dtype_name, release
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.optim.build import evaluating
from musubi_tuner.sampling import outputs, pictures
from musubi_tuner.sampling.models import Prompts, encode_prompts
from musubi_tuner.sampling.options import task_defaults
from musubi_tuner.sampling.pictures import Pictures
from musubi_tuner.sampling.pipeline import Sampler, decode
from musubi_tuner.sampling.prompts import PromptEntry, read_prompts
from musubi_tuner.sampling.request import Request, fitted
from musubi_tuner.training.checkpoint import Names
from musubi_tuner.training.config import SampleOptions
from musubi_tuner.training.events import EpochRecord, Quiet, State, StepRecord
from musubi_tuner.training.runtime import LocalRuntime
from musubi_tuner.training.tracker import Show

log = logging.getLogger(__name__)

SIZE, FRAMES, STEPS = 256, 1, 20
"""Width and height, frames and steps of a preview whose prompt does not say: one picture in seconds."""


@dataclass(frozen=True)
class Encoded:
    """What previews need beside the transformer. `vae` is on the CPU between previews."""

    requests: tuple[Request, ...]
    prompts: Prompts
    vae: Vae
    pictures: Pictures = field(default_factory=dict)
    options: Any = None
    """The family's own group."""


def encode(family: Family, options: Resolved, *, device: torch.device, dit: Dit | None = None) -> Encoded:
    """Read the prompt file, encode its prompts and load the VAE; the text encoder is gone when this returns.

    dit: the transformer, opened but not loaded, whose needs the prompts are compared with. Raises UserError for faults
    of the prompt file, the encoder's files or the VAE.
    """
    chosen = options[SampleOptions]
    if chosen.sample_prompts is None or chosen.vae is None:
        raise UserError("previews need --sample_prompts and --vae")
    requests = preview_requests(family, options, read_prompts(chosen.sample_prompts))
    pictures.check_model(dit, requests)
    own = family.option_groups("train")
    encoder_options = options[own[0]] if own else None
    dtype = _vae_dtype(options, device)
    vae = family.load_vae(chosen.vae, device=torch.device("cpu"), dtype=dtype, options=encoder_options)
    seen: dict[Request, Mapping[str, Tensor]] = {}

    def encode_pictures(encoders: Encoders) -> None:
        seen.update(pictures.encode(family, encoders, lambda: vae.to(device), requests, device))
        if seen:
            vae.to(torch.device("cpu"))

    prompts = encode_prompts(
        family, encoder_options, requests, device=device, dtype=torch.bfloat16, also=encode_pictures
    )
    pictures.check_fields(dit, requests, seen)
    return Encoded(requests, prompts, vae, seen, encoder_options)


def preview_requests(family: Family, options: Resolved, entries: Sequence[PromptEntry]) -> tuple[Request, ...]:
    """A request for each entry; sizes are rounded down to the latent grid with a warning.

    A prompt without a seed gets one of its own place in the file, the same in every preview and every run, so that
    pictures of one prompt can be compared.
    """
    spec, own = family.spec, family.option_groups("train")
    task, plans = task_defaults(spec, options), isinstance(family, OwnSampling)
    high = family.high_noise(options[own[1]]) if isinstance(family, HasExperts) else None
    requests = []
    for number, entry in enumerate(entries):
        values: dict[str, Any] = {
            "seed": keyed.seed_of("preview", number) % 2**32,
            "width": SIZE,
            "height": SIZE,
            "frames": None if plans else FRAMES,
            "steps": STEPS,
            "fps": task.fps,
            "guidance": task.guidance,
            "guidance_high": None if high is None else high.guidance,
            "embedded_guidance": task.embedded_guidance,
            "shift": task.shift if task.shift is not None or plans else 1.0,
            "solver": task.solver,
        }
        try:
            given = values | entry.given(embedded=task.embedded_guidance is not None)
            if high is not None and given["guidance"] != task.guidance:
                given["guidance_high"] = given["guidance"]  # a prompt's own guidance is that of both transformers
            idle = pictures.unserved(given, spec)
            given = {name: value for name, value in given.items() if name not in idle}
            asked = pictures.planned(family, options[own[0]] if own else None, given, entry.said)
        except UserError as fault:
            raise UserError(f"{entry.where}: {fault}") from fault
        request = fitted(asked, spec.latents)
        if request != asked:
            sizes = [f"{r.width} x {r.height}, {r.frames} frames" for r in (asked, request)]
            log.warning("%s: %s does not fit the model's grid; %s is rendered", entry.where, *sizes)
        if entry.unserved or idle:
            log.warning("%s: without effect here: %s", entry.where, ", ".join((*entry.unserved, *idle)))
        requests.append(request)
    return tuple(requests)


def _vae_dtype(options: Resolved, device: torch.device) -> torch.dtype:
    """`--vae_dtype`; without one, bfloat16 on CUDA and float32 elsewhere. Raises UserError."""
    name = dtype_name(options[SampleOptions].vae_dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if name not in DTYPES:
        raise UserError(f"--vae_dtype {name}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


class Previews(Quiet):
    """Renders at the asked steps or epochs, and before the first step if asked. For one process of a run."""

    def __init__(
        self,
        family: Family,
        options: Resolved,
        encoded: Encoded,
        dit: Dit,
        *,
        blocks: Run = direct,
        runtime: LocalRuntime,
        show: Show,
        names: Names,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._when = options[SampleOptions]
        self._encoded, self._show, self._optimizer = encoded, show, optimizer
        self._sampler = Sampler(
            family, dit, runtime.device, dtype=runtime.dtype, make_run=lambda: blocks, options=encoded.options
        )
        self._folder, self._name = names.folder / "sample", names.name

    def start(self, state: State) -> None:
        """Before the first step of a new run, with `sample_at_first`."""
        if self._when.sample_at_first and state.step == 0:
            self._render(f"{0:06d}", 0)

    def step_end(self, record: StepRecord) -> None:
        """After every n-th step, unless epochs were asked for."""
        every = self._when.sample_every_n_steps
        if every and not self._when.sample_every_n_epochs and record.step % every == 0:
            self._render(f"{record.step:06d}", record.step)

    def epoch_end(self, record: EpochRecord) -> None:
        """After every n-th epoch."""
        every = self._when.sample_every_n_epochs
        if every and record.epoch % every == 0:
            self._render(f"e{record.epoch:06d}", record.step)

    def _render(self, when: str, step: int) -> None:
        """Write and show one picture or clip for each prompt."""
        stamp = time.strftime("%Y%m%d%H%M%S")
        try:
            with evaluating(self._optimizer):
                have = self._encoded
                found = list(self._sampler.latents(have.requests, have.prompts, have.pictures))
            for number, (request, pixels) in enumerate(self._decoded(found)):
                path = self._write(f"{self._name}_{when}_{number:02d}_{stamp}_{request.seed}", request, pixels)
                log.info("preview %s", path)
                self._show(f"sample/{number:02d}", (pixels + 1) / 2, step, request.fps)
        except (UserError, torch.OutOfMemoryError) as fault:
            log.warning("the preview at %s was left out: %s", when, fault)
        finally:
            self._encoded.vae.to(torch.device("cpu"))
            release(self._sampler.device)

    def _decoded(self, found: Sequence[tuple[Request, Tensor]]) -> list[tuple[Request, Tensor]]:
        """(request, pixels [3, F, H, W] in [-1, 1])."""
        device = self._sampler.device
        vae = self._encoded.vae.to(device)
        return [(request, decode(vae, latents[None], device)[0]) for request, latents in found]

    def _write(self, stem: str, request: Request, pixels: Tensor) -> Path:
        frames, text = outputs.to_bytes(pixels), outputs.describe(request)
        if len(frames) == 1:
            path = self._folder / f"{stem}.png"
            outputs.write_png(path, frames[0], text)
        else:
            path = self._folder / f"{stem}.mp4"
            outputs.write_video(path, frames, request.fps, text)
        return path
