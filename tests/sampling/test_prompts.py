"""Prompt files in the three established forms, and their faults."""

import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.sampling.prompts import PromptEntry, parse_line, read_prompts


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_line_is_a_prompt_and_its_options():
    entry = parse_line("A cat -- with a hat, 1--2 --w 480 --h 832 --f 33 --d 7 --s 25 --l 6.5 --fs 3 --n low, bad ")
    assert entry == PromptEntry(
        prompt="A cat -- with a hat, 1--2",
        where="prompt",
        width=480,
        height=832,
        frames=33,
        seed=7,
        steps=25,
        guidance=6.5,
        shift=3.0,
        negative="low, bad",
    )


def test_only_what_was_said_is_given():
    assert parse_line("a dog --d 3").given() == {"prompt": "a dog", "seed": 3}
    assert parse_line("a dog --n").given() == {"prompt": "a dog", "negative": ""}


@pytest.mark.parametrize("line", ["x --g 1 --l 4", "x --l 4 --g 1"])
def test_the_guidance_scale_proper_wins_over_the_embedded_one(line):
    assert parse_line(line).guidance == 4.0


def test_options_of_other_models_are_named_and_not_lost_silently():
    assert parse_line("x --m mask.png --w 64").unserved == ("--m",)


def test_pictures_and_what_only_some_families_understand(tmp_path):
    line = parse_line(
        "x --i a b.png --ei e.png --ci c.png --ci d.png --cim m.png --cn c.mp4 --vs 3 --of target_index=1,no_post"
    )
    assert line.control == "c.mp4"
    assert (line.image, line.end_image, line.control_images) == ("a b.png", "e.png", ("c.png", "d.png"))
    assert line.control_masks == ("m.png",)
    assert line.said == {"vs": "3", "of": "target_index=1,no_post"}
    table = '[{"prompt": "x", "image_path": "a.png", "control_image_path": "c.png", "one_frame": "default", '
    table += '"control_image_mask_path": ["m.png"]}]'
    (entry,) = read_prompts(write(tmp_path, "p.json", table))
    assert entry.given() == {"prompt": "x", "image": "a.png", "control_images": ("c.png",), "control_masks": ("m.png",)}
    assert entry.said == {"of": "default"}
    with pytest.raises(UserError, match="control_image_path = 3: must be the path of a picture, or a list of them"):
        read_prompts(write(tmp_path, "q.json", '[{"prompt": "x", "control_image_path": 3}]'))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x --width 3", "--width is not an option of a prompt line; use --w"),
        ("x --w", "--w needs a value"),
        ("x --w wide", "--w = 'wide': must be a whole number"),
        ("x --l strong", "--l = 'strong': must be a number"),
    ],
)
def test_faults_of_a_line_name_the_option(line, words):
    with pytest.raises(UserError, match=words):
        parse_line(line)


def test_lines_may_be_comments_or_empty(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeff# comment\n\na cat --d 1\n  # another\n a dog\n")
    assert [(e.prompt, e.seed, e.where) for e in read_prompts(path)] == [
        ("a cat", 1, "p.txt line 3"),
        ("a dog", None, "p.txt line 5"),
    ]


TOML = """
[prompt]
width = 480
height = 832
sample_steps = 20
[[prompt.subset]]
prompt = "a cat"
seed = 1
[[prompt.subset]]
prompt = "a dog"
width = 640
frame_count = 17
cfg_scale = 6.0
guidance_scale = 1.0
discrete_flow_shift = 3
negative_prompt = "bad"
"""


def test_a_toml_file_shares_common_values(tmp_path):
    first, second = read_prompts(write(tmp_path, "p.toml", TOML))
    assert first.given() == {"prompt": "a cat", "seed": 1, "width": 480, "height": 832, "steps": 20}
    assert second.given() == {
        "prompt": "a dog",
        "width": 640,
        "height": 832,
        "steps": 20,
        "frames": 17,
        "guidance": 6.0,
        "shift": 3.0,
        "negative": "bad",
    }


def test_a_json_file_is_a_list_of_entries(tmp_path):
    (entry,) = read_prompts(write(tmp_path, "p.json", '[{"prompt": "a cat", "seed": 4, "enum": 0}]'))
    assert (entry.prompt, entry.seed, entry.unserved) == ("a cat", 4, ("enum",))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "a --q 1\nb\nc --w x\n", "p.txt line 1: --q .*; p.txt line 3: --w = 'x'"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.toml", "[prompt]\nwidth = 3\n", "holds no prompt"),
        ("p.toml", "[prompts]\n", r"a table \[prompt\] with \[\[prompt.subset\]\] entries is needed"),
        (
            "p.toml",
            "[prompt]\nwidht = 3\nprompt = 'x'\n",
            "p.toml entry 1: widht is not a key of a prompt; did you mean width",
        ),
        ("p.toml", "[prompt]\nwidth = 3.5\nprompt = 'x'\n", "entry 1: width = 3.5: must be a whole number"),
        ("p.toml", "[prompt\n", "is not TOML"),
        ("p.json", "{", "is not JSON"),
        ("p.json", '[{"seed": 1}]', "entry 1: the key prompt is missing"),
        ("p.json", '["x"]', "a list of tables is needed"),
        ("p.json", '[{"prompt": 3}]', "prompt = 3: must be text"),
    ],
)
def test_faults_of_a_file_are_told_with_their_place(tmp_path, name, text, words):
    with pytest.raises(UserError, match=words):
        read_prompts(write(tmp_path, name, text))


def test_a_missing_file_is_one_sentence():
    with pytest.raises(UserError, match=r"prompt file nowhere.txt does not exist"):
        read_prompts("nowhere.txt")
