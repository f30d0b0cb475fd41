"""Photographs and clips as people have them: every form gives the right pixels, or one sentence."""

import re
import shutil
import tempfile
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from musubi_tuner.data.images import image_size, read_image
from musubi_tuner.data.sources import read_controls, read_pixels, scan
from musubi_tuner.data.spec import load
from musubi_tuner.data.video import at_rate, at_times, frame_times, is_even, kept_frames, probe, read_frames
from real_media import CLIPS, PHOTOS, frames_of, photo, png16, turn_mov, write_video

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "horse.png", "retina.jpg", "rocket.jpg", "text.png", "page.png")


def dataset(folder, spec, *lines, kind="image"):
    """The scan of the media in `folder`, all with a caption."""
    for path in [p for p in folder.iterdir() if p.suffix != ".txt"]:
        path.with_suffix(".txt").write_text("a caption")
    config = folder.parent / "data.toml"
    config.write_text("\n".join([f'[[datasets]]\n{kind}_directory = "{folder}"', *lines]))
    return scan(load(config).datasets[0], spec)


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "p"
    path.mkdir()
    return path


def test_photographs_reach_their_buckets_with_their_pixels(folder, family):
    """Against Pillow's own filters, which differ by rounding (enlarging) or at borders of pixels (reducing)."""
    for name in NAMES:
        shutil.copy(PHOTOS / name, folder)
    found = dataset(folder, family.spec, "resolution = [192, 128]", "enable_bucket = true")
    assert len(found.items) == len(NAMES)
    for item in found.items:
        image = photo(item.path.name)
        assert item.size == image.size
        ratio, (width, height) = image.width / image.height, item.bucket
        assert width % 16 == height % 16 == 0
        assert 0.75 * 192 * 128 <= width * height <= 192 * 128
        side = int((192 * 128) ** 0.5)  # buckets end at half of it
        assert (
            abs(np.log(width / height / ratio)) < 0.15 or max(width, height) >= 192 * 128 // (side // 2 // 16 * 16) - 16
        )
        scale = max(width / image.width, height / image.height)
        covered = (round(image.width * scale), round(image.height * scale))
        left, top = (covered[0] - width) // 2, (covered[1] - height) // 2
        rgb = image.convert("RGBA").convert("RGB")
        resized = rgb.resize(covered, Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BOX)
        expected = np.asarray(resized.crop((left, top, left + width, top + height))).astype(float)
        pixels = ((read_pixels(item)[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(float)
        assert pixels.shape == expected.shape
        difference = np.abs(pixels - expected).mean()
        assert difference < (1.0 if scale > 1 else 4.0), item.path.name


class TestForms:
    """One photograph, saved in a form, read at its own size."""

    PHOTO = "chelsea.png"
    SIZE = (96, 80)

    @pytest.fixture
    def cat(self):
        return photo(self.PHOTO, self.SIZE)

    def test_alpha_is_dropped_and_the_colours_under_it_stay(self, folder, cat):
        alpha = Image.linear_gradient("L").resize(self.SIZE)
        merged = cat.copy()
        merged.putalpha(alpha)
        merged.save(folder / "a.png")
        np.testing.assert_array_equal(read_image(folder / "a.png", self.SIZE), np.asarray(cat))

    @pytest.mark.parametrize("transparency", [None, 3, bytes([0, 100, 255])])
    def test_palettes_become_their_colours(self, folder, cat, transparency):
        few = cat.quantize(48)
        few.save(folder / "a.png", **({} if transparency is None else {"transparency": transparency}))
        assert mode_of(folder / "a.png") == "P"
        colours = np.array(few.getpalette()).reshape(-1, 3)[np.asarray(few)]
        np.testing.assert_array_equal(read_image(folder / "a.png", self.SIZE), colours)

    @pytest.mark.parametrize("ending", ["png", "tif"])
    def test_16_bit_grey_keeps_its_range(self, folder, ending):
        grey = np.asarray(photo("camera.png", self.SIZE))
        fine = grey.astype(np.uint16) * 257 + np.uint16(60)  # 60 of 257: rounds down
        Image.fromarray(np.minimum(fine, 65535)).save(folder / f"a.{ending}")
        expected = np.repeat(grey[..., None], 3, axis=-1)
        np.testing.assert_array_equal(read_image(folder / f"a.{ending}", self.SIZE), expected)

    def test_16_bit_colour_keeps_its_high_bytes(self, folder, cat):
        png16(folder / "a.png", np.asarray(cat).astype(np.uint16) * 257)
        np.testing.assert_array_equal(read_image(folder / "a.png", self.SIZE), np.asarray(cat))

    def test_cmyk_becomes_rgb(self, folder, cat):
        cat.convert("CMYK").save(folder / "a.jpg", quality=98)
        assert mode_of(folder / "a.jpg") == "CMYK"
        difference = read_image(folder / "a.jpg", self.SIZE).astype(float) - np.asarray(cat)
        assert np.abs(difference).mean() < 3

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation_of_a_camera_is_seen_upright(self, folder, cat, orientation):
        upright = np.asarray(cat)
        stored = {  # how a camera stores what is to be seen as `upright` (EXIF 2.3, figure of tag 0112)
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(folder / "a.png", exif=exif)
        assert image_size(folder / "a.png") == self.SIZE
        np.testing.assert_array_equal(read_image(folder / "a.png", self.SIZE), upright)

    def test_the_first_picture_of_an_animation_counts(self, folder, cat):
        cat.save(folder / "a.webp", save_all=True, append_images=[cat.rotate(180)], lossless=True)
        np.testing.assert_array_equal(read_image(folder / "a.webp", self.SIZE), np.asarray(cat))


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 700)])
def test_slivers_fill_a_bucket(folder, family, size):
    row = np.asarray(photo("coffee.png").convert("RGB")).reshape(-1, 3)[: size[0] * size[1]]
    Image.fromarray(row.reshape(size[1], size[0], 3).copy()).save(folder / "a.png")
    [item] = dataset(folder, family.spec, "resolution = 64", "enable_bucket = true").items
    pixels = read_pixels(item)
    assert pixels.shape[2:] == (item.bucket[1], item.bucket[0])
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    if size == (1, 1):  # one colour, wherever one looks
        assert ((pixels[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5).round().reshape(-1, 3).astype(int).tolist() == (
            row.tolist() * (item.bucket[0] * item.bucket[1])
        )


def test_what_is_no_picture_is_left_out_with_its_reason(folder, family):
    shutil.copy(PHOTOS / "chelsea.png", folder / "good.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "header.png").write_bytes((PHOTOS / "chelsea.png").read_bytes()[:20])
    (folder / "clip.png").write_bytes((CLIPS / "bikes.mp4").read_bytes()[:5000])
    Image.fromarray(np.zeros((20, 20), np.float32)).save(folder / "float.tif")
    photo("chelsea.png").resize((9, 400)).save(folder / "thin.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "folder.png").mkdir()
    found = dataset(folder, family.spec, "resolution = 512", "enable_bucket = true", "bucket_no_upscale = true")
    assert [item.path.name for item in found.items] == ["float.tif", "good.png"]
    reasons = {entry.path.name: entry.reason for entry in found.left_out}
    assert reasons.pop("header.png").startswith(("cannot be read as a picture", "is not a picture"))
    assert reasons == {
        "empty.png": "is empty (0 bytes)",
        "page.jpg": "is not a picture that Pillow knows",
        "clip.png": "is not a picture that Pillow knows",
        "thin.png": "9 x 400 pixels is below 16 and bucket_no_upscale forbids enlarging",
    }
    with pytest.raises(ValueError, match="floating-point values, whose range is not known: save it with 8 or 16 bits"):
        read_image(folder / "float.tif", (16, 16))


@pytest.mark.parametrize("name", ["retina.jpg", "chelsea.png"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_a_picture_that_is_cut_short_never_passes_as_whole(folder, name, share):
    whole = (PHOTOS / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"cannot be read as a picture \(.*truncated"):
        read_image(folder / name, (64, 64))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(["png", "jpg", "webp", "tif", "bmp", "avif", "gif"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.floats(0.2, 1),
)
def test_damaged_bytes_give_pixels_or_a_reason(ending, changes, share):
    stream = BytesIO()
    photo("chelsea.png", (24, 20)).save(stream, Image.registered_extensions()[f".{ending}"])
    content = bytearray(stream.getvalue())
    for place, value in changes:  # damage near the front, where the structure is
        content[int(place**3 * (len(content) - 1))] = value
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"a.{ending}"
        path.write_bytes(content[: int(share * len(content))] if share < 0.6 else content)
        for work in (image_size, lambda file: read_image(file, (16, 16))):
            try:
                found = work(path)
            except ValueError as error:
                reason = str(error)
                assert re.match(
                    r"cannot be read as a picture \(.|is not a picture that|is empty|holds floating", reason
                )
            else:
                assert len(found) in (2, 16)


class TestClips:
    def test_real_clips_are_counted_and_read(self, folder, family):
        for name in ("bikes.mp4", "carphone_pristine.mp4"):
            shutil.copy(CLIPS / name, folder)
        lines = ("resolution = 64", "enable_bucket = true", "target_frames = [9]", 'frame_extraction = "uniform"')
        found = dataset(folder, family.spec, *lines, "frame_sample = 2", "source_fps = 30", kind="video")
        starts = {item.stem for item in found.items}
        kept = {frames: (frames - 1) * 16 // 30 + 1 for frames in (250, 120)}
        assert starts == {
            "bikes_00000-009",
            f"bikes_{kept[250] - 9:05d}-009",
            "carphone_pristine_00000-009",
            f"carphone_pristine_{kept[120] - 9:05d}-009",
        }
        item = found.items[-1]
        assert item.size == (176, 144)
        with av.open(str(item.path)) as container:
            wanted = [f.to_image() for i, f in enumerate(container.decode(video=0)) if i in item.frames]
        assert len(wanted) == 9
        pixels = (read_pixels(item).permute(1, 2, 3, 0).numpy() + 1) * 127.5
        scale = max(item.bucket[0] / 176, item.bucket[1] / 144)
        size = (round(176 * scale), round(144 * scale))
        left, top = (size[0] - item.bucket[0]) // 2, (size[1] - item.bucket[1]) // 2
        box = (left, top, left + item.bucket[0], top + item.bucket[1])
        for frame, image in zip(pixels, wanted, strict=True):
            expected = np.asarray(image.resize(size, Image.Resampling.BOX).crop(box)).astype(float)
            assert np.abs(frame - expected).mean() < 4

    def test_odd_sizes_are_read_exactly(self, tmp_path):
        frames = frames_of("coffee.png", 5, (63, 47))
        path = write_video(tmp_path / "a.mkv", frames)
        assert (probe(path).frames, probe(path).size) == (5, (63, 47))
        np.testing.assert_array_equal(read_frames(path, [0, 2, 4], (63, 47)), frames[[0, 2, 4]])

    @pytest.mark.parametrize("clockwise", [90, 180, 270])
    def test_quarter_turns_are_applied(self, tmp_path, clockwise):
        frames = frames_of("coffee.png", 2, (48, 32))
        path = turn_mov(write_video(tmp_path / "a.mov", frames), clockwise)
        upright = np.rot90(frames, -clockwise // 90, axes=(1, 2))
        size = (upright.shape[2], upright.shape[1])
        assert probe(path).size == size
        np.testing.assert_array_equal(read_frames(path, [0, 1], size), upright)

    def test_frames_of_a_variable_rate_are_taken_as_they_come(self, tmp_path):
        frames = frames_of("coffee.png", 6, (48, 32))
        path = write_video(tmp_path / "a.mkv", frames, stamps=[0, 10, 500, 510, 520, 3000])
        assert probe(path).frames == 6
        np.testing.assert_array_equal(read_frames(path, range(6), (48, 32)), frames)

    def test_a_variable_rate_is_resampled_by_time(self, tmp_path):
        """Frames of 25 a second, then one that stands for a second, then ten a second: at 16 a second, evenly."""
        stamps = [*range(0, 1000, 40), *range(2000, 3000, 100)]
        frames = frames_of("coffee.png", len(stamps), (48, 32))
        path = write_video(tmp_path / "a.mkv", frames, stamps=stamps)
        assert not is_even(frame_times(path))
        kept = at_rate(path, probe(path), 25.0, 16.0)
        ticks = np.arange(len(kept)) / 16 * 1000
        assert len(kept) == int(2900 / 62.5) + 1
        assert [stamps[i] for i in kept] == [max(s for s in stamps if s <= tick + 0.1) for tick in ticks]
        assert kept.count(24) == 16, "the frame of 960 ms is seen until 2000 ms"
        read = read_frames(path, kept, (48, 32))
        np.testing.assert_array_equal(read, frames[kept])
        assert at_rate(path, probe(path), 10.0, 16.0) == at_times([s / 1000 for s in stamps], 10.0)
        assert at_rate(path, probe(path), None, 16.0) == list(range(len(stamps)))

    def test_a_constant_rate_of_rounded_stamps_goes_by_number(self, tmp_path):
        """29.97 frames a second in whole milliseconds, and stamps that start late."""
        stamps = [1000 + round(i * 1001 / 30) for i in range(40)]
        path = write_video(tmp_path / "a.mkv", frames_of("coffee.png", 40, (48, 32)), stamps=stamps)
        assert is_even(frame_times(path))
        assert at_rate(path, probe(path), 30.0, 16.0) == kept_frames(40, 30.0, 16.0)

    def test_a_gif_is_a_clip(self, folder, family):
        shutil.copy(PHOTOS / "no_time_for_that_tiny.gif", folder / "a.gif")
        with Image.open(folder / "a.gif") as image:
            count, size = image.n_frames, image.size
        assert (probe(folder / "a.gif").frames, probe(folder / "a.gif").size) == (count, size)
        found = dataset(folder, family.spec, "resolution = 32", "target_frames = [5]", kind="video")
        assert read_pixels(found.items[0]).shape == (3, 5, 32, 32)

    def test_a_folder_of_pictures_is_a_clip_of_a_list(self, tmp_path, family):
        frames = frames_of("coffee.png", 6, (48, 32))
        (tmp_path / "shots").mkdir()
        for i, pixels in enumerate(frames):
            Image.fromarray(pixels).save(tmp_path / "shots" / f"{i:03d}.png")
        (tmp_path / "shots" / "notes.txt").write_text("no frame")
        (tmp_path / "none").mkdir()
        lines = [f'{{"video_path": "{tmp_path / name}", "caption": "moving"}}' for name in ("shots", "none")]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))
        (tmp_path / "data.toml").write_text(
            f'[[datasets]]\nvideo_jsonl_file = "{tmp_path / "list.jsonl"}"\ncache_directory = "{tmp_path / "c"}"\n'
            'resolution = [48, 32]\ntarget_frames = [5]\nframe_extraction = "slide"\n'
        )
        found = scan(load(tmp_path / "data.toml").datasets[0], family.spec)
        assert [item.stem for item in found.items] == ["shots_00000-005", "shots_00001-005"]
        pixels = (read_pixels(found.items[1]).permute(1, 2, 3, 0).numpy() + 1) * 127.5
        np.testing.assert_array_equal(np.round(pixels).astype(np.uint8), frames[1:])
        assert [entry.reason for entry in found.left_out] == ["is a folder without pictures, so no video"]

    def test_a_control_clip_gives_the_frames_of_its_item(self, tmp_path, edit_family):
        frames = frames_of("coffee.png", 9, (48, 32))
        write_video(tmp_path / "v" / "a.mkv", frames)
        write_video(tmp_path / "v" / "b.mkv", frames)
        write_video(tmp_path / "k" / "a.mkv", frames[:, ::-1])
        write_video(tmp_path / "k" / "b.mkv", frames[:7])
        lines = (f'control_directory = "{tmp_path / "k"}"', "resolution = [48, 32]", "target_frames = [5]")
        found = dataset(tmp_path / "v", edit_family.spec, *lines, 'frame_extraction = "chunk"', kind="video")
        found_slide = dataset(tmp_path / "v", edit_family.spec, *lines, 'frame_extraction = "slide"', kind="video")
        assert [item.stem for item in found.items] == ["a_00000-005", "b_00000-005"]
        assert found_slide.left_out[0].reason == "its control b.mkv has 7 frames, 9 are needed"
        [control] = read_controls(found_slide.items[3])
        pixels = np.round((control.permute(1, 2, 3, 0).numpy() + 1) * 127.5).astype(np.uint8)
        np.testing.assert_array_equal(pixels, frames[3:8, ::-1])

    def test_what_is_no_clip_is_left_out_with_its_reason(self, folder, family):
        whole = (CLIPS / "bikes.mp4").read_bytes()
        (folder / "good.mp4").write_bytes(whole)
        (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        (folder / "empty.mp4").write_bytes(b"")
        (folder / "text.mkv").write_text("no video at all")
        shutil.copy(PHOTOS / "chelsea.png", folder / "still.mp4")
        with av.open(str(folder / "sound.mkv"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        found = dataset(folder, family.spec, "resolution = 64", "target_frames = [5]", kind="video")
        assert [item.stem for item in found.items] == ["good_00000-005"]
        reasons = {entry.path.name: entry.reason for entry in found.left_out}
        assert reasons.pop("cut.mp4").startswith("cannot be read as a video: ")
        assert reasons.pop("text.mkv").startswith("cannot be read as a video: ")
        assert reasons == {
            "empty.mp4": "is empty (0 bytes)",
            "sound.mkv": "has no video stream",
            "still.mp4": "too short: 1 frames, target_frames = [5]",
        }

    def test_a_clip_that_is_cut_behind_its_index_fails_at_its_frame(self, tmp_path):
        frames = frames_of("coffee.png", 20, (64, 48))
        whole = write_video(tmp_path / "a.mkv", frames).read_bytes()
        (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
        count = probe(tmp_path / "cut.mkv").frames
        assert 5 < count < 15
        np.testing.assert_array_equal(read_frames(tmp_path / "cut.mkv", [0, 4], (64, 48)), frames[[0, 4]])
        with pytest.raises(ValueError, match=r"ends before frame 15|cannot be read as a video"):
            read_frames(tmp_path / "cut.mkv", [0, 15], (64, 48))
