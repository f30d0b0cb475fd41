"""Reading the golden fixtures: weights, inputs and expected outputs of tiny models, and how they are compared."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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


def fixture_sinusoid(timestep: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`nn.modulation.sinusoid` with the float32 frequencies of the machine that made the fixtures.

    torch's exp of float32 is good to one unit in the last place and differs between processors. A guidance of 10000
    times such a unit moves outputs by 1.5e-5 and gradients by 2.5e-5, which is all of the tolerance, so parity is
    tested with the fixtures' own: the correctly rounded exp of the float32 exponents but for one, which is a unit more.
    `tests/nn/test_modulation.py` holds ours to a unit of these.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=dtype) * (-math.log(10000.0) / half)
    frequencies = exponents.double().exp().to(dtype)
    if dtype == torch.float32 and half == 128:
        frequencies[12] = torch.nextafter(frequencies[12], torch.tensor(1.0))
    angles = torch.outer(timestep.to(dtype), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
