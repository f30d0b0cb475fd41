"""The generate command: check everything, encode, sample, decode, write.

No model is loaded before all that can be told from options, prompt files and file headers is settled: sizes, solver,
which LoRA modules fit, whether the target folder can be written. Then the models take turns in memory: text encoder,
transformer, VAE. Latents that are asked for are written the moment they exist.
"""

import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.adapters.merge import LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import Family, SamplingDefaults, Vae
from musubi_tuner.memory.placement import DTYPES, choose_device, release
from musubi_tuner.nn.compiling import CompileOptions, compile_blocks
from musubi_tuner.sampling import outputs
from musubi_tuner.sampling.models import OpenDit, Prompts, encode_prompts, open_dit, read_model_config, weight_policy
from musubi_tuner.sampling.options import (
    CompileArgs,
    LoraOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    SolverOptions,
    compile_settings,
    task_defaults,
)
from musubi_tuner.sampling.pipeline import Sampler, decode
from musubi_tuner.sampling.prompts import PromptEntry, read_prompts
from musubi_tuner.sampling.request import Request
from musubi_tuner.weights.policy import WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

log = logging.getLogger(__name__)

GROUPS: tuple[type, ...] = (
    ModelOptions,
    LoraOptions,
    PromptOptions,
    SolverOptions,
    OutputOptions,
    CompileOptions,
    CompileArgs,
)


def run(family: Family, options: Resolved) -> None:
    """Generate what `options` ask for. Raises UserError for what the user can mend, before long work where possible.

    Of several processes of a launch the first does the work.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if options[OutputOptions].latent_path:
        decode_files(family, options)
        return
    requests = make_requests(family, options)
    device = choose_device(options[ModelOptions].device)
    policy, compiling = _policy(family, options[ModelOptions]), compile_settings(options, os.environ)
    opened = _open(family, options)
    writer = Writer.checked(family, options)
    own = family.option_groups("generate")
    prompts = encode_prompts(family, options[own[0]] if own else None, requests, device=device, dtype=torch.bfloat16)
    for request in requests:
        log.info("%s", request.summary())
    started = time.monotonic()
    dit = opened.load(policy, device)
    if compiling is not None:
        compile_blocks(dit, family.spec.blocks, compiling)
    sampler = Sampler(family, dit, device, joint=options[SolverOptions].cfg_batch)
    samples = _sample(sampler, requests, prompts, writer, batch=options[SolverOptions].sample_batch_size)
    del sampler, opened, dit
    release(device)
    log.info("%d sampled in %.1f s", len(samples), time.monotonic() - started)
    if writer.wants_pixels:
        vae = _load_vae(family, options, device)
        for request, stem, latents in samples:
            writer.pixels(request, stem, _decoded(vae, latents, device))


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
    vae = _load_vae(family, options, device)
    names = {field.name for field in fields(Request)}
    for latents, values in stored:
        known = {name: value for name, value in values.items() if name in names}
        blank: dict[str, Any] = {"prompt": "", "seed": 0, "width": 1, "height": 1}
        request = Request(**(blank | known))
        if options.given("fps") or "fps" not in known:
            request = replace(request, fps=options[PromptOptions].fps or task_defaults(family.spec, options).fps)
        writer.pixels(request, writer.stem(request), _decoded(vae, latents, device))


def make_requests(family: Family, options: Resolved) -> list[Request]:
    """The requests of a command line, every size checked. Raises UserError with every fault of a prompt file."""
    chosen = options[PromptOptions]
    if (chosen.prompt is None) == (chosen.from_file is None):
        given = "neither was given" if chosen.prompt is None else "both were given"
        raise UserError(f"what to sample comes from --prompt or from --from_file; {given}")
    if chosen.from_file is None:
        entries = [PromptEntry(str(chosen.prompt), "--prompt")]
    else:
        entries = read_prompts(chosen.from_file)
    common = _common_values(family, options)
    requests, faults = [], []
    for entry in entries:
        seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
        try:
            said = entry.given(embedded=common["embedded_guidance"] is not None)
            request = Request(**({"seed": seed} | common | said))
            request.shape(family.spec.latents)
        except UserError as fault:
            faults.append(str(fault) if chosen.from_file is None else f"{entry.where}: {fault}")
        else:
            requests.append(request)
    if faults:
        raise UserError("; ".join(faults))
    _tell_what_has_no_effect(options, entries, requests)
    return requests


def _common_values(family: Family, options: Resolved) -> dict[str, Any]:
    """What the command line says of every request, the task's defaults where it says nothing."""
    task, chosen, solver = task_defaults(family.spec, options), options[PromptOptions], options[SolverOptions]
    height, width = chosen.video_size or (task.size[1], task.size[0])
    return {
        "negative": chosen.negative_prompt or "",
        "height": height,
        "width": width,
        "frames": _or(chosen.video_length, task.frames),
        "fps": _or(chosen.fps, task.fps),
        "steps": _or(solver.infer_steps, task.steps),
        "guidance": _or(solver.guidance_scale, task.guidance),
        "embedded_guidance": _embedded(task, solver.embedded_cfg_scale),
        "shift": _or(solver.flow_shift, _or(task.shift, 1.0)),
        "solver": _or(solver.sample_solver, task.solver),
    }


def _embedded(task: SamplingDefaults, chosen: float | None) -> float | None:
    """The guidance that the transformer is told; None where it has no such input, which a given one is told."""
    if task.embedded_guidance is None and chosen is not None:
        log.warning("--embedded_cfg_scale has no effect: this model has no embedded guidance; see --guidance_scale")
    return None if task.embedded_guidance is None else _or(chosen, task.embedded_guidance)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _tell_what_has_no_effect(options: Resolved, entries: Sequence[PromptEntry], requests: Sequence[Request]) -> None:
    if options.given("negative_prompt") and not any(r.guided for r in requests):
        log.warning("--negative_prompt has no effect: guidance is off at --guidance_scale 1")
    unserved = sorted({name for entry in entries for name in entry.unserved})
    if unserved:
        log.warning("in the prompt file, without effect here: %s", ", ".join(unserved))


def _policy(family: Family, chosen: ModelOptions) -> WeightPolicy:
    return weight_policy(
        family,
        fp8=chosen.fp8,
        scaled=chosen.fp8_scaled,
        dtype=None if chosen.dit_dtype is None else DTYPES[chosen.dit_dtype],
        allow_prequantized=chosen.allow_prequantized,
    )


def _open(family: Family, options: Resolved) -> OpenDit:
    """The transformer, looked at but not loaded, with its adapters matched."""
    chosen, lora = options[ModelOptions], options[LoraOptions]
    if chosen.dit is None:
        raise UserError("--dit is required: the transformer's checkpoint")
    if len(lora.lora_multiplier) > len(lora.lora_weight):
        raise UserError(
            f"{len(lora.lora_multiplier)} values of --lora_multiplier for {len(lora.lora_weight)} files of "
            "--lora_weight: give at most one per file"
        )
    multipliers = (*lora.lora_multiplier, *([1.0] * (len(lora.lora_weight) - len(lora.lora_multiplier))))
    merges = [
        LoraMerge.from_file(path, multiplier, strict=lora.strict_lora)
        for path, multiplier in zip(lora.lora_weight, multipliers, strict=True)
    ]
    config = read_model_config(options.as_dict().get("model_config"))
    own = [options[group] for group in family.option_groups("generate")][1:]
    more = {"options": own[0] if own else None, "attn_mode": chosen.attn_mode}
    return open_dit(family, chosen.dit, merges=merges, config=config, **more)


def _sample(
    sampler: Sampler, requests: Sequence[Request], prompts: Prompts, writer: "Writer", *, batch: int
) -> list[tuple[Request, str, Tensor]]:
    """(request, name of its files, latents on the CPU) of every request; latents that are asked for are written."""
    found = []
    for request, latents in sampler.latents(requests, prompts, batch=batch):
        stem = writer.stem(request)
        writer.latents(request, stem, latents)
        found.append((request, stem, latents))
    return found


def _load_vae(family: Family, options: Resolved, device: torch.device) -> Vae:
    chosen, own = options[ModelOptions], [options[group] for group in family.option_groups("generate")]
    dtype = DTYPES[chosen.vae_dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    return family.load_vae(str(chosen.vae), device=device, dtype=dtype, options=own[0] if own else None)


def _decoded(vae: Vae, latents: Tensor, device: torch.device) -> Tensor:
    return outputs.to_bytes(decode(vae, latents[None], device)[0])


@dataclass
class Writer:
    """Names and writes the files of a run: `<date>-<time>_<seed>` with `.mp4`, `.png`, `_latent.safetensors`, or a
    folder of frames."""

    family: str
    folder: Path
    chosen: OutputOptions
    stamp: str
    taken: set[str]

    @staticmethod
    def checked(family: Family, options: Resolved) -> "Writer":
        """The writer of a command; raises UserError where the folder or the VAE cannot serve."""
        chosen, models = options[OutputOptions], options[ModelOptions]
        folder = Path(chosen.save_path)
        writer = Writer(family.spec.name, folder, chosen, time.strftime("%Y%m%d-%H%M%S"), set())
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--save_path {folder} is a file: give the folder that samples go to")
        if folder.suffix.lower() in (".mp4", ".png", ".safetensors", ".webp", ".jpg"):
            raise UserError(f"--save_path {folder} looks like a file: give a folder, files are named by time and seed")
        if writer.wants_pixels:
            if models.vae is None:
                raise UserError("--vae is required to decode samples; without one, use --output_type latent")
            with open_checkpoint(models.vae):
                pass
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(f"--save_path {folder} cannot be made: {fault.strerror}") from fault
        return writer

    @property
    def wants_pixels(self) -> bool:
        return self.chosen.output_type != "latent"

    def stem(self, request: Request) -> str:
        """A name for the files of a request that no file has."""
        found = outputs.free_stem(self.folder, f"{self.stamp}_{request.seed}", self.taken)
        self.taken.add(found)
        return found

    def latents(self, request: Request, stem: str, latents: Tensor) -> None:
        """Write latents, where they are asked for."""
        if self.chosen.output_type in ("latent", "both", "latent_images"):
            path = self.folder / f"{stem}_latent.safetensors"
            outputs.write_latents(path, latents, request, self.family, metadata=not self.chosen.no_metadata)
            log.info("wrote %s", path)

    def pixels(self, request: Request, stem: str, frames: Tensor) -> None:
        """Write `frames: [F, H, W, 3]` as the output type asks."""
        frames = frames[: len(frames) - min(self.chosen.trim_tail_frames, len(frames) - 1)]
        text = None if self.chosen.no_metadata else outputs.describe(request)
        for path in self._written(stem, frames, request.fps, text):
            log.info("wrote %s", path)

    def _written(self, stem: str, frames: Tensor, fps: int, text: dict[str, str] | None) -> Iterator[Path]:
        path = self.folder / stem
        if len(frames) == 1:
            outputs.write_png(path.with_name(f"{stem}.png"), frames[0], text)
            yield path.with_name(f"{stem}.png")
        elif self.chosen.output_type in ("images", "latent_images"):
            outputs.write_frames(path, frames, text)
            yield path
        else:
            outputs.write_video(path.with_name(f"{stem}.mp4"), frames, fps, text)
            yield path.with_name(f"{stem}.mp4")
