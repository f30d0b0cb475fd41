"""Random dataset files and media: an error is one sentence, and what is promised of items, buckets and epochs holds."""

import json
import logging
import math
import string
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse as parse_options
from musubi_tuner.data.batches import Group, epoch_order, open_batches
from musubi_tuner.data.buckets import Buckets, fit, to_bucket
from musubi_tuner.data.build_cache import LATENT_GROUPS, TEXT_GROUPS, cache_latents, cache_text
from musubi_tuner.data.controls import of_area
from musubi_tuner.data.sources import scan
from musubi_tuner.data.spec import load, parse
from musubi_tuner.data.spec_keys import EXTRACTIONS, KEYS
from musubi_tuner.data.video import kept_frames, windows

quick = settings(max_examples=80, deadline=None, derandomize=True)
with_files = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SENSIBLE = {
    "resolution": st.one_of(st.integers(16, 2000), st.lists(st.integers(16, 2000), min_size=2, max_size=2)),
    "caption_extension": st.sampled_from([".txt", ".caption"]),
    "batch_size": st.integers(1, 9),
    "num_repeats": st.integers(1, 5),
    "enable_bucket": st.booleans(),
    "bucket_no_upscale": st.booleans(),
    "target_frames": st.lists(st.integers(1, 200), min_size=1, max_size=4),
    "frame_extraction": st.sampled_from(EXTRACTIONS),
    "frame_stride": st.integers(1, 40),
    "frame_sample": st.integers(1, 9),
    "max_frames": st.integers(1, 300),
    "source_fps": st.one_of(st.integers(1, 120), st.floats(0.5, 120)),
    "control_resolution": st.integers(16, 2000),
    "no_resize_control": st.booleans(),
}
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)
any_key = st.one_of(
    st.sampled_from(sorted({*KEYS["image"], *KEYS["video"]})), st.text(string.ascii_lowercase, max_size=9)
)


@st.composite
def tables(draw):
    """A `[[datasets]]` table: mostly right, with a wrong value or key now and then."""
    kind = draw(st.sampled_from(["image", "video"]))
    keys = draw(st.lists(st.sampled_from(sorted(key for key in KEYS[kind] if key in SENSIBLE)), unique=True))
    table = {key: draw(SENSIBLE[key]) for key in keys}
    table[draw(st.sampled_from([f"{kind}_directory", f"{kind}_jsonl_file"]))] = "/media"
    if draw(st.booleans()):
        table["cache_directory"] = "/cache"
    if draw(st.integers(0, 3)) == 0:
        table[draw(any_key)] = draw(junk)
    return table


files = st.fixed_dictionaries(
    {"datasets": st.one_of(st.lists(tables(), max_size=3), junk)},
    optional={
        "general": st.one_of(st.dictionaries(any_key, junk, max_size=2), st.just({"resolution": 64}), junk),
        "other": junk,
    },
)


def attempt(work, *arguments, expect=UserError):
    """(result, "") of a call, or (None, the sentence of the error that it may raise); any other error passes on."""
    try:
        return work(*arguments), ""
    except expect as error:
        return None, str(error)


@quick
@given(files)
@example({"datasets": [], "general": {"\r": None}, "a\x1b": 0})
def test_any_file_is_read_or_answered_with_its_name(content):
    config, sentence = attempt(parse, json.dumps(content), Path("data.json"))
    if config is None:
        first, *faults = sentence.splitlines()
        assert first.startswith("data.json")
        assert all(len(line) > 10 for line in (first, *faults))
        assert not faults or first == f"data.json has {len(faults)} faults:"
        return
    assert len(config.datasets) == len(content["datasets"]) > 0
    for number, (dataset, table) in enumerate(zip(config.datasets, content["datasets"], strict=True), start=1):
        assert dataset.number == number
        general = content.get("general", {})
        for key in (
            "batch_size",
            "num_repeats",
            "enable_bucket",
            "bucket_no_upscale",
            "frame_extraction",
            "max_frames",
        ):
            if key in table or key in general:
                assert getattr(dataset, key) == table.get(key, general.get(key))


@quick
@given(st.text(alphabet=string.printable, max_size=60), st.integers(0, 90), st.booleans())
def test_damaged_text_is_answered_with_a_sentence(noise, place, cut):
    whole = '[general]\nresolution = [64, 64]\n[[datasets]]\nimage_directory = "/d"\nbatch_size = 2\n'
    text = whole[:place] + noise + ("" if cut else whole[place:])
    config, sentence = attempt(parse, text, Path("data.toml"))
    assert config or sentence.startswith("data.toml")


sides = st.integers(1, 6000)
resolutions = st.tuples(st.integers(16, 1500), st.integers(16, 1500))


@quick
@given(sides, sides, resolutions, st.booleans())
def test_a_bucket_has_whole_steps_at_most_the_area_and_a_near_shape(width, height, resolution, no_upscale):
    buckets = Buckets(resolution, True, no_upscale)
    chosen, sentence = attempt(buckets.choose, (width, height), expect=ValueError)
    if chosen is None:
        assert no_upscale
        assert min(width, height) < 16
        assert "bucket_no_upscale forbids enlarging" in sentence
        return
    area = resolution[0] * resolution[1]
    assert chosen[0] % 16 == chosen[1] % 16 == 0
    assert 0 < chosen[0] * chosen[1] <= area
    if no_upscale and width * height <= area:
        assert chosen == (width // 16 * 16, height // 16 * 16)
    else:
        nearest = min(abs(w / h - width / height) for w, h in buckets.sizes)
        assert abs(chosen[0] / chosen[1] - width / height) == nearest
    how = fit((width, height), chosen)
    scale = max(chosen[0] / width, chosen[1] / height)
    for axis in (0, 1):
        assert how.resized[axis] >= chosen[axis]
        assert abs(how.resized[axis] - (width, height)[axis] * scale) <= 0.5 + 1e-9
        assert 0 <= how.left_top[axis] <= how.resized[axis] - chosen[axis]
    assert min(how.resized[axis] - chosen[axis] for axis in (0, 1)) == 0  # nothing is cut along one of the axes


@quick
@given(sides, sides, resolutions)
def test_a_control_of_some_area_is_never_larger_and_no_other_is_nearer(width, height, resolution):
    area = resolution[0] * resolution[1]
    found = of_area((width, height), resolution, 16)
    every = [(w, area // w // 16 * 16) for w in range(16, area // 16 + 1, 16)]
    distances = {size: abs(size[0] / size[1] - width / height) for size in every if size[1]}
    assert distances[found] == min(distances.values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 4), st.integers(1, 4))
def test_any_picture_fills_any_bucket_and_a_plain_one_stays_plain(width, height, columns, rows):
    bucket = (16 * columns, 16 * rows)
    plain = Image.new("RGB", (width, height), (255, 130, 1))
    found = to_bucket(plain, bucket)
    assert found.dtype == np.uint8
    assert found.shape == (bucket[1], bucket[0], 3)
    np.testing.assert_array_equal(found, np.broadcast_to(np.uint8([255, 130, 1]), found.shape))


extractions = st.fixed_dictionaries(
    {
        "extraction": st.sampled_from(EXTRACTIONS),
        "targets": st.lists(st.integers(1, 200), min_size=1, max_size=4),
        "stride": st.integers(1, 60),
        "samples": st.integers(1, 12),
        "max_frames": st.integers(1, 300),
    }
)


@quick
@given(st.integers(0, 400), extractions)
def test_clips_lie_inside_the_video_and_are_distinct(frames, how):
    found = windows(frames, **how)
    assert len(set(found)) == len(found)
    for window in found:
        assert window.count % 4 == 1
        assert window.start >= 0
        assert window.start + window.count <= frames
    lengths = {(target - 1) // 4 * 4 + 1 for target in how["targets"]}
    if how["extraction"] == "full":
        assert [window.count for window in found] == [(min(frames, how["max_frames"]) - 1) // 4 * 4 + 1] * bool(frames)
    else:
        assert {window.count for window in found} == {length for length in lengths if length <= frames}
    if how["extraction"] == "chunk":
        assert len(found) == sum(frames // length for length in lengths)


@quick
@given(st.integers(1, 400), st.floats(0.5, 240), st.floats(0.5, 60))
def test_thinning_keeps_order_and_about_the_right_number(frames, source, target):
    kept = kept_frames(frames, source, target)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert kept[-1] < frames
    if source <= target:
        assert kept == list(range(frames))
    else:
        assert abs(len(kept) - (frames - 1) * target / source - 1) <= 1


@st.composite
def groups(draw):
    sizes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5))
    first = 0
    found = []
    for number, (count, batch_size) in enumerate(sizes):
        found.append(Group(f"{number}", tuple(range(first, first + count)), batch_size))
        first += count
    return found


@quick
@given(groups(), st.integers(0, 2**32), st.integers(0, 50), st.integers(1, 9))
def test_every_entry_is_in_one_batch_of_one_process(found, seed, epoch, world):
    order = epoch_order(found, seed, epoch)
    total = sum(len(group.entries) for group in found)
    shares = [order[rank::world] for rank in range(world)]
    assert sorted(entry for share in shares for batch in share for entry in batch) == list(range(total))
    assert len(shares[0]) - len(shares[-1]) <= 1
    batches = Counter(next(g.key for g in found if batch[0] in g.entries) for batch in order)
    assert batches == {group.key: math.ceil(len(group.entries) / group.batch_size) for group in found}
    for batch in order:
        [home] = [group for group in found if set(batch) <= set(group.entries)]
        assert 0 < len(batch) <= home.batch_size


json_line = st.one_of(
    st.text(max_size=30).filter(lambda text: "\n" not in text),
    st.fixed_dictionaries(
        {"image_path": st.one_of(st.sampled_from(["a.png", "b.png", "../a.png", "", "\0"]), junk), "caption": junk},
        optional={"control_path": junk, "control_path_1": st.just("a.png"), "more": junk},
    ).map(json.dumps),
)


@settings(with_files, max_examples=60)
@given(lines=st.lists(json_line, max_size=4))
def test_any_list_gives_items_or_a_sentence(lines, edit_family):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (20, 20)).save(folder / "a.png")
        (folder / "list.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        (folder / "data.toml").write_text(
            f'[[datasets]]\nimage_jsonl_file = "{folder}/list.jsonl"\ncache_directory = "{folder}/c"\nresolution = 32\n'
        )
        found, sentence = attempt(scan, load(folder / "data.toml").datasets[0], edit_family.spec)
        if found is None:
            assert sentence.startswith(("data.toml", str(folder)))
            return
        assert all(item.path == folder / "a.png" for item in found.items)
        assert all(entry.reason for entry in found.left_out)


@st.composite
def media(draw):
    """Pictures of a folder: name -> (size, caption or None, whole)."""
    names = draw(st.lists(st.text("ab_0é", min_size=1, max_size=4), min_size=1, max_size=7, unique=True))
    rows = {}
    for name in names:
        ending = draw(st.sampled_from([".png", ".jpg", ".webp"]))
        size = (draw(st.integers(1, 70)), draw(st.integers(1, 70)))
        caption = draw(st.one_of(st.none(), st.text("xyz \n", max_size=5)))
        rows[name + ending] = (size, caption, draw(st.integers(0, 6)) > 0)
        if draw(st.integers(0, 4)) == 0:
            rows[name + ".bmp"] = (size, caption, True)  # an equal stem
    return rows


sizing = st.fixed_dictionaries(
    {
        "resolution": st.tuples(st.sampled_from([32, 48]), st.sampled_from([32, 64])).map(list),
        "batch_size": st.integers(1, 4),
        "num_repeats": st.integers(1, 3),
        "enable_bucket": st.booleans(),
        "bucket_no_upscale": st.booleans(),
    }
)


@with_files
@given(rows=media(), how=sizing, world=st.integers(1, 3))
def test_from_any_folder_to_epochs_of_every_item_once(rows, how, world, family):
    """The whole way: files -> scan -> both caches -> batches of every process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "p", rows)
        config = folder / "data.toml"
        lines = [f"{key} = {json.dumps(value)}" for key, value in how.items()]
        folders = f'image_directory = "{folder}/p"', f'cache_directory = "{folder}/c"'
        config.write_text("\n".join(["[[datasets]]", *folders, *lines]))
        captioned = {path for path in rows if (folder / "p" / path).with_suffix(".txt").exists()}
        usable = {path for path in captioned if rows[path][2] and not _too_small(rows[path][0], how)}
        found, sentence = attempt(scan, load(config).datasets[0], family.spec)
        if found is None:
            assert not usable
            assert "nothing in" in sentence
            return
        assert {item.path.name for item in found.items} == usable
        assert {entry.path.name for entry in found.left_out} == set(rows) - usable
        for tag_path in ("latent_path", "text_path"):
            assert len({getattr(item, tag_path)("toy") for item in found.items}) == len(usable)
        _cache(config, folder, family)
        seen: Counter[int] = Counter()
        for rank in range(world):
            source = open_batches(config, family, seed=3, rank=rank, world=world, workers=rank, strict=True)
            for batch in source.epoch(1):
                seen.update(batch.items)
                assert 0 < len(batch.items) <= how["batch_size"]
                assert batch.latents.shape[0] == len(batch.items) == len(batch.cond["text"])
                for row, number in enumerate(batch.items):
                    item = found.items[number // how["num_repeats"]]
                    assert batch.latents.shape[2:] == (1, item.bucket[1] // 8, item.bucket[0] // 8)
                    text = "".join(chr(int(c)) for c in batch.cond["text"][row][:, 0])
                    assert text == (item.caption or "\0")
        assert seen == Counter(range(len(usable) * how["num_repeats"]))


def _write(folder, rows):
    folder.mkdir()
    for name, (size, caption, whole) in rows.items():
        path = folder / name
        noise = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        if not whole:
            path.write_bytes(path.read_bytes()[:9])
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)


def _too_small(size, how):
    kept = how["enable_bucket"] and how["bucket_no_upscale"]
    return kept and size[0] * size[1] <= math.prod(how["resolution"]) and min(size) < 16


def _cache(config, folder, family):
    (folder / "vae").write_bytes(b"v")
    words = ["--dataset_config", str(config), "--device", "cpu", "--num_workers", "1"]
    vae = [*words, "--vae", str(folder / "vae"), "--vae_dtype", "float32"]
    cache_latents(family, parse_options(LATENT_GROUPS, vae, prog="cache", description="", defaults={}, elsewhere={}))
    cache_text(family, parse_options(TEXT_GROUPS, words, prog="cache", description="", defaults={}, elsewhere={}))


@pytest.fixture(autouse=True)
def _one_thread_and_no_log():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("musubi_tuner").setLevel(logging.ERROR)
    yield
    logging.getLogger("musubi_tuner").setLevel(logging.NOTSET)
    torch.set_num_threads(threads)
