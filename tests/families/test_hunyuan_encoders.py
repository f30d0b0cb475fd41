"""HunyuanVideo's VAE and text encoders: original files in, the fixtures' and the library's numbers out."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden_data import TOLERANCE, distance, golden, manifest
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.families.base import Item
from musubi_tuner.families.hunyuan_video.options import CacheTextEncoderOptions, EncodingOptions, VaeOptions
from musubi_tuner.flow import keyed
from musubi_tuner.nn.text import clip, llama
from musubi_tuner.nn.vae import video_kl
from tiny_encoders import save_clip, save_llama, save_llama_tokenizer, tiny_clip, tiny_llama

FAMILY = registry.get("hunyuan_video")
CPU = torch.device("cpu")


# VAE


@pytest.fixture(scope="module")
def vae_case():
    return golden("hunyuan_video_vae_a")


@pytest.fixture(scope="module")
def vae_file(vae_case, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(vae_case.weights, path, {"musubi.config": '{"norm_num_groups": 4}'})
    return path


def load(path, dtype=torch.float32, **options):
    return FAMILY.load_vae(str(path), device=CPU, dtype=dtype, options=VaeOptions(**options))


def test_posterior_and_pixels_equal_the_fixture(vae_file, vae_case):
    vae = load(vae_file)
    mean, std = vae.posterior(vae_case.inputs["pixels"])
    moments_mean, log_variance = vae_case.outputs["moments"].chunk(2, dim=1)
    assert distance(mean, moments_mean) < TOLERANCE
    assert distance(2 * std.log(), log_variance) < TOLERANCE
    assert distance(vae.encode(vae_case.inputs["pixels"]), vae_case.outputs["latents_from_mean_scaled"]) < TOLERANCE
    assert distance(vae.decode(vae_case.inputs["latents"]), vae_case.outputs["pixels"]) < TOLERANCE


def test_long_clips_are_coded_whole(vae_file):
    """The library would cut 33 frames into blended pieces: a causal encoder's first frames must not depend on it."""
    vae = load(vae_file)
    pixels = keyed.normal((1, 3, 33, 16, 16), "clip").clamp(-1, 1)
    latents = vae.posterior(pixels)[0]
    assert latents.shape == (1, 16, 9, 2, 2)
    model = library_vae(vae_file)
    with torch.no_grad():
        whole = model.quant_conv(model.encoder(pixels))[:, :16]
    assert distance(latents, whole) < 1e-6


@pytest.mark.shows("vae_chunk_size")
def test_chunks_of_frames_change_nothing(vae_file):
    pixels = keyed.normal((1, 3, 13, 16, 16), "chunks").clamp(-1, 1)
    plain = load(vae_file)
    latents = plain.encode(pixels)
    for frames in (1, 2, 5):
        chunked = load(vae_file, vae_chunk_size=frames)
        assert distance(chunked.encode(pixels), latents) < 1e-6
        assert distance(chunked.decode(latents), plain.decode(latents)) < 1e-5


@pytest.mark.shows("vae_tiling", "vae_spatial_tile_sample_min_size")
def test_tiles_are_made_only_when_asked_for(vae_file):
    """Tiles of 64 pixels overlap by a quarter; the library's own call is the oracle of the blending."""
    pixels = keyed.normal((1, 3, 1, 96, 80), "tiles").clamp(-1, 1)
    whole = load(vae_file).encode(pixels)
    tiled = load(vae_file, vae_spatial_tile_sample_min_size=64).encode(pixels)
    model = library_vae(vae_file)
    model.enable_tiling(64, 64, tile_sample_stride_height=48, tile_sample_stride_width=48)
    with torch.no_grad():
        expected = model.encode(pixels).latent_dist.mean * 0.476986
    assert distance(tiled, expected) < 1e-6
    assert distance(tiled, whole) > 1e-3
    assert torch.equal(load(vae_file, vae_tiling=True).encode(pixels), whole), "a tile of 256 pixels holds it all"


def library_vae(path):
    """diffusers' class with the fixture's weights."""
    model = video_kl.empty_vae(video_kl.VideoKlSizes((8, 16, 16, 16), 1, norm_num_groups=4))
    model.load_state_dict(load_file(path))
    return model.eval()


def test_the_cache_holds_a_sample_of_the_posterior_that_only_the_picture_decides(vae_file):
    vae = load(vae_file)
    one, other = (keyed.normal((3, 1, 64, 64), name).clamp(-1, 1) for name in ("one", "other"))
    entries = FAMILY.encode_latents([Item("a", one), Item("b", other)], vae)
    assert [len(of_item) for of_item in entries] == [1, 1]
    again = FAMILY.encode_latents([Item("another caption", other.clone())], vae)[0][0]["latents"]
    assert distance(again, entries[1][0]["latents"]) < 1e-5, "neither batch nor caption matters"
    mean, std = vae.posterior(one[None])
    z = ((entries[0][0]["latents"] - mean[0]) / std[0]).flatten()
    assert z.numel() == 16 * 8 * 8
    assert abs(z.mean()) < 0.1, "standard normal: 1024 values"
    assert abs(z.std() - 1) < 0.1


def test_caches_are_unscaled_and_read_in_the_transformers_scale(vae_file, tmp_path):
    from musubi_tuner.data import cache
    from musubi_tuner.data.fingerprint import Fingerprint

    entry = {"latents": keyed.normal((16, 1, 2, 3), "cached").half()}
    path = tmp_path / "x_0024x0016_hv.safetensors"
    cache.write(path, entry, FAMILY.spec, "latent", fingerprint=Fingerprint(), metadata={}, item="x")
    stored = load_file(path)
    assert torch.equal(stored["latents_1x2x3_float16"], entry["latents"])
    read = cache.read(path, FAMILY.spec, "latent")["latents"]
    assert torch.equal(read, entry["latents"].float() * 0.476986)


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_pt_file_and_prefixed_keys_load_like_the_safetensors_file(vae_case, tmp_path, prefix):
    config = video_kl.VideoKlSizes((32, 32, 32, 32), 1)
    model = video_kl.empty_vae(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(keyed.normal(value.shape, "vae", key) * 0.1)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    more = {"discriminator.weight": torch.zeros(1)} if prefix else {}
    torch.save({"state_dict": state | more}, tmp_path / "pytorch_model.pt")
    pixels = vae_case.inputs["pixels"]
    mean = load(tmp_path / "pytorch_model.pt").posterior(pixels)[0]
    with torch.no_grad():
        assert distance(mean, model.eval().encode(pixels).latent_dist.mean) < 1e-6


def test_every_published_vae_key_has_a_place():
    shapes = manifest("hunyuan_video_vae")
    sizes = video_kl.sizes_from_shapes(shapes, "vae")
    assert sizes == video_kl.VideoKlSizes()
    with torch.device("meta"):
        model = video_kl.empty_vae(sizes)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


# text encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A folder with both encoders and their tokenizers."""
    folder = tmp_path_factory.mktemp("encoders")
    save_llama(folder)
    save_clip(folder)
    return folder


def options_of(folder, **changes):
    files = {"text_encoder1": "llava_llama3.safetensors", "text_encoder2": "clip_l.safetensors"}
    named = {name: str(folder / file) for name, file in files.items()} | {"text_encoder_dtype": "float32"}
    return CacheTextEncoderOptions(**(named | changes))


def loaded(options):
    return FAMILY.load_encoders(options, device=CPU, dtype=torch.bfloat16)


CAPTIONS = ("a red roof", "the petal of a red flower of the temple")


def encode(encoder, captions=CAPTIONS):
    return FAMILY.encode_condition([Item(caption) for caption in captions], encoder)


def test_token_features_are_the_third_last_hidden_state_after_the_instruction(encoders):
    encoder = loaded(options_of(encoders))
    texts = [llama.INSTRUCTION + caption + llama.END for caption in CAPTIONS]
    tokenizer = encoder.llm.tokenizer
    tokenizer.pad_token = "<|end_of_text|>"
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = tiny_llama()(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 5
    for i, (entry, words) in enumerate(zip(encode(encoder), (4, 10), strict=True)):
        assert entry["text"].shape == (256, 32)
        assert entry["mask"].dtype == torch.int64
        assert entry["mask"].tolist() == [1] * words + [0] * (256 - words)
        assert not entry["text"][words:].any()
        assert distance(entry["text"][:words], states[-3][i, 95 : 95 + words]) < TOLERANCE


def test_the_pooled_vector_is_clips(encoders):
    encoder = loaded(options_of(encoders))
    tokenizer = encoder.clip.tokenizer
    batch = tokenizer(list(CAPTIONS), padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        pooled = tiny_clip()(**batch).pooler_output
    for entry, expected in zip(encode(encoder), pooled, strict=True):
        assert distance(entry["pooled"], expected) < TOLERANCE


def test_a_caption_does_not_depend_on_its_batch(encoders):
    encoder = loaded(options_of(encoders))
    together, alone = encode(encoder)[0], encode(encoder, CAPTIONS[:1])[0]
    assert all(distance(together[name], alone[name]) < 1e-6 for name in ("text", "pooled"))


def test_a_long_caption_is_cut_with_a_warning(encoders, caplog):
    entry = encode(loaded(options_of(encoders)), ["red " * 300])[0]
    assert entry["mask"].sum() == 256
    assert "a caption of 301 tokens is cut to the 256 that the model takes: red red" in caplog.text


@pytest.mark.shows("text_encoder_dtype")
def test_default_caches_are_float16_and_close(encoders):
    full, half = (encode(loaded(options_of(encoders, **c)))[0] for c in ({}, {"text_encoder_dtype": "float16"}))
    assert CacheTextEncoderOptions().text_encoder_dtype == "float16"
    for name in ("text", "pooled"):
        assert half[name].dtype == torch.float16
        assert distance(half[name].float(), full[name]) < 1e-2


@pytest.mark.shows("fp8_llm")
def test_the_language_model_runs_in_fp8(encoders):
    full = encode(loaded(options_of(encoders)))[0]["text"]
    encoder = loaded(options_of(encoders, fp8_llm=True))
    kinds = {key: value.dtype for key, value in encoder.llm.model.state_dict().items()}
    assert kinds["layers.0.self_attn.q_proj.weight"] == torch.float8_e4m3fn
    assert kinds["layers.1.mlp.down_proj.weight"] == torch.float8_e4m3fn
    assert kinds["embed_tokens.weight"] == torch.float32
    assert 1e-3 < distance(encode(encoder)[0]["text"], full) < 0.2


def test_a_vision_language_folder_with_shards_serves_too(encoders, tmp_path):
    """The repository's own layout: prefixed keys, a vision tower, two shards, the tokenizer beside them."""
    state = {f"language_model.{k}": v.contiguous() for k, v in tiny_llama().state_dict().items()}
    state["vision_tower.vision_model.embeddings.class_embedding"] = torch.zeros(3)
    state["multi_modal_projector.linear_1.bias"] = torch.zeros(3)
    keys = sorted(state)
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = tmp_path / f"model-0000{number}-of-00002.safetensors"
        save_file(
            {key: state[key] for key in part}, name, {"musubi.config": json.dumps({"num_heads": 4, "num_kv_heads": 2})}
        )
    shutil.copy(encoders / "tokenizer" / "tokenizer.json", tmp_path)
    clip_folder = tmp_path / "clip"
    clip_folder.mkdir()
    shutil.copy(encoders / "clip_l.safetensors", clip_folder / "model.safetensors")
    shutil.copy(encoders / "tokenizer_2" / "tokenizer.json", clip_folder)
    other = options_of(encoders, text_encoder1=str(tmp_path), text_encoder2=str(clip_folder))
    expected, found = encode(loaded(options_of(encoders)))[1], encode(loaded(other))[1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_published_llama_key_has_a_place_or_is_not_needed():
    shapes = manifest("llava_llama3_text")
    sizes = llama.sizes_from_shapes(shapes, "llama")
    assert sizes == llama.LlamaSizes(128320, 4096, 14336, 32, 32, 8)
    built = {key: tuple(value.shape) for key, value in llama.empty_decoder(sizes).state_dict().items()}
    placed = {key: name for key in shapes if (name := llama.decoder_key(key, 32)) is not None}
    assert {name: shapes[key] for key, name in placed.items()} == built
    unused = re.compile(r"lm_head\.weight|model\.norm\.weight|model\.layers\.3[01]\..*")
    assert {key for key in shapes if key not in placed} == {key for key in shapes if unused.fullmatch(key)}
    for prefix in ("language_model.model.", "model.language_model.", ""):
        renamed = [llama.decoder_key(prefix + key.removeprefix("model."), 32) for key in placed]
        assert renamed == list(placed.values())
    assert llama.decoder_key("tokenizer", 32) is None


def test_every_published_clip_key_has_a_place():
    shapes = manifest("clip_l_text")
    sizes = clip.sizes_from_shapes(shapes, "clip")
    assert sizes == clip.ClipSizes(49408, 768, 3072, 12, 12, 77)
    model = clip.empty_clip(sizes, end=49407)
    built = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {clip.model_key(key, model): shape for key, shape in shapes.items()} == built


@pytest.mark.shows("text_encoder1", "text_encoder2")
def test_wrong_and_missing_files_are_named(encoders, vae_file, tmp_path):
    with pytest.raises(UserError, match="has two text encoders: name both"):
        loaded(EncodingOptions(text_encoder1="x"))
    with pytest.raises(UserError, match=r"is not a Llama text encoder: it has no embed_tokens.weight"):
        loaded(options_of(encoders, text_encoder1=str(encoders / "clip_l.safetensors")))
    with pytest.raises(UserError, match="is not a CLIP text model"):
        loaded(options_of(encoders, text_encoder2=str(vae_file), tokenizer2=str(encoders / "tokenizer_2")))
    with pytest.raises(UserError, match="is not the causal video VAE"):
        load(encoders / "clip_l.safetensors")
    assert loaded(EncodingOptions()) is None
    assert loaded(VaeOptions()) is None


def test_the_first_option_of_each_group_is_the_one_to_name():
    """Where previews find no encoder, they ask for the group's first option."""
    for group in (CacheTextEncoderOptions, EncodingOptions):
        assert dataclasses.fields(group)[0].name == "text_encoder1"


def test_a_tokenizer_that_cuts_the_instruction_otherwise_is_refused(encoders, tmp_path):
    """A Llama 3 tokenizer without its begin token gives 94: features would be shifted by one token, silently."""
    save_llama_tokenizer(tmp_path / "other", instruction_tokens=94)
    with pytest.raises(UserError, match="has 94 tokens, the model was trained with 95"):
        loaded(options_of(encoders, tokenizer1=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"an empty text gives .*; it is not CLIP's"):
        loaded(options_of(encoders, tokenizer2=str(encoders / "tokenizer")))
    with pytest.raises(UserError, match=r"--tokenizer1 .*nowhere"):
        loaded(options_of(encoders, tokenizer1=str(tmp_path / "nowhere")))
