"""An adapter merged into weights while they are loaded: `W + multiplier * (alpha / rank) * up @ down`, in float32.

`LoraMerge` is what `weights.load.materialize` takes in `merge`. Rows of a delta are computed when their rows of the
weight pass by, so a merge costs no second copy of the model. A weight is merged before it is quantised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from musubi_tuner.adapters.files import load_lora
from musubi_tuner.adapters.formats import Factors, require_applicable, resolve
from musubi_tuner.weights.load import Delta


@dataclass(frozen=True)
class LoraMerge:
    """A LoRA file's tensors (any spelling) with a multiplier. strict: what does not apply is an error."""

    tensors: Mapping[str, Tensor]
    multiplier: float = 1.0
    strict: bool = False
    label: str = "file"

    @staticmethod
    def from_file(path: str | Path, multiplier: float = 1.0, *, strict: bool = False) -> "LoraMerge":
        """Read `path`. Raises UserError where it is no LoRA file."""
        tensors, _ = load_lora(path)
        return LoraMerge(tensors, multiplier, strict, str(path))

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Delta]:
        """Deltas by tensor name; what does not apply is one warning, or an error (see `strict`)."""
        modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        found = resolve(self.tensors, modules)
        require_applicable(found, self.label, modules, strict=self.strict)
        deltas: dict[str, Delta] = {}
        if self.multiplier == 0.0:
            return deltas
        for path, factors in found.modules.items():
            if factors.down is not None or factors.diff is not None:
                deltas[f"{path}.weight"] = _weight_delta(factors, self.multiplier)
            if factors.diff_b is not None and f"{path}.bias" in shapes:
                deltas[f"{path}.bias"] = _bias_delta(factors.diff_b, self.multiplier)
        return deltas


def _weight_delta(factors: Factors, multiplier: float) -> Delta:
    return lambda first, last: multiplier * factors.delta(first, last)


def _bias_delta(diff: Tensor, multiplier: float) -> Delta:
    return lambda first, last: multiplier * diff[first:last].float()
