"""Keys that few families read: their values reach the family, renew caches, and mean nothing to the others."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.data.batches import open_batches
from musubi_tuner.data.build_cache import LATENT_GROUPS, TEXT_GROUPS, cache_latents, cache_text
from musubi_tuner.data.cached import find_cached
from musubi_tuner.data.sources import read_masks, read_pixels, scan, to_encode
from musubi_tuner.data.spec import load
from musubi_tuner.data.spec_keys import SPECIAL
from real_media import frames_of, write_video


def write(root, *lines, media='image_directory = "{0}/p"'):
    rows = ["[[datasets]]", media.format(root), f'cache_directory = "{root}/c"', "resolution = [64, 32]", *lines]
    (root / "data.toml").write_text("\n".join(rows))
    (root / "vae").write_bytes(b"weights")
    return root / "data.toml"


def latents(family, path, caplog):
    words = ["--dataset_config", str(path), "--device", "cpu", "--vae", str(path.parent / "vae"), "--vae_dtype", "fp32"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        cache_latents(family, parse(LATENT_GROUPS, words, prog="cache", description="", elsewhere={}))
    return caplog.text


def texts(family, path):
    words = ["--dataset_config", str(path), "--device", "cpu"]
    cache_text(family, parse(TEXT_GROUPS, words, prog="cache", description="", elsewhere={}))


LINES = ("fp_latent_window_size = 4", "fp_1f_clean_indices = [0, 10]", "fp_1f_target_index = 1", "fp_1f_no_post = true")


def test_a_family_gets_the_values_of_its_keys_and_the_defaults(tmp_path, sectioned_family, make_picture, caplog):
    make_picture(tmp_path / "p" / "a.png")
    latents(sectioned_family, write(tmp_path), caplog)
    latents(sectioned_family, write(tmp_path, *LINES), caplog)
    assert [dict(item.said) for item in sectioned_family.items] == [
        {
            "multiple_target": False,
            "fp_latent_window_size": 9,
            "fp_1f_no_post": False,
        },
        {
            "multiple_target": False,
            "fp_latent_window_size": 4,
            "fp_1f_clean_indices": (0, 10),
            "fp_1f_target_index": 1,
            "fp_1f_no_post": True,
        },
    ]


def test_another_value_renews_the_latents_and_training_notices(tmp_path, sectioned_family, make_picture, caplog):
    make_picture(tmp_path / "p" / "a.png")
    path = write(tmp_path)
    texts(sectioned_family, path)
    assert "made 1 latent caches" in latents(sectioned_family, path, caplog)
    assert "0 to make, 1 fresh" in latents(sectioned_family, path, caplog)
    write(tmp_path, "fp_latent_window_size = 4")
    with pytest.raises(UserError, match="fp_latent_window_size was 9, now 4"):
        open_batches(path, sectioned_family, seed=0)
    assert "1 stale: fp_latent_window_size was 9, now 4" in latents(sectioned_family, path, caplog)
    assert len(open_batches(path, sectioned_family, seed=0)) == 1


def test_the_value_goes_with_clips_too(tmp_path, sectioned_family):
    write_video(tmp_path / "v" / "a.mkv", frames_of("coffee.png", 5, (64, 32)))
    (tmp_path / "v" / "a.txt").write_text("a cup")
    path = write(tmp_path, "fp_latent_window_size = 3", media='video_directory = "{0}/v"')
    [item] = scan(load(path).datasets[0], sectioned_family.spec).items
    assert to_encode(item, sectioned_family.spec, with_pixels=False).said["fp_latent_window_size"] == 3


def test_to_a_family_that_does_not_read_them_they_mean_nothing(tmp_path, family, make_picture, caplog):
    make_picture(tmp_path / "p" / "a.png")
    make_picture(tmp_path / "p" / "a_0.png")
    path = write(tmp_path, *LINES, "multiple_target = true")
    told = latents(family, path, caplog)
    assert f"without effect here: {', '.join(SPECIAL)}" in told
    assert "2 items" in told
    write(tmp_path)
    assert "0 to make, 2 fresh" in latents(family, path, caplog)


class TestMasks:
    """Of a control that is partly transparent."""

    @pytest.fixture
    def item(self, tmp_path, sectioned_family, make_picture):
        for name in ("half", "opaque"):
            make_picture(tmp_path / "p" / f"{name}.png", (64, 32))
        pixels = np.full((32, 64, 4), 200, np.uint8)
        pixels[..., 3] = 255
        (tmp_path / "k").mkdir()
        Image.fromarray(pixels).save(tmp_path / "k" / "opaque.png")
        pixels[:, :32, 3] = 0
        pixels[:, 32:, 3] = 51
        Image.fromarray(pixels).save(tmp_path / "k" / "half.png")
        path = write(tmp_path, f'control_directory = "{tmp_path}/k"')
        return scan(load(path).datasets[0], sectioned_family.spec).items

    def test_opacity_is_the_mask_and_an_opaque_control_has_none(self, item):
        half, opaque = item
        [mask] = read_masks(half)
        assert mask.shape == (1, 1, 32, 64)
        assert torch.equal(mask[..., :32], torch.zeros(1, 1, 32, 32))
        torch.testing.assert_close(mask[..., 32:], torch.full((1, 1, 32, 32), 0.2))
        assert read_masks(opaque) == (None,)

    def test_only_a_family_that_asks_gets_masks(self, item, sectioned_family):
        given = to_encode(item[0], sectioned_family.spec, with_pixels=True, with_controls=True)
        assert len(given.masks) == len(given.controls) == 1
        plain = dataclasses.replace(sectioned_family.spec, control_masks=False)
        assert to_encode(item[0], plain, with_pixels=True, with_controls=True).masks == ()

    def test_caches_are_fresh_though_they_hold_no_field_of_controls(self, item, tmp_path, sectioned_family, caplog):
        latents(sectioned_family, tmp_path / "data.toml", caplog)
        assert "0 to make, 2 fresh" in latents(sectioned_family, tmp_path / "data.toml", caplog)


class TestSeveralTargets:
    """`multiple_target`: the pictures of one item, one after the other."""

    @pytest.fixture
    def root(self, tmp_path, make_picture):
        for number, name in enumerate(("a", "a_10", "a_2", "b", "b_0", "c_7")):
            caption = None if name in ("a_10", "a_2", "b_0") else name
            make_picture(tmp_path / "p" / f"{name}.png", (64, 32), colour=number, caption=caption)
        return tmp_path

    def test_numbered_pictures_of_a_folder_follow_their_first(self, root, sectioned_family, family):
        found = scan(load(write(root, "multiple_target = true")).datasets[0], sectioned_family.spec)
        shapes = {item.path.stem: ([path.stem for path in item.targets], item.shape) for item in found.items}
        assert shapes == {
            "a": (["a_2", "a_10"], (3, 32, 64)),
            "b": (["b_0"], (2, 32, 64)),
            "c_7": ([], (1, 32, 64)),
        }
        assert found.left_out == ()
        pixels = read_pixels(found.items[0])
        second = torch.from_numpy(np.asarray(Image.open(root / "p" / "a_2.png")).copy()).permute(2, 0, 1).float()
        torch.testing.assert_close(pixels[:, 1], second / 127.5 - 1)
        assert len(scan(load(root / "data.toml").datasets[0], family.spec).items) == 3

    def test_a_list_names_them_by_number(self, root, sectioned_family):
        rows = [{"image_path": "p/a.png", "image_path_1": "p/a_10.png", "image_path_0": "p/a_2.png", "caption": "x"}]
        rows += [{"image_path": "p/b.png", "image_path_0": "p/gone.png", "caption": "x"}]
        (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        path = write(root, "multiple_target = true", media='image_jsonl_file = "{0}/list.jsonl"')
        found = scan(load(path).datasets[0], sectioned_family.spec)
        assert [[target.stem for target in item.targets] for item in found.items] == [["a_2", "a_10"]]
        assert [entry.reason for entry in found.left_out] == ["its target p/gone.png is not there"]

    def test_a_changed_target_renews_the_cache_of_its_item(self, root, sectioned_family, make_picture, caplog):
        path = write(root, "multiple_target = true")
        assert "made 3 latent caches" in latents(sectioned_family, path, caplog)
        [held] = load_file(root / "c" / "a_0064x0032_toy.safetensors").items()
        assert held[0] == "latents_2x4x8_float32", "three frames in groups of one and four"
        make_picture(root / "p" / "a_2.png", (64, 32), colour=99, caption=None)
        told = latents(sectioned_family, path, caplog)
        assert "1 to make (1 stale: its source changed), 2 fresh" in told

    def test_a_target_that_is_no_picture_leaves_its_item_out(self, root, sectioned_family):
        (root / "p" / "b_0.png").write_bytes(b"")
        found = scan(load(write(root, "multiple_target = true")).datasets[0], sectioned_family.spec)
        assert [entry.reason for entry in found.left_out] == ["its target b_0.png is empty (0 bytes)"]


class TestTextOfClips:
    """All clips of a video have its caption, so they share one text cache, as existing caches have it."""

    @pytest.fixture
    def path(self, tmp_path, family, caplog):
        write_video(tmp_path / "v" / "a_00000-005.mkv", frames_of("coffee.png", 12, (64, 32)))
        (tmp_path / "v" / "a_00000-005.txt").write_text("a cup")
        lines = ("target_frames = [1, 5]", 'frame_extraction = "chunk"')
        path = write(tmp_path, *lines, media='video_directory = "{0}/v"')
        assert "made 14 latent caches" in latents(family, path, caplog)
        texts(family, path)
        return path

    def test_one_file_for_all(self, path, family):
        assert [p.name for p in (path.parent / "c").glob("*_te.safetensors")] == ["a_00000-005_toy_te.safetensors"]
        assert family.encoders.calls == 1
        items, _ = find_cached(load(path), family.spec)
        assert len(items) == 14
        assert {item.text.name for item in items} == {"a_00000-005_toy_te.safetensors"}

    def test_found_by_the_caches_alone(self, path, family):
        (path.parent / "v").rename(path.parent / "elsewhere")
        items, warnings = find_cached(load(path, need_media=False), family.spec)
        assert len(items) == 14
        assert {item.text.name for item in items} == {"a_00000-005_toy_te.safetensors"}
        assert "training on the 14 caches" in warnings[0]

    def test_those_of_the_established_tool_are_taken(self, path, family):
        """Their names, without fingerprints."""
        for file in (path.parent / "c").iterdir():
            save_file(load_file(file), file, {"architecture": "toy", "format_version": "1.0.1"})
        items, warnings = find_cached(load(path), family.spec)
        assert len(items) == 14
        assert "carry no fingerprint" in warnings[0]
