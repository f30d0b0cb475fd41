"""`--debug_mode`: what is shown, what is asked, and that nothing is cached."""

import io
import re

import numpy as np
import pytest
from PIL import Image, ImageShow

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.data.build_cache import LATENT_GROUPS, cache_latents
from musubi_tuner.data.sources import scan
from musubi_tuner.data.spec import load
from musubi_tuner.data.view import ViewOptions, half_blocks, picture, view

CELL = re.compile("\x1b\\[38;2;(\\d+);(\\d+);(\\d+)m\x1b\\[48;2;(\\d+);(\\d+);(\\d+)m\u2580")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def pixels_of(lines):
    """The picture that half blocks draw: read back from the escape codes."""
    rows = []
    for line in lines:
        cells = [tuple(map(int, match.groups())) for match in CELL.finditer(line)]
        assert CELL.sub("", line) == "\x1b[0m"
        rows += [[cell[:3] for cell in cells], [cell[3:] for cell in cells]]
    return np.array(rows, np.uint8)


@pytest.fixture
def data(tmp_path, make_picture):
    """Two datasets of three and two pictures."""
    text = "[general]\nresolution = 32\n"
    for folder, count in (("x", 3), ("y", 2)):
        for i in range(count):
            make_picture(tmp_path / folder / f"{folder}{i}.png", (32, 32), colour=i, caption=f"of {folder}")
        text += f'[[datasets]]\nimage_directory = "{tmp_path / folder}"\n'
    path = tmp_path / "data.toml"
    path.write_text(text)
    return path


@pytest.fixture
def scans(data, family):
    return [scan(dataset, family.spec) for dataset in load(data).datasets]


def shown(scans, options, answers=""):
    out = io.StringIO()
    view(scans, options, stdin=Terminal(answers), out=out)
    return re.findall(r"^\S*?(\[\d+/\d+\]) (\w+)", CELL.sub("", out.getvalue()).replace("> [", ">\n["), re.MULTILINE)


@pytest.mark.shows("console_width")
def test_half_blocks_draw_the_picture():
    """At most --console_width characters in a row."""
    colours = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(half_blocks(colours, 80)), colours)
    halves = pixels_of(half_blocks(colours, 10))
    np.testing.assert_allclose(halves, colours.reshape(6, 2, 10, 2, 3).mean((1, 3)), atol=1)
    framed = pixels_of(half_blocks(colours, 22, (9, 8, 7)))
    np.testing.assert_array_equal(framed[2:-2, 1:-1], colours)
    assert {tuple(c) for c in framed[0]} | {tuple(c) for c in framed[:, -1]} == {(9, 8, 7)}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("\n\n\n\n\n", ["x0", "x1", "x2", "y0", "y1"]),
        ("\nd\n\nq\n", ["x0", "x1", "y0", "y1"]),
        ("q\n", ["x0"]),
        ("\n", ["x0", "x1"]),  # the input ends
    ],
)
def test_the_terminal_is_asked_after_each_item(scans, answers, expected):
    assert [name for _, name in shown(scans, ViewOptions("console", 16), answers)] == expected


@pytest.mark.shows("console_num_images")
def test_a_number_of_images_is_shown_without_asking(scans):
    out = io.StringIO()
    view(scans, ViewOptions("console", 16, None, 2), stdin=io.StringIO(), out=out)
    assert re.findall(r"\[\d/\d\]", out.getvalue()) == ["[1/3]", "[2/3]", "[1/2]", "[2/2]"]
    assert "x0.png (32x32) -> 32x32: 'of x'" in out.getvalue()
    assert "next item" not in out.getvalue()


def test_without_a_terminal_the_number_is_needed(scans):
    with pytest.raises(UserError, match="--console_num_images"):
        view(scans, ViewOptions("console"), stdin=io.StringIO(), out=io.StringIO())


@pytest.mark.shows("console_back")
def test_a_colour_that_is_none_is_refused(scans):
    with pytest.raises(UserError, match="--console_back blu: use a colour name"):
        view(scans, ViewOptions("console", 16, "blu", 1), out=io.StringIO())


class Recorder(ImageShow.Viewer):
    def __init__(self):
        self.pictures = []

    def show(self, image, **options):
        self.pictures.append((np.asarray(image), options["title"]))
        return True


def test_the_viewer_gets_the_pixels_that_would_be_encoded(scans, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(ImageShow, "_viewers", [recorder])
    view(scans, ViewOptions("image", console_num_images=1), out=io.StringIO())
    assert len(recorder.pictures) == 2
    pixels, title = recorder.pictures[0]
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(scans[0].items[0].path)))
    assert title.startswith("[1/3] x0.png")
    monkeypatch.setattr(ImageShow, "_viewers", [])
    with pytest.raises(UserError, match="use --debug_mode console"):
        view(scans, ViewOptions("image", console_num_images=1), out=io.StringIO())


def test_controls_stand_beside_their_item(tmp_path, edit_family, make_picture):
    make_picture(tmp_path / "p" / "a.png", (32, 32))
    control = make_picture(tmp_path / "k" / "a.png", (48, 16), colour=4, caption=None)
    (tmp_path / "data.toml").write_text(
        f'[[datasets]]\nimage_directory = "{tmp_path / "p"}"\ncontrol_directory = "{tmp_path / "k"}"\n'
        "resolution = 32\nno_resize_control = true\n"
    )
    [item] = scan(load(tmp_path / "data.toml").datasets[0], edit_family.spec).items
    found = picture(item)
    assert found.shape == (32, 80, 3)
    np.testing.assert_array_equal(found[:16, 32:], np.asarray(Image.open(control)))


def test_a_picture_that_cannot_be_decoded_is_told_and_the_rest_is_shown(scans):
    path = scans[0].items[0].path
    path.write_bytes(path.read_bytes()[:1500])
    out = io.StringIO()
    view(scans, ViewOptions("console", 16, None, 3), out=out)
    assert "x0.png cannot be read as a picture" in out.getvalue()
    assert len(re.findall(r"\[\d/\d\]", out.getvalue())) == 5


@pytest.mark.shows("debug_mode")
def test_the_command_shows_and_caches_nothing(data, family, capsys):
    words = ["--dataset_config", str(data), "--debug_mode", "console", "--console_num_images", "1"]
    cache_latents(family, parse(LATENT_GROUPS, words, prog="cache", description="", defaults={}, elsewhere={}))
    assert "[1/3] x0.png" in capsys.readouterr().out
    assert not list(data.parent.rglob("*.safetensors"))
    assert family.vae.batches == []


def test_without_debug_mode_the_vae_is_needed(data, family):
    words = ["--dataset_config", str(data)]
    with pytest.raises(UserError, match="--vae is needed"):
        cache_latents(family, parse(LATENT_GROUPS, words, prog="cache", description="", defaults={}, elsewhere={}))
