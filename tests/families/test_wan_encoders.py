"""Wan's VAE and text encoder: original files in, fixtures' numbers out."""

import json

import pytest
import torch
from safetensors.torch import save_file

from golden_data import TOLERANCE, distance, golden, manifest
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.families.base import Item
from musubi_tuner.families.wan import vae
from musubi_tuner.families.wan.options import CacheTextEncoderOptions
from musubi_tuner.nn.text.umt5 import TextConfig, clean_caption, empty_encoder
from musubi_tuner.weights import umt5

FAMILY = registry.get("wan")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae_case():
    return golden("wan_vae_a")


@pytest.fixture(scope="module")
def vae_file(vae_case, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    sizes = {name: vae_case.config[name] for name in ("dim_mult", "num_res_blocks", "temporal_downsample")}
    save_file(vae_case.weights, path, {"musubi.config": json.dumps(sizes)})
    return path


@pytest.fixture(scope="module")
def loaded_vae(vae_file):
    return FAMILY.load_vae(str(vae_file), device=CPU, dtype=torch.float32)


def test_latents_are_the_normalised_posterior_mean(loaded_vae, vae_case):
    assert distance(loaded_vae.encode(vae_case.inputs["pixels"]), vae_case.outputs["latents"]) < TOLERANCE
    one = loaded_vae.encode(vae_case.inputs["single_frame_pixels"])
    assert distance(one, vae_case.outputs["single_frame_latents"]) < TOLERANCE


def test_decoded_pixels_are_clamped(loaded_vae, vae_case):
    pixels = loaded_vae.decode(vae_case.inputs["latents"])
    assert distance(pixels, vae_case.outputs["pixels_clamped"]) < TOLERANCE
    assert pixels.abs().max() <= 1


@pytest.mark.parametrize("shape", [(6, 16, 16), (5, 20, 16), (1, 16, 12)])
def test_sizes_that_the_network_would_cut_are_refused(loaded_vae, shape):
    with pytest.raises(ValueError, match=r"the VAE takes 1 \+ 4 k frames, height and width in multiples of 8"):
        loaded_vae.encode(torch.zeros(1, 3, *shape))


def test_the_pth_file_loads_like_the_safetensors_file(vae_case, loaded_vae, tmp_path):
    """A published .pth is a flat dictionary without metadata: sizes that shapes do not tell are the published ones."""
    config = vae.VaeConfig(base_dim=8)
    torch.manual_seed(0)
    state = vae.to_original_keys(vae.empty_vae(config).state_dict(), config)
    torch.save(state, tmp_path / "vae.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "vae.safetensors")
    pixels = vae_case.inputs["single_frame_pixels"]
    a, b = (
        FAMILY.load_vae(str(tmp_path / name), device=CPU, dtype=torch.float32).encode(pixels)
        for name in ("vae.pth", "vae.safetensors")
    )
    assert torch.equal(a, b)


def test_the_family_caches_one_entry_per_picture(loaded_vae, vae_case):
    pixels = vae_case.inputs["single_frame_pixels"][0]
    entries = FAMILY.encode_latents([Item("", pixels), Item("", pixels)], loaded_vae)
    assert [len(of_item) for of_item in entries] == [1, 1]
    assert entries[0][0]["latents"].shape == (16, 1, 2, 3)
    assert distance(entries[1][0]["latents"], vae_case.outputs["single_frame_latents"][0]) < TOLERANCE


def test_every_published_vae_key_has_a_place_and_a_way_back():
    shapes = manifest("wan2_1_vae")
    with torch.device("meta"):
        model = vae.empty_vae(vae.VaeConfig())
    renamed = {vae.vae_key(key, 2): shape for key, shape in shapes.items()}
    assert renamed == {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert [vae.original_vae_key(vae.vae_key(key, 2), 2) for key in shapes] == list(shapes)


def test_every_published_text_encoder_key_has_a_place():
    shapes = manifest("wan_umt5_xxl_encoder")
    config = TextConfig(256384, 4096, 4096, 10240, 64, 24)
    with torch.device("meta"):
        model = empty_encoder(config)
    built = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    built.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    assert {umt5.text_key(key): shape for key, shape in shapes.items()} == built
    assert umt5.text_key("encoder.blocks.3.attn.q.weight") == umt5.text_key("blocks.3.attn.q.weight")


@pytest.fixture(scope="module")
def umt5_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    save_file(golden("wan_umt5_a").weights, folder / "t5.safetensors")
    make_tokenizer(folder / "tokenizer")
    return folder / "t5.safetensors"


def make_tokenizer(folder):
    """A word-level tokenizer of 50 pieces with an end token, saved as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 50)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.save_pretrained(str(folder))


def load_umt5(path, dtype=torch.float32, fp8=False):
    return FAMILY.load_encoders(CacheTextEncoderOptions(t5=str(path), fp8_t5=fp8), device=CPU, dtype=dtype)


def test_hidden_states_equal_the_fixture(umt5_file):
    case = golden("wan_umt5_a")
    mask = case.inputs["mask"].bool()
    with torch.no_grad():
        model = load_umt5(umt5_file).text.model
        hidden = model(input_ids=case.inputs["ids"], attention_mask=case.inputs["mask"]).last_hidden_state
    assert distance(hidden[mask], case.outputs["hidden"][mask]) < TOLERANCE


def test_a_repackaged_file_in_transformers_names_is_read(umt5_file, tmp_path):
    """Such files hold the embedding under two names, or the tokenizer beside the weights."""
    renamed = {umt5.text_key(key): tensor for key, tensor in golden("wan_umt5_a").weights.items()}
    more = {"encoder.embed_tokens.weight": renamed["shared.weight"].clone(), "spiece_model": torch.zeros(9).byte()}
    save_file(renamed | more, tmp_path / "umt5.safetensors")
    a = FAMILY.encode_condition([Item("w5 w6")], load_umt5(umt5_file))
    b = FAMILY.encode_condition(
        [Item("w5 w6")], load_umt5_with_tokenizer(tmp_path / "umt5.safetensors", umt5_file.parent / "tokenizer")
    )
    assert torch.equal(a[0]["text"], b[0]["text"])


def test_long_captions_are_cut_with_their_end_token_kept(umt5_file):
    encoder = load_umt5(umt5_file).text
    encoder.max_length = 5
    cut, same = encoder.encode(["w3 w4 w5 w6 w7 w8 w9", "w3 w4 w5 w6"])
    assert cut.shape[0] == 5
    assert distance(cut, same) < 1e-6


def test_features_are_cut_to_the_caption_and_do_not_depend_on_the_batch(umt5_file):
    encoder = load_umt5(umt5_file)
    together = FAMILY.encode_condition([Item("w5 w6 w7"), Item("w9"), Item("")], encoder)
    assert [entry["text"].shape[0] for entry in together] == [4, 2, 1]
    alone = FAMILY.encode_condition([Item("w9")], encoder)[0]["text"]
    assert distance(together[1]["text"], alone) < 1e-6


def test_captions_are_cleaned_as_the_model_was_trained():
    assert clean_caption("  a &amp;amp; b\n\tc ") == "a & b c"


@pytest.mark.shows("fp8_t5")
def test_the_encoder_runs_in_fp8(umt5_file):
    full = FAMILY.encode_condition([Item("w5 w6 w7")], load_umt5(umt5_file))[0]["text"]
    encoder = load_umt5(umt5_file, fp8=True)
    kinds = {name: p.dtype for name, p in encoder.text.model.state_dict().items()}
    assert kinds["encoder.block.0.layer.0.SelfAttention.q.weight"] == torch.float8_e4m3fn
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float8_e4m3fn
    assert kinds["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == torch.float32
    assert kinds["shared.weight"] == torch.float32
    assert 1e-4 < distance(FAMILY.encode_condition([Item("w5 w6 w7")], encoder)[0]["text"], full) < 0.2


@pytest.mark.shows("t5", "vae")
def test_wrong_and_missing_files_are_named(umt5_file, vae_file, tmp_path):
    with pytest.raises(UserError, match=r"is not umt5: it has no token_embedding.weight"):
        load_umt5_with_tokenizer(vae_file, umt5_file.parent / "tokenizer")
    with pytest.raises(UserError, match=r"no tokenizer for .*put tokenizer.json or spiece.model of google/umt5-xxl in"):
        load_umt5(copied(umt5_file, tmp_path))
    with pytest.raises(UserError, match=r"has 50 tokens and .* knows 40: they do not belong together"):
        load_umt5_with_tokenizer(with_vocabulary(40, tmp_path), umt5_file.parent / "tokenizer")
    with pytest.raises(UserError, match="is not a Wan VAE"):
        FAMILY.load_vae(str(umt5_file), device=CPU, dtype=torch.float32)
    with pytest.raises(UserError, match=r"--t5_tokenizer .*nowhere: there is no tokenizer.json or spiece.model in it"):
        load_umt5_with_tokenizer(umt5_file, tmp_path / "nowhere")
    assert FAMILY.load_encoders(None, device=CPU, dtype=torch.float32) is None


def copied(file, folder):
    """The encoder's file alone, without the tokenizer beside it."""
    (folder / "alone.safetensors").write_bytes(file.read_bytes())
    return folder / "alone.safetensors"


def with_vocabulary(size, folder):
    """The fixture's encoder with fewer rows in its embedding."""
    weights = golden("wan_umt5_a").weights
    small = weights["token_embedding.weight"][:size].clone()
    save_file(weights | {"token_embedding.weight": small}, folder / "small.safetensors")
    return folder / "small.safetensors"


def load_umt5_with_tokenizer(path, folder):
    options = CacheTextEncoderOptions(t5=str(path), t5_tokenizer=str(folder))
    return FAMILY.load_encoders(options, device=CPU, dtype=torch.float32)
