"""Files that sampling writes: their content read back by other means, and wholeness."""

import json

import av
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.sampling import outputs
from musubi_tuner.sampling.request import Request

REQUEST = Request("a red seven, 七", 5, width=32, height=48, frames=5)


def gradient(frames=9, height=48, width=64):
    """A smooth moving picture [F, H, W, 3]."""
    f, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x * 2 + f * 8, y * 3, 128 + x - y], dim=-1).clamp(0, 255).to(torch.uint8)


def test_pixels_become_bytes_by_rounding_with_channels_last():
    pixels = torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.5]).view(1, 1, 1, 5).repeat(3, 1, 1, 1)
    frames = outputs.to_bytes(pixels)
    assert frames.shape == (1, 1, 5, 3)
    assert frames[0, 0, :, 0].tolist() == [0, 64, 128, 255, 255]


def test_png_holds_the_frame_and_its_request(tmp_path):
    frame = gradient()[0]
    outputs.write_png(tmp_path / "a.png", frame, outputs.describe(REQUEST))
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(48, 64, 3), frame)
        assert image.text["prompt"] == "a red seven, 七"
        assert image.text["seed"] == "5"


def test_frames_are_numbered_in_a_folder(tmp_path):
    outputs.write_frames(tmp_path / "clip", gradient(3))
    assert sorted(p.name for p in (tmp_path / "clip").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["clip"]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_video_plays_back_close_to_what_was_written(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(outputs, "_CODECS", tuple(row for row in outputs._CODECS if row[0] == codec))
    frames = gradient()
    outputs.write_video(tmp_path / "a.mp4", frames, 8, {"prompt": "七"})
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.pix_fmt, stream.average_rate) == ("yuv420p", 8)
        assert json.loads(container.metadata["comment"]) == {"prompt": "七"}
        back = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(stream)])
    assert back.shape == frames.shape
    error = (back.float() - frames.float()).pow(2).mean()
    assert 10 * torch.log10(255**2 / error) > 34, "peak signal to noise in dB"


def test_a_codec_that_ffmpeg_lacks_is_passed_over(monkeypatch):
    monkeypatch.setattr(outputs, "_CODECS", (("no_such_codec", {}), ("mpeg4", {})))
    assert outputs._codec() == ("mpeg4", {})
    monkeypatch.setattr(outputs, "_CODECS", (("no_such_codec", {}),))
    with pytest.raises(UserError, match="--output_type images"):
        outputs._codec()


def test_odd_sizes_are_refused_for_video(tmp_path):
    with pytest.raises(UserError, match="47 x 64 pixels: height and width must be even"):
        outputs.write_video(tmp_path / "a.mp4", gradient(height=47), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_nothing_behind(tmp_path):
    broken = gradient(3).clone()
    with pytest.raises(TypeError):
        outputs.write_frames(tmp_path / "clip", [*broken[:2], torch.zeros(4, 4, 7, dtype=torch.uint8)])
    with pytest.raises(TypeError):
        outputs.write_png(tmp_path / "a.png", torch.zeros(4, 4, 7, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_latents_come_back_with_their_request(tmp_path):
    latents = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "a_latent.safetensors"
    outputs.write_latents(path, latents, REQUEST, "toy")
    back, values = outputs.read_latents(str(path), "toy")
    assert torch.equal(back, latents)
    assert Request(**values) == REQUEST
    with safe_open(path, "pt") as file:
        assert file.metadata()["musubi.family"] == "toy"


def test_latents_without_metadata_name_no_prompt(tmp_path):
    path = tmp_path / "a.safetensors"
    outputs.write_latents(path, torch.zeros(3, 1, 2, 2), REQUEST, "toy", metadata=False)
    assert b"seven" not in path.read_bytes()
    assert outputs.read_latents(str(path), "toy")[1] == {}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"x": torch.zeros(2)}, {}, "holds no latents"),
        ({"latent": torch.zeros(3, 1, 2, 2)}, {"musubi.family": "other"}, "holds latents of other"),
        ({"latent": torch.zeros(3, 1, 2, 2)}, {"musubi.latent_version": "2"}, "newer than this version"),
    ],
)
def test_foreign_latent_files_are_refused(tmp_path, tensors, metadata, words):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=words):
        outputs.read_latents(str(tmp_path / "a.safetensors"), "toy")


def test_names_never_hit_a_file_that_is_there(tmp_path):
    assert outputs.free_stem(tmp_path, "s") == "s"
    (tmp_path / "s.png").touch()
    (tmp_path / "s_2_latent.safetensors").touch()
    (tmp_path / "s_3").mkdir()
    assert outputs.free_stem(tmp_path, "s") == "s_4"
    assert outputs.free_stem(tmp_path, "s_1") == "s_1"
