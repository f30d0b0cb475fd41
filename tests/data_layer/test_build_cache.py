"""The cache commands on a toy family: what is made, skipped, renewed, refused and told."""

import logging
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.data import build_cache
from musubi_tuner.data.batches import open_batches
from musubi_tuner.data.build_cache import LATENT_GROUPS, TEXT_GROUPS, cache_latents, cache_text


class Run:
    """A folder of pictures, a dataset file over it and the two commands."""

    def __init__(self, folder, family, make_picture, caplog):
        self.folder, self.family, self.picture, self.caplog = folder, family, make_picture, caplog
        self.vae = folder / "vae.safetensors"
        self.vae.write_bytes(b"weights")
        for i in range(4):
            make_picture(folder / "p" / f"{i}.png", (64, 64) if i < 3 else (80, 48), colour=i, caption=f"caption {i}")
        self.config = folder / "data.toml"
        self.cache = folder / "c"
        self.write("resolution = 64")

    def write(self, general):
        self.config.write_text(
            f"[general]\nenable_bucket = true\nbatch_size = 2\n{general}\n"
            f'[[datasets]]\nimage_directory = "{self.folder / "p"}"\ncache_directory = "{self.cache}"\n'
        )

    def latents(self, *words):
        argv = ["--dataset_config", str(self.config), "--vae", str(self.vae), "--device", "cpu", *words]
        return self._run(cache_latents, LATENT_GROUPS, argv)

    def text(self, *words):
        return self._run(cache_text, TEXT_GROUPS, ["--dataset_config", str(self.config), "--device", "cpu", *words])

    def _run(self, command, groups, argv):
        """The log of a command; the VAE's record of batches starts anew."""
        self.family.vae.batches.clear()
        self.caplog.clear()
        with self.caplog.at_level(logging.INFO, logger="musubi_tuner"):
            command(self.family, parse(groups, argv, prog="cache", description="", defaults={}, elsewhere={}))
        return [record.getMessage() for record in self.caplog.records]

    def stamps(self):
        return {path.name: path.stat().st_mtime_ns for path in self.cache.iterdir()}


@pytest.fixture
def run(tmp_path, family, make_picture, caplog):
    return Run(tmp_path, family, make_picture, caplog)


def test_a_first_run_makes_every_file_in_the_established_form(run):
    log = run.latents()
    assert log == [
        f"dataset 1 ({run.folder / 'p'}): 4 items in 2 buckets (width x height x frames) 64x64x1: 3, 80x48x1: 1",
        f"  caches in {run.cache}",
        "latent caches: 4 to make (4 missing), 0 fresh",
        "made 4 latent caches",
    ]
    assert sorted(run.family.vae.batches) == [(1, 3, 1, 48, 80), (1, 3, 1, 64, 64), (2, 3, 1, 64, 64)]
    run.text()
    names = [f"{i}_0064x0064_toy.safetensors" for i in range(3)] + ["3_0080x0048_toy.safetensors"]
    assert sorted(run.stamps()) == sorted([*names, *(f"{i}_toy_te.safetensors" for i in range(4))])
    with safe_open(run.cache / names[3], framework="pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in metadata if key != "musubi.cache"} == {
        "architecture": "toy",
        "format_version": "1.0.1",
        "width": "80",
        "height": "48",
    }
    with safe_open(run.cache / "2_toy_te.safetensors", framework="pt") as file:
        assert file.metadata()["caption1"] == "caption 2"


@pytest.mark.shows("vae_dtype")
def test_the_latents_are_those_of_the_picture(run):
    run.latents("--vae_dtype", "fp32")
    pixels = np.asarray(Image.open(run.folder / "p" / "1.png")).astype(np.float64) / 127.5 - 1
    means = pixels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
    stored = load_file(run.cache / "1_0064x0064_toy.safetensors")["latents_1x8x8_float32"]
    np.testing.assert_allclose(stored[:, 0].permute(1, 2, 0).numpy(), means, atol=1e-5)


@pytest.mark.shows("disable_cudnn_backend")
def test_the_vae_is_coded_without_cudnn_where_that_is_asked(run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    run.latents()
    assert torch.backends.cudnn.enabled
    log = run.latents("--disable_cudnn_backend")
    assert not torch.backends.cudnn.enabled
    assert log[-1] == "latent caches: 0 to make, 4 fresh", "no other way of convolving makes another cache"
    assert "disable_cudnn_backend has no effect on cpu" in log


@pytest.mark.shows("batch_size", "num_workers")
def test_batches_of_the_cap_give_the_same_files(run):
    run.latents()
    first = {path.name: load_file(path) for path in run.cache.iterdir()}
    run.latents("--recache", "--batch_size", "1", "--num_workers", "3")
    assert {shape[0] for shape in run.family.vae.batches} == {1}
    for path in run.cache.iterdir():
        for key, tensor in load_file(path).items():
            assert torch.equal(tensor, first[path.name][key])


@pytest.mark.shows("skip_existing")
def test_a_second_run_encodes_and_writes_nothing(run):
    """What --skip_existing asks for is always so."""
    run.latents()
    before = run.stamps()
    log = run.latents()
    assert log[-1] == "latent caches: 0 to make, 4 fresh"
    assert run.family.vae.batches == []
    assert run.stamps() == before


@pytest.mark.parametrize(
    ("change", "count", "reason"),
    [
        ("picture", 1, "its source changed"),
        ("vae", 4, "vae changed"),
        ("dtype", 4, "vae_dtype changed"),
        ("resolution", 4, "its latents are for"),
        ("damage", 1, "it cannot be read"),
    ],
)
def test_a_change_renews_what_depends_on_it_and_nothing_else(run, change, count, reason):
    run.latents()
    before = run.stamps()
    words = []
    if change == "picture":
        stat = (run.folder / "p" / "1.png").stat()
        run.picture(run.folder / "p" / "1.png", colour=50, caption="caption 1")
        os.utime(run.folder / "p" / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # an old date does not hide it
    elif change == "vae":
        run.vae.write_bytes(b"Weights")
    elif change == "dtype":
        words = ["--vae_dtype", "float32"]
    elif change == "resolution":
        run.write("resolution = 128")
    else:
        (run.cache / "1_0064x0064_toy.safetensors").write_bytes(b"half a fi")
    log = "\n".join(run.latents(*words))
    assert f"{count} to make" in log
    assert reason in log
    after = run.stamps()
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in after) == count
    assert "0 to make, 4 fresh" in run.latents(*words)[-1]


def test_a_changed_caption_renews_one_text_cache(run):
    run.text()
    (run.folder / "p" / "2.txt").write_text("other words")
    assert "text caches: 1 to make (1 stale: its source changed), 3 fresh" in run.text()
    features = load_file(run.cache / "2_toy_te.safetensors")["varlen_emb_float32"]
    assert "".join(chr(int(c)) for c in features[:, 0]) == "other words"


class TestForeign:
    @pytest.fixture
    def foreign(self, run):
        run.latents()
        for path in run.cache.iterdir():
            save_file(load_file(path), path, {"architecture": "toy"})
        return run

    def test_they_are_taken_as_they_are_and_told_once(self, foreign):
        before = foreign.stamps()
        log = foreign.latents()
        assert "4 without fingerprint, taken as they are" in log[-1]
        assert foreign.stamps() == before

    def test_strict_cache_refuses_and_recache_renews(self, foreign):
        with pytest.raises(UserError, match=r"4 latent caches carry no fingerprint .* --recache"):
            foreign.latents("--strict_cache")
        foreign.latents("--recache")
        assert "4 fresh" in foreign.latents("--strict_cache")[-1]


@pytest.mark.shows("prune_cache", "keep_cache")
def test_only_prune_cache_deletes_and_only_what_is_ours(run):
    """What --keep_cache asks for is always so."""
    run.latents()
    run.text()
    (run.folder / "p" / "0.png").unlink()
    for name in ("0_0064x0064_wan.safetensors", "notes.txt", "0_wan_te.safetensors"):
        (run.cache / name).write_bytes(b"x")
    before = run.stamps()
    assert any("1 latent caches belong to no item, e.g. 0_0064x0064_toy.safetensors" in line for line in run.latents())
    assert run.stamps() == before
    run.latents("--prune_cache")
    assert before.keys() - run.stamps().keys() == {"0_0064x0064_toy.safetensors"}
    run.text("--prune_cache")
    assert before.keys() - run.stamps().keys() == {"0_0064x0064_toy.safetensors", "0_toy_te.safetensors"}


def test_a_broken_picture_is_named_and_the_others_are_cached(run):
    whole = (run.folder / "p" / "1.png").read_bytes()
    (run.folder / "p" / "1.png").write_bytes(whole[:3000])
    with pytest.raises(
        UserError, match=r"1 of 4 items could not be decoded, the others are cached: .*1\.png cannot be"
    ):
        run.latents()
    assert len(run.stamps()) == 3
    (run.folder / "p" / "1.png").write_bytes(whole)
    assert "latent caches: 1 to make (1 missing), 3 fresh" in run.latents()


def test_nan_stops_with_the_items_name(run):
    encode = run.family.vae.encode
    run.family.vae.encode = lambda pixels: encode(pixels) * float("nan")
    with pytest.raises(UserError, match=r"0\.png: 192 of the 192 values of latents are NaN .* --vae_dtype float32"):
        run.latents()


def test_what_is_left_out_is_told_before_work(run):
    run.picture(run.folder / "p" / "8.png", caption=None)
    run.picture(run.folder / "p" / "9.png", caption=None)
    run.picture(run.folder / "p" / "4.png", caption=" ")
    log = run.latents()
    assert log[2:4] == [
        "  1 captions are empty",
        "  left out: 2 x no caption file (its name with the ending .txt), e.g. 8.png",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--vae", "/nowhere.safetensors"], "--vae /nowhere.safetensors is not there"),
        (["--device", "gpu"], "--device gpu is no device"),
        (["--device", "cuda:99"], "CUDA devices are here"),
        (["--dataset_config", "/nowhere.toml"], "dataset file /nowhere.toml is not there"),
    ],
)
@pytest.mark.shows("device")
def test_a_wrong_option_is_one_sentence_before_any_work(run, words, sentence):
    with pytest.raises(UserError, match=sentence):
        run.latents(*words)
    assert run.family.vae.batches == []


def test_training_takes_what_the_commands_made(run):
    run.latents()
    run.text()
    source = open_batches(run.config, run.family, seed=0, strict=True)
    captions = {
        number: "".join(chr(int(c)) for c in batch.cond["text"][row][:, 0])
        for batch in source.epoch(0)
        for row, number in enumerate(batch.items)
    }
    assert captions == {i: f"caption {i}" for i in range(4)}
    assert source.warnings == ()


def test_decoding_runs_ahead_by_a_few_batches_only(run, monkeypatch):
    """Memory is bounded: with slow encoding, decoded items that wait never exceed three batches."""
    for i in range(4, 24):
        run.picture(run.folder / "p" / f"{i:02}.png", colour=i)
    decoded, waiting = [], []
    load, encode = build_cache.to_encode, run.family.vae.encode

    def counted(*args, **kwargs):
        decoded.append(None)
        return load(*args, **kwargs)

    def slow(pixels):
        time.sleep(0.01)
        waiting.append(len(decoded) - sum(shape[0] for shape in run.family.vae.batches))
        return encode(pixels)

    monkeypatch.setattr(build_cache, "to_encode", counted)
    run.family.vae.encode = slow
    run.latents("--num_workers", "4")
    assert len(decoded) == 24
    assert 2 < max(waiting) <= 3 * 2
