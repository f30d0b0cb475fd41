"""Names and keys of cache files against the reference, for every family's kind of layout."""

import json
from pathlib import Path

import pytest
import torch

from musubi_tuner.data.cache_keys import find_fields, latent_name, latent_pattern, text_name, to_keys
from musubi_tuner.families.base import CacheField

TABLE = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/dataset.json").read_text(encoding="utf-8"))

FIELDS = {
    "hv": (
        CacheField("latents", "latents", "video", "latent"),
        CacheField("llm", "llm", "plain", "text"),
        CacheField("llm_mask", "llm_mask", "mask", "text"),
        CacheField("clip", "clipL", "plain", "text"),
    ),
    "wan": (
        CacheField("latents", "latents", "video", "latent"),
        CacheField("image_latents", "latents_image", "video", "latent", required=False),
        CacheField("control", "latents_control", "video", "latent", required=False),
        CacheField("image_features", "clip", "plain", "latent", required=False),
        CacheField("frame_indices", "f_indices", "plain", "latent", required=False),
        CacheField("text", "t5", "varlen", "text"),
    ),
    "fp": (
        CacheField("latents", "latents", "video", "latent"),
        CacheField("clean", "latents_clean", "history", "latent"),
        CacheField("clean_2x", "latents_clean_2x", "history", "latent"),
        CacheField("clean_4x", "latents_clean_4x", "history", "latent"),
        CacheField("indices", "latent_indices", "plain", "latent"),
        CacheField("clean_indices", "clean_latent_indices", "plain", "latent"),
        CacheField("clean_2x_indices", "clean_latent_2x_indices", "plain", "latent"),
        CacheField("clean_4x_indices", "clean_latent_4x_indices", "plain", "latent"),
        CacheField("image", "image_embeddings", "plain", "latent"),
        CacheField("llama", "llama_vec", "plain", "text"),
        CacheField("llama_mask", "llama_attention_mask", "mask", "text"),
        CacheField("pooled", "clip_l_pooler", "plain", "text"),
    ),
    "fk": (
        CacheField("latents", "latents", "image", "latent"),
        CacheField("control", "latents_control", "image", "latent"),
        CacheField("t5", "t5_vec", "plain", "text"),
        CacheField("pooled", "clip_l_pooler", "plain", "text"),
    ),
    "qi": (
        CacheField("latents", "latents", "video", "latent"),
        CacheField("text", "vl_embed", "varlen", "text"),
    ),
    "qie": (
        CacheField("latents", "latents", "video", "latent"),
        CacheField("control", "latents_control", "video", "latent", numbered=True),
    ),
}


def _part(row):
    return "text" if row["kind"] == "text" else "latent"


@pytest.mark.parametrize("row", TABLE["cache_keys"], ids=lambda row: f"{row['arch']}-{row['kind']}")
def test_keys_of_the_reference_survive_a_round_trip(row):
    """Every key finds its field, and the fields' tensors find the same keys again."""
    tensors = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in row["keys"].items()}
    found = find_fields(tensors, FIELDS[row["arch"]], _part(row))
    assert set(found) == set(tensors)
    entry = {item.name: tensors[key] for key, item in found.items()}
    assert len(entry) == len(tensors)
    again = to_keys(entry, FIELDS[row["arch"]], _part(row))
    assert {key: id(tensor) for key, tensor in again.items()} == {key: id(t) for key, t in tensors.items()}


def test_numbered_fields_carry_their_number():
    row = next(row for row in TABLE["cache_keys"] if row["arch"] == "qie")
    names = {key: item.name for key, item in find_fields(row["keys"], FIELDS["qie"], "latent").items()}
    assert names["latents_control_1_1x64x96_bfloat16"] == "control_1"


@pytest.mark.parametrize("row", TABLE["cache_names"], ids=lambda row: row["item_key"])
def test_file_names_of_the_reference(row):
    stem = Path(row["item_key"]).stem
    size = tuple(row["original_size"])
    assert f"CACHE/{latent_name(stem, size, 'wan')}" == row["latent"]
    assert f"CACHE/{text_name(stem, 'wan')}" == row["text"]
    match = latent_pattern("wan").fullmatch(latent_name(stem, size, "wan"))
    assert (match["stem"], int(match["width"]), int(match["height"])) == (stem, *size)
    assert latent_pattern("wan").fullmatch(text_name(stem, "wan")) is None


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({}, "the latent cache needs latents: given nothing"),
        ({"latents": torch.zeros(3, 4, 4)}, r"latents has shape \(3, 4, 4\): layout video has 4 dimensions"),
        ({"latents": torch.zeros(3, 1, 4, 4), "extra": torch.zeros(1)}, "extra is no field of the latent cache"),
        ({"latents_0": torch.zeros(3, 1, 4, 4)}, "latents_0 is no field"),
    ],
)
def test_what_the_table_does_not_know_is_refused(entry, sentence):
    with pytest.raises(ValueError, match=sentence):
        to_keys(entry, FIELDS["wan"], "latent")
