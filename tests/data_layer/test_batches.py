"""The order of batches, their shares over processes, and what is refused before training starts."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import cache
from musubi_tuner.data.batches import Group, epoch_order, open_batches
from musubi_tuner.data.fingerprint import Fingerprint, content_hash, text_hash
from musubi_tuner.data.sources import scan, to_encode
from musubi_tuner.data.spec import load

GROUPS = (Group("1:a", tuple(range(7)), 3), Group("1:b", tuple(range(7, 12)), 3), Group("2:a", (12, 13), 4))


def test_every_entry_once_groups_apart_and_partial_batches_kept():
    for epoch in range(5):
        batches = epoch_order(GROUPS, seed=4, epoch=epoch)
        assert Counter(i for batch in batches for i in batch) == Counter(range(14))
        assert sorted(map(len, batches)) == [1, 2, 2, 3, 3, 3]
        assert all(any(set(batch) <= set(group.entries) for group in GROUPS) for batch in batches)


def test_order_is_a_function_of_seed_and_epoch_and_differs_between_them():
    assert epoch_order(GROUPS, 4, 2) == epoch_order(GROUPS, 4, 2)
    orders = {tuple(epoch_order(GROUPS, seed, epoch)) for seed in (4, 5) for epoch in (0, 1, 2)}
    assert len(orders) == 6


def test_a_group_keeps_its_shuffle_when_another_one_grows():
    inside = [batch for batch in epoch_order(GROUPS[:1], 4, 0) if batch[0] < 7]
    grown = [batch for batch in epoch_order(GROUPS, 4, 0) if batch[0] < 7]
    assert set(inside) == set(grown)


@pytest.fixture
def dataset(tmp_path, family, make_picture):
    """A dataset file over five pictures of two sizes, cached by hand."""
    for i in range(5):
        make_picture(tmp_path / "p" / f"{i}.png", (64, 64) if i < 3 else (80, 48), colour=i, caption="c" * (i + 1))
    path = tmp_path / "data.toml"
    path.write_text(
        f'[[datasets]]\nimage_directory = "{tmp_path / "p"}"\ncache_directory = "{tmp_path / "c"}"\n'
        "resolution = 64\nenable_bucket = true\nbatch_size = 2\nnum_repeats = 2\n"
    )
    for item in scan(load(path).datasets[0], family.spec).items:
        encoded = [to_encode(item, family.spec, with_pixels=True)]
        [[latent]], [text] = (
            family.encode_latents(encoded, family.vae),
            family.encode_condition(encoded, family.encoders),
        )
        stamp = Fingerprint(content_hash(item.path), item.bucket)
        cache.write(item.latent_path("toy"), latent, family.spec, "latent", fingerprint=stamp, metadata={}, item="")
        stamp = Fingerprint(text_hash(item.caption))
        cache.write(item.text_path("toy"), text, family.spec, "text", fingerprint=stamp, metadata={}, item="")
    return path


def test_batches_hold_the_caches(dataset, family):
    source = open_batches(dataset, family, seed=1)
    assert source.num_items == 10
    assert len(source) == 5  # 6 entries of one size in 3 batches, 4 of the other in 2
    batches = list(source.epoch(0))
    assert sorted(i for batch in batches for i in batch.items) == list(range(10))
    assert [batch.index for batch in batches] == list(range(5))
    for batch in batches:
        assert batch.latents.dtype == torch.float32
        assert batch.latents.shape[1:] in ((3, 1, 8, 8), (3, 1, 6, 10))
        for row, number in enumerate(batch.items):
            picture = number // 2  # two repeats each, in the order of names
            assert batch.cond["text"][row].shape == (picture + 1, 1)
            name = f"{picture}_{'0064x0064' if picture < 3 else '0080x0048'}_toy.safetensors"
            stored = next(iter(load_file(dataset.parent / "c" / name).values()))
            assert torch.equal(batch.latents[row], stored.float())


def test_threads_and_a_later_start_change_nothing(dataset, family):
    plain = list(open_batches(dataset, family, seed=1).epoch(3))
    ahead = list(open_batches(dataset, family, seed=1, workers=3).epoch(3))
    tail = list(open_batches(dataset, family, seed=1, workers=2).epoch(3, start=2))
    assert [b.items for b in ahead] == [b.items for b in plain]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(ahead, plain, strict=True))
    assert [(b.index, b.items) for b in tail] == [(b.index, b.items) for b in plain[2:]]


def test_an_abandoned_epoch_leaves_no_threads(dataset, family):
    epoch = open_batches(dataset, family, seed=1, workers=2).epoch(0)
    next(epoch)
    epoch.close()
    assert len(list(open_batches(dataset, family, seed=1, workers=2).epoch(0))) == 5


def test_every_start_method_of_processes_gives_the_same_epochs(dataset, tmp_path):
    """The workers are threads, so a process that is spawned or forked (threads at work) reads the same."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / folder) for folder in ("python", "kernels"))
    command = [sys.executable, str(Path(__file__).with_name("start_methods.py")), str(dataset), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    found = json.loads((tmp_path / "out").read_text())
    assert len(found["here"]) == 10
    assert found["spawn"] == found["fork"] == found["here"]
    assert found["rest"] == [row[:2] for row in found["here"][1:5]]


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_is_bounded(dataset, family, workers):
    """However slow the training, no more than two batches a worker wait (the toy's `collate` counts what is read)."""
    dataset.write_text(dataset.read_text().replace("num_repeats = 2", "num_repeats = 20"))
    source = open_batches(dataset, family, seed=1, workers=workers)
    made, ahead = [], []
    collate = family.collate
    family.collate = lambda entries: made.append(None) or collate(entries)
    for taken, _ in enumerate(source.epoch(0), start=1):
        time.sleep(0.005)
        ahead.append(len(made) - taken)
    assert len(made) == len(source) == 50
    assert 0 < max(ahead) <= 2 * workers


def test_a_process_whose_share_has_ended_gets_nothing_more(dataset, family):
    """The loop asks it to go on from where the longest share stands."""
    shares = [open_batches(dataset, family, seed=1, rank=rank, world=2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 2]
    assert [len(list(share.epoch(0, start=2))) for share in shares] == [1, 0]
    assert list(shares[1].epoch(0, start=3)) == []


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_an_epoch_without_overlap_or_gap(dataset, family, world):
    whole = [batch.items for batch in open_batches(dataset, family, seed=1).epoch(0)]
    shares = []
    for rank in range(world):
        source = open_batches(dataset, family, seed=1, rank=rank, world=world)
        shares.append([batch.items for batch in source.epoch(0)])
        assert len(shares[-1]) == len(source)
    assert sorted(items for share in shares for items in share) == sorted(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_metadata_describes_the_data(dataset, family):
    found = open_batches(dataset, family, seed=1).metadata()
    assert found["ss_num_train_items"] == "10"
    assert found["ss_num_batches_per_epoch"] == "5"
    assert '"image_directory": "p"' in found["ss_datasets"]
    assert str(dataset.parent) not in found["ss_datasets"]


class TestRefusals:
    def test_a_missing_cache(self, dataset, family):
        (dataset.parent / "c" / "1_0064x0064_toy.safetensors").unlink()
        (dataset.parent / "c" / "4_toy_te.safetensors").unlink()
        with pytest.raises(
            UserError, match=r"2 cache files are missing, e\.g\. .*1_0064x0064.*musubi cache_latents toy"
        ):
            open_batches(dataset, family, seed=1)

    def test_a_changed_caption(self, dataset, family):
        (dataset.parent / "p" / "1.txt").write_text("other")
        with pytest.raises(UserError, match=r"1 do not fit, e\.g\. .*1_toy_te.safetensors \(its source changed\)"):
            open_batches(dataset, family, seed=1)

    def test_a_changed_picture(self, dataset, family, make_picture):
        path = make_picture(dataset.parent / "p" / "1.png", colour=77, caption=None)
        newer = (dataset.parent / "c" / "1_0064x0064_toy.safetensors").stat().st_mtime_ns + 10**9
        os.utime(path, ns=(newer, newer))
        with pytest.raises(UserError, match=r"1_0064x0064_toy.safetensors \(its source changed\)"):
            open_batches(dataset, family, seed=1)

    def test_a_picture_that_was_only_touched_is_fine(self, dataset, family):
        newer = (dataset.parent / "c" / "1_0064x0064_toy.safetensors").stat().st_mtime_ns + 10**9
        os.utime(dataset.parent / "p" / "1.png", ns=(newer, newer))
        assert len(open_batches(dataset, family, seed=1)) == 5

    def test_another_resolution(self, dataset, family):
        dataset.write_text(dataset.read_text().replace("resolution = 64", "resolution = 128"))
        with pytest.raises(
            UserError, match=r"5 do not fit, .* \(its latents are for 64 x 64, now 128 x 128 is wanted\)"
        ):
            open_batches(dataset, family, seed=1)


def test_caches_of_the_established_tool_are_taken_with_one_warning(dataset, family):
    for path in (dataset.parent / "c").iterdir():
        save_file(load_file(path), path, {"architecture": "toy", "format_version": "1.0.1"})
    source = open_batches(dataset, family, seed=1)
    assert len(source.warnings) == 1
    assert "10 cache files carry no fingerprint" in source.warnings[0]
    with pytest.raises(UserError, match="--strict_cache refuses them"):
        open_batches(dataset, family, seed=1, strict=True)


def test_without_the_pictures_the_caches_are_the_dataset(dataset, family):
    before = {batch.items: batch.latents for batch in open_batches(dataset, family, seed=1).epoch(0)}
    (dataset.parent / "p").rename(dataset.parent / "elsewhere")
    source = open_batches(dataset, family, seed=1)
    after = {batch.items: batch.latents for batch in source.epoch(0)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[items], after[items]) for items in before)
    assert "training on the 5 caches" in source.warnings[0]
    with pytest.raises(UserError, match="is not there, so --strict_cache cannot compare"):
        open_batches(dataset, family, seed=1, strict=True)
    for path in (dataset.parent / "c").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"neither .* nor caches named"):
        open_batches(dataset, family, seed=1)
