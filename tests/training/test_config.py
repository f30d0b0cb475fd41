"""The options of training against the established script: names, defaults, choices; and how they act together."""

import json
from pathlib import Path

import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import options_of
from musubi_tuner.config.options import parse
from musubi_tuner.families import registry
from musubi_tuner.training import checks, config
from musubi_tuner.training.config import OptimizerOptions, TimestepOptions

CLI = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/cli.json").read_text())
ESTABLISHED = {row["flags"][0][2:]: row for row in CLI["scripts"]["wan_train_network"]["options"]}
OURS = {o.name: o for group in (*config.GROUPS, *registry.get("wan").option_groups("train")) for o in options_of(group)}

OTHER_DEFAULTS = {
    "optimizer_type": "AdamW",  # the established default is an empty name, which fails
    "vae_dtype": None,  # bfloat16 on CUDA, as there; float32 on a CPU
    "blocks_to_swap": 0,  # the established None, as a number of blocks
    "dit": "",  # required
    "dataset_config": "",
    "output_dir": "",
    "output_name": "",
}
OWN = {"allow_prequantized", "attn_mode", "full_finetune", "model_config", "strict_cache", "t5_tokenizer"}
OWN |= {"timestep_offset", "fp8_mode", "fp8_block_size", "fp8_format", "fp8_exclude", "fp8_report", "initial_step"}
OWN |= {"reset_counters"}
OWN |= {"dit_dtype", "full_bf16", "full_fp16", "trainable_modules"}  # of other established scripts
REQUIRED = ["--dit", "a.safetensors", "--dataset_config", "d.toml", "--output_dir", "o", "--output_name", "n"]


def parsed(*words: str):
    return parse(config.GROUPS, [*REQUIRED, *words], prog="train", description="")


def test_our_options_are_the_established_ones_and_a_few_of_our_own():
    assert set(OURS) - set(ESTABLISHED) == OWN


@pytest.mark.parametrize("name", sorted(set(OURS) & set(ESTABLISHED)))
def test_an_option_has_the_established_default(name):
    ours, theirs = OURS[name].default, ESTABLISHED[name]["default"]
    expected = OTHER_DEFAULTS.get(name, () if OURS[name].arity == "*" and theirs is None else theirs)
    assert ours == expected


def test_choices_are_those_of_the_page():
    """Timestep samplers of families beyond the page are left out; every scheme of weighting is there."""
    beyond = {"flux2_shift", "ideogram4_shift", "krea2_shift"}
    samplers = set(ESTABLISHED["timestep_sampling"]["choices"])
    assert set(OURS["timestep_sampling"].declared.choices) == samplers - beyond
    for name in ("weighting_scheme", "mixed_precision", "save_precision"):
        assert set(OURS[name].declared.choices) == set(ESTABLISHED[name]["choices"])


@pytest.mark.shows("attn_mode", "sdpa", "flash_attn", "flash3", "xformers")
def test_attention_flags_are_short_for_attn_mode():
    from musubi_tuner.training.config import ModelOptions

    for flag, mode in (("sdpa", "sdpa"), ("flash_attn", "flash"), ("flash3", "flash3"), ("xformers", "xformers")):
        assert parsed(f"--{flag}")[ModelOptions].attn_mode == mode
    assert parsed()[ModelOptions].attn_mode == "sdpa"


@pytest.mark.parametrize(("words", "value"), [("12%", 0.12), ("0.1", 0.1), ("100", 100), ("1", 1)])
def test_warm_up_is_read_as_steps_or_ratio(words, value):
    found = parsed("--lr_warmup_steps", words)[OptimizerOptions].lr_warmup_steps
    assert found == pytest.approx(value)
    assert type(found) is type(value)
    with pytest.raises(UserError, match="lr_warmup_steps"):
        parsed("--lr_warmup_steps", "1.5")


def test_warm_up_from_a_file_is_read_alike(tmp_path):
    for text, value in (('"10%"', 0.1), ("0.25", 0.25), ("40", 40)):
        (tmp_path / "c.toml").write_text(f"lr_warmup_steps = {text}\n")
        found = parsed("--config_file", str(tmp_path / "c.toml"))
        assert found[OptimizerOptions].lr_warmup_steps == pytest.approx(value)


def test_the_range_of_t_comes_from_min_and_max():
    assert parsed()[TimestepOptions].range == (0.0, 1.0)
    assert parsed("--min_timestep", "200")[TimestepOptions].range == (0.2, 1.0)
    assert parsed("--max_timestep", "500")[TimestepOptions].range == (0.0, 0.5)


def test_all_faults_of_the_combination_are_told_at_once():
    words = [
        "--fp8_scaled",
        "--sage_attn",
        "--min_timestep",
        "900",
        "--max_timestep",
        "100",
        "--log_with",
        "tensorboard",
    ]
    with pytest.raises(UserError) as fault:
        checks.check(parsed(*words))
    for part in ("fp8_base", "sageattn", "min_timestep = 900", "logging_dir"):
        assert part in str(fault.value)


def test_what_fits_together_is_accepted():
    checks.check(parsed("--fp8_base", "--fp8_scaled", "--min_timestep", "100", "--max_timestep", "900"))
    checks.check(parsed("--fp8_base"))
