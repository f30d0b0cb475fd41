"""Cache files: what is written, what is found fresh, foreign or stale, and what is refused."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import cache
from musubi_tuner.data.fingerprint import Fingerprint, content_hash, file_identity, option_identity, text_hash

PRINT = Fingerprint("abc", (64, 48), (), {"vae": "v1", "vae_dtype": "bfloat16"})
LATENT = {"latents": torch.arange(3 * 6 * 8, dtype=torch.bfloat16).reshape(3, 1, 6, 8)}


@pytest.fixture
def written(tmp_path, family):
    path = tmp_path / "cache" / "a_0064x0048_toy.safetensors"
    metadata = {"width": "64", "height": "48"}
    cache.write(path, LATENT, family.spec, "latent", fingerprint=PRINT, metadata=metadata, item="a.png")
    return path


def test_the_file_has_the_established_form_and_a_fingerprint(written, family):
    assert list(load_file(written)) == ["latents_1x6x8_bfloat16"]
    with safe_open(written, framework="pt") as file:
        metadata = file.metadata()
    stamp = metadata.pop("musubi.cache")
    assert metadata == {"architecture": "toy", "format_version": "1.0.1", "width": "64", "height": "48"}
    assert json.loads(stamp)["version"] == 1
    assert Fingerprint.parse(stamp) == PRINT
    read = cache.read(written, family.spec, "latent")
    assert read.keys() == LATENT.keys()
    assert torch.equal(read["latents"], LATENT["latents"])
    assert [p.name for p in written.parent.iterdir()] == [written.name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": "abd"}, "its source changed"),
        ({"frames": (0, 1)}, "it holds other frames"),
        ({"settings": {"vae": "v2", "vae_dtype": "bfloat16"}}, "vae changed"),
        ({"settings": {"vae": "v1", "vae_dtype": "float32", "tiled": "True"}}, "tiled changed; vae_dtype changed"),
        ({"bucket": (48, 64)}, "its latents are for 64 x 48, now 48 x 64 is wanted"),
    ],
)
def test_any_change_makes_it_stale_and_says_which(written, family, change, reason):
    verdict = cache.judge(written, dataclasses.replace(PRINT, **change), family.spec, "latent")
    assert verdict == cache.Verdict("stale", reason)


def test_the_same_is_fresh_and_unknown_parts_can_be_left_out(written, family):
    assert cache.judge(written, PRINT, family.spec, "latent").state == "fresh"
    other = Fingerprint("xyz", (64, 48))
    assert cache.judge(written, other, family.spec, "latent").state == "stale"
    assert cache.judge(written, other, family.spec, "latent", ignore={"source", "settings"}).state == "fresh"


def test_missing_damaged_and_other_architectures(written, family, tmp_path):
    assert cache.judge(tmp_path / "none", PRINT, family.spec, "latent").state == "missing"
    written.write_bytes(written.read_bytes()[:50])
    assert cache.judge(written, PRINT, family.spec, "latent").state == "stale"
    with pytest.raises(UserError, match=r"cannot be read .* --recache"):
        cache.read(written, family.spec, "latent")
    save_file({"latents_1x6x8_bfloat16": LATENT["latents"]}, written, {"architecture": "wan"})
    assert cache.judge(written, PRINT, family.spec, "latent").reason == "it is for wan, not toy"
    save_file({"something_float32": torch.zeros(1)}, written, {"architecture": "toy"})
    assert cache.judge(written, PRINT, family.spec, "latent").reason == "it holds no latents"


def test_a_cache_without_fingerprint_is_foreign_when_its_size_fits(written, family):
    save_file({"latents_1x6x8_bfloat16": LATENT["latents"]}, written, {"architecture": "toy"})
    assert cache.judge(written, PRINT, family.spec, "latent").state == "foreign"
    other = dataclasses.replace(PRINT, bucket=(64, 64))
    assert cache.judge(written, other, family.spec, "latent").state == "stale"


def test_a_fingerprint_of_another_version_is_stale(written, family):
    stamp = json.dumps({**json.loads(PRINT.dump()), "version": 99})
    metadata = {"architecture": "toy", "musubi.cache": stamp}
    save_file({"latents_1x6x8_bfloat16": LATENT["latents"]}, written, metadata)
    assert cache.judge(written, PRINT, family.spec, "latent").reason == "it was made by another version"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_an_error_that_names_the_item_not_a_zero(tmp_path, family, bad):
    tensor = torch.zeros(3, 1, 6, 8)
    tensor[0, 0, 1, 2] = bad
    with pytest.raises(UserError, match=r"^b\.png: 1 of the 144 values of latents are NaN or infinite.*--vae_dtype"):
        cache.write(
            tmp_path / "b", {"latents": tensor}, family.spec, "latent", fingerprint=PRINT, metadata={}, item="b.png"
        )
    assert not (tmp_path / "b").exists()
    save_file({"latents_1x6x8_float32": tensor}, tmp_path / "c")
    with pytest.raises(UserError, match="NaN or infinite"):
        cache.read(tmp_path / "c", family.spec, "latent")


def test_identities_follow_content_not_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 8192)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    assert file_identity(tmp_path / "a") == file_identity(tmp_path / "b")
    altered = bytearray((tmp_path / "a").read_bytes())
    altered[-1] ^= 1
    (tmp_path / "b").write_bytes(altered)
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")
    assert file_identity(tmp_path / "a") != file_identity(tmp_path / "b")
    assert option_identity(str(tmp_path / "a")) == file_identity(tmp_path / "a")
    assert option_identity(True) == "True"
    assert text_hash("a") != text_hash("a ")
