"""The cache commands with the Wan family, through the command line: real files in, established caches out."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musubi_tuner import cli
from musubi_tuner.data.batches import open_batches
from musubi_tuner.families import registry

GOLDEN = Path(__file__).parents[1] / "data" / "reference" / "golden"
CAPTIONS = ("w3 w4 w5", "w6", "w7 w8 w9 w10 w11")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny VAE, a tiny umt5 and a tokenizer of 50 words, in the layouts of the published files."""
    folder = tmp_path_factory.mktemp("models")
    for name, file in (("wan_vae_a", "vae"), ("wan_umt5_a", "t5")):
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as fixture:
            config = json.loads(fixture.metadata()["json"])["config"]
            weights = {key[2:]: fixture.get_tensor(key) for key in list(fixture.keys()) if key.startswith("w.")}
        sizes = {key: config[key] for key in ("dim_mult", "num_res_blocks", "temporal_downsample") if key in config}
        save_file(weights, folder / f"{file}.safetensors", {"musubi.config": json.dumps(sizes)} if sizes else {})
    _save_tokenizer(folder / "tokenizer")
    return folder


def _save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 50)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(str(folder))


@pytest.fixture(scope="module")
def cached(models, tmp_path_factory, module_picture):
    """The dataset file over three pictures, cached by both commands."""
    folder = tmp_path_factory.mktemp("data")
    for i, caption in enumerate(CAPTIONS):
        module_picture(folder / "p" / f"{i}.png", (64, 48), colour=i, caption=caption)
    config = folder / "data.toml"
    config.write_text(
        f'[[datasets]]\nimage_directory = "{folder / "p"}"\ncache_directory = "{folder / "c"}"\n'
        "resolution = [32, 32]\nbatch_size = 3\n"
    )
    latents = ["cache_latents", "wan", "--vae", str(models / "vae.safetensors"), "--vae_dtype", "float32"]
    assert musubi(*latents, "--dataset_config", str(config), "--device", "cpu") == 0
    text = ["cache_text", "wan", "--t5", str(models / "t5.safetensors")]
    assert musubi(*text, "--dataset_config", str(config), "--device", "cpu") == 0
    return config


def musubi(*words):
    """The exit code of a command; the logging that it sets up is taken down again."""
    handlers = logging.getLogger().handlers[:]
    try:
        return cli.main(words)
    finally:
        logging.captureWarnings(False)
        logging.getLogger().handlers[:] = handlers


def test_names_keys_and_dtypes_are_the_established_ones(cached):
    found = {path.name: load_file(path) for path in (cached.parent / "c").iterdir()}
    assert sorted(found) == sorted(
        [*(f"{i}_0064x0048_wan.safetensors" for i in range(3)), *(f"{i}_wan_te.safetensors" for i in range(3))]
    )
    for i, caption in enumerate(CAPTIONS):
        latents = found[f"{i}_0064x0048_wan.safetensors"]
        assert {key: tuple(t.shape) for key, t in latents.items()} == {"latents_1x4x4_float32": (16, 1, 4, 4)}
        text = found[f"{i}_wan_te.safetensors"]
        assert {key: tuple(t.shape) for key, t in text.items()} == {
            "varlen_t5_bfloat16": (len(caption.split()) + 1, 32)  # the words and the end token
        }


def test_latents_are_the_vaes_own_of_the_cropped_picture(cached, models):
    """64 x 48 covers 32 x 32 at 43 x 32, of which the middle 32 columns start at floor(11 / 2) = 5."""
    source = np.asarray(Image.open(cached.parent / "p" / "1.png")).astype(np.float64)
    scaled = np.einsum("yj,xi,jic->yxc", _shares(48, 32), _shares(64, 43), source)
    vae = registry.get("wan").load_vae(str(models / "vae.safetensors"), device=torch.device("cpu"), dtype=torch.float32)
    stored = load_file(cached.parent / "c" / "1_0064x0048_wan.safetensors")["latents_1x4x4_float32"]

    def difference(left):
        pixels = np.floor(scaled[:, left : left + 32] + 0.5) / 127.5 - 1
        latents = vae.encode(torch.from_numpy(pixels).float().permute(2, 0, 1)[None, :, None])[0]
        return float((stored - latents).norm() / latents.norm())

    assert difference(5) < 1e-3  # a mean that ends in .5 may round either way
    assert difference(6) > 0.02


def _shares(source, target):
    """Share of each source pixel in each target pixel."""
    matrix = np.zeros((target, source))
    for i in range(target):
        for j in range(source):
            overlap = min((i + 1) * source / target, j + 1) - max(i * source / target, j)
            matrix[i, j] = max(overlap, 0.0) * target / source
    return matrix


def test_a_caption_encoded_in_a_batch_is_the_one_encoded_alone(cached, models):
    from musubi_tuner.families.wan.options import CacheTextEncoderOptions

    options = CacheTextEncoderOptions(t5=str(models / "t5.safetensors"))
    encoder = registry.get("wan").load_encoders(options, device=torch.device("cpu"), dtype=torch.bfloat16)
    for i, caption in enumerate(CAPTIONS):
        stored = load_file(cached.parent / "c" / f"{i}_wan_te.safetensors")["varlen_t5_bfloat16"].float()
        alone = encoder.text.encode([caption])[0].float()
        assert (stored - alone).norm() / alone.norm() < 0.01  # padding is masked; bf16 sums in another order


def test_training_gets_padded_text_and_float_latents(cached):
    [batch] = open_batches(cached, registry.get("wan"), seed=0, strict=True).epoch(0)
    assert batch.latents.shape == (3, 16, 1, 4, 4)
    lengths = {number: len(CAPTIONS[number].split()) + 1 for number in batch.items}
    for row, number in enumerate(batch.items):
        text = batch.cond["text"][row].float()
        assert text[: lengths[number]].norm(dim=-1).min() > 0
        assert text[lengths[number] :].abs().sum() == 0


def test_another_tokenizer_beside_the_encoder_renews_the_text_caches(cached, models, tmp_path, capsys):
    """It is found, not named; named by its folder or its file it is the same one."""
    home = shutil.copytree(models, tmp_path / "models")
    words = ["cache_text", "wan", "--t5", str(home / "t5.safetensors"), "--dataset_config", str(cached)]
    words += ["--device", "cpu"]
    told = []
    for more in ([], ["--t5_tokenizer", str(home / "tokenizer")], ["--t5_tokenizer", str(models / "tokenizer")]):
        assert musubi(*words, *more) == 0
        told.append(capsys.readouterr().err)
    assert all("0 to make, 3 fresh" in text for text in told), told
    file = home / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w7": 7', '"w7": 8').replace('"w8": 8', '"w8": 7'))
    assert musubi(*words) == 0
    assert "3 stale: t5_tokenizer changed" in capsys.readouterr().err
    assert musubi(*words[:3], str(models / "t5.safetensors"), *words[4:]) == 0, "as the others of this file want them"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cache_latents", "wan", "--vae", "{models}/t5.safetensors"], "is not a Wan VAE"),
        (["cache_text", "wan", "--t5", "{models}/vae.safetensors"], "is not umt5"),
        (["cache_latents", "wan"], "vae"),
    ],
)
def test_the_wrong_file_is_one_sentence_and_exit_code_2(cached, models, capsys, words, sentence):
    words = [word.format(models=models) for word in words]
    assert musubi(*words, "--dataset_config", str(cached), "--device", "cpu", "--recache") == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
