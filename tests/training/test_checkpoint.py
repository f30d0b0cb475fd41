"""Names and contents of saved files, and that a failed write leaves the old file."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner.adapters.attach import attach
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.training.checkpoint import Names, Saver, lora_file, model_file, output_folder, output_name
from musubi_tuner.training.events import EpochRecord, State, StepRecord
from musubi_tuner.training.retention import Retention
from tiny_models import header_of, tiny_dit

FAMILY = registry.get("wan")


class TwoWeights(torch.optim.SGD):
    """An optimizer with a training and an evaluation version, which tells its mode."""

    mode = "train"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def record_of(step: int, epoch: int) -> StepRecord:
    return StepRecord(step, epoch, 1.0, 1.0, 1.0, {}, 0.1, 1)


@pytest.fixture
def saver(tmp_path):
    optimizer = TwoWeights([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    written = []

    def write(path, metadata):
        written.append((path.name, dict(metadata), optimizer.mode))

    def metadata(step, epoch):
        return {"step": str(step), "epoch": str(epoch)}

    return Saver(Names(tmp_path, "study"), write, metadata, optimizer, Retention(2, 3)), written, optimizer


def test_files_come_when_asked_for_and_are_written_from_the_evaluation_weights(saver):
    saver, written, optimizer = saver
    for step in range(1, 9):
        saver.step_end(record_of(step, (step + 1) // 2))
        if step % 2 == 0:
            saver.epoch_end(EpochRecord(step // 2, step, 1.0, last=step == 8))
    saver.finish(State(8, 4, 0))
    assert [name for name, _, _ in written] == [
        "study-step00000003.safetensors",
        "study-000002.safetensors",
        "study-step00000006.safetensors",
        "study.safetensors",
    ]
    assert [m["step"] for _, m, _ in written] == ["3", "4", "6", "8"]
    assert {mode for _, _, mode in written} == {"eval"}
    assert optimizer.mode == "train"


def test_a_saved_adapter_loads_to_the_same_model_and_carries_its_hash(tmp_path):
    dit = tiny_dit("wan")
    adapters = attach(dit, FAMILY.spec.adapter, rank=2, alpha=1.0, seed=1)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    lora_file(adapters, torch.bfloat16)(tmp_path / "a.safetensors", {"ss_steps": "7"})
    saved = load_file(tmp_path / "a.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    for key, parameter in adapters.named_parameters():
        assert torch.equal(saved[key], parameter.detach().bfloat16())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    raw = (tmp_path / "a.safetensors").read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["ss_steps"] == "7"


def test_a_whole_model_keeps_keys_prefix_and_dtypes_of_its_checkpoint(tmp_path):
    """Saved under the file's own names (here with a repackager's prefix), in its dtypes or the one asked for."""
    plain = header_of("wan")
    prefixed = {f"model.diffusion_model.{key}": info for key, info in plain.tensors.items()}
    header = type(plain)(tensors=prefixed, metadata={"musubi.config": "{}"}, paths=plain.paths)
    dit = tiny_dit("wan")
    model_file(dit, header, FAMILY.rename_dit_key, torch.bfloat16)(tmp_path / "m.safetensors", {"x": "y"})
    saved = load_file(tmp_path / "m.safetensors")
    assert set(saved) == set(prefixed)
    key = "blocks.1.ffn.2.weight"
    assert torch.equal(saved[f"model.diffusion_model.{key}"], dit.state_dict()[key].bfloat16())
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert (file.metadata()["musubi.config"], file.metadata()["x"]) == ("{}", "y")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    adapters = attach(tiny_dit("wan"), FAMILY.spec.adapter, rank=2)
    write, path = lora_file(adapters, None), tmp_path / "a.safetensors"
    write(path, {})
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write(path, {"ss_steps": "2"})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_folder_and_name_are_checked_before_a_run(tmp_path):
    assert output_folder(str(tmp_path / "new/folder")).is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        output_folder(str(tmp_path / "file"))
    assert output_name("study.safetensors") == "study"
    for wrong in ("", "a/b", ".."):
        with pytest.raises(UserError, match="plain file name"):
            output_name(wrong)


def test_processes_of_one_run_do_not_disturb_each_others_look_at_the_folder(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(output_folder, [str(tmp_path)] * 400)) == {tmp_path}
    assert list(tmp_path.iterdir()) == []


def test_metadata_survives_as_text(tmp_path):
    adapters = attach(tiny_dit("wan"), FAMILY.spec.adapter, rank=2)
    text = json.dumps({"caption": "a “red” café"})
    lora_file(adapters, None)(Path(tmp_path) / "a.safetensors", {"ss_datasets": text})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["ss_datasets"] == text
