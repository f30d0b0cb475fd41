"""Windows of videos against the reference, and reading frames by number."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.sources import MediaItem, clip_stem, read_pixels, scan
from musubi_tuner.data.spec import DatasetSpec, load, parse
from musubi_tuner.data.video import Window, kept_frames, probe, read_frames, windows

ROWS = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/dataset.json").read_text(encoding="utf-8"))[
    "frames"
]
FPS = {"wan": 16.0, "hv": 24.0, "fp": 30.0}


def _id(row):
    return "-".join(str(row.get(k)) for k in ("video_frames", "frame_extraction", "source_fps", "max_frames"))


@pytest.mark.parametrize("row", [row for row in ROWS if "error" not in row and row.get("max_frames") != 0], ids=_id)
def test_windows_and_frames_of_the_reference(row):
    kept = kept_frames(row["video_frames"], row.get("source_fps"), FPS[row.get("architecture", "wan")])
    found = windows(
        len(kept),
        row["frame_extraction"],
        targets=row.get("target_frames", [1]),
        stride=row.get("frame_stride", 1),
        samples=row.get("frame_sample", 1),
        max_frames=row.get("max_frames", 129),
    )
    expected = list(dict.fromkeys((item["start"], item["count"]) for item in row["items"]))  # equal windows once
    assert [(window.start, window.count) for window in found] == expected
    for item in row["items"]:
        frames = kept[item["start"] : item["start"] + item["count"]]
        assert frames == (item["frames"] or list(range(item["start"], item["start"] + item["count"])))


REFUSED = {
    "slide": "frame_stride = 0: must be 1 or more",
    "bogus": 'frame_extraction = "bogus": use one of head, chunk, slide, uniform, full',
    "full": "max_frames = 0: must be 1 or more",
    "head": "target_frames = [0]: must be 1 or more",
}


@pytest.mark.parametrize("row", [row for row in ROWS if "error" in row or row.get("max_frames") == 0], ids=_id)
def test_values_that_the_established_tool_fails_on_are_faults_of_the_file(row):
    """It stops with a ValueError, an IndexError, or goes on with a clip of -3 frames."""
    given = {key: row[key] for key in ("frame_extraction", "target_frames", "frame_stride", "max_frames") if key in row}
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
    with pytest.raises(UserError) as caught:
        parse("\n".join(['[[datasets]]\nvideo_directory = "v"', *lines]), Path("data.toml"))
    assert REFUSED[row["frame_extraction"]] in str(caught.value)


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("items") and row.get("max_frames") != 0], ids=_id)
def test_cache_names_of_clips_are_those_of_the_reference(row, tmp_path):
    tag = row.get("architecture", "wan")
    dataset = DatasetSpec(1, "", "video", tmp_path, cache_directory=Path())
    for item in row["items"]:
        stem = clip_stem(f"v{row['video_frames']}", item["start"], item["count"])
        clip = MediaItem(dataset, tmp_path, "", (32, 32), (32, 32), stem, tuple(range(item["count"])))
        assert str(clip.latent_path(tag)) == item["cache_file"]


def test_an_unknown_extraction_is_refused():
    with pytest.raises(ValueError, match="'bogus' is not known"):
        windows(40, "bogus", targets=[13])


def test_a_slower_source_keeps_all_its_frames():
    assert kept_frames(10, 8.0, 16.0) == list(range(10))


def _film(path):
    """Write a 20-frame video of 64 x 48 pixels whose frame i is grey of level 10 i."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"qscale": "2"}
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    path.with_suffix(".txt").write_text("it gets brighter")
    return path


@pytest.fixture
def clip(tmp_path):
    return _film(tmp_path / "v" / "clip.mp4")


@pytest.mark.parametrize("ending", ["mp4", "mkv"])  # mkv states no frame count
def test_frames_are_counted_with_and_without_the_containers_word(tmp_path, ending):
    info = probe(_film(tmp_path / "v" / f"clip.{ending}"))
    assert (info.frames, info.size) == (20, (64, 48))


def test_frames_are_read_by_number(clip):
    levels = read_frames(clip, [0, 7, 19], (32, 32)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, [0, 70, 190], atol=4)


def test_a_clip_that_ends_early_says_so(clip):
    with pytest.raises(ValueError, match="ends before frame 25"):
        read_frames(clip, [0, 25], (32, 32))


def test_a_dataset_of_clips_at_the_familys_rate(clip, tmp_path, family):
    (clip.parent / "broken.mp4").write_bytes(b"nothing")
    (clip.parent / "broken.txt").write_text("x")
    path = tmp_path / "data.toml"
    path.write_text(
        f'[[datasets]]\nvideo_directory = "{clip.parent}"\nresolution = [64, 48]\n'
        "source_fps = 30\ntarget_frames = [1, 9, 25]\n"
    )
    found = scan(load(path).datasets[0], family.spec)
    assert [item.stem for item in found.items] == ["clip_00000-001", "clip_00000-009"]
    assert found.items[1].frames == tuple(kept_frames(20, 30.0, 16.0)[:9])
    assert found.left_out[0].reason.startswith("cannot be read as a video")
    pixels = read_pixels(found.items[1])
    assert pixels.shape == (3, 9, 48, 64)
    levels = (pixels.mean(dim=(0, 2, 3)) + 1) * 127.5
    np.testing.assert_allclose(levels.numpy(), [10 * i for i in found.items[1].frames], atol=4)
    assert windows(20, "head", targets=[9]) == [Window(0, 9)]
