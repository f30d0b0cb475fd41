"""Pictures that a request comes with: their masks, the size that follows one of them, and who makes nothing of them."""

import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.buckets import bucket_sizes
from musubi_tuner.sampling import outputs, pictures
from musubi_tuner.sampling.request import Request

CPU = torch.device("cpu")
LATENT = ("--prompt", "x", "--seed", "1", "--output_type", "latent")


@pytest.fixture
def folder(tmp_path):
    """A start, a control that is opaque on its left half, a white control, and grey masks."""
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "start.png")
    glass = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    glass.paste((0, 255, 0, 255), (0, 0, 32, 64))
    glass.save(tmp_path / "glass.png")
    Image.new("RGB", (64, 64), (255, 255, 255)).save(tmp_path / "white.png")
    Image.new("L", (64, 64), 51).save(tmp_path / "grey.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 16, 32, 32))
    mask.save(tmp_path / "below.png")
    Image.new("RGB", (300, 100), (9, 9, 9)).save(tmp_path / "wide.png")
    return tmp_path


@pytest.fixture
def seeing(toy, folder):
    """A family that keeps the items it is asked to encode."""

    class Seeing(toy.Family):
        def __init__(self):
            spec = replace(toy.SPEC, takes_pictures=("start", "control"), control_masks=True)
            super().__init__(spec=spec)
            self.items = []

        def encode_latents(self, items, vae, encoders=None):
            self.items += items
            return [[{"seen": torch.zeros(1)}] for _ in items]

    return Seeing()


def encoded(family, request):
    pictures.encode(
        family, family.encoders, lambda: family.load_vae("", device=CPU, dtype=torch.float32), [request], CPU
    )
    return family.items[-1]


@pytest.mark.shows("control_image_mask_path")
def test_a_control_counts_where_its_mask_is_white_or_it_is_opaque(seeing, folder):
    """A named mask wins over opacity; masks go to the controls in turn; a start picture has none."""
    names = [str(folder / f"{name}.png") for name in ("glass", "glass", "white")]
    masks = (str(folder / "grey.png"),)
    item = encoded(seeing, Request("x", 1, 32, 32, image=names[0], control_images=tuple(names), control_masks=masks))
    assert item.roles == ("start", "control", "control", "control")
    assert item.masks[0] is None
    assert item.masks[3] is None, "opaque"
    torch.testing.assert_close(item.masks[1], torch.full((1, 1, 32, 32), 0.2))
    assert item.masks[2].shape == (1, 1, 32, 32)
    assert item.masks[2][0, 0, :, :16].min() == 1
    assert item.masks[2][0, 0, :, 16:].max() == 0
    below = Request("x", 1, 32, 32, control_images=(names[2],), control_masks=(str(folder / "below.png"),))
    assert encoded(seeing, below).masks[0][0, 0, :, 0].tolist() == [0.0] * 16 + [1.0] * 16
    with pytest.raises(UserError, match="2 masks for 1 control pictures"):
        Request("x", 1, 32, 32, control_images=(names[0],), control_masks=masks * 2)


def test_masks_of_the_command_line_reach_the_request_or_are_told(world, seeing, toy, folder, caplog):
    words = ("--control_image_path", folder / "white.png", "--control_image_mask_path", folder / "grey.png")
    with caplog.at_level(logging.WARNING):
        world(*LATENT, *words)
    assert "takes no such pictures: control_images, control_masks" in caplog.text
    world.family.spec = seeing.spec
    world.family.encode_latents = seeing.encode_latents
    world(*LATENT, *words)
    (mask,) = seeing.items[-1].masks
    torch.testing.assert_close(mask, torch.full((1, 1, 48, 32), 0.2))
    with pytest.raises(UserError, match=r"picture .*none\.png"):
        world(*LATENT, *words[:3], folder / "none.png")


@pytest.mark.shows("one_frame_auto_resize")
def test_a_single_picture_takes_the_shape_of_its_control(world, seeing, folder, caplog):
    """The bucket nearest to 3 : 1 among those of the asked area; the first control counts, before the start."""
    world.family.spec, world.family.encode_latents = seeing.spec, seeing.encode_latents
    words = ("--video_size", "64", "96", "--one_frame_auto_resize", "--image_path", folder / "start.png")
    (path,) = world(*LATENT, "--video_length", "1", *words, "--control_image_path", folder / "wide.png")
    values = outputs.read_latents(str(path), "toy")[1]
    size = values["width"], values["height"]
    assert size == min(bucket_sizes((96, 64)), key=lambda s: abs(s[0] / s[1] - 3))
    assert size[0] > 2 * size[1]
    path.unlink()
    (path,) = world(*LATENT, "--video_length", "1", *words)
    values = outputs.read_latents(str(path), "toy")[1]
    assert (values["width"], values["height"]) == (64, 80), "nearest to 1 : 1 of this area"
    path.unlink()
    with caplog.at_level(logging.WARNING):
        (path,) = world(*LATENT, "--video_length", "5", *words)
    values = outputs.read_latents(str(path), "toy")[1]
    assert (values["width"], values["height"]) == (96, 64)
    assert "--one_frame_auto_resize has no effect" in caplog.text


def test_pictures_for_sections_are_refused_where_there_are_none(world, seeing, folder):
    world.family.spec = seeing.spec
    with pytest.raises(UserError, match="makes no sections: give one picture"):
        world(*LATENT, "--image_path", f"0:{folder / 'start.png'};;;1:{folder / 'white.png'}")
    assert world.family.loaded == ()
