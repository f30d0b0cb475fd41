"""What a scan takes, what it leaves out and why, and the pixels it hands on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.images import image_size, read_image
from musubi_tuner.data.sources import read_pixels, scan
from musubi_tuner.data.spec import load


@pytest.fixture
def dataset(tmp_path):
    """A function that writes a dataset file and gives its first dataset."""

    def make(text: str):
        path = tmp_path / "data.toml"
        path.write_text(f"[[datasets]]\n{text}", encoding="utf-8")
        return load(path).datasets[0]

    return make


def test_captioned_pictures_in_the_order_of_their_names(tmp_path, dataset, family, make_picture):
    make_picture(tmp_path / "p" / "b.png", (80, 48), caption="  second \n")
    make_picture(tmp_path / "p" / "a.JPG", (64, 64), caption="first")
    make_picture(tmp_path / "p" / "c.png", caption=None)
    (tmp_path / "p" / "d.png").write_text("not a picture")
    (tmp_path / "p" / "d.txt").write_text("x")
    make_picture(tmp_path / "p" / "e.png", caption=None)
    (tmp_path / "p" / "e.txt").write_bytes(b"\xff\xfe\xff")
    found = scan(dataset(f'image_directory = "{tmp_path / "p"}"\nresolution = 64\nenable_bucket = true'), family.spec)
    assert [(item.path.name, item.caption, item.size, item.bucket) for item in found.items] == [
        ("a.JPG", "first", (64, 64), (64, 64)),
        ("b.png", "second", (80, 48), (80, 48)),
    ]
    reasons = {entry.path.name: entry.reason for entry in found.left_out}
    assert reasons["c.png"] == "no caption file (its name with the ending .txt)"
    assert reasons["d.png"] == "is not a picture that Pillow knows"
    assert reasons["e.png"].startswith("its caption file is no UTF-8 text")
    assert found.items[1].latent_path("toy").name == "b_0080x0048_toy.safetensors"
    assert found.items[1].text_path("toy") == tmp_path / "p" / "b_toy_te.safetensors"


def test_a_folder_without_use_is_one_sentence(tmp_path, dataset, family, make_picture):
    make_picture(tmp_path / "p" / "deep" / "a.png")
    with pytest.raises(UserError, match=r"holds no images .*; its subfolders are not searched"):
        scan(dataset(f'image_directory = "{tmp_path / "p"}"\nresolution = 64'), family.spec)
    make_picture(tmp_path / "p" / "a.png", caption=None)
    with pytest.raises(UserError, match=r"nothing in .* can be used: 1 x no caption file"):
        scan(dataset(f'image_directory = "{tmp_path / "p"}"\nresolution = 64'), family.spec)


def test_a_resolution_that_the_family_cannot_encode_is_refused_with_the_nearest(
    tmp_path, dataset, family, make_picture
):
    make_picture(tmp_path / "p" / "a.png")
    with pytest.raises(UserError, match=r"resolution = \[100, 64\]: toy needs multiples of 16 x 16: use \[96, 64\] or"):
        scan(dataset(f'image_directory = "{tmp_path / "p"}"\nresolution = [100, 64]'), family.spec)
    bucketed = dataset(f'image_directory = "{tmp_path / "p"}"\nresolution = [100, 64]\nenable_bucket = true')
    assert scan(bucketed, family.spec).items[0].bucket == (80, 80)


def test_a_picture_too_small_for_no_upscale_is_left_out(tmp_path, dataset, family, make_picture):
    make_picture(tmp_path / "p" / "a.png", (15, 40))
    make_picture(tmp_path / "p" / "b.png", (16, 40))
    spec = dataset(
        f'image_directory = "{tmp_path / "p"}"\nresolution = 64\nenable_bucket = true\nbucket_no_upscale = true'
    )
    found = scan(spec, family.spec)
    assert [item.bucket for item in found.items] == [(16, 32)]
    assert found.left_out[0].reason == "15 x 40 pixels is below 16 and bucket_no_upscale forbids enlarging"


def test_a_list_with_equal_stems_in_two_folders_gets_two_caches(tmp_path, dataset, family, make_picture):
    for number, folder in enumerate(("x", "y")):
        make_picture(tmp_path / folder / "1.png", colour=number, caption=None)
    lines = [{"image_path": f"{folder}/1.png", "caption": f" of {folder} "} for folder in ("x", "y", "gone")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    spec = dataset(
        f'image_jsonl_file = "{tmp_path / "list.jsonl"}"\ncache_directory = "{tmp_path / "c"}"\nresolution=64'
    )
    found = scan(spec, family.spec)
    assert [item.caption for item in found.items] == ["of x", "of y"]
    assert [entry.reason for entry in found.left_out] == ["the list names it but it is not there"]
    assert found.items[0].latent_path("toy").name == "1_0064x0064_toy.safetensors"
    names = {item.latent_path("toy").name for item in found.items} | {
        item.text_path("toy").name for item in found.items
    }
    assert len(names) == 4


def test_one_file_many_times_in_a_list_gets_as_many_caches(tmp_path, dataset, family, make_picture):
    make_picture(tmp_path / "a.png", caption=None)
    lines = [{"image_path": str(tmp_path / "a.png"), "caption": f"words {i}"} for i in range(5)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = dataset(
        f'image_jsonl_file = "{tmp_path / "list.jsonl"}"\ncache_directory = "{tmp_path / "c"}"\nresolution=64'
    )
    items = scan(spec, family.spec).items
    assert len({item.latent_path("toy") for item in items}) == len({item.text_path("toy") for item in items}) == 5


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("{", "line 2 is not JSON"), ('{"image_path": "a.png"}', 'the texts "image_path" and "caption" is needed')],
)
def test_a_malformed_list_names_the_line(tmp_path, dataset, family, line, sentence):
    (tmp_path / "list.jsonl").write_text('{"image_path": "a.png", "caption": ""}\n' + line, encoding="utf-8")
    spec = dataset(f'image_jsonl_file = "{tmp_path / "list.jsonl"}"\ncache_directory = "{tmp_path}"\nresolution = 64')
    with pytest.raises(UserError, match=sentence):
        scan(spec, family.spec)


def test_pixels_are_rgb_between_minus_one_and_one(tmp_path, dataset, family, make_picture):
    path = make_picture(tmp_path / "p" / "a.png", (64, 48))
    item = scan(dataset(f'image_directory = "{tmp_path / "p"}"\nresolution = [64, 48]'), family.spec).items[0]
    pixels = read_pixels(item)
    assert pixels.shape == (3, 1, 48, 64)
    expected = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 127.5 - 1)
    torch.testing.assert_close(pixels[:, 0].permute(1, 2, 0), expected, rtol=0, atol=1e-6)


def test_a_turned_photo_is_seen_upright(tmp_path):
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16] = (255, 0, 0)  # red above black
    stored = Image.fromarray(np.rot90(upright, 1))  # what a camera held on its side stores
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "a.png", exif=exif)
    assert stored.size == (32, 16)
    assert image_size(tmp_path / "a.png") == (16, 32)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (16, 32)), upright)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 32, axis=0)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    pixels = read_image(path, (32, 32))
    expected = np.where(grey >= 128, 255, 0) if mode == "1" else grey
    if mode == "1":  # dithered: only the mean is kept
        assert abs(pixels.mean() - grey.mean()) < 8
    else:
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))


def test_a_picture_cut_short_says_so(tmp_path, make_picture):
    path = make_picture(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_image(path, (64, 64))


def test_a_list_that_is_no_text_is_one_sentence(tmp_path, dataset, family):
    (tmp_path / "list.jsonl").write_bytes(b"\xff\xfe\x00")
    spec = dataset(f'image_jsonl_file = "{tmp_path / "list.jsonl"}"\ncache_directory = "{tmp_path}"\nresolution = 64')
    with pytest.raises(UserError, match=r"list\.jsonl\" cannot be read: "):
        scan(spec, family.spec)
