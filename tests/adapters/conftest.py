"""The tiny Wan of the LoRA golden file, as a checkpoint and as loaded models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from musubi_tuner.families import registry
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Header, TensorInfo, open_checkpoint

REFERENCE = Path(__file__).parent.parent / "data" / "reference"


@pytest.fixture
def reference() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(REFERENCE / "golden" / "lora_a.safetensors")


@pytest.fixture(scope="session")
def lora(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA of the golden file, by the keys of a saved file."""
    return {key.removeprefix("lora."): tensor for key, tensor in golden.items() if key.startswith("lora.")}


@pytest.fixture(scope="session")
def checkpoint(golden: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base weights as a checkpoint file."""
    path = tmp_path_factory.mktemp("wan") / "tiny.safetensors"
    weights = {key.removeprefix("w."): tensor for key, tensor in golden.items() if key.startswith("w.")}
    save_file(weights, path, {"musubi.config": json.dumps({"num_heads": 2})})
    return path


Load = Callable[..., nn.Module]


@pytest.fixture
def load(checkpoint: Path) -> Load:
    """load(fp8=False, dtype=None, merge=()) -> the tiny model."""

    def build(*, fp8: bool = False, dtype: torch.dtype | None = None, merge: tuple[object, ...] = ()) -> nn.Module:
        family = registry.get("wan")
        policy = WeightPolicy(dtype, Fp8Policy(family.spec.fp8) if fp8 else None)
        with open_checkpoint(checkpoint) as file:
            model = family.build_dit(file.header)
            materialize(model, file, rename=family.rename_dit_key, policy=policy, merge=merge, progress=False)  # type: ignore[arg-type]
        return model

    return build


@pytest.fixture
def manifest_model() -> Callable[[str], nn.Module]:
    """The real transformer of a published checkpoint, on meta, built from the checkpoint's manifest."""

    def build(name: str) -> nn.Module:
        path = REFERENCE / "checkpoints" / f"{name}.json"
        entries = json.loads(path.read_text())["tensors"]
        tensors = {k: TensorInfo(tuple(e["shape"]), torch.bfloat16, path) for k, e in entries.items()}
        return registry.get("wan").build_dit(Header(tensors, paths=(path,)))

    return build
