"""The page and the example say what the code does."""

from pathlib import Path

from musubi_tuner.data.spec import parse
from musubi_tuner.data.spec_keys import KEYS

ROOT = Path(__file__).parents[2]


def test_the_example_is_a_valid_file():
    path = ROOT / "examples" / "dataset.toml"
    [dataset] = parse(path.read_text(encoding="utf-8"), path).datasets
    assert dataset.enable_bucket
    commented = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()]
    clips = commented[commented.index("[[datasets]]", commented.index("[[datasets]]") + 1) :]
    [video] = parse("\n".join(clips), path).datasets
    assert video.kind == "video"
    assert video.target_frames == (1, 25, 45)


def test_the_page_names_every_key():
    page = (ROOT / "docs" / "dataset.md").read_text(encoding="utf-8")
    keys = {key for table in KEYS.values() for key in table}
    assert {key for key in keys if f"`{key}`" not in page} == set()
