import errno
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.sources import SAFETENSORS_DTYPES
from musubi_tuner.weights.write import atomic_file, atomic_save_safetensors, data_sha256


def mixed() -> dict[str, torch.Tensor]:
    """Every dtype of the format twice, names against the order of dtypes, plus odd shapes and layouts."""
    tensors: dict[str, torch.Tensor] = {"empty": torch.empty(0, 3), "strided": torch.arange(12.0).reshape(3, 4).t()}
    for i, dtype in enumerate(SAFETENSORS_DTYPES.values()):
        tensors[f"{'zyx'[i % 3]}{i}"] = torch.arange(3 + i).to(torch.float32).to(dtype)
        tensors[f"a{i}"] = torch.ones(()).to(dtype)
    return tensors


def parts(path: Path) -> tuple[dict[str, object], bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_the_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    tensors, metadata = mixed(), {"a": "1", "ü": "日本"}
    atomic_save_safetensors(tmp_path / "ours.safetensors", tensors, metadata)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs.safetensors", metadata)
    assert parts(tmp_path / "ours.safetensors") == parts(tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size
    loaded = load_file(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape
        assert loaded[name].dtype == tensor.dtype
    assert torch.equal(loaded["strided"], tensors["strided"])


def test_the_hash_is_that_of_the_data_part(tmp_path: Path) -> None:
    tensors = mixed()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors", {"k": "v"})
    assert data_sha256(tensors) == hashlib.sha256(parts(tmp_path / "m.safetensors")[1]).hexdigest()


def test_metadata_must_be_text_and_dtypes_known(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="metadata 'rank' is int: values must be strings"):
        atomic_save_safetensors(path, {"a": torch.ones(1)}, {"rank": 4})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"'c' is torch\.complex64"):
        atomic_save_safetensors(path, {"c": torch.ones(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    atomic_save_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def fail_half_way() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "told"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission"), (errno.EIO, "Input/output error")],
)
def test_a_failing_disk_is_one_sentence_and_keeps_the_old_file(tmp_path: Path, code: int, told: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")

    def fail_like_a_disk() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=told) as caught:
        fail_like_a_disk()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        atomic_save_safetensors(tmp_path / "file" / "m.safetensors", {"a": torch.ones(1)})


def test_missing_folders_are_made(tmp_path: Path) -> None:
    atomic_save_safetensors(tmp_path / "new" / "deep" / "m.safetensors", {"a": torch.ones(2)})
    assert load_file(tmp_path / "new" / "deep" / "m.safetensors")["a"].tolist() == [1.0, 1.0]


KILLED = """
import sys
import torch
from musubi_tuner.weights.write import atomic_save_safetensors
print("ready", flush=True)
for i in range(1, 100000):
    atomic_save_safetensors(sys.argv[1], {"a": torch.full((2_000_000,), float(i)), "n": torch.tensor(float(i))})
"""


def killed_while_saving(path: Path, pause: float) -> bool:
    """Start a process that saves to `path` without end, kill it; True where that hit it while it was writing."""
    before = set(path.parent.iterdir())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    child.stdout.readline()
    while not path.exists() and child.poll() is None:
        time.sleep(0.005)
    time.sleep(pause)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return bool(set(path.parent.iterdir()) - before - {path})


def test_a_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for attempt in range(8):
        in_the_middle = killed_while_saving(path, 0.05 + 0.03 * attempt)
        with safe_open(path, "pt") as file:
            tensor, number = file.get_tensor("a"), file.get_tensor("n")
        assert tensor.shape == (2_000_000,)
        assert bool((tensor == number).all())
        if in_the_middle:
            return
    pytest.fail("no kill hit the writer while it was writing")


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    """A real failing write, after the first megabyte: the system's limit on file sizes stands for the full disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "m.safetensors"
    atomic_save_safetensors(path, {"a": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*m\.safetensors"):
            atomic_save_safetensors(path, {"a": torch.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_file(path)["a"].tolist() == [1.0, 1.0, 1.0]
    assert list(tmp_path.iterdir()) == [path]
