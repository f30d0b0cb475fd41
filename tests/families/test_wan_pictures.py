"""What pictures become for Wan: CLIP's features, marks and latents of given frames, and the keys of their caches."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from golden_data import REFERENCE, TOLERANCE, distance, golden, manifest
from musubi_tuner.config.errors import UserError
from musubi_tuner.data.cache_keys import to_keys
from musubi_tuner.families import registry
from musubi_tuner.families.base import Item
from musubi_tuner.families.wan import vae
from musubi_tuner.families.wan.options import CacheLatentOptions, EncodingOptions, GenerationOptions
from musubi_tuner.flow import keyed
from musubi_tuner.nn.vision.clip import MEAN, STD, ClipTower
from musubi_tuner.weights.clip_vision import load_clip_vision, tower_key, tower_sizes
from musubi_tuner.weights.encoders import TextAndPicture
from wan_files import header_of

FAMILY = registry.get("wan")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    text = {"log_scale": torch.zeros(()), "textual.token_embedding.weight": torch.zeros(4, 8)}
    save_file(golden("wan_clip_visual_a").weights | text, path, {"musubi.config": json.dumps({"num_heads": 3})})
    return path


@pytest.fixture(scope="module")
def tower(tower_file) -> ClipTower:
    return load_clip_vision(str(tower_file), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    case = golden("wan_vae_a")
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    sizes = {name: case.config[name] for name in ("dim_mult", "num_res_blocks", "temporal_downsample")}
    save_file(case.weights, path, {"musubi.config": json.dumps(sizes)})
    return path


@pytest.fixture(scope="module")
def coder(vae_file):
    return FAMILY.load_vae(str(vae_file), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """A clip of five frames of 16 x 24 pixels."""
    return keyed.normal((3, 5, 16, 24), "clip").clamp(-1, 1)


def test_picture_features_equal_the_fixture(tower):
    case = golden("wan_clip_visual_a")
    with torch.no_grad():
        assert distance(tower(case.inputs["pixels"]), case.outputs["features"]) < TOLERANCE


def test_pictures_are_squeezed_to_the_towers_square_without_antialiasing(tower):
    picture = keyed.normal((2, 3, 40, 50), "picture").clamp(-1, 1)
    square = F.interpolate(picture, (28, 28), mode="bicubic", align_corners=False, antialias=False) / 2 + 0.5
    mean, std = (torch.tensor(row).view(1, 3, 1, 1) for row in (MEAN, STD))
    with torch.no_grad():
        expected = tower((square - mean) / std)
    assert distance(tower.encode(picture), expected) < 1e-6


def test_every_published_key_of_the_tower_has_a_place_and_no_other_has():
    header = header_of(manifest("wan_clip_xlm_roberta_vit_h_14"))
    sizes = tower_sizes(header)
    assert (sizes.dim, sizes.num_heads, sizes.num_layers, sizes.mlp_dim) == (1280, 16, 31, 5120)
    assert (sizes.patch_size, sizes.image_size) == (14, 224)
    with torch.device("meta"):
        built = {key: tuple(value.shape) for key, value in ClipTower(sizes).state_dict().items()}
    found = {tower_key(key, 31): info.shape for key, info in header.tensors.items()}
    found.pop(None)
    assert found == built


@pytest.mark.shows("clip")
def test_another_file_is_not_taken_for_the_clip_encoder(vae_file, tower_file):
    with pytest.raises(UserError, match=r"is not the CLIP picture encoder: it has no visual.patch_embedding.weight"):
        FAMILY.load_encoders(EncodingOptions(clip=str(vae_file)), device=CPU, dtype=torch.float32)
    found = FAMILY.load_encoders(EncodingOptions(clip=str(tower_file)), device=CPU, dtype=torch.float32)
    assert found.text is None
    with pytest.raises(UserError, match="captions need the text encoder umt5: name it with --t5"):
        FAMILY.encode_condition([Item("a cat")], found)


def original_marks(given: list[int], frames: int, rows: int, columns: int) -> torch.Tensor:
    """The mask as the model's authors build it: by pixel frame, the first one four times, folded by four."""
    mask = torch.zeros(1, frames, rows, columns)
    mask[:, given] = 1
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    return mask.view(1, mask.shape[1] // 4, 4, rows, columns).transpose(1, 2)[0]


@pytest.mark.parametrize(("given", "places"), [("first", [0]), ("both", [0, 4])])
def test_given_frames_are_marked_and_the_others_are_grey(coder, tower, clip, given, places):
    entry = vae.training_entries([Item("", clip)], coder, tower, given)[0]
    image = entry["image"]
    assert image.shape == (20, 2, 2, 3)
    assert torch.equal(image[:4], original_marks(places, 5, 2, 3))
    grey = torch.zeros_like(clip)
    grey[:, places] = clip[:, places]
    assert distance(image[4:], coder.encode(grey[None])[0]) < 1e-6
    features = torch.cat([tower.encode(clip[None, :, place])[0] for place in places])
    assert distance(entry["clip"], features) < 1e-6
    assert distance(entry["latents"], coder.encode(clip[None])[0]) < 1e-6


def test_a_single_frame_is_given_whole(coder, clip):
    for given in ("first", "both"):
        entry = vae.training_entries([Item("", clip[:, :1])], coder, None, given)[0]
        assert torch.equal(entry["image"][:4], torch.ones(4, 1, 2, 3))
        assert "clip" not in entry


@pytest.mark.shows("i2v")
def test_the_options_of_the_latent_cache_say_what_is_cached(coder, tower, clip):
    control = -clip
    for options, controls, names in (
        (CacheLatentOptions(), (), {"latents"}),
        (CacheLatentOptions(), (control,), {"latents", "control"}),
        (CacheLatentOptions(i2v=True), (), {"latents", "image", "clip"}),
        (CacheLatentOptions(clip="its file"), (), {"latents", "image", "clip"}),
        (CacheLatentOptions(flf2v=True), (control,), {"latents", "image", "clip", "control"}),
    ):
        items = [Item("", clip, controls=controls)] * 2
        entries = FAMILY.encode_latents(items, coder, TextAndPicture(options, picture=tower))
        assert [set(entry) for of_item in entries for entry in of_item] == [names, names]
    assert distance(entries[1][0]["control"], coder.encode(control[None])[0]) < 1e-6
    assert entries[0][0]["clip"].shape == (2 * 5, 48)


def test_a_request_is_encoded_like_a_training_item(coder, tower, clip):
    first, last = clip[:, :1], clip[:, -1:]
    encoders = TextAndPicture(EncodingOptions(), picture=tower)
    trained = vae.training_entries([Item("", clip)], coder, tower, "both")[0]
    request = Item("", controls=(first, last), roles=("start", "end"), frames=5, height=16, width=24)
    asked = FAMILY.encode_latents([request], coder, encoders)[0][0]
    assert asked.keys() == {"image", "clip"}
    assert all(distance(asked[name], trained[name]) < 1e-6 for name in asked)


def test_cache_keys_are_the_established_ones():
    rows = json.loads((REFERENCE / "behaviour/dataset.json").read_text())["cache_keys"]
    rows = [row for row in rows if row["arch"] == "wan" and row["kind"].startswith("latent")]
    names = {"clip": "clip", "latents_control": "control", "latents_image": "image", "f_indices": "positions"}
    for row in rows:
        entry = {}
        for key, (shape, dtype) in row["keys"].items():
            stem = next((stem for stem in names if key.startswith(stem)), None)
            entry[names.get(stem, "latents")] = torch.zeros(shape, dtype=getattr(torch, dtype))
        found = to_keys(entry, FAMILY.spec.cache_fields, "latent")
        assert {key: [list(value.shape), str(value.dtype)[6:]] for key, value in found.items()} == row["keys"]


@pytest.mark.shows("vae_cache_cpu")
def test_features_between_frames_rest_on_the_cpu(vae_file, coder, clip):
    """The same latents and pixels; what is kept from frame to frame is a list that stores on the CPU."""
    saving = FAMILY.load_vae(
        str(vae_file), device=CPU, dtype=torch.float32, options=CacheLatentOptions(vae_cache_cpu=True)
    )
    latents = saving.encode(clip[None])
    assert torch.equal(latents, coder.encode(clip[None]))
    assert torch.equal(saving.decode(latents), coder.decode(latents))
    assert isinstance(saving.model._feat_map, vae._OnCpu)
    kept = vae._OnCpu([None, None])
    kept[1] = torch.ones(2)
    kept[0] = "Rep"
    assert kept[0] == "Rep"
    assert torch.equal(kept[1], torch.ones(2))
    assert kept.devices == {1: CPU}


@pytest.mark.gpu
def test_features_between_frames_come_back_to_the_device():
    kept = vae._OnCpu([None])
    kept[0] = torch.ones(2, device="cuda")
    assert list.__getitem__(kept, 0).device.type == "cpu"
    assert kept[0].device.type == "cuda"


@pytest.mark.parametrize("target", [1, 9, 0])
def test_a_single_picture_is_a_frame_at_its_time_among_its_controls(coder, tower, clip, target):
    """In the order of their times; all frames are trained, the picture is grey in what the model is given."""
    picture, controls = clip[:, :1], (clip[:, 1:2], clip[:, 2:3])
    said = {"fp_1f_clean_indices": (4, 12), "fp_1f_target_index": target}
    encoders = TextAndPicture(CacheLatentOptions(one_frame=True), picture=tower)
    entry = FAMILY.encode_latents([Item("", picture, controls=controls, said=said)], coder, encoders)[0][0]
    place = [0, 1][target == 9]
    assert entry["positions"].tolist() == sorted([4, 12, target])
    assert entry["positions"].dtype == torch.int32
    assert entry["clip"].shape == (10, 48)
    alone = [coder.encode(x[None])[0][:, 0] for x in (picture, *controls, torch.zeros_like(picture))]
    order = [1, 2]
    order.insert(place, 0)
    assert distance(entry["latents"], torch.stack([alone[i] for i in order], dim=1)) < 1e-6
    order[place] = 3
    assert distance(entry["image"][4:], torch.stack([alone[i] for i in order], dim=1)) < 1e-6
    assert entry["image"][:4, :, 0, 0].tolist() == [[float(i != place) for i in range(3)]] * 4
    request = Item("", controls=controls, roles=("start", "end"), frames=1, height=16, width=24)
    chosen = GenerationOptions(one_frame_inference=f"target_index={target},control_index=4;12")
    asked = FAMILY.encode_latents([request], coder, TextAndPicture(chosen, picture=tower))[0][0]
    assert asked.pop("kept").tolist() == [3, place]
    assert all(torch.equal(asked[name], entry[name]) for name in asked)
    assert asked.keys() == {"image", "positions", "clip"}


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ({"said": {"fp_1f_clean_indices": (1,)}}, "times 1 and 1: each must be another"),
        ({"said": {"fp_1f_clean_indices": (1, 2)}}, "one-frame mode: 1 control pictures and times 1, 2"),
        ({"controls": ()}, "one-frame mode: 0 control pictures and no times"),
        ({"controls": (torch.zeros(3, 1, 32, 32),)}, "controls have the size of the picture"),
        ({"pixels": torch.zeros(3, 5, 16, 24)}, "--one_frame takes pictures, not clips"),
    ],
)
def test_single_pictures_that_cannot_be_are_told(coder, clip, item, sentence):
    given = {"caption": "", "pixels": clip[:, :1], "controls": (clip[:, 1:2],)} | item
    with pytest.raises(UserError, match=sentence):
        FAMILY.encode_latents([Item(**given)], coder, TextAndPicture(CacheLatentOptions(one_frame=True)))


def test_several_controls_of_a_clip_are_refused(coder, clip):
    with pytest.raises(UserError, match=r"an item has 2 controls .*: a clip takes one control clip"):
        FAMILY.encode_latents([Item("", clip, controls=(clip, clip))], coder, TextAndPicture(CacheLatentOptions()))


def test_control_pictures_without_one_frame_mode_are_refused(coder, clip):
    request = Item("", controls=(clip[:, :1],), roles=("control",), frames=5, height=16, width=24)
    with pytest.raises(UserError, match="control pictures are for --one_frame_inference"):
        FAMILY.encode_latents([request], coder, TextAndPicture(GenerationOptions()))
    with pytest.raises(UserError, match="one-frame mode makes one picture, not 5 frames: give --video_length 1"):
        FAMILY.encode_latents([request], coder, TextAndPicture(GenerationOptions(one_frame_inference="default")))
