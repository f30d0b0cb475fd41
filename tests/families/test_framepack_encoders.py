"""FramePack's VAE, picture encoder, text cache and plans: the fixtures' and the library's numbers, and the rules."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from golden_data import REFERENCE, TOLERANCE, distance, golden, manifest
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.one_frame import OneFrame
from musubi_tuner.config.options import parse
from musubi_tuner.families import registry
from musubi_tuner.families.base import Item, OwnSampling, Tools
from musubi_tuner.families.framepack import generate
from musubi_tuner.families.framepack.options import (
    CacheLatentOptions,
    CacheTextEncoderOptions,
    EncodingOptions,
    GenerationOptions,
)
from musubi_tuner.families.framepack.vae import blended, empty_tower, in_pieces, load_picture_encoder, tower_sizes
from musubi_tuner.flow import keyed, sections
from musubi_tuner.nn.text import llama
from musubi_tuner.sampling import generate as sampling
from musubi_tuner.weights.reader import Header, TensorInfo
from real_media import photo
from tiny_encoders import save_clip, save_llama, save_siglip, tiny_siglip

FAMILY = registry.get("framepack")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The VAE of the fixture and all encoders, as files."""
    folder = tmp_path_factory.mktemp("framepack")
    save_file(
        golden("hunyuan_video_vae_a").weights, folder / "vae.safetensors", {"musubi.config": '{"norm_num_groups": 4}'}
    )
    save_llama(folder)
    save_clip(folder)
    save_siglip(folder)
    return folder


def load_vae(folder, options=None):
    return FAMILY.load_vae(str(folder / "vae.safetensors"), device=CPU, dtype=torch.float32, options=options)


# VAE


def test_latents_are_a_scaled_sample_and_pixels_those_of_the_fixture(folder):
    vae, case = load_vae(folder), golden("hunyuan_video_vae_a")
    mean, std = vae.posterior(case.inputs["pixels"])
    latents = vae.encode(case.inputs["pixels"])
    assert bool(((latents / 0.476986 - mean).abs() <= 6 * std + 1e-6).all())
    assert torch.equal(latents, load_vae(folder).encode(case.inputs["pixels"])), "named by the picture"
    assert distance(vae.decode(case.inputs["latents"]), case.outputs["pixels"]) < TOLERANCE


@pytest.mark.shows("bulk_decode")
def test_a_long_video_is_decoded_in_pieces_that_are_blended(folder):
    """Two sections at a time; where only one piece covers a frame, it is that piece's, and lengths fit."""
    latents = keyed.normal((1, 16, 1 + 4 * 2, 2, 2), "latents")
    whole = load_vae(folder, EncodingOptions(latent_window_size=2, bulk_decode=True)).decode(latents)
    vae = load_vae(folder, EncodingOptions(latent_window_size=2))
    pieces = vae.decode(latents)
    assert pieces.shape == whole.shape == (1, 3, 33, 16, 16)
    bulk = load_vae(folder, EncodingOptions(latent_window_size=2, bulk_decode=True))
    first = bulk.decode(latents[:, :, : 1 + 2 * 2])
    assert distance(pieces[:, :, :12], first[:, :, :12]) < 1e-6, "frames that the second piece does not reach"
    assert distance(pieces, whole) > 1e-4
    short = latents[:, :, :5]
    assert torch.equal(vae.decode(short), bulk.decode(short)), "two sections and the start are one piece"


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("window", [2, 9])
def test_pieces_cover_every_frame_once(count, window):
    """A decoder that tells the time of each frame: blends of equal times must give the times back."""

    def decode(z):
        """The first latent frame of a piece is one frame, the last of its four; each other one is four."""
        times = 4 * z[0, 0, 0, 0, 0] + torch.arange(4 * z.shape[2] - 3)
        return times.view(1, 1, -1, 1, 1).expand(1, 3, -1, 1, 1).clone()

    latents = torch.arange(1.0 + count * window).view(1, 1, -1, 1, 1)
    found = in_pieces(decode, latents, window)
    assert found[0, 0, :, 0, 0].tolist() == pytest.approx(list(range(1 + 4 * count * window)))


def test_blending_goes_from_the_left_clip_to_the_right_one():
    left, right = torch.zeros(1, 3, 5, 1, 1), torch.ones(1, 3, 4, 1, 1)
    assert blended(left, right, 3)[0, 0, :, 0, 0].tolist() == [0, 0, 0, 0.5, 1, 1]


# pictures


def test_picture_features_are_the_librarys_last_hidden_state(folder):
    from transformers import SiglipImageProcessorPil

    picture = photo("chelsea.png", (160, 96))
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1
    encoder = load_picture_encoder(str(folder / "sigclip.safetensors"), device=CPU, dtype=torch.float32)
    processor = SiglipImageProcessorPil(
        size={"height": 56, "width": 56}, resample=Image.Resampling.BICUBIC, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with torch.no_grad():
        expected = tiny_siglip()(processor(picture, return_tensors="pt").pixel_values).last_hidden_state[0]
    found = encoder.encode(pixels)
    assert found.shape == (16, 72)
    assert distance(found, expected) < TOLERANCE


def test_every_published_tower_key_has_a_place_or_is_the_pooling_heads():
    shapes = manifest("siglip_so400m_patch14_384")
    path = "sigclip.safetensors"
    header = Header({k: TensorInfo(shape=s, dtype=torch.float16, file=path) for k, s in shapes.items()}, {}, (path,))
    sizes = tower_sizes(header)
    about = (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.patch_size, sizes.image_size)
    assert about == (1152, 27, 16, 14, 384)
    built = {key.removeprefix("vision_model."): tuple(v.shape) for key, v in empty_tower(sizes).state_dict().items()}
    wanted = {key.removeprefix("vision_model."): shape for key, shape in shapes.items() if ".head." not in key}
    assert built == wanted


def test_another_file_is_refused(folder):
    with pytest.raises(UserError, match=r"is not SigLIP's picture encoder: it has no vision_model\.embeddings"):
        load_picture_encoder(str(folder / "clip_l.safetensors"), device=CPU, dtype=torch.float32)


# text


def test_captions_fill_at_most_256_of_512_rows(folder, caplog):
    files = {"text_encoder1": "llava_llama3.safetensors", "text_encoder2": "clip_l.safetensors"}
    options = CacheTextEncoderOptions(**{name: str(folder / file) for name, file in files.items()})
    encoders = FAMILY.load_encoders(options, device=CPU, dtype=torch.bfloat16)
    short, long = FAMILY.encode_condition([Item("a red roof"), Item("red " * 300)], encoders)
    assert short["text"].shape == (512, 32)
    assert (short["text"].dtype, short["mask"].dtype) == (torch.bfloat16, torch.int64)
    assert short["mask"].sum() == 4
    assert not short["text"][4:].any()
    assert long["mask"].sum() == 256
    assert "is cut to the 256 that the model takes" in caplog.text


@pytest.mark.shows("image_encoder")
def test_pictures_without_their_encoder_are_refused(folder):
    item = Item("x", controls=(torch.zeros(3, 1, 16, 16),), roles=("start",), height=16, width=16)
    with pytest.raises(UserError, match="pictures need SigLIP: name it with --image_encoder"):
        FAMILY.encode_latents([item], load_vae(folder), None)
    assert FAMILY.load_encoders(EncodingOptions(), device=CPU, dtype=torch.bfloat16) is None


# one frame


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default", OneFrame()),
        ("target_index=1,control_index=0;10", OneFrame(1, (0, 10))),
        ("no_post, no_2x,no_4x", OneFrame(post=False, half=False, quarter=False)),
    ],
)
def test_one_frame_settings_are_read(text, expected):
    assert OneFrame.parse(text) == expected


@pytest.mark.parametrize("text", ["target_index=x", "no_post=1", "index=3", "control_index=0,10", "target_index=-1"])
def test_other_one_frame_settings_are_refused(text):
    with pytest.raises(
        UserError, match="is none of target_index=9, control_index=0;10, no_post, no_2x, no_4x, default"
    ):
        OneFrame.parse(text)


def test_one_frame_history_is_empty_after_the_controls():
    controls = keyed.normal((16, 1, 4, 6), "control")
    told = sections.one_frame(OneFrame(), controls, 9)
    assert {name: value.tolist() for name, value in told.items() if name in ("indices", "clean_indices")} == {
        "indices": [9],
        "clean_indices": [0, 10],
    }
    assert told["clean_2x_indices"].tolist() == [11, 12]
    assert told["clean_4x_indices"].tolist() == list(range(13, 29))
    assert torch.equal(told["clean"][:, :1], controls)
    assert not any(told[name].any() for name in ("clean_2x", "clean_4x"))
    assert not told["clean"][:, 1:].any()
    with pytest.raises(
        UserError, match="2 control pictures and times 0: give at least one picture, and a time for each"
    ):
        sections.one_frame(OneFrame(1, (0,)), controls.repeat(1, 2, 1, 1), 9)


@pytest.mark.shows("one_frame_no_2x")
def test_parts_of_a_single_pictures_history_are_left_out_on_demand():
    """What --one_frame_no_2x and --one_frame_no_4x hand over."""
    controls = keyed.normal((16, 1, 4, 6), "control")
    for half, quarter in ((False, True), (True, False)):
        told = sections.one_frame(OneFrame.of_dataset({}, half=half, quarter=quarter), controls, 9)
        assert any(name.startswith("clean_2x") for name in told) == half
        assert any(name.startswith("clean_4x") for name in told) == quarter


# plans and the order of making


VALUES = {
    "prompt": "x",
    "width": 640,
    "height": 640,
    "frames": None,
    "fps": 30,
    "shift": None,
    "solver": "unipc",
    "roles": ("start",),
}


def test_a_family_with_its_own_sampling_is_known_as_one():
    assert isinstance(FAMILY, OwnSampling)
    assert not isinstance(registry.get("wan"), OwnSampling)


@pytest.mark.parametrize(
    ("options", "said", "frames"),
    [
        ({}, {}, 145),  # 5 s of 30 frames are 4.17 sections of 36
        ({"video_seconds": 0.1}, {}, 37),
        ({"video_sections": 2}, {}, 73),
        ({"video_sections": 2}, {"vs": "3"}, 109),
        ({"video_sections": 2}, {"f": "5"}, 145),
        ({"latent_window_size": 4, "video_sections": 3}, {}, 49),
        ({"latent_paddings": "0,0"}, {}, 73),
        ({"one_frame_inference": "default"}, {}, 1),
        ({}, {"of": "target_index=1"}, 1),
    ],
)
@pytest.mark.shows("video_seconds")
def test_lengths_are_whole_sections(options, said, frames):
    assert FAMILY.plan(GenerationOptions(**options), VALUES, said)["frames"] == frames


def test_the_shift_is_that_of_a_sections_tokens_and_the_solver_the_published_one():
    cases = json.loads((REFERENCE / "behaviour" / "schedules.json").read_text())["cases"]
    known = {(c["sequence_length"], c["mu"]) for c in cases if c["family"] == "framepack" and not c["flow_shift"]}
    assert len(known) == 4
    for tokens, mu in known:
        assert np.log(generate.shift_of(1, 8 * 4, 8 * tokens)) == pytest.approx(mu, abs=1e-6)
    found = FAMILY.plan(GenerationOptions(), VALUES, {})
    assert found["solver"] == "unipc3"
    assert found["shift"] == pytest.approx(7.0), "9 x 80 x 80 / 4 tokens are beyond the cap"
    assert "shift" not in FAMILY.plan(GenerationOptions(), VALUES | {"shift": 3.0}, {})
    assert FAMILY.plan(GenerationOptions(), VALUES | {"solver": "vanilla"}, {})["solver"] == "vanilla"


@pytest.mark.shows("control_image_path")
def test_what_cannot_be_planned_is_refused():
    for values, said, words in (
        (VALUES | {"roles": ()}, {}, "give the first frame with --image_path"),
        (VALUES | {"roles": ("control",)}, {}, "give the first frame with --image_path"),
        (VALUES, {"vs": "0"}, "--vs 0: must be a number of sections"),
        (VALUES | {"prompt": "0:a;;;b"}, {}, "'b': with ;;; each part begins with its section"),
        (VALUES | {"roles": ()}, {"of": "default"}, "or control pictures with --control_image_path"),
    ):
        with pytest.raises(UserError, match=words):
            FAMILY.plan(GenerationOptions(), values, said)
    with pytest.raises(UserError, match="--latent_paddings 3,x: whole numbers with commas"):
        FAMILY.plan(GenerationOptions(latent_paddings="3,x"), VALUES, {})


def made(options, pictures, frames=1 + 4 * 3 * 2, prompt="x", **said):
    """What a model that answers with 10, 20, 30, ... is told of, and the joined result's first channel."""
    told = []

    def denoise(noise, fields, text):
        told.append({**fields, "text": text})
        return torch.full_like(noise, 10.0 * len(told))

    tools = Tools(denoise, lambda shape: torch.zeros(tuple(shape)))
    item = Item(prompt, frames=frames, height=16, width=16, said=said)
    return told, FAMILY.generate(options, item, pictures, tools)[0, :, 0, 0].tolist()


def pictures(**more):
    return {"start": torch.full((16, 1, 2, 2), 1.0), "image": torch.zeros(2, 3), **more}


def test_sections_are_made_from_the_last_to_the_first():
    told, found = made(GenerationOptions(latent_window_size=2), pictures())
    assert found == [1, 30, 30, 20, 20, 10, 10]
    assert [f["indices"].tolist() for f in told] == [[5, 6], [3, 4], [1, 2]]
    assert [f["clean"][0, :, 0, 0].tolist() for f in told] == [[1, 0], [1, 10], [1, 20]]
    assert told[2]["clean_2x"][0, :, 0, 0].tolist() == [20, 10]


@pytest.mark.parametrize("f1", [False, True])
def test_each_section_has_its_own_text_where_one_is_given(f1):
    """Three sections, the last one made first unless with F1; what is not named is that of section 0."""
    options, order = GenerationOptions(latent_window_size=2, f1=f1), 1 if f1 else -1
    for prompt, texts in (
        ("0:sit;;;1:jump;;;2:lie", ["sit", "jump", "lie"]),
        ("0:sit;;;-1:lie", ["sit", "sit", "lie"]),
        ("1-2: run ;;;0:sit", ["sit", "run", "run"]),
        ("-1:lie;;;1:jump", ["lie", "jump", "lie"]),
        ("a cat: it sits", ["a cat: it sits"] * 3),
    ):
        told, _ = made(options, pictures(), prompt=prompt)
        assert [fields["text"] for fields in told] == texts[::order]
        assert set(texts) == set(FAMILY.texts(prompt))


def test_each_section_starts_from_its_own_picture_where_one_is_given():
    """Section 0's picture begins the video; sections are told of their own and of its features."""
    starts = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).repeat(16, 1, 2, 2)
    more = pictures(start=starts, images=torch.tensor([[[5.0]], [[6.0]]]))
    told, found = made(GenerationOptions(latent_window_size=2), more, image="0:a.png;;;-1:b.png")
    assert found == [1, 30, 30, 20, 20, 10, 10]
    assert [f["clean"][0, 0, 0, 0].item() for f in told] == [2, 1, 1]
    assert [f["image"].item() for f in told] == [6, 5, 5]
    told, found = made(GenerationOptions(latent_window_size=2, f1=True), more, image="0:a.png;;;1:b.png")
    assert found[0] == 1
    assert [f["clean"][0, 0, 0, 0].item() for f in told] == [1, 2, 1]


def test_parts_for_no_section_are_told_and_pictures_of_sections_are_remembered(caplog):
    options = GenerationOptions(video_sections=2)
    values = VALUES | {"prompt": "0:a;;;5:of nothing", "image": "0:a.png;;;1:b.png", "roles": ("start", "start")}
    assert FAMILY.plan(options, values, {})["said"] == {"image": "0:a.png;;;1:b.png"}
    assert "a prompt is for no section of this length: of nothing" in caplog.text
    assert "a image" not in caplog.text


def test_an_end_picture_is_the_future_of_the_last_section():
    told, found = made(GenerationOptions(latent_window_size=2), pictures(end=torch.full((16, 1, 2, 2), 9.0)))
    assert found == [1, 30, 30, 20, 20, 10, 10]
    assert told[0]["clean"][0, :, 0, 0].tolist() == [1, 9]
    assert told[1]["clean_2x"][0, :, 0, 0].tolist() == [10, 9]


def test_f1_makes_them_in_the_order_of_time(caplog):
    more = pictures(end=torch.zeros(16, 1, 2, 2))
    told, found = made(GenerationOptions(latent_window_size=2, f1=True), more)
    assert found == [1, 10, 10, 20, 20, 30, 30]
    assert [f["clean"][0, :, 0, 0].tolist() for f in told] == [[1, 1], [1, 10], [1, 20]]
    assert told[2]["clean_2x"][0, :, 0, 0].tolist() == [10, 20]
    assert "--end_image_path has no effect with --f1" in caplog.text


@pytest.mark.shows("latent_paddings")
def test_chosen_paddings_are_used_and_must_fit():
    told, _ = made(GenerationOptions(latent_window_size=2, latent_paddings="0,0,0"), pictures())
    assert [f["indices"].tolist() for f in told] == [[1, 2]] * 3
    with pytest.raises(UserError, match="--latent_paddings 1,0: 2 numbers for 3 sections"):
        made(GenerationOptions(latent_window_size=2, latent_paddings="1,0"), pictures())


@pytest.mark.shows("one_frame_inference")
def test_a_single_picture_is_made_from_controls_or_the_start():
    options = GenerationOptions(one_frame_inference="target_index=1,no_post")
    told, found = made(options, pictures(), frames=1)
    assert (found, told[0]["indices"].tolist(), told[0]["clean"].shape[1]) == ([10.0], [1], 1)
    controls = pictures(control=torch.full((16, 2, 2, 2), 5.0))
    options = GenerationOptions(one_frame_inference="control_index=0;10")
    told, _ = made(options, controls, frames=1)
    assert told[0]["clean_indices"].tolist() == [0, 10, 10]


def test_masks_say_what_of_a_control_counts(folder):
    """In a request and in a cache alike: latents times the mask's mean over each cell; the start is whole."""
    vae = load_vae(folder)
    files = {"image_encoder": str(folder / "sigclip.safetensors")}
    ones, mask = torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    mask[..., 8:12] = 0.5
    share = torch.tensor([1.0, 0.25]).view(1, 1, 1, 2)
    pixels = [keyed.normal((3, 1, 16, 16), "mask", n).clamp(-1, 1) for n in range(3)]
    coded = [vae.encode(p[None])[0] for p in pixels]
    encoders = FAMILY.load_encoders(GenerationOptions(**files), device=CPU, dtype=torch.float32)
    roles = ("start", "control", "control")
    item = Item("x", controls=tuple(pixels), roles=roles, masks=(None, mask, ones), height=16, width=16)
    ((found,),) = FAMILY.encode_latents([item], vae, encoders)
    torch.testing.assert_close(found["start"], coded[0])
    torch.testing.assert_close(found["control"], torch.cat([coded[1] * share, coded[2]], dim=1))
    encoders = FAMILY.load_encoders(CacheLatentOptions(**files, one_frame=True), device=CPU, dtype=torch.float32)
    said = {"fp_1f_clean_indices": (0, 10), "fp_1f_no_post": True}
    item = Item("x", pixels[0], tuple(pixels[1:]), height=16, width=16, masks=(mask, None), said=said)
    ((entry,),) = FAMILY.encode_latents([item], vae, encoders)
    torch.testing.assert_close(entry["clean"], torch.cat([coded[1] * share, coded[2]], dim=1))


@pytest.mark.shows("custom_system_prompt")
def test_another_task_of_the_text_encoder_changes_the_features_alone(folder, caplog):
    """Features are those of the caption's own tokens after the other instruction, however long that is."""
    files = {"text_encoder1": "llava_llama3.safetensors", "text_encoder2": "clip_l.safetensors"}
    paths = {name: str(folder / file) for name, file in files.items()} | {"text_encoder_dtype": "float32"}

    def encoded(**more):
        encoders = FAMILY.load_encoders(GenerationOptions(**paths, **more), device=CPU, dtype=torch.float32)
        return encoders.text.llm, FAMILY.encode_condition([Item("a red roof")], encoders)[0]

    _, usual = encoded()
    model, other = encoded(custom_system_prompt="the roof of a temple")
    before = llama.instruction("the roof of a temple")
    assert "<|start_header_id|>system<|end_header_id|>\n\nthe roof of a temple<|eot_id|>" in before
    assert torch.equal(usual["mask"], other["mask"])
    assert torch.equal(usual["pooled"], other["pooled"])
    assert not torch.equal(usual["text"], other["text"])
    ids = torch.tensor([model.tokenizer(before + "a red roof" + llama.END).input_ids])
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0, len(model.tokenizer(before).input_ids) :]
    assert torch.equal(other["text"][: len(hidden)], hidden)
    assert len(hidden) == other["mask"].sum()


def test_controls_of_another_size_are_refused(folder):
    encoders = FAMILY.load_encoders(
        CacheLatentOptions(image_encoder=str(folder / "sigclip.safetensors"), one_frame=True),
        device=CPU,
        dtype=torch.float32,
    )
    item = Item("x", torch.zeros(3, 1, 16, 16), (torch.zeros(3, 1, 32, 16),), height=16, width=16)
    with pytest.raises(UserError, match="a control of 16 x 32 pixels beside a picture of 16 x 16"):
        FAMILY.encode_latents([item], load_vae(folder), encoders)
    with pytest.raises(UserError, match="--one_frame takes pictures, not clips of 5 frames"):
        FAMILY.encode_latents([Item("x", torch.zeros(3, 5, 16, 16))], load_vae(folder), encoders)


@pytest.mark.shows("control_image_path")
def test_pictures_of_the_command_line_and_of_a_line_reach_the_request(tmp_path):
    for name in ("a", "b", "c"):
        photo("chelsea.png", (32, 32)).save(tmp_path / f"{name}.png")
    a, b, c = (str(tmp_path / f"{name}.png") for name in ("a", "b", "c"))
    groups = (*sampling.GROUPS, *FAMILY.option_groups("generate"))
    common = ["--video_size", "32", "32", "--save_path", "x", "--one_frame_inference", "control_index=0;10"]
    argv = ["--prompt", "x", "--control_image_path", a, b, *common]
    (request,) = sampling.make_requests(FAMILY, parse(groups, argv, prog="generate", description=""))
    assert request.pictures == (("control", a), ("control", b))
    assert (request.frames, request.solver) == (1, "unipc3")
    (tmp_path / "p.txt").write_text(f"x --i {c} --ei {a} --vs 2 --of target_index=1\n")
    argv = ["--from_file", str(tmp_path / "p.txt"), *common]
    (request,) = sampling.make_requests(FAMILY, parse(groups, argv, prog="generate", description=""))
    assert request.pictures == (("start", c), ("end", a))
    assert dict(request.said) == {"of": "target_index=1", "vs": "2"}


def test_the_models_own_ratios_are_those_of_the_version():
    published = json.loads((REFERENCE / "behaviour" / "magcache_ratios.json").read_text())["models"]
    for name, f1 in (("FramePack", False), ("FramePack-F1", True)):
        assert list(FAMILY.mag_ratios(GenerationOptions(f1=f1))) == published[name]["ratios"]
    assert list(registry.get("hunyuan_video").mag_ratios(None)) == published["HunyuanVideo-540p"]["ratios"]
