"""Buckets and resizing against the reference table, and against arithmetic done another way."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from musubi_tuner.data.buckets import Buckets, area_resize, bucket_sizes, fit, to_bucket

TABLE = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/dataset.json").read_text(encoding="utf-8"))[
    "buckets"
]


def _name(row):
    return f"{row['resolution'][0]}x{row['resolution'][1]}-{row['enable_bucket']:d}{row['bucket_no_upscale']:d}"


@pytest.mark.parametrize("row", TABLE["selectors"], ids=_name)
class TestReference:
    def test_the_list_of_buckets_is_the_table(self, row):
        sizes = Buckets(tuple(row["resolution"]), row["enable_bucket"], row["bucket_no_upscale"], row["steps"]).sizes
        assert [list(size) for size in sizes] == row["bucket_list"]

    def test_every_picture_lands_where_the_table_says(self, row):
        buckets = Buckets(tuple(row["resolution"]), row["enable_bucket"], row["bucket_no_upscale"], row["steps"])
        for choice in row["choices"]:
            size = tuple(choice["image"])
            if choice["bucket"] == [0, 0]:  # an empty bucket is the established tool's fault: here it is refused
                with pytest.raises(ValueError, match="15 x 15 pixels is below 16"):
                    buckets.choose(size)
                continue
            assert list(buckets.choose(size)) == choice["bucket"], choice
            how = fit(size, tuple(choice["bucket"]))
            if "resized" in choice:
                assert list(how.resized) == choice["resized"], choice
                assert list(how.left_top) == choice["crop_left_top"], choice
                assert how.enlarge == (choice["filter"] == "lanczos"), choice
            else:
                assert how.resized == size == tuple(choice["bucket"])


def test_a_resolution_below_the_step_has_one_bucket_at_least():
    assert bucket_sizes((16, 16)) == ((16, 16),)


@pytest.mark.parametrize("size", [(31, 17), (64, 64), (50, 23)])
def test_area_resize_equals_the_overlap_matrix(size):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    resized = (size[0] * 5 // 8, size[1] * 5 // 8)

    def overlaps(source, target):
        matrix = np.zeros((target, source))
        for i in range(target):
            low, high = i * source / target, (i + 1) * source / target
            for j in range(source):
                matrix[i, j] = max(0.0, min(high, j + 1) - max(low, j)) / (high - low)
        return matrix

    exact = np.einsum("yj,xi,jic->yxc", overlaps(size[1], resized[1]), overlaps(size[0], resized[0]), pixels * 1.0)
    whole = area_resize(pixels, resized, (0, 0), resized)
    assert np.abs(whole - exact).max() <= 0.5 + 1e-9
    crop = area_resize(pixels, resized, (3, 2), (8, 6))
    np.testing.assert_array_equal(crop, whole[2:8, 3:11])


def test_halving_is_the_mean_of_four():
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    means = pixels.reshape(4, 2, 4, 2, 3).astype(float).mean(axis=(1, 3))
    found = to_bucket(Image.fromarray(pixels), (4, 4))
    np.testing.assert_array_equal(found, np.floor(means + 0.5).astype(np.uint8))


def test_a_picture_of_its_buckets_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_bucket(Image.fromarray(pixels), (48, 32)), pixels)


def test_enlarging_keeps_a_plain_colour_and_crops_the_centre():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = (10, 200, 30)  # the middle half
    found = to_bucket(Image.fromarray(pixels), (32, 32))
    assert found.shape == (32, 32, 3)
    np.testing.assert_array_equal(found[:, 6:26], np.broadcast_to(np.uint8([10, 200, 30]), (32, 20, 3)))
