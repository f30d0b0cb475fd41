"""Controls: which files belong to which item, at what size they are encoded, and what their caches depend on."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.data import controls
from musubi_tuner.data.batches import open_batches
from musubi_tuner.data.build_cache import LATENT_GROUPS, TEXT_GROUPS, cache_latents, cache_text
from musubi_tuner.data.sources import read_controls, scan
from musubi_tuner.data.spec import load
from musubi_tuner.families.base import CacheField

ROWS = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/dataset.json").read_text(encoding="utf-8"))[
    "buckets"
]["control_resolution"]


class Folder:
    """Pictures in `p`, their controls in `k`, caches in `c`, and a dataset file over them."""

    def __init__(self, root, picture):
        self.root, self.picture = root, picture
        (root / "vae.safetensors").write_bytes(b"weights")

    def write(self, *lines, source='image_directory = "{0}/p"'):
        rows = [source.format(self.root), f'cache_directory = "{self.root}/c"', *lines]
        path = self.root / "data.toml"
        path.write_text("[general]\nresolution = 64\n[[datasets]]\n" + "\n".join(rows) + "\n")
        return path

    def dataset(self, *lines, **source):
        return load(self.write(f'control_directory = "{self.root}/k"', *lines, **source)).datasets[0]

    def command(self, family, caplog, entry=cache_latents):
        """The log of a cache command over the file that was written last."""
        argv = ["--dataset_config", str(self.root / "data.toml"), "--device", "cpu"]
        groups = TEXT_GROUPS if entry is cache_text else LATENT_GROUPS
        argv += [] if entry is cache_text else ["--vae", str(self.root / "vae.safetensors")]
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="musubi_tuner"):
            entry(family, parse(groups, argv, prog="cache", description="", defaults={}, elsewhere={}))
        return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def folder(tmp_path, make_picture):
    return Folder(tmp_path, make_picture)


def test_controls_of_a_folder_go_to_their_items_in_the_order_of_their_numbers(folder, edit_family):
    for name in ("img", "img_1", "img_10", "other"):
        folder.picture(folder.root / "p" / f"{name}.png")
    names = ["img.webp", "img_2.png", "img_10.png", "img_1.jpg", "img_1_0.png", "img_10_3.png", "other_7.png", "x.png"]
    for name in names:
        folder.picture(folder.root / "k" / name, caption=None)
    (folder.root / "k" / "img_3.txt").write_text("no picture")
    found = {item.stem: [c.path.name for c in item.controls] for item in scan(folder.dataset(), edit_family.spec).items}
    assert found == {
        "img": ["img.webp", "img_2.png"],  # img_1 and img_10 are items of their own
        "img_1": ["img_1.jpg", "img_1_0.png"],
        "img_10": ["img_10.png", "img_10_3.png"],
        "other": ["other_7.png"],
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['image']}-{row['control_resolution']}")
def test_control_resolution_follows_the_reference(row, folder):
    (folder.root / "p").mkdir()
    (folder.root / "k").mkdir()
    dataset = folder.dataset(f"control_resolution = {row['control_resolution']}")
    assert list(controls.size_of(tuple(row["image"]), (64, 64), dataset, 16)) == row["result"]


@pytest.mark.parametrize("size", [(1, 100000), (100000, 1), (1, 1)])
def test_a_control_of_any_shape_has_a_size(size):
    width, height = controls.of_area(size, (512, 512), 16)
    assert width % 16 == height % 16 == 0
    assert 0 < width * height <= 512 * 512


@pytest.mark.parametrize(
    ("lines", "size"),
    [
        ((), (64, 64)),
        (("no_resize_control = true",), (96, 48)),
        (("control_resolution = 64",), (80, 48)),
        (("no_resize_control = true", "control_resolution = 64"), (96, 48)),
    ],
)
def test_a_control_has_the_size_that_the_dataset_asks_for(folder, edit_family, lines, size):
    folder.picture(folder.root / "p" / "a.png")
    path = folder.picture(folder.root / "k" / "a.png", (99, 48), colour=5, caption=None)
    [item] = scan(folder.dataset(*lines), edit_family.spec).items
    assert item.controls == (controls.Control(path, size),)
    [pixels] = read_controls(item)
    assert pixels.shape == (3, 1, size[1], size[0])
    if size == (96, 48):  # only cut at the centre
        kept = np.asarray(Image.open(path))[:, 1:97].astype(np.float32) / 127.5 - 1
        torch.testing.assert_close(pixels[:, 0].permute(1, 2, 0), torch.from_numpy(kept), rtol=0, atol=1e-6)


def test_a_list_names_controls_singly_or_by_number(folder, edit_family):
    for name in ("a", "b", "c"):
        folder.picture(folder.root / f"{name}.png", caption=None)
    for number in range(11):
        folder.picture(folder.root / f"k{number}.png", caption=None)
    lines = [
        {"image_path": "a.png", "caption": "", "control_path": "k3.png"},
        {"image_path": "b.png", "caption": "", **{f"control_path_{n}": f"k{n}.png" for n in (10, 2, 0)}},
        {"image_path": "c.png", "caption": ""},
        {"image_path": "c.png", "caption": "", "control_path": "gone.png"},
    ]
    (folder.root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = scan(load(folder.write(source='image_jsonl_file = "{0}/list.jsonl"')).datasets[0], edit_family.spec)
    names = [[control.path.name for control in item.controls] for item in found.items]
    assert names == [["k3.png"], ["k0.png", "k2.png", "k10.png"]]
    assert sorted(entry.reason for entry in found.left_out) == [
        "its control gone.png is not there",
        "no control of its name (control_directory, or control_path in a list)",
    ]


def test_a_control_that_is_no_text_names_the_line(folder, edit_family):
    line = {"image_path": "a.png", "caption": "", "control_path_0": 3}
    (folder.root / "list.jsonl").write_text(json.dumps(line))
    dataset = load(folder.write(source='image_jsonl_file = "{0}/list.jsonl"')).datasets[0]
    with pytest.raises(UserError, match=r'list\.jsonl, line 1: "control_path_0" must be a text'):
        scan(dataset, edit_family.spec)


def test_items_whose_controls_are_of_no_use_are_left_out(folder, edit_family):
    for name in ("a", "b", "c", "d"):
        folder.picture(folder.root / "p" / f"{name}.png")
    for name in ("a_0", "a_1", "b"):
        folder.picture(folder.root / "k" / f"{name}.png", caption=None)
    (folder.root / "k" / "c.png").write_bytes(b"")
    single = dataclasses.replace(
        edit_family.spec,
        cache_fields=(*edit_family.spec.cache_fields[:2], CacheField("control", "latents_control", "video", "latent")),
    )
    found = scan(folder.dataset(), single)
    assert [item.stem for item in found.items] == ["b"]
    assert {entry.path.stem: entry.reason for entry in found.left_out} == {
        "a": "2 controls (a_0.png, a_1.png), toy takes 1",
        "c": "its control c.png is empty (0 bytes)",
        "d": "no control of its name (control_directory, or control_path in a list)",
    }
    with pytest.raises(UserError, match=r"nothing in .* can be used: 4 x no control of its name"):
        scan(load(folder.write()).datasets[0], single)


def test_a_family_without_controls_says_that_the_keys_have_no_effect(folder, family, caplog):
    folder.picture(folder.root / "p" / "a.png")
    folder.picture(folder.root / "k" / "b.png", caption=None)
    folder.dataset("no_resize_control = true", "control_resolution = 64", "fp_1f_no_post = true")
    log = folder.command(family, caplog)
    assert "without effect here: control_directory, no_resize_control, control_resolution, fp_1f_no_post" in log
    assert "made 1 latent caches" in log


def test_a_control_directory_that_is_not_there_is_a_fault_of_the_file(folder):
    (folder.root / "p").mkdir()
    with pytest.raises(UserError, match=r'\[\[datasets\]\] 1: control_directory = ".*/k" is not there'):
        folder.dataset()
    (folder.root / "k").write_text("")
    with pytest.raises(UserError, match=r'control_directory = ".*/k" is not a folder'):
        folder.dataset()


class TestCaches:
    @pytest.fixture
    def made(self, folder, edit_family, caplog):
        folder.picture(folder.root / "p" / "a.png", colour=1, caption="a")
        folder.picture(folder.root / "p" / "b.png", colour=2, caption="b")
        for i, name in enumerate(("a_0", "a_1", "b")):
            folder.picture(folder.root / "k" / f"{name}.png", (96, 48), colour=10 + i, caption=None)
        folder.dataset("no_resize_control = true")
        log = folder.command(edit_family, caplog)
        assert "  3 controls, from " in log
        folder.command(edit_family, caplog, cache_text)
        return folder

    def test_they_hold_each_control_at_its_size(self, made):
        found = load_file(made.root / "c" / "a_0064x0064_toy.safetensors")
        assert {key: list(tensor.shape) for key, tensor in found.items()} == {
            "latents_1x8x8_bfloat16": [3, 1, 8, 8],
            "latents_control_0_1x6x12_bfloat16": [3, 1, 6, 12],
            "latents_control_1_1x6x12_bfloat16": [3, 1, 6, 12],
        }
        pixels = np.asarray(Image.open(made.root / "k" / "a_1.png")).astype(np.float64) / 127.5 - 1
        means = pixels.reshape(6, 8, 12, 8, 3).mean(axis=(1, 3))
        stored = found["latents_control_1_1x6x12_bfloat16"][:, 0].permute(1, 2, 0).float().numpy()
        np.testing.assert_allclose(stored, means, atol=4e-3)

    def test_training_gets_them(self, made, edit_family):
        source = open_batches(made.root / "data.toml", edit_family, seed=0, strict=True)
        counts = {batch.items: [len(row) for row in batch.cond["controls"]] for batch in source.epoch(0)}
        assert counts == {(0,): [2], (1,): [1]}
        assert '"has_control": true' in source.metadata()["ss_datasets"]

    def test_nothing_is_made_twice(self, made, edit_family, caplog):
        assert "0 to make, 2 fresh" in made.command(edit_family, caplog)

    def test_a_changed_control_renews_the_cache_of_its_item(self, made, edit_family, caplog):
        made.picture(made.root / "k" / "a_1.png", (96, 48), colour=99, caption=None)
        with pytest.raises(UserError, match=r"a_0064x0064_toy.safetensors \(a control changed\)"):
            open_batches(made.root / "data.toml", edit_family, seed=0)
        assert "1 to make (1 stale: a control changed), 1 fresh" in made.command(edit_family, caplog)
        assert "0 to make, 2 fresh" in made.command(edit_family, caplog, cache_text)

    def test_another_size_or_number_of_controls_renews_too(self, made, edit_family, caplog):
        made.dataset()
        log = made.command(edit_family, caplog)
        assert "its controls were 96x48, 96x48, now 64x64, 64x64" in log
        made.picture(made.root / "k" / "b_0.png", caption=None)
        assert "it holds 1 controls, now 2 are wanted" in made.command(edit_family, caplog)

    def test_caches_of_the_established_tool_count_where_their_controls_do(self, made, edit_family, caplog):
        paths = sorted((made.root / "c").glob("*0064_toy.safetensors"))
        for path in paths:
            tensors = load_file(path)
            if path == paths[1]:
                del tensors["latents_control_0_1x6x12_bfloat16"]
            save_file(tensors, path, {"architecture": "toy"})
        log = made.command(edit_family, caplog)
        assert "1 to make (1 stale: it holds 0 controls, now 1 are wanted), 0 fresh, 1 without fingerprint" in log

    def test_the_text_cache_depends_on_them_where_the_family_says_so(self, made, edit_family, caplog):
        edit_family.spec = dataclasses.replace(edit_family.spec, text_sees_controls=True)
        seen = []
        encode = edit_family.encode_condition
        edit_family.encode_condition = lambda items, encoders: (
            seen.extend(len(item.controls) for item in items) or encode(items, encoders)
        )
        assert "its controls were none, now 96x48, 96x48" in made.command(edit_family, caplog, cache_text)
        assert sorted(seen) == [1, 2]
        made.picture(made.root / "k" / "b.png", (96, 48), colour=98, caption=None)
        assert "1 to make (1 stale: a control changed)" in made.command(edit_family, caplog, cache_text)
