"""Adapters go into a model and come out again: `attach` puts `LoraLinear` modules in the slots of its targets.

The `AdapterSet` that comes back owns them: parameters by the keys of their file, loading and saving as tensors, the
multiplier, switching off for comparisons with the base, and `detach`, which restores the model as it was. The base's
weights are untouched all along; merging is a matter of loading (`adapters.merge`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.formats import Factors, lora_name, require_applicable, resolve
from musubi_tuner.adapters.lora import Dropout, DropoutKey, LoraLinear
from musubi_tuner.adapters.targets import NetworkArgs, Targets, find_targets, parse_network_args
from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.linear import Fp8Linear, set_module
from musubi_tuner.weights.sources import some

__all__ = ["AdapterSet", "NetworkArgs", "Norms", "attach", "attach_tensors", "find_targets", "parse_network_args"]


@dataclass(frozen=True)
class Norms:
    """What `limit_norms` did. scaled: modules that were above; mean, largest: of the norms afterwards."""

    scaled: int
    mean: float
    largest: float


class AdapterSet:
    """The adapters of one model, by module path, in the model's order."""

    def __init__(self, model: nn.Module, slots: Mapping[str, LoraLinear], key: DropoutKey) -> None:
        self._model, self._slots, self._key = model, dict(slots), key
        self._shared: list[tuple[nn.Module, Mapping[str, LoraLinear]]] = []

    def share(self, model: nn.Module) -> None:
        """Put the same factors in the slots of another `model` of this architecture: both train and follow them.

        Raises UserError where it lacks a module or has an adapter already.
        """
        known = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Fp8Linear)}
        if missing := [path for path in self._slots if path not in known]:
            raise UserError(f"the second transformer has no linear layer {some(missing)}: it is of another kind")
        slots = {path: slot.beside(_base(model, path)) for path, slot in self._slots.items()}
        _put(model, slots, self._key)
        self._shared.append((model, slots))

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted module paths."""
        return tuple(self._slots)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the file, `lora_unet_...`."""
        return tuple(slot.name for slot in self._slots.values())

    @property
    def modules(self) -> tuple[LoraLinear, ...]:
        return tuple(self._slots.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key in the file, parameter): down and up of each module."""
        for slot in self._slots.values():
            yield f"{slot.name}.lora_down.weight", slot.down
            yield f"{slot.name}.lora_up.weight", slot.up

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def parameter_groups(self, learning_rate: float, loraplus_lr_ratio: float | None = None) -> list[dict[str, Any]]:
        """Optimiser groups: one, or with a ratio a second one of the up factors at `learning_rate * ratio`."""
        if loraplus_lr_ratio is None:
            return [{"params": self.parameters(), "lr": learning_rate}]
        downs = [slot.down for slot in self._slots.values()]
        ups = [slot.up for slot in self._slots.values()]
        return [{"params": downs, "lr": learning_rate}, {"params": ups, "lr": learning_rate * loraplus_lr_ratio}]

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What a LoRA file holds: alpha, down and up of each module, on the CPU, copies, in `dtype` if given."""
        tensors: dict[str, Tensor] = {}
        for slot in self._slots.values():
            tensors[f"{slot.name}.alpha"] = torch.tensor(slot.alpha, dtype=dtype or slot.down.dtype)
            for part, parameter in (("lora_down", slot.down), ("lora_up", slot.up)):
                tensors[f"{slot.name}.{part}.weight"] = parameter.detach().to("cpu", dtype, copy=True)
        return tensors

    def load(self, tensors: Mapping[str, Tensor], *, label: str = "file") -> None:
        """Take factors and alphas from a LoRA file (any spelling) with exactly these modules and ranks."""
        found = resolve(tensors, self._shapes())
        missing = [path for path in self._slots if path not in found.modules]
        wrong = [*found.unmatched, *found.misfits, *missing]
        for path, factors in found.modules.items():
            if factors.rank != self._slots[path].rank or factors.only_merges:
                wrong.append(f"{path} (rank {factors.rank}, this adapter has {self._slots[path].rank})")
        if wrong:
            raise UserError(
                f"LoRA {label} does not fit the adapter of {len(self._slots)} modules: {len(wrong)} differences: "
                f"{some(wrong)}; use the same targets and rank, or take both from the file"
            )
        for path, factors in found.modules.items():
            _fill(self._slots[path], factors)
            for _, slots in self._shared:
                slots[path].alpha = self._slots[path].alpha

    def begin_step(self, seed: int, epoch: int, items: Sequence[int]) -> None:
        """Name the step whose dropout masks are drawn next. Needed only where some dropout is above 0."""
        self._key.begin_step(seed, epoch, tuple(items))

    @torch.no_grad()
    def limit_norms(self, maximum: float) -> Norms:
        """Scale both factors of every module whose product has a Frobenius norm above `maximum` down to it.

        The norm is that of `up @ down * alpha / rank`, without the multiplier; what is below stays as it is.
        """
        norms = [slot.norm() for slot in self._slots.values()]
        for slot, norm in zip(self._slots.values(), norms, strict=True):
            if norm > maximum:
                root = math.sqrt(maximum / norm)
                slot.up.mul_(root)
                slot.down.mul_(root)
        kept = [min(norm, maximum) for norm in norms]
        return Norms(sum(norm > maximum for norm in norms), sum(kept) / len(kept), max(kept))

    @property
    def multiplier(self) -> float:
        return self.modules[0].multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        for slot in self._everywhere():
            slot.multiplier = value

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without its adapters, for the length of a block."""
        every = self._everywhere()
        before = [slot.enabled for slot in every]
        try:
            for slot in every:
                slot.enabled = False
            yield
        finally:
            for slot, enabled in zip(every, before, strict=True):
                slot.enabled = enabled

    def detach(self) -> None:
        """Put the base layers back. The set keeps its factors, so `state_dict` still works."""
        for model, slots in ((self._model, self._slots), *self._shared):
            for path, slot in slots.items():
                if model.get_submodule(path) is slot:
                    set_module(model, path, slot.base)
        self._shared = []

    def _everywhere(self) -> list[LoraLinear]:
        """The modules in every model."""
        return [*self._slots.values(), *(slot for _, slots in self._shared for slot in slots.values())]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: (slot.out_features, slot.in_features) for path, slot in self._slots.items()}


def attach(
    model: nn.Module,
    targets: Targets,
    *,
    rank: int = 4,
    alpha: float | None = 1.0,
    seed: int = 0,
    multiplier: float = 1.0,
    dropout: float | None = None,
    args: NetworkArgs | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterSet:
    """Put a fresh LoRA in the slots of `find_targets(model, targets, args)`; the model computes as before.

    alpha: 0 or None means the rank. dropout: of single low-rank activations. Raises UserError without a target or for
    an impossible rank or dropout.
    """
    args = args or NetworkArgs()
    if rank < 1:
        raise UserError(f"network_dim {rank}: use a rank of 1 or more")
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"network_dropout {dropout}: use a probability from 0 to below 1")
    drops = Dropout(dropout or 0.0, args.rank_dropout, args.module_dropout)
    key = DropoutKey()
    slots: dict[str, LoraLinear] = {}
    for path in find_targets(model, targets, args):
        slots[path] = LoraLinear(
            lora_name(path),
            _base(model, path),
            rank=rank,
            alpha=alpha,
            seed=seed,
            multiplier=multiplier,
            dropout=drops,
            key=key,
            dtype=dtype,
        )
    return _put(model, slots, key)


def attach_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    multiplier: float = 1.0,
    dropout: float | None = None,
    args: NetworkArgs | None = None,
    dtype: torch.dtype = torch.float32,
    strict: bool = True,
    label: str = "file",
) -> AdapterSet:
    """Put the LoRA of a file beside the weights: targets, ranks and alphas are the file's own.

    strict: what does not apply is an error, else one warning. Whole deltas (`.diff`), LoHa and LoKr can only be merged.
    """
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Fp8Linear)
    }
    found = resolve(tensors, linears)
    require_applicable(found, label, linears, strict=strict)
    whole = [path for path, factors in found.modules.items() if factors.only_merges]
    if whole:
        raise UserError(
            f"LoRA {label} holds whole deltas, LoHa or LoKr for {some(whole)}: merge it while loading instead"
        )
    args = args or NetworkArgs()
    drops = Dropout(dropout or 0.0, args.rank_dropout, args.module_dropout)
    key = DropoutKey()
    slots: dict[str, LoraLinear] = {}
    for path in linears:  # the model's order, whatever the file's
        if (factors := found.modules.get(path)) is not None:
            slots[path] = LoraLinear(
                lora_name(path),
                _base(model, path),
                rank=factors.rank,
                alpha=factors.alpha,
                multiplier=multiplier,
                dropout=drops,
                key=key,
                dtype=dtype,
            )
            _fill(slots[path], factors)
    return _put(model, slots, key)


def _base(model: nn.Module, path: str) -> nn.Linear | Fp8Linear:
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear | Fp8Linear):
        raise TypeError(f"{path} is a {type(module).__name__}, not a linear layer")
    return module


def _put(model: nn.Module, slots: Mapping[str, LoraLinear], key: DropoutKey) -> AdapterSet:
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError(f"{type(model).__name__} has an adapter already; detach it first")
    for path, slot in slots.items():
        set_module(model, path, slot.train(slot.base.training))
    return AdapterSet(model, slots, key)


def _fill(slot: LoraLinear, factors: Factors) -> None:
    """Copy a file's factors into a slot of their shapes."""
    assert factors.down is not None
    assert factors.up is not None
    with torch.no_grad():
        slot.down.copy_(factors.down)
        slot.up.copy_(factors.up)
    slot.alpha = factors.alpha or float(factors.rank)
