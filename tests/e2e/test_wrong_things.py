"""One wrong thing of each kind, at the real commands: exit code 2, one sentence that says what to do, nothing lost."""

import json
import shutil

import pytest
from safetensors.torch import save_file
from torch import zeros

from musubi_tuner import cli


@pytest.fixture
def told(capsys):
    """Run a command that must fail with exit code 2; gives the sentence it printed."""

    def run(command: str, *words: str) -> str:
        assert cli.main([command, *words]) == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        sentences = [line for line in err.splitlines() if line.startswith(("error", "musubi"))]
        return " ".join(sentences) or err

    return run


def test_a_file_that_is_not_there(workshop, told):
    words = workshop.caching()
    words[words.index("--vae") + 1] = str(workshop.root / "nowhere.safetensors")
    assert "nowhere.safetensors" in told("wan_cache_latents", *words)


def test_a_file_cut_short(workshop, told, tmp_path):
    whole = workshop.dit.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    told_of = told("wan_generate_video", *workshop.generation(tmp_path, "--dit", str(tmp_path / "cut.safetensors")))
    assert "cut.safetensors" in told_of


def test_a_file_of_another_family(workshop, told, tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": zeros(6, 2)}, tmp_path / "other.safetensors")
    said = told("wan_generate_video", *workshop.generation(tmp_path, "--dit", str(tmp_path / "other.safetensors")))
    assert "other.safetensors" in said
    assert "Wan" in said


def test_a_family_that_is_not_known(told):
    said = told("train", "wam")
    assert "wam" in said
    assert "wan" in said


def test_a_key_that_the_model_does_not_have(workshop, told, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(workshop.dit) | {"blocks.0.self_attn.z.weight": zeros(2, 2)}
    del weights["blocks.1.ffn.2.bias"]
    sizes = {"musubi.config": json.dumps({"num_heads": 2, "text_len": 16})}
    save_file(weights, tmp_path / "keys.safetensors", sizes)
    said = told("wan_generate_video", *workshop.generation(tmp_path, "--dit", str(tmp_path / "keys.safetensors")))
    assert "blocks.0.self_attn.z.weight" in said
    assert "blocks.1.ffn.2.bias" in said


def test_a_picture_without_a_caption(workshop, told, tmp_path):
    """A caption that is missing leaves its picture out, and says so; none at all is an error."""
    shutil.copytree(workshop.root / "pictures", tmp_path / "pictures", ignore=shutil.ignore_patterns("*.txt"))
    config = workshop.data.read_text(encoding="utf-8").replace(
        (workshop.root / "pictures").as_posix(), (tmp_path / "pictures").as_posix()
    )
    (tmp_path / "data.toml").write_text(config, encoding="utf-8")
    words = workshop.caching()
    words[words.index("--dataset_config") + 1] = str(tmp_path / "data.toml")
    said = told("wan_cache_latents", *words)
    assert ".txt" in said
    assert "pictures" in said


def test_an_option_with_a_letter_wrong(workshop, told):
    said = told("wan_train_network", *workshop.training("x"), "--lerning_rate", "1e-4")
    assert "lerning_rate" in said
    assert "learning_rate" in said


def test_an_option_out_of_range(workshop, told):
    said = told("wan_train_network", *workshop.training("x"), "--learning_rate", "-1")
    assert "learning_rate" in said
    assert "-1" in said


def test_fp8_scaled_without_fp8_base(workshop, told):
    words = [word for word in workshop.training("x") if word != "--fp8_base"]
    assert "fp8_base" in told("wan_train_network", *words)


def test_training_before_caching(workshop, told, tmp_path):
    config = workshop.data.read_text(encoding="utf-8").replace(workshop.cache.as_posix(), (tmp_path / "c").as_posix())
    (tmp_path / "data.toml").write_text(config, encoding="utf-8")
    words = workshop.training("x")
    words[words.index("--dataset_config") + 1] = str(tmp_path / "data.toml")
    assert "cache_latents wan" in told("wan_train_network", *words)
    assert not (workshop.out / "x.safetensors").exists()


def test_a_clip_length_that_the_vae_cannot_make(workshop, told, tmp_path):
    said = told("wan_generate_video", *workshop.generation(tmp_path, "--video_length", "6"))
    assert "6" in said
    assert not list(tmp_path.iterdir())
