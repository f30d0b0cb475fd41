import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.reader import open_checkpoint

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def some_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    tensors = {f"w{i}": torch.randn(5, 3 + i, generator=g).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "five": torch.randn(2, 1, 3, 1, 2)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and their index."""
    names = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / names[0], {"k": "first"})
    save_file({"c": torch.full((4,), 7.0)}, tmp_path / names[1], {"k": "second", "other": "x"})
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_every_dtype_and_shape_reads_back_to_the_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "m.safetensors", {"musubi.config": "{}"})
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.header.metadata == {"musubi.config": "{}"}
        assert checkpoint.header.paths == (tmp_path / "m.safetensors",)
        assert checkpoint.header.tensors.keys() == tensors.keys()
        for key, tensor in tensors.items():
            got = checkpoint.read(key)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert checkpoint.header.tensors[key].shape == tuple(tensor.shape)
            assert bits(got) == bits(tensor)


@pytest.mark.shows("disable_numpy_memmap")
def test_a_file_is_read_and_never_mapped(tmp_path: Path) -> None:
    """What --disable_numpy_memmap asks for is always so."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list a process's mappings")
    save_file({"w": torch.ones(512, 512)}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        tensor = checkpoint.read("w")
        assert "m.safetensors" not in maps.read_text()
    assert float(tensor.sum()) == 512 * 512


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 4), slice(3, None), slice(5, 9), slice(None)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rows_are_the_rows_of_the_whole(tmp_path: Path, rows: slice, suffix: str) -> None:
    tensor = torch.arange(35, dtype=torch.bfloat16).reshape(5, 7)
    path = tmp_path / f"m{suffix}"
    save_file({"x": torch.ones(3), "w": tensor}, path) if suffix == ".safetensors" else torch.save({"w": tensor}, path)
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.read("w", rows), tensor[rows])
        out = torch.full(tensor[rows].shape, -1.0, dtype=torch.bfloat16)
        assert checkpoint.read("w", rows, out=out) is out
        assert torch.equal(out, tensor[rows])


def test_a_buffer_of_another_dtype_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        with pytest.raises(ValueError, match=r"float32 \(2, 2\) is needed"):
            checkpoint.read("w", out=torch.empty(2, 2, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="slice of step 1"):
            checkpoint.read("w", slice(0, 2, 2))
        with pytest.raises(KeyError):
            checkpoint.read("nothing")


@pytest.mark.parametrize(
    "name",
    ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json", "."],
)
def test_any_name_of_a_sharded_checkpoint_opens_the_whole(shards: Path, name: str) -> None:
    with open_checkpoint(shards / name) as checkpoint:
        assert set(checkpoint.header.tensors) == {"a", "b", "c"}
        assert checkpoint.header.metadata == {"k": "first", "other": "x"}
        assert checkpoint.read("c").tolist() == [7.0] * 4
        assert checkpoint.read("b").tolist() == [0.0] * 3


def test_a_lost_shard_is_named(shards: Path) -> None:
    (shards / "m-00002-of-00002.safetensors").unlink()
    for name in ("m-00001-of-00002.safetensors", "m.safetensors.index.json"):
        with pytest.raises(UserError, match=r"1 of its 2 parts .*m-00002-of-00002\.safetensors"):
            open_checkpoint(shards / name)


def test_tensors_in_two_shards_are_refused(shards: Path) -> None:
    save_file({"a": torch.zeros(2)}, shards / "m-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="repeats tensors of another part: a"):
        open_checkpoint(shards / "m-00001-of-00002.safetensors")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_open_with_and_without_a_wrapper(tmp_path: Path, wrapper: str | None, legacy: bool) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(3, dtype=torch.int64)}
    content = tensors if wrapper is None else {wrapper: tensors, "epoch": 4}
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path / "m.pth") as checkpoint:
        assert set(checkpoint.header.tensors) == {"a", "scalar"}
        assert torch.equal(checkpoint.read("a"), tensors["a"])
        assert checkpoint.read("scalar").item() == 3


class Payload:
    """What unpickling must never call."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("/nonexistent-folder/written",))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "x": Payload()}, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"cannot be read as weights only .*\.safetensors release"):
        open_checkpoint(tmp_path / "m.pt")


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>sign in</html>" * 9, "this is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(64), "pickle named .safetensors"),
        (b"GGUF" + bytes(64), "GGUF files are not read"),
        (b"\x10" + bytes(7) + b"not json at all!", "no safetensors header"),
        (struct.pack("<Q", 500) + b"{}", "cut off inside its header"),
        (bytes(100), "no safetensors header"),
    ],
    ids=["empty", "web page", "lfs", "zip", "gguf", "text", "cut", "zeros"],
)
def test_other_content_is_recognised(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_off_file_tells_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match=f"promises {len(whole)} bytes, it has {len(whole) - 40}; download it again"):
        open_checkpoint(path)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(100)}, path)
    with open_checkpoint(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(300)
        with pytest.raises(UserError, match="became shorter while it was read"):
            checkpoint.read("w")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "is damaged: tensor 'w'"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "is damaged: tensor 'w'"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "data type F4, which is not read"),
        ({"dtype": "F32", "shape": [2]}, "no safetensors header"),
        (["F32"], "no safetensors header"),
    ],
)
def test_a_damaged_header_is_told(tmp_path: Path, entry: object, told: str) -> None:
    with pytest.raises(UserError, match=told):
        open_checkpoint(write(tmp_path / "m.safetensors", {"w": entry}, bytes(8)))


def test_what_is_not_there_or_not_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        open_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"file type '\.gguf' is not read"):
        open_checkpoint(tmp_path / "m.gguf")
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"several checkpoints, one\.safetensors, two\.safetensors: name one"):
        open_checkpoint(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(UserError, match="not a plain file name"):
        open_checkpoint(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="no readable `weight_map`"):
        open_checkpoint(index)
