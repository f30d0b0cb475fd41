"""An adapter merged into weights while they are loaded: `W + multiplier * (alpha / rank) * up @ down`, in float32.

`LoraMerge` is what `weights.load.materialize` takes in `merge`. Rows of a delta are computed when their rows of the
weight pass by, so a merge costs no second copy of the model. A weight is merged before it is quantised.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from musubi_tuner.adapters.files import load_lora
from musubi_tuner.adapters.formats import Factors, require_applicable, resolve
from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.load import Delta


@dataclass(frozen=True)
class KeyChoice:
    """Which tensors of a file count, by its own keys. Regular expressions that are searched for; "" says nothing."""

    include: str = ""
    exclude: tuple[str, ...] = ()

    def of(self, tensors: Mapping[str, Tensor], label: str) -> Mapping[str, Tensor]:
        """The tensors that are left. Raises UserError for no expression, and where none is left."""
        wanted, unwanted = _expression(self.include), [_expression(text) for text in self.exclude if text]
        left = {
            key: tensor
            for key, tensor in tensors.items()
            if wanted.search(key) and not any(pattern.search(key) for pattern in unwanted)
        }
        if tensors and not left:
            raise UserError(
                f"LoRA {label}: include {self.include!r} and exclude {', '.join(self.exclude)!r} leave none of its "
                f"{len(tensors)} tensors; its first key is {next(iter(tensors))}"
            )
        return left


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as fault:
        raise UserError(f"pattern {text!r} is no regular expression: {fault}") from fault


@dataclass(frozen=True)
class LoraMerge:
    """A LoRA file's tensors (any spelling) with a multiplier. strict: what does not apply is an error."""

    tensors: Mapping[str, Tensor]
    multiplier: float = 1.0
    strict: bool = False
    label: str = "file"

    @staticmethod
    def from_file(
        path: str | Path, multiplier: float = 1.0, *, strict: bool = False, keys: KeyChoice | None = None
    ) -> "LoraMerge":
        """Read `path`, the tensors of `keys` if given. Raises UserError where it is no LoRA file."""
        tensors, _ = load_lora(path)
        chosen = tensors if keys is None else keys.of(tensors, str(path))
        return LoraMerge(chosen, multiplier, strict, str(path))

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Delta]:
        """Deltas by tensor name; what does not apply is one warning, or an error (see `strict`)."""
        modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        found = resolve(self.tensors, modules)
        require_applicable(found, self.label, modules, strict=self.strict)
        deltas: dict[str, Delta] = {}
        if self.multiplier == 0.0:
            return deltas
        for path, factors in found.modules.items():
            if factors.changes_weight:
                deltas[f"{path}.weight"] = _weight_delta(factors, self.multiplier)
            if factors.diff_b is not None and f"{path}.bias" in shapes:
                deltas[f"{path}.bias"] = _bias_delta(factors.diff_b, self.multiplier)
        return deltas


def _weight_delta(factors: Factors, multiplier: float) -> Delta:
    return lambda first, last: multiplier * factors.delta(first, last)


def _bias_delta(diff: Tensor, multiplier: float) -> Delta:
    return lambda first, last: multiplier * diff[first:last].float()
