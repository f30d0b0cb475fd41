"""The model of a training run, and what of it is trained: an adapter on frozen weights, or every weight.

Loading follows the house's way: header first, the transformer on meta, adapters merged and weights quantised while they
stream in. What is trained comes back as a `Trainable`, which is all that the rest of the run needs to know of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import Norms, attach, attach_tensors, parse_network_args
from musubi_tuner.adapters.files import load_lora
from musubi_tuner.adapters.merge import LoraMerge
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import nearest
from musubi_tuner.families.base import Dit, Family, FamilySpec, HasExperts
from musubi_tuner.memory.placement import DTYPES
from musubi_tuner.nn.experts import expert_at, transformers
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.sampling.models import OpenDit, Opened, open_dit, open_experts
from musubi_tuner.training import fp8_report
from musubi_tuner.training.checkpoint import Write, lora_file, model_file
from musubi_tuner.training.config import ModelOptions, NetworkOptions
from musubi_tuner.training.runtime import LocalRuntime
from musubi_tuner.training.shards import own_part
from musubi_tuner.training.step import Predict
from musubi_tuner.weights.load import Merge
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

log = logging.getLogger(__name__)

DEFAULT_RANK = 4
GENERIC_MODULE = "networks.lora"
GROUP_NAMES = ("unet", "unet plus")
"""Names of an adapter's parameter groups in trackers: all, or with LoRA+ the down and the up factors."""


@dataclass(frozen=True)
class Trainable:
    """What is trained. groups: for the optimizer, each with a name. write: saves it. begin_step: keys its dropout.
    limit_norms: scales what has grown too large. named: the trained tensors by their names in a state."""

    groups: Sequence[Mapping[str, Any]]
    write: Write
    begin_step: Callable[[int, int, tuple[int, ...]], None] | None = None
    rank: int | None = None
    alpha: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    limit_norms: Callable[[], Norms] | None = None
    named: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def watch(self, optimizer: torch.optim.Optimizer, put: Callable[[Mapping[str, float]], None]) -> None:
        """From now on limit the norms (`--scale_weight_norms`) after each step, and tell `put` of them."""
        limit = self.limit_norms
        if limit is None:
            return

        def after_step(*_: object) -> None:
            norms = limit()
            found = {"keys_scaled": norms.scaled, "average_key_norm": norms.mean, "max_key_norm": norms.largest}
            put({f"max_norm/{name}": float(value) for name, value in found.items()})

        optimizer.register_step_post_hook(after_step)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]


def check_adapter(network: NetworkOptions, spec: FamilySpec) -> None:
    """Everything about the adapter that can be known before anything is loaded. Raises UserError."""
    offered = tuple(dict.fromkeys((spec.network_module, GENERIC_MODULE)))
    if network.network_module is not None and network.network_module not in offered:
        raise UserError(f"network_module = {network.network_module!r} is not served: use {' or '.join(offered)}")
    parse_network_args(network.network_args)
    if network.network_weights is not None:
        load_lora(network.network_weights)


def open_model(family: Family, model: ModelOptions, config: Mapping[str, Any] | None, options: Any = None) -> Opened:
    """The transformer, looked at but not loaded, with `base_weights` matched. Raises UserError for what cannot be.

    options: the family's own group for the model. Of two experts both get the `base_weights`.
    """
    plan = family.high_noise(options) if isinstance(family, HasExperts) else None
    for sentence in family.without_effect(options) if isinstance(family, HasExperts) else ():
        log.warning("%s", sentence)
    if plan is not None and model.full_finetune:
        raise UserError(
            "--full_finetune trains the weights of one transformer: leave out --dit_high_noise, and train each expert "
            "in its own run, in its own range of timesteps"
        )
    multipliers = (*model.base_weights_multiplier, *[1.0] * len(model.base_weights))
    merges = [LoraMerge.from_file(p, m, strict=True) for p, m in zip(model.base_weights, multipliers, strict=False)]

    def open_one(path: str, merges: Sequence[Merge]) -> OpenDit:
        return open_dit(
            family,
            path,
            merges=merges,
            config=config,
            options=options,
            attn_mode=model.attn_mode,
            split_attn=model.split_attn,
        )

    opened = open_one(model.dit, merges)
    return opened if plan is None else open_experts(opened, plan, merges, open_one)


def model_dtype(model: ModelOptions, computing: torch.dtype | None) -> torch.dtype:
    """The dtype of weights that are not FP8: `dit_dtype`, else that of computing (None: float32). With `full_finetune`
    float32, or bfloat16 by `full_bf16`. Raises UserError where these cannot be computed with."""
    chosen = "bfloat16" if model.full_bf16 and model.full_finetune else model.dit_dtype
    if chosen is None:
        return torch.float32 if model.full_finetune else computing or torch.float32
    if computing is None and DTYPES[chosen] != torch.float32:
        raise UserError(f"{chosen} weights need --mixed_precision bf16 (or fp16): without, float32 is computed")
    return DTYPES[chosen]


def weight_policy(spec: FamilySpec, model: ModelOptions, dtype: torch.dtype) -> WeightPolicy:
    """FP8 for the family's targets where `fp8_base` says so; everything else in `dtype`."""
    if not model.fp8_base:
        return WeightPolicy(dtype)
    fp8 = Fp8Policy(
        spec.fp8,
        mode=model.fp8_mode,  # type: ignore[arg-type]  # a choice of the option
        block_size=model.fp8_block_size,
        fmt=model.fp8_format,  # type: ignore[arg-type]  # the same
        scaled=model.fp8_scaled,
        allow_prequantized=model.allow_prequantized,
        extra_exclude=model.fp8_exclude,
    )
    return WeightPolicy(dtype, fp8)


def report_fp8(dit: Dit, opened: Opened, folder: Path, name: str) -> None:
    """The error of every FP8 weight of `dit`, to the log and to `NAME-fp8.tsv` (`training.fp8_report`); of a second
    expert to `NAME-high-fp8.tsv`."""
    files = (opened,) if isinstance(opened, OpenDit) else (opened.low, opened.high)
    for part, file, mark in zip(transformers(dit), files, ("", "-high"), strict=False):
        with open_checkpoint(file.path) as checkpoint:
            rows = fp8_report.measure(part, checkpoint, opened.family.rename_dit_key)
        fp8_report.write(rows, folder / f"{name}{mark}-fp8.tsv")


def predictor(family: Family, dit: Dit, blocks: Run = direct) -> Predict:
    """A family's transformer as the step wants it; of two experts the one of the batch's noise level."""

    def predict(x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return family.predict(expert_at(dit, t), x_t, t, cond, run=blocks)

    return predict


def adapter(
    dit: Dit, spec: FamilySpec, network: NetworkOptions, *, rate: float, seed: int, save_dtype: torch.dtype | None
) -> Trainable:
    """A fresh adapter in the slots of `dit`, or that of `network_weights`; two experts share one."""
    args = parse_network_args(network.network_args)
    rank = network.network_dim
    tensors = None if network.network_weights is None else load_lora(network.network_weights)[0]
    dit, *others = transformers(dit)
    if tensors is not None and (rank is None or network.dim_from_weights):
        drop = network.network_dropout
        adapters = attach_tensors(dit, tensors, dropout=drop, args=args, label=str(network.network_weights))
        rank = max(module.rank for module in adapters.modules)
    else:
        rank = rank or DEFAULT_RANK
        drop = network.network_dropout
        adapters = attach(dit, spec.adapter, rank=rank, alpha=network.network_alpha, seed=seed, dropout=drop, args=args)
        if tensors is not None:
            adapters.load(tensors, label=str(network.network_weights))
    for other in others:
        adapters.share(other)
    groups = [
        {**group, "name": name}
        for group, name in zip(adapters.parameter_groups(rate, args.loraplus_lr_ratio), GROUP_NAMES, strict=False)
    ]
    count = sum(p.numel() for p in adapters.parameters())
    log.info("LoRA of rank %d on %d modules, %s parameters", rank, len(adapters.paths), f"{count:,}")
    given = {pair.partition("=")[0].strip() for pair in network.network_args}
    arguments = {key: value for key, value in asdict(args).items() if key in given}
    alpha = adapters.modules[0].alpha
    limit = network.scale_weight_norms
    limit_norms = None if limit is None else partial(adapters.limit_norms, limit)
    return Trainable(
        groups,
        lora_file(adapters, save_dtype),
        adapters.begin_step,
        rank,
        alpha,
        arguments,
        limit_norms,
        named=dict(adapters.named_parameters()),
    )


def whole_model(
    dit: Dit,
    opened: Opened,
    runtime: LocalRuntime,
    *,
    rate: float,
    save_dtype: torch.dtype | None,
    parts: Sequence[str] = (),
) -> Trainable:
    """Every weight of `dit`, unfrozen, in shards where `runtime` says so; saved in the layout of its checkpoint.

    parts: train only weights whose name has one of them. Raises UserError where one fits no name.
    """
    with open_checkpoint(opened.path) as checkpoint:
        header = checkpoint.header
    wanted = _named(dit, parts)
    dit.requires_grad_(False)
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(name in wanted)
    runtime.shard(dit, opened.family.spec.blocks)
    every = dict(dit.named_parameters())
    named, total = {name: parameter for name, parameter in every.items() if name in wanted}, len(every)
    parameters = list(named.values())
    count, here = (sum(p.numel() for p in of) for of in (parameters, map(own_part, parameters)))
    some_here = f", {here:,} of them here" if here < count else ""
    log.info("training %s parameters%s in %d of %d tensors", f"{count:,}", some_here, len(named), total)
    group = {"params": parameters, "lr": rate, "name": "all"}
    write = model_file(dit, header, opened.family.rename_dit_key, save_dtype, leads=runtime.rank == 0)
    return Trainable([group], write, named=named)


def _named(dit: Dit, parts: Sequence[str]) -> frozenset[str]:
    """The names of weights that have one of `parts` in them; all of them without any."""
    every = [name for name, _ in dit.named_parameters()]
    wanted = frozenset(name for name in every if not parts or any(part in name for part in parts))
    if unused := [part for part in parts if not any(part in name for name in wanted)]:
        close = nearest(unused[0], {piece for name in every for piece in name.split(".")}, 0.5)
        raise UserError(
            f"trainable_modules: no weight has {', '.join(map(repr, unused))} in its name"
            + (f"; did you mean {close}?" if close else "")
        )
    return wanted
