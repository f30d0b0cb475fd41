"""`--show_timesteps`: what is shown is what is drawn; nothing is loaded."""

import logging

import pytest
import torch
from PIL import Image

from musubi_tuner.config.options import parse
from musubi_tuner.families import registry
from musubi_tuner.flow.timesteps import TimestepShape, distribution
from musubi_tuner.training import config, run
from musubi_tuner.training.config import TimestepOptions
from musubi_tuner.training.show_timesteps import DRAWS, ROWS, histogram, text

FAMILY = registry.get("wan")


def options(tmp_path, *words: str):
    given = ["--dit", "/gone/dit.safetensors", "--dataset_config", "/gone/data.toml"]
    given += ["--output_dir", str(tmp_path), "--output_name", "study", "--seed", "1"]
    return parse((*config.GROUPS, *FAMILY.option_groups("train")), [*given, *words], prog="t", description="")


def test_shares_are_those_of_the_distribution(tmp_path):
    words = ["--timestep_sampling", "shift", "--discrete_flow_shift", "3", "--min_timestep", "500"]
    words += ["--preserve_distribution_shape", "--weighting_scheme", "sigma_sqrt"]
    found = histogram(options(tmp_path, *words)[TimestepOptions], FAMILY.spec, 1)
    of = distribution("shift", (16, 1, 8, 8), TimestepShape(shift=3.0), low=0.5, high=1.0, truncate=True)
    edges = of.cdf(torch.arange(ROWS + 1) / ROWS)
    assert torch.allclose(found.shares, edges.diff(), atol=4 / DRAWS**0.5 / 2)
    assert float(found.shares[: ROWS // 2].sum()) == 0
    assert float(found.weights[-1]) == pytest.approx(0.98**-2, rel=0.03)


def test_stratified_draws_are_shown_as_they_fall(tmp_path):
    words = ["--timestep_sampling", "uniform", "--num_timestep_buckets", "25"]
    found = histogram(options(tmp_path, *words)[TimestepOptions], FAMILY.spec, 1)
    assert torch.equal(found.shares, torch.full((ROWS,), 1 / ROWS, dtype=torch.float64))
    assert "25 buckets" in text(found)


def test_console_prints_a_bar_for_each_range_and_reads_no_model(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run.run(FAMILY, options(tmp_path, "--show_timesteps", "console", "--timestep_sampling", "sigmoid"))
    rows = [line for line in caplog.text.splitlines() if "%" in line]
    assert len(rows) == ROWS
    bars = [line.count("#") for line in rows]
    assert abs(bars.index(max(bars)) - ROWS // 2) <= 1  # the peak is flat
    assert "sigmoid" in caplog.text


@pytest.mark.shows("show_timesteps")
def test_image_is_a_picture_whose_path_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run.run(FAMILY, options(tmp_path, "--show_timesteps", "image", "--timestep_sampling", "shift"))
    path = tmp_path / "study-timesteps.png"
    assert str(path) in caplog.text
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
