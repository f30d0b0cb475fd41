"""Options of training, one frozen dataclass per consumer; `training.checks` judges them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.data.batches import DataOptions
from musubi_tuner.flow import timesteps
from musubi_tuner.flow.timesteps import DISTRIBUTIONS, TimestepShape
from musubi_tuner.flow.weighting import WEIGHTS
from musubi_tuner.memory.placement import DTYPES, dtype_name
from musubi_tuner.memory.plan import SwapOptions
from musubi_tuner.nn.attention import MODES
from musubi_tuner.nn.compiling import CompileOptions
from musubi_tuner.optim.schedules import SCHEDULES, steps_or_ratio
from musubi_tuner.training.draws import BeginStep, Buckets, KeyedDraws
from musubi_tuner.training.hub import HubOptions
from musubi_tuner.training.machine import MachineOptions
from musubi_tuner.training.retention import StateOptions

SAVE_DTYPES = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    dit: str = option("", help="checkpoint of the diffusion transformer", required=True, metavar="FILE")
    fp8_base: bool = option(False, help="keep the frozen linear weights in FP8")
    fp8_scaled: bool = option(False, help="quantise them with block scales (needs fp8_base); without, a plain cast")
    allow_prequantized: bool = option(False, help="take FP8 checkpoints that other tools quantised as they are")
    fp8_mode: str = option("block", help="what shares a scale in fp8_scaled", choices=("block", "channel", "tensor"))
    fp8_block_size: int = option(64, help="values of a row that share a scale, with block", minimum=32, maximum=256)
    fp8_format: str = option("e4m3", help="FP8 format: e4m3 is finer, e5m2 reaches further", choices=("e4m3", "e5m2"))
    fp8_exclude: tuple[str, ...] = option(
        (), help="parts of weight names to keep in high precision, beside the family's", metavar="TEXT"
    )
    fp8_report: bool = option(False, help="measure the error of every FP8 weight, log the worst, write all to a file")
    attn_mode: str = option(
        "sdpa",
        help="attention implementation",
        choices=MODES,
        shorthand={
            "--sdpa": "sdpa",
            "--flash_attn": "flash",
            "--flash3": "flash3",
            "--sage_attn": "sageattn",
            "--xformers": "xformers",
        },
    )
    split_attn: bool = option(False, help="attend sample by sample where captions of a batch have different lengths")
    base_weights: tuple[str, ...] = option((), help="LoRA files to merge into the base before training")
    base_weights_multiplier: tuple[float, ...] = option(
        (), help="a multiplier for each of base_weights; 1 if not given"
    )
    dit_dtype: str | None = option(
        None,
        help="dtype of the frozen weights where they are not FP8; that of mixed_precision if not given",
        choices=tuple(DTYPES),
        parse=dtype_name,
    )
    full_finetune: bool = option(False, help="train every weight of the transformer in place of an adapter")
    trainable_modules: tuple[str, ...] = option(
        (), help="with full_finetune, train only weights whose name has one of these parts", metavar="TEXT"
    )
    full_bf16: bool = option(False, help="with full_finetune, keep weights and gradients in bfloat16")
    full_fp16: bool = option(False, help="not served: gradients in float16 underflow; use full_bf16")


@dataclass(frozen=True)
class NetworkOptions:
    """Adapter"""

    network_module: str | None = option(None, help="kind of adapter; the family's LoRA if not given")
    network_dim: int | None = option(None, help="rank; 4, or that of network_weights, if not given", minimum=1)
    network_alpha: float = option(
        1.0, help="strength: the adapter's product is scaled by alpha / rank; 0 means the rank"
    )
    network_dropout: float | None = option(None, help="dropout of the low-rank activations", minimum=0, below=1)
    network_args: tuple[str, ...] = option((), help="key=value arguments of the adapter", metavar="KEY=VALUE")
    network_weights: str | None = option(None, help="LoRA file to start from", metavar="FILE")
    dim_from_weights: bool = option(False, help="take every module's rank and alpha from network_weights")
    scale_weight_norms: float | None = option(
        None, help="after each step, scale every module's product down to this Frobenius norm", above=0
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning rate"""

    optimizer_type: str = option("AdamW", help="AdamW, AdamW8bit, AdaFactor, a class of torch.optim, or package.Class")
    optimizer_args: tuple[str, ...] = option((), help="key=literal arguments of the optimizer", metavar="KEY=VALUE")
    learning_rate: float = option(2e-6, help="base learning rate", above=0)
    max_grad_norm: float = option(1.0, help="clip the joint gradient norm; 0 does not clip", minimum=0)
    lr_scheduler: str = option("constant", help=f"schedule of the rate: {', '.join(SCHEDULES)}")
    lr_warmup_steps: int | float = option(
        0, help="length of the warm-up: steps, a ratio of all steps, or a percentage", parse=steps_or_ratio, minimum=0
    )
    lr_decay_steps: int | float = option(
        0, help="length of the decay of warmup_stable_decay, in the same forms", parse=steps_or_ratio, minimum=0
    )
    lr_scheduler_num_cycles: int = option(1, help="restarts or cycles of the cosine schedules", minimum=1)
    lr_scheduler_power: float = option(1.0, help="exponent of polynomial", above=0)
    lr_scheduler_timescale: int | None = option(
        None, help="time scale of inverse_sqrt; the warm-up's length", minimum=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, help="floor of the rate as a fraction of it", minimum=0, maximum=1
    )
    lr_scheduler_type: str = option("", help="a scheduler class of torch or package.Class; wins over lr_scheduler")
    lr_scheduler_args: tuple[str, ...] = option((), help="key=literal arguments of the schedule", metavar="KEY=VALUE")


@dataclass(frozen=True)
class RunOptions:
    """Length and precision of the run"""

    max_train_steps: int = option(1600, help="optimiser steps", minimum=1)
    max_train_epochs: int | None = option(None, help="epochs; replaces max_train_steps", minimum=1)
    gradient_accumulation_steps: int = option(1, help="batches per optimiser step", minimum=1)
    gradient_checkpointing: bool = option(False, help="recompute activations in the backward pass to save memory")
    gradient_checkpointing_cpu_offload: bool = option(False, help="keep the checkpointed activations in CPU memory")
    mixed_precision: str | None = option(
        None, help="autocast precision; the launcher's if not given", choices=("no", "fp16", "bf16")
    )
    seed: int | None = option(None, help="seed of noise, timesteps, order and initial weights; random if not given")


@dataclass(frozen=True)
class TimestepOptions:
    """Timesteps and loss"""

    timestep_sampling: str = option("sigma", help="distribution of the training time t", choices=tuple(DISTRIBUTIONS))
    discrete_flow_shift: float = option(1.0, help="shift of t towards noise, for timestep_sampling = shift", above=0)
    sigmoid_scale: float = option(1.0, help="spread of the sigmoid samplers", above=0)
    weighting_scheme: str = option("none", help="weight of the loss, or density of sigma", choices=tuple(WEIGHTS))
    logit_mean: float = option(0.0, help="mean of logit_normal and of the log-SNR samplers")
    logit_std: float = option(1.0, help="standard deviation of the same", above=0)
    mode_scale: float = option(1.29, help="parameter of the mode density", minimum=-1, maximum=1.752)
    min_timestep: int | None = option(None, help="lower end of t x 1000 (1000 is noise)", minimum=0, maximum=999)
    max_timestep: int | None = option(None, help="upper end of t x 1000", minimum=1, maximum=1000)
    preserve_distribution_shape: bool = option(False, help="cut the distribution to the range instead of squeezing it")
    num_timestep_buckets: int | None = option(
        None, help="draw t from this many buckets equally often in an epoch; 0 and 1 do not", minimum=0
    )
    show_timesteps: str | None = option(
        None,
        help="show what would be sampled, as a PNG in output_dir or as text, and stop",
        choices=("image", "console"),
    )
    timestep_offset: float = option(
        0.0, help="added to the timestep (0..1000) that the model is told; 1 is what the established trainer does"
    )

    @property
    def range(self) -> tuple[float, float]:
        """The range of t in [0, 1]."""
        low = 0 if self.min_timestep is None else self.min_timestep
        return low / 1000, (1000 if self.max_timestep is None else self.max_timestep) / 1000

    def draws(
        self, seed: int, begin_step: BeginStep | None, buckets: Buckets | None, boundary: float | None
    ) -> KeyedDraws:
        """The numbers of a run; `boundary` between two experts is compared with t after `timestep_offset` is added."""
        before = None if boundary is None else boundary - self.timestep_offset / 1000
        return KeyedDraws(seed, self.distribution, begin_step, buckets, before)

    @property
    def stratified(self) -> bool:
        return (self.num_timestep_buckets or 0) > 1

    @property
    def shape(self) -> TimestepShape:
        return TimestepShape(
            sigmoid_scale=self.sigmoid_scale,
            shift=self.discrete_flow_shift,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
            density=self.weighting_scheme,
        )

    def distribution(self, latent_shape: Sequence[int]) -> timesteps.Distribution:
        """The distribution of t for latents [C, F, H, W]. Raises UserError for an impossible range."""
        low, high = self.range
        try:
            return timesteps.distribution(
                self.timestep_sampling,
                latent_shape,
                self.shape,
                low=low,
                high=high,
                truncate=self.preserve_distribution_shape,
            )
        except ValueError as fault:
            raise UserError(f"timesteps: {fault}") from fault


@dataclass(frozen=True)
class SaveOptions:
    """Saving"""

    output_dir: str = option("", help="folder of the files that are written", required=True, metavar="FOLDER")
    output_name: str = option("", help="base name of the files", required=True, metavar="NAME")
    save_precision: str | None = option(
        None, help="dtype of saved weights; fp32 if not given", choices=tuple(SAVE_DTYPES)
    )
    save_every_n_epochs: int | None = option(None, help="save after every n-th epoch", minimum=1)
    save_every_n_steps: int | None = option(None, help="save after every n-th step", minimum=1)
    training_comment: str | None = option(None, help="free text for the metadata")
    no_metadata: bool = option(False, help="write only the metadata that loaders need")
    metadata_title: str | None = option(None, help="title; output_name if not given")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="licence")
    metadata_tags: str | None = option(None, help="tags, separated by commas")
    metadata_reso: str | None = option(None, help="resolution, as 1280x720")
    metadata_arch: str | None = option(None, help="architecture id in place of the family's")

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of saved tensors, None: as they are trained."""
        return None if self.save_precision is None else SAVE_DTYPES[self.save_precision]


@dataclass(frozen=True)
class LogOptions:
    """Logging"""

    logging_dir: str | None = option(None, help="folder of logs; each run gets a folder of its own", metavar="FOLDER")
    log_with: str | None = option(
        None,
        help="where numbers and previews go; tensorboard where logging_dir is given",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(None, help="start of the run's folder name, before the date")
    log_tracker_name: str | None = option(None, help="name of the tracker's folder inside it; project of wandb")
    log_tracker_config: str | None = option(
        None, help="TOML file; [tensorboard] and [wandb] are arguments of their writers", metavar="FILE"
    )
    wandb_run_name: str | None = option(None, help="name of the run in wandb")
    wandb_api_key: str | None = option(None, help="key of wandb for this run; better in the variable WANDB_API_KEY")
    log_config: bool = option(False, help="write the option values to the tracker")

    @property
    def boards(self) -> tuple[str, ...]:
        """tensorboard, wandb, both or none."""
        if self.log_with == "all":
            return ("tensorboard", "wandb")
        return (self.log_with or "tensorboard",) if self.log_with or self.logging_dir else ()


@dataclass(frozen=True)
class SampleOptions:
    """Previews"""

    sample_prompts: str | None = option(None, help="file of prompts to render during training", metavar="FILE")
    sample_every_n_steps: int | None = option(None, help="render after every n-th step", minimum=1)
    sample_every_n_epochs: int | None = option(None, help="render after every n-th epoch; wins over steps", minimum=1)
    sample_at_first: bool = option(False, help="render once before training")
    vae: str | None = option(None, help="VAE checkpoint, to decode previews", metavar="FILE")
    vae_dtype: str | None = option(
        None,
        help="dtype of the VAE; bfloat16 on CUDA and float32 elsewhere if not given",
        choices=tuple(DTYPES),
        parse=dtype_name,
    )


GROUPS: tuple[type, ...] = (
    ModelOptions,
    DataOptions,
    NetworkOptions,
    OptimizerOptions,
    RunOptions,
    SwapOptions,
    CompileOptions,
    TimestepOptions,
    SaveOptions,
    StateOptions,
    LogOptions,
    SampleOptions,
    HubOptions,
    MachineOptions,
)
