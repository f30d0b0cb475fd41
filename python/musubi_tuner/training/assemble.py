"""The transformer of a run in working order: load -> attach -> block swap -> checkpointing -> compile."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from musubi_tuner.families.base import Dit
from musubi_tuner.memory.plan import swapped
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.compiling import CompileOptions, compile_blocks, settings_of
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.training.config import ModelOptions, NetworkOptions, OptimizerOptions, RunOptions, SaveOptions
from musubi_tuner.training.model import Trainable, adapter, model_dtype, report_fp8, weight_policy, whole_model
from musubi_tuner.training.prepare import Setting


@dataclass(frozen=True)
class Assembled:
    """training, sampling: how the blocks are run with and without gradients."""

    dit: Dit
    trainable: Trainable
    training: Run
    sampling: Run


def assemble(of: Setting) -> Assembled:
    """Load the model and make what is trained."""
    dit, trainable = _model(of)
    swap = of.memory.install(dit)
    chosen = of.options[RunOptions]
    blocks: Run = direct
    if chosen.gradient_checkpointing:
        blocks = checkpointed(direct, cpu_offload=chosen.gradient_checkpointing_cpu_offload)
    if (compiling := settings_of(of.options[CompileOptions], os.environ)) is not None:
        compile_blocks(dit, of.family.spec.blocks, compiling)
    training = swapped(swap, blocks, recomputed=chosen.gradient_checkpointing)
    return Assembled(dit, trainable, training, swapped(swap))


def _model(of: Setting) -> tuple[Dit, Trainable]:
    """The transformer and what of it is trained. Trained weights are float32 whatever the precision of the rest."""
    model = of.options[ModelOptions]
    place = torch.device("cpu") if of.runtime.sharded else of.runtime.device
    policy = weight_policy(of.family.spec, model, model_dtype(model, of.runtime.dtype))
    dit = of.opened.load(policy, place, host=of.memory.host)
    if model.fp8_report and model.fp8_base and of.runtime.rank == 0:
        report_fp8(dit, of.opened, of.names.folder, of.names.name)
    rate, kept = of.options[OptimizerOptions].learning_rate, of.options[SaveOptions].dtype
    if not model.full_finetune:
        return dit, adapter(dit, of.family.spec, of.options[NetworkOptions], rate=rate, seed=of.seed, save_dtype=kept)
    parts = model.trainable_modules
    return dit, whole_model(dit, of.opened, of.runtime, rate=rate, save_dtype=kept, parts=parts)
