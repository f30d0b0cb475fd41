"""Reading the golden fixtures: weights, inputs and expected outputs of tiny models, and how they are compared."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

REFERENCE = Path(__file__).parent / "data" / "reference"
TOLERANCE = 2e-5
"""Relative norm to which another implementation must agree; see the reference's README for what it can see."""


@dataclass(frozen=True)
class Golden:
    """One case: `weights` by checkpoint key, `inputs` and `outputs` by name, `config` of the tiny model."""

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    config: dict[str, Any]


def golden(case: str) -> Golden:
    """The case of that name."""
    parts: dict[str, dict[str, Tensor]] = {"w": {}, "in": {}, "out": {}, "mid": {}}
    with safe_open(REFERENCE / "golden" / f"{case}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 the reader is no mapping
            part, _, name = key.partition(".")
            parts[part][name] = file.get_tensor(key)
        config = json.loads(file.metadata()["json"])["config"]
    return Golden(parts["w"], parts["in"], parts["out"], config)


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a published checkpoint."""
    content = json.loads((REFERENCE / "checkpoints" / f"{name}.json").read_text(encoding="utf-8"))
    return {key: tuple(tensor["shape"]) for key, tensor in content["tensors"].items()}


def distance(mine: Tensor, reference: Tensor) -> float:
    """Relative norm |mine - reference| / |reference| in float64."""
    assert mine.shape == reference.shape, f"{tuple(mine.shape)} against {tuple(reference.shape)}"
    return ((mine.double() - reference.double()).norm() / reference.double().norm()).item()
