"""The generate command: check everything, encode, sample, decode, write.

No model is loaded before all that can be told from options, prompt files and file headers is settled: sizes, solver,
which LoRA modules fit, whether the target folder can be written. Then the models take turns in memory: text encoder,
transformer, VAE. Latents that are asked for are written the moment they exist.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TextIO

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Encoders, Family, Vae
from musubi_tuner.memory.placement import choose_device, release
from musubi_tuner.memory.plan import SwapOptions
from musubi_tuner.nn.compiling import CompileOptions
from musubi_tuner.sampling import outputs, pictures
from musubi_tuner.sampling.asked import make_requests
from musubi_tuner.sampling.assembly import (
    guidance_steps,
    load_vae,
    loading_of,
    memory_of,
    open_transformer,
    require_vae,
    sampler_of,
    save_merged_model,
    step_cache_of,
)
from musubi_tuner.sampling.models import Prompts, encode, encode_prompts
from musubi_tuner.sampling.options import (
    CompileArgs,
    LoraOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    SolverOptions,
    located,
    own_options,
    task_defaults,
)
from musubi_tuner.sampling.pipeline import Sampler, decode
from musubi_tuner.sampling.prompts import parse_line
from musubi_tuner.sampling.request import Request
from musubi_tuner.sampling.step_cache import Calibration, StepCacheOptions
from musubi_tuner.sampling.writer import Writer

log = logging.getLogger(__name__)

GROUPS: tuple[type, ...] = (
    ModelOptions,
    LoraOptions,
    PromptOptions,
    SolverOptions,
    StepCacheOptions,
    OutputOptions,
    SwapOptions,
    CompileOptions,
    CompileArgs,
)


def run(family: Family, options: Resolved) -> None:
    """Generate what `options` ask for. Raises UserError for what the user can mend, before long work where possible.

    Of several processes of a launch the first does the work.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    options = located(family, options)
    if options[LoraOptions].save_merged_model:
        save_merged_model(options, open_transformer(family, options))
        return
    if options[OutputOptions].latent_path:
        decode_files(family, options)
        return
    if options[PromptOptions].interactive:
        serve(family, options, sys.stdin)
        return
    requests = make_requests(family, options)
    device = choose_device(options[ModelOptions].device)
    loading, opened = loading_of(family, options), open_transformer(family, options)
    memory = memory_of(opened, options, device, loading.compiling)
    step_cache_of(family, options)  # its faults are told before the long work
    guidance_steps(family, options, opened.dit)
    pictures.check_model(opened.dit, requests)
    writer = Writer.checked(family, options)
    if any(request.needs_vae for request in requests):
        require_vae(options)
    seen: dict[Request, Mapping[str, Tensor]] = {}

    def encode_pictures(encoders: Encoders) -> None:
        seen.update(pictures.encode(family, encoders, lambda: load_vae(family, options, device), requests, device))

    prompts = encode_prompts(
        family, own_options(family, options), requests, device=device, dtype=torch.bfloat16, also=encode_pictures
    )
    pictures.check_fields(opened.dit, requests, seen)
    for request in requests:
        log.info("%s", request.summary())
    started = time.monotonic()
    dit, make_run = loading.load(opened, device, memory)
    sampler = sampler_of(family, options, dit, device, make_run)
    samples = _sample(sampler, requests, prompts, seen, writer, batch=options[SolverOptions].sample_batch_size)
    if isinstance(sampler.cache, Calibration):
        sampler.cache.tell(options.script)
    del sampler, opened, dit
    release(device)
    log.info("%d sampled in %.1f s", len(samples), time.monotonic() - started)
    if writer.wants_pixels:
        vae = load_vae(family, options, device)
        for request, stem, latents in samples:
            writer.pixels(request, stem, _decoded(vae, latents, device))


def serve(family: Family, options: Resolved, lines: TextIO) -> None:
    """`--interactive`: a prompt line at a time, until the input ends. Models stay loaded, encoders and VAE on the CPU.

    A line that cannot be served is told, and the next one is read.
    """
    chosen, device, cpu = options[PromptOptions], choose_device(options[ModelOptions].device), torch.device("cpu")
    if chosen.prompt is not None or chosen.from_file is not None:
        raise UserError("--interactive reads its prompts from the terminal: leave --prompt and --from_file out")
    loading, opened = loading_of(family, options), open_transformer(family, options)
    memory = memory_of(opened, options, device, loading.compiling)
    writer = Writer.checked(family, options)
    require_vae(options)
    encoders = family.load_encoders(own_options(family, options), device=cpu, dtype=torch.bfloat16)
    if encoders is None:
        raise UserError(f"prompts cannot be encoded without {family.spec.name}'s text encoder: name its files")
    vae = load_vae(family, options, cpu)
    guidance_steps(family, options, opened.dit)
    dit, make_run = loading.load(opened, device, memory)
    sampler = sampler_of(family, options, dit, device, make_run)
    for line in _asked_lines(lines):
        try:
            requests = make_requests(family, options, [parse_line(line)])
            pictures.check_model(opened.dit, requests)
            encoders.to(device)
            prompts = encode(family, encoders, requests, progress=False)
            seen = pictures.encode(family, encoders, lambda: vae.to(device), requests, device)
            encoders.to(cpu)
            pictures.check_fields(opened.dit, requests, seen)
            for request, stem, latents in _sample(sampler, requests, prompts, seen, writer, batch=1):
                if writer.wants_pixels:
                    writer.pixels(request, stem, _decoded(vae.to(device), latents, device))
        except UserError as fault:
            log.error("%s", fault)
        finally:
            vae.to(cpu)
            encoders.to(cpu)


def _asked_lines(lines: TextIO) -> Iterator[str]:
    """Lines that hold a prompt; on a terminal each is asked for."""
    while True:
        if lines.isatty():
            log.info("prompt (Ctrl-D ends):")
        line = lines.readline()
        if not line:
            return
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def decode_files(family: Family, options: Resolved) -> None:
    """`--latent_path`: decode stored latents."""
    chosen = options[OutputOptions]
    if chosen.output_type not in ("video", "images"):
        raise UserError(f"--output_type {chosen.output_type} with --latent_path: use video or images")
    writer = Writer.checked(family, options)
    stored = [outputs.read_latents(path, family.spec.name) for path in chosen.latent_path]
    for path, (latents, _) in zip(chosen.latent_path, stored, strict=True):
        if latents.shape[0] != family.spec.latents.channels:
            raise UserError(
                f"{path} has {latents.shape[0]} channels; {family.spec.name} has those of its VAE: "
                f"{family.spec.latents.channels}"
            )
    device = choose_device(options[ModelOptions].device)
    vae = load_vae(family, options, device)
    names = {field.name for field in fields(Request)}
    for latents, values in stored:
        known = {name: value for name, value in values.items() if name in names}
        blank: dict[str, Any] = {"prompt": "", "seed": 0, "width": 1, "height": 1}
        request = Request(**(blank | known))
        if options.given("fps") or "fps" not in known:
            request = replace(request, fps=options[PromptOptions].fps or task_defaults(family.spec, options).fps)
        writer.pixels(request, writer.stem(request), _decoded(vae, latents, device))


def _sample(
    sampler: Sampler,
    requests: Sequence[Request],
    prompts: Prompts,
    seen: pictures.Pictures,
    writer: Writer,
    *,
    batch: int,
) -> list[tuple[Request, str, Tensor]]:
    """(request, name of its files, latents on the CPU) of every request; latents that are asked for are written."""
    found = []
    for request, latents in sampler.latents(requests, prompts, seen, batch=batch):
        stem = writer.stem(request)
        writer.latents(request, stem, latents)
        found.append((request, stem, latents))
    return found


def _decoded(vae: Vae, latents: Tensor, device: torch.device) -> Tensor:
    return outputs.to_bytes(decode(vae, latents[None], device)[0])
