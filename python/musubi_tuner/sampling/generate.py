"""The generate command: check everything, encode, sample, decode, write.

No model is loaded before all that can be told from options, prompt files and file headers is settled: sizes, solver,
which LoRA modules fit, whether the target folder can be written. Then the models take turns in memory: text encoder,
transformer, VAE. Latents that are asked for are written the moment they exist.
"""

import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from musubi_tuner.adapters.merge import LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.guidance_steps import GuidanceSteps
from musubi_tuner.config.options import Resolved
from musubi_tuner.families.base import (
    Dit,
    Encoders,
    Family,
    HasExperts,
    HasGuidanceSteps,
    HasMagRatios,
    HighNoise,
    OwnSampling,
    SamplingDefaults,
    Vae,
)
from musubi_tuner.memory.placement import DTYPES, choose_device, release
from musubi_tuner.nn.compiling import CompileOptions, CompileSettings, compile_blocks
from musubi_tuner.sampling import outputs, pictures
from musubi_tuner.sampling.models import (
    OpenDit,
    Opened,
    Prompts,
    encode,
    encode_prompts,
    open_dit,
    open_experts,
    read_model_config,
    weight_policy,
)
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
from musubi_tuner.sampling.prompts import PromptEntry, parse_line, read_prompts
from musubi_tuner.sampling.request import Request
from musubi_tuner.sampling.step_cache import Calibration, StepCache, StepCacheOptions, step_cache
from musubi_tuner.weights.load import Merge
from musubi_tuner.weights.policy import WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

log = logging.getLogger(__name__)

GROUPS: tuple[type, ...] = (
    ModelOptions,
    LoraOptions,
    PromptOptions,
    SolverOptions,
    StepCacheOptions,
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
    if options[PromptOptions].interactive:
        serve(family, options, sys.stdin)
        return
    requests = make_requests(family, options)
    device = choose_device(options[ModelOptions].device)
    policy, compiling = _policy(family, options[ModelOptions]), compile_settings(options, os.environ)
    opened = _open(family, options)
    _step_cache(family, options)  # its faults are told before the long work
    _guidance_steps(family, options, opened.dit)
    pictures.check_model(opened.dit, requests)
    writer = Writer.checked(family, options)
    if any(request.pictures or request.control for request in requests):
        _require_vae(options)
    seen: dict[Request, Mapping[str, Tensor]] = {}

    def encode_pictures(encoders: Encoders) -> None:
        seen.update(pictures.encode(family, encoders, lambda: _load_vae(family, options, device), requests, device))

    prompts = encode_prompts(
        family, _own(family, options), requests, device=device, dtype=torch.bfloat16, also=encode_pictures
    )
    pictures.check_fields(opened.dit, requests, seen)
    for request in requests:
        log.info("%s", request.summary())
    started = time.monotonic()
    dit = opened.load(policy, device, prepare=_compiler(family, compiling))
    sampler = _sampler(family, options, dit, device)
    samples = _sample(sampler, requests, prompts, seen, writer, batch=options[SolverOptions].sample_batch_size)
    if isinstance(sampler.cache, Calibration):
        sampler.cache.tell()
    del sampler, opened, dit
    release(device)
    log.info("%d sampled in %.1f s", len(samples), time.monotonic() - started)
    if writer.wants_pixels:
        vae = _load_vae(family, options, device)
        for request, stem, latents in samples:
            writer.pixels(request, stem, _decoded(vae, latents, device))


def serve(family: Family, options: Resolved, lines: TextIO) -> None:
    """`--interactive`: a prompt line at a time, until the input ends. Models stay loaded, encoders and VAE on the CPU.

    A line that cannot be served is told, and the next one is read.
    """
    chosen, device, cpu = options[PromptOptions], choose_device(options[ModelOptions].device), torch.device("cpu")
    if chosen.prompt is not None or chosen.from_file is not None:
        raise UserError("--interactive reads its prompts from the terminal: leave --prompt and --from_file out")
    policy, opened = _policy(family, options[ModelOptions]), _open(family, options)
    writer = Writer.checked(family, options)
    _require_vae(options)
    encoders = family.load_encoders(_own(family, options), device=cpu, dtype=torch.bfloat16)
    if encoders is None:
        raise UserError(f"prompts cannot be encoded without {family.spec.name}'s text encoder: name its files")
    vae = _load_vae(family, options, cpu)
    _guidance_steps(family, options, opened.dit)
    sampler = _sampler(family, options, opened.load(policy, device), device)
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


def _own(family: Family, options: Resolved) -> Any:
    """The family's first own group, which its encoders, VAE and sampling are told by; None where it has none."""
    groups = family.option_groups("generate")
    return options[groups[0]] if groups else None


def _of_model(family: Family, options: Resolved) -> Any:
    """The family's group of the model, which it is built by; None where it has none."""
    groups = family.option_groups("generate")[1:]
    return options[groups[0]] if groups else None


def _high_noise(family: Family, options: Resolved) -> HighNoise | None:
    return family.high_noise(_of_model(family, options)) if isinstance(family, HasExperts) else None


def _sampler(family: Family, options: Resolved, dit: Dit, device: torch.device) -> Sampler:
    return Sampler(
        family,
        dit,
        device,
        joint=options[SolverOptions].cfg_batch,
        options=_own(family, options),
        cache=_step_cache(family, options),
        steps=_guidance_steps(family, options),
    )


def _step_cache(family: Family, options: Resolved) -> StepCache | None:
    own = _own(family, options), _of_model(family, options)
    return step_cache(options[StepCacheOptions], family.mag_ratios(*own) if isinstance(family, HasMagRatios) else None)


def _guidance_steps(family: Family, options: Resolved, dit: Dit | None = None) -> GuidanceSteps:
    """In which steps there is guidance, and by which blocks. Raises UserError, of `dit` too for blocks it has not."""
    found = GuidanceSteps()
    if isinstance(family, HasGuidanceSteps):
        found = family.guidance_steps(_of_model(family, options))
    if found.layers and dit is not None:
        count = sum(len(dit.get_submodule(name)) for name in family.spec.blocks)  # type: ignore[arg-type]
        if max(found.layers) >= count:
            raise UserError(f"--slg_layers {max(found.layers)}: this model has {count} blocks, 0 to {count - 1}")
    if found != GuidanceSteps() and options[StepCacheOptions].magcache_mag_ratios is not None:
        raise UserError(
            "--magcache_mag_ratios takes every step to be made alike: leave --cfg_skip_mode and --slg_layers out, or it"
        )
    return found


def _compiler(family: Family, settings: CompileSettings | None) -> Callable[[Dit], None] | None:
    """What is done to each transformer that is loaded."""
    return None if settings is None else lambda dit: compile_blocks(dit, family.spec.blocks, settings) and None


def _require_vae(options: Resolved) -> None:
    if options[ModelOptions].vae is None:
        raise UserError("--vae is required: pictures that a request comes with are encoded by it")


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


def make_requests(family: Family, options: Resolved, entries: Sequence[PromptEntry] | None = None) -> list[Request]:
    """The requests of a command line, or of `entries`, every size checked. Raises UserError with every fault."""
    chosen = options[PromptOptions]
    found = _entries(chosen) if entries is None else entries
    common, requests, faults = _common_values(family, options), [], []
    idle = set(pictures.unserved(common, family.spec))
    for entry in found:
        seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
        try:
            given = entry.given(embedded=common["embedded_guidance"] is not None)
            request = _request(family, options, {"seed": seed} | common, given, entry)
            request.shape(family.spec.latents)
        except UserError as fault:
            faults.append(f"{entry.where}: {fault}" if chosen.prompt is None else str(fault))
        else:
            requests.append(request)
            idle |= set(pictures.unserved(given, family.spec))
    if faults:
        raise UserError("; ".join(faults))
    _tell_what_has_no_effect(options, found, requests, idle)
    return requests


def _entries(chosen: PromptOptions) -> list[PromptEntry]:
    if (chosen.prompt is None) == (chosen.from_file is None):
        given = "neither was given" if chosen.prompt is None else "both were given"
        raise UserError(f"what to sample comes from --prompt or from --from_file; {given}")
    return [PromptEntry(str(chosen.prompt), "--prompt")] if chosen.from_file is None else read_prompts(chosen.from_file)


def _request(
    family: Family, options: Resolved, common: Mapping[str, Any], given: dict[str, Any], entry: PromptEntry
) -> Request:
    """One entry's request: what only the family understands goes to it, pictures that it does not take are left out."""
    said = dict(entry.said)
    if isinstance(family, OwnSampling) and "frames" in given:
        said["f"] = str(given.pop("frames"))
    values = {**common, **given}
    if "guidance" in given and common["guidance_high"] is not None:
        values["guidance_high"] = given["guidance"]  # a prompt's own guidance is that of both transformers
    left_out = pictures.unserved(values, family.spec)
    values = {name: value for name, value in values.items() if name not in left_out}
    return pictures.planned(family, _own(family, options), values, said)


def _common_values(family: Family, options: Resolved) -> dict[str, Any]:
    """What the command line says of every request, the task's defaults where it says nothing."""
    task, chosen, solver = task_defaults(family.spec, options), options[PromptOptions], options[SolverOptions]
    plans = isinstance(family, OwnSampling)  # then what is not given is left to it
    height, width = chosen.video_size or (task.size[1], task.size[0])
    high = _high_noise(family, options)
    return {
        "negative": chosen.negative_prompt or "",
        "height": height,
        "width": width,
        "frames": _or(chosen.video_length, None if plans else task.frames),
        "fps": _or(chosen.fps, task.fps),
        "steps": _or(solver.infer_steps, task.steps),
        "guidance": _or(solver.guidance_scale, task.guidance),
        "guidance_high": None if high is None else high.guidance,
        "embedded_guidance": _embedded(task, solver.embedded_cfg_scale),
        "shift": _or(solver.flow_shift, _or(task.shift_of(width, height), None if plans else 1.0)),
        "solver": _or(solver.sample_solver, task.solver),
        "image": chosen.image_path,
        "end_image": chosen.end_image_path,
        "control_images": chosen.control_image_path,
        "control": chosen.control_path,
    }


def _embedded(task: SamplingDefaults, chosen: float | None) -> float | None:
    """The guidance that the transformer is told; None where it has no such input, which a given one is told."""
    if task.embedded_guidance is None and chosen is not None:
        log.warning("--embedded_cfg_scale has no effect: this model has no embedded guidance; see --guidance_scale")
    return None if task.embedded_guidance is None else _or(chosen, task.embedded_guidance)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _tell_what_has_no_effect(
    options: Resolved, entries: Sequence[PromptEntry], requests: Sequence[Request], idle: Collection[str]
) -> None:
    if options.given("negative_prompt") and not any(r.guided for r in requests):
        log.warning("--negative_prompt has no effect: guidance is off at --guidance_scale 1")
    if idle:
        log.warning("without effect, since this model takes no such pictures: %s", ", ".join(sorted(idle)))
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


def _open(family: Family, options: Resolved) -> Opened:
    """The transformer, or two, looked at but not loaded, with their adapters matched."""
    chosen, lora = options[ModelOptions], options[LoraOptions]
    if chosen.dit is None:
        raise UserError("--dit is required: the transformer's checkpoint")
    if len(lora.lora_multiplier) > len(lora.lora_weight):
        raise UserError(
            f"{len(lora.lora_multiplier)} values of --lora_multiplier for {len(lora.lora_weight)} files of "
            "--lora_weight: give at most one per file"
        )
    multipliers = (*lora.lora_multiplier, *([1.0] * (len(lora.lora_weight) - len(lora.lora_multiplier))))
    config = read_model_config(options.as_dict().get("model_config"))
    own, plan = _of_model(family, options), _high_noise(family, options)
    for sentence in family.without_effect(own) if isinstance(family, HasExperts) else ():
        log.warning("%s", sentence)

    def open_one(path: str, merges: Sequence[Merge]) -> OpenDit:
        modes = chosen.attn_mode, chosen.split_attn
        return open_dit(
            family, path, merges=merges, config=config, options=own, attn_mode=modes[0], split_attn=modes[1]
        )

    opened = open_one(chosen.dit, _merges(lora.lora_weight, multipliers, lora))
    if plan is None:
        return opened
    return open_experts(opened, plan, _merges(plan.lora_weight, plan.lora_multiplier, lora), open_one)


def _merges(files: Sequence[str], multipliers: Sequence[float], lora: LoraOptions) -> list[Merge]:
    rows = zip(files, multipliers, strict=True)
    return [LoraMerge.from_file(path, multiplier, strict=lora.strict_lora) for path, multiplier in rows]


def _sample(
    sampler: Sampler,
    requests: Sequence[Request],
    prompts: Prompts,
    seen: pictures.Pictures,
    writer: "Writer",
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


def _load_vae(family: Family, options: Resolved, device: torch.device) -> Vae:
    chosen = options[ModelOptions]
    dtype = DTYPES[chosen.vae_dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    return family.load_vae(str(chosen.vae), device=device, dtype=dtype, options=_own(family, options))


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
