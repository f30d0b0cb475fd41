"""Previews of a run by two processes: made once, by the first, equal to those of one process, noticed by no loss."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from musubi_tuner import cli
from training_place import losses_in
from training_server import Server

PROMPTS = "a red roof --w 32 --h 32 --s 2 --d 5\na flower --w 32 --h 48 --s 2 --d 6\n"
NAMES = [f"study_{when}_0{n}_{5 + n}" for when in ("000000", "000002", "000004") for n in range(2)]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(workshop, tmp_path_factory) -> Path:
    """The workshop with caches of its own."""
    place = tmp_path_factory.mktemp("two") / "place"
    shutil.copytree(workshop.root, place, ignore=shutil.ignore_patterns("cache", "out"))
    for file in (place / "data.toml",):
        file.write_text(file.read_text().replace(workshop.root.as_posix(), place.as_posix()))
    words = ["--dataset_config", str(place / "data.toml"), "--device", "cpu"]
    assert cli.main(["wan_cache_latents", *words, "--vae", str(place / "vae.safetensors")]) == 0
    assert cli.main(["wan_cache_text_encoder_outputs", *words, "--t5", str(place / "t5.safetensors")]) == 0
    (place / "prompts.txt").write_text(PROMPTS)
    return place


def words_of(place: Path, *more: str) -> list[str]:
    files = ["--t5", str(place / "t5.safetensors"), "--vae", str(place / "vae.safetensors")]
    previews = ["--sample_prompts", str(place / "prompts.txt"), "--sample_every_n_steps", "2", "--sample_at_first"]
    return ["--max_train_steps", "4", *files, *previews, *more]


def pictures(out: Path) -> dict[str, np.ndarray]:
    """By name without its time."""
    found = {}
    for path in sorted((out / "sample").iterdir()):
        run, when, number, _, seed = path.stem.split("_")
        found[f"{run}_{when}_{number}_{seed}"] = np.asarray(Image.open(path)).astype(int)
    return found


def test_previews_are_made_once_and_show_the_same(server, place, tmp_path):
    one, two, plain = (tmp_path / name for name in ("one", "two", "plain"))
    joint = ["--gradient_accumulation_steps", "2"]
    assert server.end(server.start(place, one, words_of(place, *joint))) == 0, (one / "log.txt").read_text()
    assert [server.end(pid) for pid in server.pair(place, two, words_of(place))] == [0, 0], (
        two / "log.txt"
    ).read_text()
    log = (two / "log.txt").read_text()
    assert log.count("preview ") == len(NAMES), log
    assert len(list((two / "sample").iterdir())) == len(NAMES)
    a, b = pictures(one), pictures(two)
    assert list(a) == list(b) == NAMES
    for name in NAMES:
        assert np.abs(a[name] - b[name]).max() <= 2, name
    assert [server.end(pid) for pid in server.pair(place, plain, ["--max_train_steps", "4"])] == [0, 0]
    assert losses_in(plain) == losses_in(two)
