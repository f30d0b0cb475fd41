import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from musubi_tuner.adapters.files import hashes, load_lora, save_lora
from musubi_tuner.config.errors import UserError


def test_the_golden_file_is_saved_again_as_it_is(reference: Path, tmp_path: Path) -> None:
    path = reference / "golden" / "lora_a_saved_file.safetensors"
    tensors, metadata = load_lora(path)
    given = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    save_lora(tmp_path / "again.safetensors", tensors, given)
    ours, theirs = (tmp_path / "again.safetensors").read_bytes(), path.read_bytes()
    assert len(ours) == len(theirs)
    data = sum(t.nbytes for t in tensors.values())
    assert ours[-data:] == theirs[-data:]
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata() == metadata  # both hashes among them


def test_the_golden_tensors_give_the_golden_hashes(lora: dict[str, Tensor], reference: Path) -> None:
    _, metadata = load_lora(reference / "golden" / "lora_a_saved_file.safetensors")
    assert hashes(lora, metadata)["sshs_model_hash"] == metadata["sshs_model_hash"]


def test_the_legacy_hash_is_that_of_the_file_with_ss_metadata_only() -> None:
    """A file beyond 1 MiB, serialised by the library, cut where the rule says."""
    g = torch.Generator().manual_seed(0)
    for rows in (250_000, 270_000, 400_000):  # the window is beyond, at and inside the data's end
        tensors = {"b.lora_up.weight": torch.randn(rows, generator=g), "a.alpha": torch.tensor(1.0).bfloat16()}
        metadata = {"ss_steps": "10", "modelspec.title": "x", "ss_epoch": "2"}
        only_ss = {"ss_steps": "10", "ss_epoch": "2"}
        whole = safetensors.torch.save(tensors, only_ss)
        expected = hashlib.sha256(whole[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
        assert hashes(tensors, metadata)["sshs_legacy_hash"] == expected
        assert (expected == "e3b0c442") == (len(whole) <= 0x100000)


def test_metadata_does_not_touch_the_model_hash(lora: dict[str, Tensor]) -> None:
    assert hashes(lora, {"ss_a": "1"})["sshs_model_hash"] == hashes(lora, {})["sshs_model_hash"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_files_come_back_in_the_asked_precision(
    lora: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype | None
) -> None:
    save_lora(tmp_path / "a.safetensors", lora, {"ss_network_dim": "4"}, dtype)
    tensors, metadata = load_lora(tmp_path / "a.safetensors")
    assert tensors.keys() == lora.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, lora[key] if dtype is None else lora[key].to(dtype))
    assert metadata["ss_network_dim"] == "4"
    assert metadata["sshs_model_hash"] == hashes(tensors, {})["sshs_model_hash"]


def test_a_file_without_factors_is_told(tmp_path: Path) -> None:
    safetensors.torch.save_file({"blocks.0.q.weight": torch.ones(2)}, tmp_path / "dit.safetensors")
    with pytest.raises(
        UserError, match=r"holds no LoRA factors; its tensors are blocks\.0\.q\.weight: is it a checkpoint"
    ):
        load_lora(tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_lora(tmp_path / "absent.safetensors")
