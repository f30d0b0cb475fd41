"""Wrong files, media and folders: each gives one sentence and exit code 2, and earlier outputs stay as they are.

Every row changes one thing about a dataset that was cached and can be trained on. A cache command, or opening the
batches for training, is then run through the guard of the command line.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import cli
from musubi_tuner.config.options import parse
from musubi_tuner.data.batches import open_batches
from musubi_tuner.data.build_cache import LATENT_GROUPS, TEXT_GROUPS, cache_latents, cache_text
from real_media import CLIPS, PHOTOS


class World:
    """Pictures in `p`, a clip in `v`, caches of the pictures in `c`, and the dataset file over them."""

    def __init__(self, root: Path, family, picture) -> None:
        self.root, self.family = root, family
        self.file = root / "data.toml"
        for i in range(3):
            picture(root / "p" / f"{i}.png", (64, 64), colour=i, caption=f"caption {i}")
        (root / "v").mkdir()
        shutil.copy(CLIPS / "carphone_distorted.mp4", root / "v" / "clip.mp4")
        (root / "v" / "clip.txt").write_text("a man talks")
        (root / "vae").write_bytes(b"weights")
        self.write()
        assert self.latents() == self.text() == 0

    def write(self, *lines: str, media: str = 'image_directory = "{0}/p"', head: str = "[[datasets]]") -> None:
        rows = [head, media.format(self.root), f'cache_directory = "{self.root}/c"', "resolution = 64", *lines]
        self.file.write_text("\n".join(row for row in rows if row), encoding="utf-8")

    def latents(self, *words: str) -> int:
        return self._run(cache_latents, LATENT_GROUPS, "--vae", str(self.root / "vae"), *words)

    def text(self, *words: str) -> int:
        return self._run(cache_text, TEXT_GROUPS, *words)

    def train(self) -> int:
        def work() -> int:
            for batch in open_batches(self.file, self.family, seed=0).epoch(0):
                assert batch.items
            return 0

        return cli.guarded("musubi", work)

    def _run(self, command, groups, *words: str) -> int:
        def work() -> int:
            given = ["--dataset_config", str(self.file), "--device", "cpu", *words]
            command(self.family, parse(groups, given, prog="cache", description="", elsewhere={}))
            return 0

        return cli.guarded("musubi", work)

    def outputs(self) -> dict[str, tuple[bytes, int]]:
        found = sorted((self.root / "c").glob("*"))
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def world(tmp_path, family, make_picture):
    return World(tmp_path, family, make_picture)


def jsonl(world: World, *lines: str | bytes, kind: str = "image") -> None:
    text = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (world.root / "list.jsonl").write_bytes(text)
    world.write(media=f'{kind}_jsonl_file = "{{0}}/list.jsonl"')


def cut(path: Path, share: float = 0.5) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def entry(path: str) -> str:
    return json.dumps({"image_path": path, "caption": "x"})


def damaged_cache(world: World) -> None:
    cut(world.root / "c" / "1_toy_te.safetensors", 0.9)


def nan_cache(world: World) -> None:
    path = world.root / "c" / "1_0064x0064_toy.safetensors"
    tensors = {key: torch.full_like(tensor, torch.nan) for key, tensor in load_file(path).items()}
    save_file(tensors, path, {"architecture": "toy"})


def only_bad(world: World, name: str, content: bytes) -> None:
    """A folder with one captioned file."""
    (world.root / "q").mkdir()
    (world.root / "q" / name).write_bytes(content)
    (world.root / "q" / name).with_suffix(".txt").write_text("x")


def bad_picture(name: str, content: bytes):
    def change(world: World) -> None:
        only_bad(world, name, content)
        world.write(media='image_directory = "{0}/q"')

    return change


def bad_clip(content: bytes, *lines: str):
    def change(world: World) -> None:
        only_bad(world, "a.mp4", content)
        world.write(*lines, media='video_directory = "{0}/q"')

    return change


FAULTS = {
    # the dataset file
    "no such file": (
        lambda w: w.file.unlink(),
        "latents",
        r"dataset file .*data\.toml is not there: check --dataset_config",
    ),
    "a folder": (lambda w: (w.file.unlink(), w.file.mkdir()), "latents", r"data\.toml cannot be read as text: "),
    "binary": (lambda w: w.file.write_bytes(b"\xff\xfe\x00"), "text", r"data\.toml cannot be read as text: "),
    "empty": (lambda w: w.file.write_text(""), "latents", r"no \[\[datasets\]\] section: add one"),
    "not TOML": (lambda w: w.write("= 3"), "latents", r"data\.toml cannot be parsed: .*line 5"),
    "a key twice": (lambda w: w.write("resolution = 32"), "latents", r"data\.toml cannot be parsed: "),
    "misspelt key": (
        lambda w: w.write("batchsize = 1"),
        "text",
        r"batchsize is not a known key: did you mean batch_size\?",
    ),
    "wrong type": (
        lambda w: w.write('num_repeats = "2"'),
        "latents",
        r'num_repeats = "2": a whole number is needed, 1 or more',
    ),
    "too small": (lambda w: w.write("batch_size = 0"), "latents", r"batch_size = 0: must be 1 or more"),
    "single brackets": (
        lambda w: w.write(head="[datasets]"),
        "latents",
        r"\[\[datasets\]\] a list of tables, in double",
    ),
    "key of clips": (lambda w: w.write("target_frames = [1]"), "latents", r"target_frames is for video datasets only"),
    "no media": (lambda w: w.write(media=""), "latents", r"names no pictures or clips: give one of image_directory"),
    "two media": (
        lambda w: w.write('video_directory = "v"'),
        "latents",
        r"image_directory and video_directory exclude each other",
    ),
    "one cache folder for two": (
        lambda w: w.write("[[datasets]]", f'image_directory="{w.root}/v"', f'cache_directory="{w.root}/c"'),
        "latents",
        r"keeps its caches in .* like \[\[datasets\]\] 1: give each its own cache_directory",
    ),
    # folders
    "no folder": (
        lambda w: w.write(media='image_directory = "{0}/nowhere"'),
        "latents",
        r'nowhere" is not there \(working',
    ),
    "a file as folder": (lambda w: w.write(media='image_directory = "{0}/vae"'), "latents", r'/vae" is not a folder'),
    "empty folder": (
        lambda w: ((w.root / "e").mkdir(), w.write(media='image_directory = "{0}/e"')),
        "latents",
        r'/e" holds no images \(',
    ),
    "only subfolders": (
        lambda w: ((w.root / "e" / "x").mkdir(parents=True), w.write(media='image_directory = "{0}/e"')),
        "latents",
        r"its subfolders are not searched: give each its own",
    ),
    "clips as pictures": (lambda w: w.write(media='image_directory = "{0}/v"'), "latents", r'/v" holds no images \('),
    "no captions": (
        lambda w: [path.unlink() for path in (w.root / "p").glob("*.txt")],
        "text",
        r"can be used: 3 x no caption file \(its name with the ending \.txt\)",
    ),
    "another caption ending": (
        lambda w: w.write('caption_extension = ".caption"'),
        "text",
        r"3 x no caption file \(its name with the ending \.caption",
    ),
    "captions that are no text": (
        lambda w: [path.write_bytes(b"\xff") for path in (w.root / "p").glob("*.txt")],
        "text",
        r"3 x its caption file is no UTF-8 text",
    ),
    "control folder": (
        lambda w: w.write('control_directory = "k"'),
        "latents",
        r'control_directory = "k" is not there',
    ),
    "cache folder below a file": (
        lambda w: w.write() or w.file.write_text(w.file.read_text().replace("/c", "/vae/c")),
        "latents",
        r"cannot write .*vae/c/",
    ),
    "cache folder is a file": (
        lambda w: w.file.write_text(w.file.read_text().replace("/c", "/vae")),
        "latents",
        r'/vae" is a file: a folder is needed',
    ),
    # sizes
    "odd resolution": (
        lambda w: w.file.write_text(w.file.read_text().replace("64", "[60, 64]")),
        "latents",
        r"resolution = \[60, 64\]: toy needs multiples of 16 x 16: use \[48, 64\] or \[64, 64\], or enable_bucket",
    ),
    # lists
    "list of no JSON": (lambda w: jsonl(w, entry("p/0.png"), "{"), "latents", r"list\.jsonl, line 2 is not JSON"),
    "list of arrays": (
        lambda w: jsonl(w, "[1]"),
        "latents",
        r'line 1: an object with the texts "image_path" and "caption"',
    ),
    "list without captions": (
        lambda w: jsonl(w, '{"image_path": "a.png"}'),
        "text",
        r'"caption" is needed, given \{"image',
    ),
    "list of no text": (lambda w: jsonl(w, b"\xff\xff"), "latents", r'list\.jsonl" cannot be read: '),
    "list of lost files": (
        lambda w: jsonl(w, entry("x.png"), entry("y.png")),
        "latents",
        r"2 x the list names it but it is not there",
    ),
    # media
    "zero bytes": (bad_picture("a.png", b""), "latents", r"can be used: 1 x is empty \(0 bytes\)"),
    "a web page": (bad_picture("a.jpg", b"<html>404</html>"), "latents", r"1 x is not a picture that Pillow knows"),
    "a clip of no bytes": (bad_clip(b""), "latents", r"1 x is empty \(0 bytes\)"),
    "a clip of noise": (bad_clip(b"noise" * 100), "latents", r"1 x cannot be read as a video: "),
    "a clip cut short": (
        bad_clip((CLIPS / "bikes.mp4").read_bytes()[:200_000]),
        "latents",
        r"1 x cannot be read as a video: ",
    ),
    "a clip that is too short": (
        bad_clip((CLIPS / "carphone_distorted.mp4").read_bytes(), "target_frames = [201]"),
        "latents",
        r"1 x too short: 120 frames, target_frames = \[201\]",
    ),
    "a picture cut short": (
        lambda w: cut(w.root / "p" / "1.png"),
        "latents",
        r"1 of 1 items could not be decoded, the others are cached: .*1\.png",
    ),
    # options
    "lost VAE": (lambda w: (w.root / "vae").unlink(), "latents", r"--vae .*/vae is not there"),
    # caches, as training meets them
    "lost picture cache": (
        lambda w: (w.root / "c" / "2_0064x0064_toy.safetensors").unlink(),
        "train",
        r"1 cache files are missing.*cache_latents toy",
    ),
    "damaged cache": (damaged_cache, "train", r"1 do not fit, e\.g\. .*1_toy_te.safetensors \(it cannot be read"),
    "NaN in a cache": (nan_cache, "train", r"are NaN or infinite: make it anew with --recache"),
    "changed caption": (
        lambda w: (w.root / "p" / "1.txt").write_text("new"),
        "train",
        r"1_toy_te.safetensors \(its source changed\)",
    ),
    "neither pictures nor caches": (
        lambda w: (shutil.rmtree(w.root / "p"), shutil.rmtree(w.root / "c")),
        "train",
        r'/p" is not there \(working folder',
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence_and_leaves_earlier_outputs(name, world, capfd, caplog):
    change, command, sentence = FAULTS[name]
    change(world)
    before = world.outputs()
    capfd.readouterr()
    assert getattr(world, command)() == 2
    told = capfd.readouterr().err
    message = told[told.index("musubi: error: ") :]
    assert re.search(sentence, message, re.DOTALL), message
    assert "Traceback" not in told
    assert "\n" not in message.strip() or " faults:" in message
    assert world.outputs() == before


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 40


def test_a_full_disk_is_one_sentence_and_harms_nothing(world, capfd, tmp_path):
    """Caching of 40 more pictures into a file system of 64 KiB that holds three caches already."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    try:
        world.file.write_text(world.file.read_text().replace(f"{world.root}/c", f"{small}/c"))
        assert world.latents() == 0
        before = {path.name: path.read_bytes() for path in (small / "c").iterdir()}
        assert len(before) == 3
        for i in range(3, 43):
            shutil.copy(PHOTOS / "chessboard_GRAY.png", world.root / "p" / f"{i}.png")
            (world.root / "p" / f"{i}.txt").write_text("x")
        capfd.readouterr()
        assert world.latents("--vae_dtype", "bf16") == 2
        told = capfd.readouterr().err
        assert re.search(r"error: cannot write .*/small/c/.*: the disk is full; free some space", told)
        after = {path.name: path.read_bytes() for path in (small / "c").iterdir()}
        assert before.items() < after.items()  # what fitted is there, and whole
        assert all(load_file(small / "c" / name) for name in after)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is where not even root may make a folder")
def test_a_folder_that_may_not_be_made_is_one_sentence(world, capfd):
    before = world.outputs()
    world.file.write_text(world.file.read_text().replace(f"{world.root}/c", "/proc/musubi"))
    assert world.text() == 2
    told = capfd.readouterr().err
    assert re.search(r"error: cannot write /proc/musubi/\d_toy_te\.safetensors: ", told)
    assert world.outputs() == before
