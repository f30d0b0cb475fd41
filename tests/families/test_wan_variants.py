"""Every kind of Wan transformer against its fixture: 2.1 and 2.2, pictures, first and last frame, given positions."""

import json
from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from golden_data import REFERENCE, TOLERANCE, distance, golden, manifest
from musubi_tuner.adapters.attach import attach
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.known import ALWAYS
from musubi_tuner.families import registry
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.families.wan.options import ModelOptions
from wan_files import PUBLISHED, header_of, to_diffusers

FAMILY = registry.get("wan")
CASES = ("wan2_1_i2v_a", "wan2_1_t2v_frame_indices_a", "wan2_2_i2v_a", "wan2_2_t2v_a")
SIZES = {field.name for field in fields(WanConfig)}


def model_of(case) -> WanModel:
    sizes = {name: value for name, value in case.config.items() if name in SIZES}
    positions = {"image_positions": 514} if "img_emb.emb_pos" in case.weights else {}
    model = WanModel(WanConfig(**{**sizes, "patch_size": tuple(sizes["patch_size"]), **positions}))
    model.load_state_dict(case.weights)
    return model.requires_grad_(False)


def entries_of(case) -> list[dict[str, torch.Tensor]]:
    """A batch as the caches hold it."""
    names = {"context": "text", "y": "image", "clip_fea": "clip", "f_indices": "positions"}
    given = {names[key]: value for key, value in case.inputs.items() if key in names}
    batch = len(given["text"])
    if "clip" in given:
        given["clip"] = given["clip"].reshape(batch, -1, given["clip"].shape[-1])
    return [{name: value[i] for name, value in given.items()} for i in range(batch)]


def predicted(model, case, x):
    cond = FAMILY.collate(entries_of(case))
    return FAMILY.predict(model, x, case.inputs["t"].double() / 1000, cond)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradient_equal_the_fixture(name):
    case = golden(name)
    x = case.inputs["x"].clone().requires_grad_()
    sample = predicted(model_of(case), case, x)
    sample.square().mean().backward()
    assert distance(sample.detach(), case.outputs["sample"]) < TOLERANCE
    assert distance(x.grad, case.outputs["grad_x"]) < TOLERANCE


def test_both_pictures_tokens_go_to_the_picture_attention():
    """The published model's own way, as decided; the other result of the fixture is another computation."""
    case = golden("wan2_1_flf2v_a")
    sample = predicted(model_of(case), case, case.inputs["x"])
    assert distance(sample, case.outputs["sample_all_image_tokens"]) < TOLERANCE
    assert distance(sample, case.outputs["sample"]) > 0.1


@pytest.mark.parametrize("name", ["wan2_1_i2v_a", "wan2_2_i2v_a", "wan2_1_flf2v_a"])
def test_diffusers_with_the_same_weights_agrees(name):
    from diffusers import WanTransformer3DModel

    case = golden(name)
    model = model_of(case)
    c = model.config
    other = WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        image_dim=c.image_embed_dim,
        added_kv_proj_dim=c.dim if c.image_embed_dim else None,
        pos_embed_seq_len=c.image_positions or None,
        rope_max_seq_len=64,
    ).eval()
    state = {in_diffusers(key): value for key, value in model.state_dict().items()}
    other.load_state_dict(state)
    assert [FAMILY.rename_dit_key(key) for key in state] == list(model.state_dict())
    model.config = replace(c, text_len=512)  # which its split of picture and text tokens takes for granted
    cond = FAMILY.collate(entries_of(case))
    text = F.pad(cond["text"], (0, 0, 0, 512 - cond["text"].shape[1]))
    x = torch.cat([case.inputs["x"], cond["image"]], dim=1)
    pictures = case.inputs.get("clip_fea")  # a row for each picture
    with torch.no_grad():
        theirs = other(x, case.inputs["t"], text, pictures, return_dict=False)[0]
    assert distance(predicted(model, case, case.inputs["x"]), theirs) < TOLERANCE


def in_diffusers(key: str) -> str:
    for old, new in (
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
        ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
        ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
        ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
        (".k_img.", ".add_k_proj."),
        (".v_img.", ".add_v_proj."),
        (".norm_k_img.", ".norm_added_k."),
    ):
        key = key.replace(old, new)
    return to_diffusers(key)


@pytest.mark.parametrize("name", PUBLISHED)
def test_default_lora_modules_are_the_established_ones(name):
    expected = json.loads((REFERENCE / "lora" / f"{name}.json").read_text())
    adapters = attach(FAMILY.build_dit(header_of(manifest(name))), FAMILY.spec.adapter, rank=4)
    assert sorted(zip(adapters.names, adapters.paths, strict=True)) == sorted(map(tuple, expected["modules"]))
    shapes = {key: list(parameter.shape) for key, parameter in adapters.named_parameters()}
    assert shapes == {key: shape for key, shape in expected["tensors"].items() if not key.endswith(".alpha")}


def test_samples_of_a_batch_may_have_different_positions():
    case = golden("wan2_1_t2v_frame_indices_a")
    model, x, t, text = model_of(case), case.inputs["x"], case.inputs["t"], case.inputs["context"]
    other = torch.tensor([[0, 3]])
    both = torch.cat([case.inputs["f_indices"], other])
    together = model(x.expand(2, -1, -1, -1, -1), t.expand(2), text.expand(2, -1, -1), frame_positions=both)
    apart = [model(x, t, text, frame_positions=row) for row in (case.inputs["f_indices"], other)]
    assert distance(together, torch.cat(apart)) < 1e-6
    assert distance(apart[0], apart[1]) > 1e-4


@pytest.mark.parametrize(
    ("name", "without", "sentence"),
    [
        ("wan2_2_i2v_a", "image", r"takes 36 channels \(image to video\) and was given no first frame: .*--i2v"),
        ("wan2_1_i2v_a", "clip", "attends to features of its first frame and was given none: .*--clip"),
    ],
)
def test_what_a_model_needs_and_was_not_given_is_one_sentence(name, without, sentence):
    case = golden(name)
    entries = [{key: value for key, value in entry.items() if key != without} for entry in entries_of(case)]
    with pytest.raises(UserError, match=sentence):
        FAMILY.predict(model_of(case), case.inputs["x"], case.inputs["t"] / 1000, FAMILY.collate(entries))


def test_one_pictures_features_do_not_fit_a_model_of_two():
    case = golden("wan2_1_flf2v_a")
    entries = [{**entry, "clip": entry["clip"][:257]} for entry in entries_of(case)]
    with pytest.raises(UserError, match="257 picture tokens: this model takes 514"):
        FAMILY.predict(model_of(case), case.inputs["x"], case.inputs["t"] / 1000, FAMILY.collate(entries))


@pytest.mark.shows("force_v2_1_time_embedding")
def test_the_time_embedding_is_always_computed_once_a_sample():
    """What force_v2_1_time_embedding asks for: the fixture's is computed for each token, and agrees."""
    assert "force_v2_1_time_embedding" in ALWAYS
    case = golden("wan2_2_t2v_a")
    model = model_of(case)
    assert model.time_vector(case.inputs["t"]).shape == (1, 64)
    assert distance(predicted(model, case, case.inputs["x"]), case.outputs["sample"]) < TOLERANCE


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("t2v-14B", "Wan2.1-T2V-14B"),
        ("t2i-14B", "Wan2.1-T2V-14B"),
        ("t2v-1.3B", "Wan2.1-T2V-1.3B"),
        ("i2v-14B", "Wan2.1-I2V-720P"),
        ("t2v-A14B", "Wan2.2-T2V-A14B"),
        ("i2v-A14B", "Wan2.2-I2V-A14B"),
    ],
)
def test_the_ratios_of_a_model_are_the_published_ones(task, name):
    """With and without the prompt in turn, as published; of i2v-A14B nothing is skipped before the switch."""
    published = json.loads((REFERENCE / "behaviour/magcache_ratios.json").read_text())["models"][name]
    found = FAMILY.mag_ratios(None, ModelOptions(task=task))
    assert [value for pair in zip(found.ratios, found.without, strict=True) for value in pair] == published["ratios"]
    assert found.high_computed == ("no caching before switch" in published.get("extra_rule", ""))


def test_a_model_that_was_not_measured_has_no_ratios():
    assert FAMILY.mag_ratios(None, ModelOptions(task="flf2v-14B")) is None


def test_the_shift_of_pictures_to_video_depends_on_the_size():
    task = FAMILY.spec.tasks["i2v-14B"]
    assert [task.shift_of(*size) for size in ((832, 480), (480, 832), (1280, 720))] == [3.0, 3.0, 5.0]
    assert FAMILY.spec.tasks["t2v-14B"].shift_of(832, 480) == 5.0
