"""Options of the generate command, in the established names."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved, option
from musubi_tuner.families.base import Family, FamilySpec, HasExperts, HasFolder, HighNoise, SamplingDefaults
from musubi_tuner.flow.solvers import SOLVERS
from musubi_tuner.memory.placement import DTYPES, dtype_name
from musubi_tuner.nn.attention import MODES
from musubi_tuner.nn.compiling import MODES as COMPILE_MODES
from musubi_tuner.nn.compiling import CompileOptions, CompileSettings, settings_of
from musubi_tuner.sampling.request import MAX_SEED, MAX_STEPS

log = logging.getLogger(__name__)

OUTPUT_TYPES = ("video", "images", "latent", "both", "latent_images")
_ATTENTION = {"torch": "sdpa", "flash2": "flash"}


@dataclass(frozen=True)
class ModelOptions:
    """Models"""

    dit: str | None = option(None, help="transformer checkpoint: a file, the first shard, or a folder", metavar="FILE")
    vae: str | None = option(None, help="VAE checkpoint; not needed for --output_type latent", metavar="FILE")
    vae_dtype: str | None = option(
        None,
        help="dtype of the VAE; bfloat16 on CUDA and float32 elsewhere if not given",
        choices=tuple(DTYPES),
        parse=dtype_name,
    )
    dit_dtype: str | None = option(
        None,
        help="dtype that the transformer computes in, and of its weights where they are not FP8; the checkpoint's if "
        "not given",
        choices=tuple(DTYPES),
        parse=dtype_name,
    )
    fp8: bool = option(False, help="keep the transformer's large weights in FP8; without --fp8_scaled by a plain cast")
    fp8_scaled: bool = option(False, help="make the FP8 weights with one scale per 64 values; needs --fp8")
    fp8_fast: bool = option(
        False,
        help="multiply FP8 weights with activations of 8 bits too: faster, with an error that is measured and told "
        "once; needs --fp8",
    )
    allow_prequantized: bool = option(False, help="accept an FP8 checkpoint that another tool has made")
    attn_mode: str = option(
        "sdpa",
        help="attention: torch's own (sdpa) or an installed library",
        choices=MODES,
        parse=lambda text: _ATTENTION.get(text, text),
    )
    split_attn: bool = option(False, help="attend sample by sample where captions of a batch have different lengths")
    device: str | None = option(None, help="where to compute, e.g. cuda:1 or cpu; CUDA when present if not given")


@dataclass(frozen=True)
class LoraOptions:
    """LoRA"""

    lora_weight: tuple[str, ...] = option((), help="LoRA files, merged into the weights while they are loaded")
    lora_multiplier: tuple[float, ...] = option((), help="strength of each LoRA file in turn; 1 where none is given")
    include_patterns: tuple[str, ...] = option(
        (),
        help="for each LoRA file in turn, a regular expression: only keys of the file in which it is found count; an "
        "empty one says nothing",
        metavar="PATTERN",
    )
    exclude_patterns: tuple[str, ...] = option(
        (), help="the same for keys that do not count; exclude wins over include", metavar="PATTERN"
    )
    exclude_single_blocks: bool = option(False, help="leave what LoRA files hold for single-stream blocks out")
    save_merged_model: str | None = option(
        None,
        help="write the transformer with the LoRA files merged into it, in the checkpoint's own layout and precision "
        "(or dit_dtype), and stop",
        metavar="FILE",
    )
    strict_lora: bool = option(False, help="stop when any module of a LoRA file finds no place, instead of a warning")


@dataclass(frozen=True)
class PromptOptions:
    """What to sample"""

    prompt: str | None = option(None, help="text to sample from")
    negative_prompt: str | None = option(None, help="text to lead away from, where guidance is on; empty if not given")
    from_file: str | None = option(
        None,
        help="prompt file: a prompt a line with its own --w --h --f --d --s --g --l --fs --n --i --ei --ci --cim --cn",
        metavar="FILE",
    )
    interactive: bool = option(False, help="read such lines from the terminal, with the models kept loaded")
    image_path: str | None = option(None, help="picture that the video begins with, or goes on from", metavar="FILE")
    end_image_path: str | None = option(None, help="picture that the video ends with", metavar="FILE")
    control_image_path: tuple[str, ...] = option((), help="control pictures", metavar="FILE")
    control_image_mask_path: tuple[str, ...] = option(
        (),
        help="for each control picture in turn, what of it counts: white; the picture's opacity if not given",
        metavar="FILE",
    )
    one_frame_auto_resize: bool = option(
        False,
        help="a single picture takes the shape of its first control (or start) picture, with the area of video_size",
    )
    control_path: str | None = option(
        None, help="clip that controls frame by frame: a video, or a folder of pictures", metavar="FILE"
    )
    video_path: str | None = option(
        None, help="video to begin from, in place of noise alone; see strength", metavar="FILE"
    )
    strength: float = option(
        0.8,
        help="with video_path: the part of the steps that are made, 1 for all (nothing of the video is left)",
        above=0,
        maximum=1,
    )
    video_size: tuple[int, int] | None = option(
        None, help="height and width in pixels, in this order; the task's if not given", minimum=1
    )
    video_length: int | None = option(None, help="number of frames, 4 k + 1; the task's if not given", minimum=1)
    fps: int | None = option(None, help="frames per second of the written video; the task's if not given", minimum=1)
    seed: int | None = option(None, help="names the noise; random if not given, and told", minimum=0, maximum=MAX_SEED)
    cpu_noise: bool = option(False, help="accepted for old command lines: noise is always drawn on the CPU")


@dataclass(frozen=True)
class SolverOptions:
    """Denoising"""

    infer_steps: int | None = option(
        None, help="denoising steps; the task's if not given", minimum=1, maximum=MAX_STEPS
    )
    guidance_scale: float | None = option(
        None, help="scale of classifier-free guidance; 1 turns it off and halves the time; the task's if not given"
    )
    guidance_rescale: float = option(
        0.0,
        help="share of guidance's contrast that is taken back to that of the prompt alone, 0 to 1",
        minimum=0,
        maximum=1,
    )
    embedded_cfg_scale: float | None = option(
        None, help="guidance that a distilled transformer is told as an input; the task's if not given", minimum=0
    )
    flow_shift: float | None = option(
        None, help="more than 1 spends more steps near noise; the task's if not given", above=0
    )
    sample_solver: str | None = option(
        None, help="solver: " + ", ".join(f"{n} ({s.about})" for n, s in SOLVERS.items()), choices=tuple(SOLVERS)
    )
    cfg_batch: bool = option(
        False, help="guidance by one call of twice the batch: faster for small models, more memory"
    )
    sample_batch_size: int = option(1, help="prompts of one size that are sampled together", minimum=1)


@dataclass(frozen=True)
class OutputOptions:
    """Output"""

    save_path: str = option("", help="folder that the samples are written to", required=True, metavar="FOLDER")
    output_type: str = option(
        "video",
        help="video (PNG where there is one frame), images (one PNG per frame), latent, both (video and latent), "
        "latent_images (latent and images)",
        choices=OUTPUT_TYPES,
    )
    latent_path: tuple[str, ...] = option((), help="decode these latent files instead of sampling")
    trim_tail_frames: int = option(0, help="frames to drop from the end of each sample", minimum=0)
    no_metadata: bool = option(False, help="write files without the prompt and settings that made them")


@dataclass(frozen=True)
class CompileArgs:
    """Compilation, in older words"""

    compile_args: tuple[str, str, str, str] | None = option(
        None,
        help="with compile: backend, mode, dynamic and fullgraph in one; the compile_* options are clearer",
        metavar="WORD",
    )


def compile_settings(options: Resolved, environment: Mapping[str, str]) -> CompileSettings | None:
    """What to compile the blocks with; None for nothing. Raises UserError."""
    chosen, words = options[CompileOptions], options[CompileArgs].compile_args
    if words is not None and chosen.compile:
        backend, mode, dynamic, fullgraph = words
        if mode not in COMPILE_MODES or not {dynamic.lower(), fullgraph.lower()} <= {"true", "false"}:
            raise UserError(
                f"--compile_args {' '.join(words)}: give backend, mode ({', '.join(COMPILE_MODES)}), dynamic and "
                "fullgraph (True or False)"
            )
        chosen = replace(
            chosen,
            compile_backend=backend,
            compile_mode=mode,
            compile_dynamic=dynamic.lower(),
            compile_fullgraph=fullgraph.lower() == "true",
        )
    elif words is not None:
        log.warning("--compile_args has no effect without --compile")
    return settings_of(chosen, environment)


def task_defaults(spec: FamilySpec, options: Resolved) -> SamplingDefaults:
    """Sampling defaults of the family's `--task`, of its default task where the command has no such option."""
    task = options.as_dict().get("task") or spec.default_task
    if task not in spec.tasks:
        raise UserError(f"--task {task}: use one of {', '.join(spec.tasks)}")
    return spec.tasks[task]


def own_options(family: Family, options: Resolved) -> Any:
    """The family's first own group, which its encoders, VAE and sampling are told by; None where it has none."""
    groups = family.option_groups("generate")
    return options[groups[0]] if groups else None


def model_options(family: Family, options: Resolved) -> Any:
    """The family's group of the model, which it is built by; None where it has none."""
    groups = family.option_groups("generate")[1:]
    return options[groups[0]] if groups else None


def located(family: Family, options: Resolved) -> Resolved:
    """The options with files of a published folder, where one is named, in place of those not given."""
    found = family.in_folder(model_options(family, options)) if isinstance(family, HasFolder) else {}
    for name, path in found.items():
        if not options.given(name):
            log.info("%s = %s", name, path)
    return options.filled(found, "--ckpt_dir")


def high_noise(family: Family, options: Resolved) -> HighNoise | None:
    """The second transformer that the options name."""
    return family.high_noise(model_options(family, options)) if isinstance(family, HasExperts) else None
