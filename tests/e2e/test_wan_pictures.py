"""Wan's picture and control models through the real commands, tiny: cache, train with previews, sample."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from golden_data import golden
from musubi_tuner import cli
from musubi_tuner.sampling import outputs
from tiny_models import tiny_dit

KINDS = {
    # task: sizes of its transformer beside the usual ones
    "i2v-14B": {"in_channels": 36, "image_embed_dim": 48},
    "flf2v-14B": {"in_channels": 36, "image_embed_dim": 48, "image_positions": 10},
    "i2v-A14B": {"in_channels": 36},
    "t2v-1.3B-FC": {"in_channels": 48, "image_embed_dim": 48},
    "i2v-14B-FC": {"in_channels": 48, "image_embed_dim": 48},
}


def musubi(command: str, *words: str) -> None:
    """Run a command in this process; it must succeed."""
    assert cli.main([command, *words]) == 0


@pytest.fixture(scope="module")
def shop(workshop, tmp_path_factory):
    """Clips with controls, CLIP and a transformer of each kind, beside what the workshop has."""
    root = tmp_path_factory.mktemp("kinds")
    for task, sizes in KINDS.items():
        dit = tiny_dit("wan", text_dim=32, text_len=16, **sizes)
        told = {"musubi.config": json.dumps({"num_heads": 2, "text_len": 16})}
        save_file(
            {k: v.bfloat16().contiguous() for k, v in dit.state_dict().items()}, root / f"{task}.safetensors", told
        )
    save_file(
        golden("wan_clip_visual_a").weights, root / "clip.safetensors", {"musubi.config": json.dumps({"num_heads": 3})}
    )
    for number in range(2):
        for folder, shade in (("clips", 90), ("controls", 200)):
            frames = root / folder / f"clip{number}"
            frames.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(np.full((32, 48, 3), shade + 12 * i + 5 * number, np.uint8)).save(frames / f"{i}.png")
    return workshop, root


def data_of(root, name: str, controls: bool):
    """A data set file with a cache folder of its own."""
    rows = [{"video_path": str(root / f"clips/clip{n}"), "caption": "a red roof"} for n in range(2)]
    if controls:
        rows = [row | {"control_path": str(root / f"controls/clip{n}")} for n, row in enumerate(rows)]
    (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = root / f"{name}.toml"
    path.write_text(
        f"""
[general]
resolution = [48, 32]
caption_extension = ".txt"
batch_size = 2
[[datasets]]
video_jsonl_file = "{(root / name).as_posix()}.jsonl"
cache_directory = "{(root / name).as_posix()}"
target_frames = [5]
""",
        encoding="utf-8",
    )
    return path


DEFAULT = ("i2v-14B", "i2v-14B-FC")
"""What the default tier runs: between them they have all that a model may be given."""
CACHED = {
    "i2v-14B": ("--i2v", "--clip"),
    "flf2v-14B": ("--flf2v", "--clip"),
    "i2v-A14B": ("--i2v",),
    "t2v-1.3B-FC": (),
    "i2v-14B-FC": ("--i2v", "--clip"),
}


def words_of(names, root) -> list[str]:
    return [
        word for name in names for word in ((name, str(root / "clip.safetensors")) if name == "--clip" else (name,))
    ]


@pytest.mark.parametrize(
    "task",
    [task if task in ("i2v-14B", "i2v-14B-FC") else pytest.param(task, marks=pytest.mark.slow) for task in KINDS],
)
@pytest.mark.shows("image_path", "end_image_path", "control_path")
def test_a_model_of_each_kind_is_cached_trained_and_sampled(shop, task, tmp_path):
    workshop, root = shop
    controls, clip = task.endswith("FC"), "--clip" in CACHED[task] or task == "t2v-1.3B-FC"
    data, dit = str(data_of(root, task, controls)), str(root / f"{task}.safetensors")
    common = ["--dataset_config", data, "--device", "cpu"]
    musubi("wan_cache_latents", *common, "--vae", str(workshop.vae), *words_of(CACHED[task], root))
    musubi("wan_cache_text_encoder_outputs", *common, "--t5", str(workshop.t5))
    keys = load_file(next((root / task).glob("clip0_00000-005_*_wan.safetensors")))
    assert {key.rsplit("_", 2)[0].removesuffix("_2x4x6") for key in keys if "latents" in key} == {
        "latents",
        *({"latents_image"} if CACHED[task] else ()),
        *({"latents_control"} if controls else ()),
    }
    assert any(key.startswith("clip_") for key in keys) == ("--clip" in CACHED[task])

    asked = request(task, root)
    prompts = tmp_path / "prompts.txt"
    line = {"--image_path": "i", "--end_image_path": "ei", "--control_path": "cn"}
    pairs = zip(asked[::2], asked[1::2], strict=True)
    extras = " ".join(f"--{line[name]} {value}" for name, value in pairs)
    prompts.write_text(f"a red roof --w 48 --h 32 --f 5 --s 2 --d 7 {extras}\n", encoding="utf-8")
    encoders = ["--t5", str(workshop.t5), "--vae", str(workshop.vae), *(words_of(("--clip",), root) if clip else ())]
    more = ["--task", task, "--dit", dit, "--dataset_config", data, "--output_dir", str(tmp_path / "out")]
    more += ["--sample_prompts", str(prompts), "--sample_every_n_epochs", "2", *encoders]
    musubi("wan_train_network", *workshop.training("lora", *more))
    lora = load_file(tmp_path / "out" / "lora.safetensors")
    assert len(lora) == 3 * 3 * (12 if "image_embed_dim" in KINDS[task] else 10)
    assert all(lora[key].abs().sum() > 0 for key in lora if key.endswith("lora_up.weight") and "_img" not in key)
    assert [path.suffix for path in (tmp_path / "out" / "sample").iterdir()] == [".mp4"]

    def sampled(name, *words):
        given = workshop.generation(tmp_path / name, "--task", task, "--dit", dit, *encoders, *words)
        size = ("--video_size", "32", "48", "--video_length", "5", "--output_type", "latent")
        musubi("wan_generate_video", *given, *size)
        (path,) = (tmp_path / name).glob("*_latent.safetensors")
        return outputs.read_latents(str(path), "wan")[0]

    plain = sampled("plain", *asked)
    for i in range(0, len(asked), 2):
        other = root / ("clips" if asked[i] == "--control_path" else "controls") / "clip1"
        changed = list(asked)
        changed[i + 1] = str(other if asked[i] == "--control_path" else other / "4.png")
        assert float((sampled(f"other{i}", *changed) - plain).abs().max()) > 1e-3, f"{asked[i]} changes what is sampled"
    assert (
        float((sampled("lora", *asked, "--lora_weight", str(tmp_path / "out" / "lora.safetensors")) - plain).std())
        > 1e-3
    )


def request(task: str, root) -> list[str]:
    """What a request for this task comes with."""
    first, last = str(root / "clips/clip0/0.png"), str(root / "clips/clip0/4.png")
    control = ["--control_path", str(root / "controls/clip0")]
    return {
        "i2v-14B": ["--image_path", first],
        "flf2v-14B": ["--image_path", first, "--end_image_path", last],
        "i2v-A14B": ["--image_path", first, "--end_image_path", last],
        "t2v-1.3B-FC": control,
        "i2v-14B-FC": [*control, "--image_path", first],
    }[task]


def test_what_is_missing_is_a_sentence_before_the_transformer_is_read(shop, tmp_path, capsys):
    workshop, root = shop
    base = ["--t5", str(workshop.t5), "--vae", str(workshop.vae)]
    first = ["--image_path", str(root / "clips/clip0/0.png")]
    clip = words_of(("--clip",), root)
    short = ["--control_path", str(root / "controls/clip0"), "--video_length", "9"]
    for task, words, sentence in (
        ("i2v-14B", clip, "is image-to-video and was given no first frame: give --image_path"),
        ("i2v-14B", first, "attends to features of its first frame and was given none: name the CLIP encoder"),
        ("flf2v-14B", [*first, *clip], "was given no last one: give --end_image_path"),
        ("t2v-1.3B-FC", (), "needs a control clip: give --control_path"),
        ("t2v-1.3B-FC", short, "has 5 frames, 9 are to be sampled: lower --video_length"),
        ("t2v-1.3B-FC", ["--control_path", str(root / "gone")], "gone does not exist"),
    ):
        given = workshop.generation(tmp_path, "--task", task, "--dit", str(root / f"{task}.safetensors"), *base, *words)
        assert cli.main(["wan_generate_video", *given, "--video_length", "5", *words]) == 2
        assert sentence in capsys.readouterr().err
    data = str(data_of(root, "bare", False))
    common = ["--dataset_config", data, "--device", "cpu"]
    musubi("wan_cache_latents", *common, "--vae", str(workshop.vae))
    musubi("wan_cache_text_encoder_outputs", *common, "--t5", str(workshop.t5))
    for task, sentence in (
        ("i2v-A14B", "2 of 2 latent caches, e.g. .*was given no first frame: cache with wan_cache_latents --i2v"),
        ("t2v-1.3B-FC", "2 of 2 latent caches, e.g. .*name the control clips in the data set file"),
    ):
        words = workshop.training("x", "--task", task, "--dit", str(root / f"{task}.safetensors"))
        assert cli.main(["wan_train_network", *words, "--dataset_config", data, "--output_dir", str(tmp_path)]) == 2
        assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.shows("one_frame", "one_frame_inference", "control_image_path")
def test_a_single_picture_from_a_control_picture(shop, tmp_path):
    """One-frame mode through the real commands: the picture's time matters, and one picture comes out."""
    workshop, root = shop
    for folder in ("targets", "befores"):
        (tmp_path / folder).mkdir()
    for n in range(2):
        Image.open(root / f"clips/clip{n}/4.png").save(tmp_path / f"targets/{n}.png")
        Image.open(root / f"clips/clip{n}/0.png").save(tmp_path / f"befores/{n}.png")
        (tmp_path / f"targets/{n}.txt").write_text("a red roof", encoding="utf-8")
    (tmp_path / "one.toml").write_text(
        f"""
[general]
resolution = [48, 32]
caption_extension = ".txt"
batch_size = 2
[[datasets]]
image_directory = "{(tmp_path / "targets").as_posix()}"
control_directory = "{(tmp_path / "befores").as_posix()}"
cache_directory = "{(tmp_path / "cache").as_posix()}"
fp_1f_clean_indices = [0]
fp_1f_target_index = 9
""",
        encoding="utf-8",
    )
    common = ["--dataset_config", str(tmp_path / "one.toml"), "--device", "cpu"]
    clip, dit = words_of(("--clip",), root), str(root / "i2v-14B.safetensors")
    musubi("wan_cache_latents", *common, "--vae", str(workshop.vae), "--one_frame", *clip)
    musubi("wan_cache_text_encoder_outputs", *common, "--t5", str(workshop.t5))
    keys = load_file(next((tmp_path / "cache").glob("0_*_wan.safetensors")))
    assert keys["f_indices_int32"].tolist() == [0, 9]
    assert keys["latents_2x4x6_bfloat16"].shape == (16, 2, 4, 6)
    more = ["--task", "i2v-14B", "--dit", dit, *common[:2], "--output_dir", str(tmp_path / "out"), "--one_frame"]
    musubi("wan_train_network", *workshop.training("lora", *more, "--max_train_epochs", "1"))

    def sampled(name, *words):
        given = workshop.generation(
            tmp_path / name, "--task", "i2v-14B", "--dit", dit, *clip, "--vae", str(workshop.vae)
        )
        size = ("--video_size", "32", "48", "--video_length", "1", "--output_type", "latent")
        lora = ("--lora_weight", str(tmp_path / "out/lora.safetensors"))
        musubi("wan_generate_video", *given, *size, *lora, *words)
        (path,) = (tmp_path / name).glob("*_latent.safetensors")
        return outputs.read_latents(str(path), "wan")[0]

    before = str(tmp_path / "befores/0.png")
    nine = sampled("nine", "--control_image_path", before, "--one_frame_inference", "target_index=9,control_index=0")
    assert nine.shape == (16, 1, 4, 6)
    same = sampled("same", "--image_path", before, "--one_frame_inference", "target_index=9,control_index=0")
    three = sampled("three", "--image_path", before, "--one_frame_inference", "target_index=3,control_index=0")
    assert same.equal(nine)
    assert float((three - nine).abs().max()) > 1e-3
