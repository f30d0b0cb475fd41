"""Malformed option files against the real training options: each with the message it must give; random files too."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.known import known_elsewhere
from musubi_tuner.config.options import Resolved, parse
from musubi_tuner.families import registry
from musubi_tuner.training import checks
from musubi_tuner.training.config import GROUPS, OptimizerOptions

FAMILY = registry.get("wan")
ALL_GROUPS = (*GROUPS, *FAMILY.option_groups("train"))
REQUIRED = 'dit = "d.safetensors"\ndataset_config = "d.toml"\noutput_dir = "o"\noutput_name = "n"\n'

CASES = [
    # text of the file below the four required lines, what the error must say
    ("learning_rate = 1e-4\nlearning_rate = 1e-4", "is not valid TOML"),
    ("learning_rate =", "is not valid TOML"),
    ("learning_rate = 1e-4,", "is not valid TOML"),
    ("learning_rate : 1e-4", "is not valid TOML"),
    ("[run\nseed = 1", "is not valid TOML"),
    ('training_comment = "open', "is not valid TOML"),
    ("network_args = [", "is not valid TOML"),
    ("fp8_base = True", "is not valid TOML"),
    ("seed = 1.5.2", "is not valid TOML"),
    ('resume_from = "x\\q"', "is not valid TOML"),
    ("learning_rte = 1e-4", "line 5: learning_rte is not an option of this command; did you mean learning_rate?"),
    (
        "[optimiser]\nmax_grad_nrm = 1",
        "line 6: max_grad_nrm is not an option of this command; did you mean max_grad_norm",
    ),
    ("network_dimm = 4", "did you mean network_dim?"),
    ("timestep_sampler = 'shift'", "did you mean timestep_sampling?"),
    ("num_timestep_bucket = 4", "did you mean num_timestep_buckets?"),
    ("dynamo_back_end = 'NO'", "did you mean dynamo_backend?"),
    ("frobnicate = 1", "line 5: frobnicate is not an option of this command (see --help for all)"),
    ("[[datasets]]\nimage_directory = 'x'", "looks like a data set file, give it with --dataset_config"),
    ("[general]\nresolution_steps = 3", "looks like a data set file"),
    ("[network_args]\nconv_thing = 1", 'network_args takes a list like ["conv_thing=value"]'),
    ("network_args = {rank_dropout = 0.1}", 'network_args takes a list like ["rank_dropout=value"]'),
    ("learning_rate = 'fast'", "learning_rate = 'fast': must be a number"),
    ("learning_rate = true", "learning_rate = True: must be a number"),
    ("learning_rate = 0", "learning_rate = 0: must be above 0"),
    ("learning_rate = -1e-4", "must be above 0"),
    ("learning_rate = inf", "must be finite"),
    ("learning_rate = nan", "must be finite"),
    ("learning_rate = [1e-4]", "is a list; give one value (a number)"),
    ("max_train_steps = 10.5", "max_train_steps = 10.5: must be a whole number"),
    ("max_train_steps = 0", "must be at least 1"),
    ("max_train_epochs = 'all'", "must be a whole number"),
    ("network_dim = 0", "must be at least 1"),
    ("network_dropout = 1.0", "must be at least 0 and below 1"),
    ("min_timestep = 1000", "must be at least 0 and at most 999"),
    ("max_timestep = 0", "must be at least 1 and at most 1000"),
    ("num_timestep_buckets = -1", "must be at least 0"),
    ("num_timestep_buckets = 2.5", "must be a whole number"),
    ("mode_scale = 3", "must be at least -1 and at most 1.752"),
    ("sigmoid_scale = 0", "must be above 0"),
    ("timestep_sampling = 'shifted'", "must be one of sigma, uniform"),
    ("weighting_scheme = 'cosmp'", "did you mean cosmap?"),
    ("mixed_precision = 'fp8'", "must be one of no, fp16, bf16"),
    ("attn_mode = 'fash'", "did you mean flash?"),
    ("save_precision = 'double'", "must be one of float, fp32, fp16, bf16"),
    ("log_with = 'comet'", "must be one of tensorboard, wandb, all"),
    ("show_timesteps = 'text'", "must be one of image, console"),
    ("fp8_block_size = 16", "must be at least 32 and at most 256"),
    ("fp8_format = 'e3m4'", "must be one of e4m3, e5m2"),
    ("fp8_mode = 'blocks'", "did you mean block?"),
    ("dynamo_mode = 'max'", "must be one of default, reduce-overhead"),
    ("gradient_checkpointing = 'on'", "must be true or false"),
    ("gradient_checkpointing = 2", "must be true or false"),
    ("lr_warmup_steps = '10 %x'", "lr_warmup_steps = '10 %x'"),
    ("lr_scheduler_min_lr_ratio = 1.5", "must be at least 0 and at most 1"),
    ("scale_weight_norms = 0", "must be above 0"),
    ("base_weights_multiplier = ['one']", "must be a number"),
    ("wandb_api_key = ['abc']", "wandb_api_key = ***: is a list"),
    ("sdpa = 'maybe'", "must be true or false"),
    ("seed = 1\n[b]\nseed = 2", "line 7: seed = 2 contradicts 1 of config.toml line 5; keep one"),
    ("seed = 1\n[a.b.c]\nseed = 2", "contradicts 1"),
    ("flash_attn = true\nattn_mode = 'sdpa'", "exclude each other; keep one"),
]


def read(folder: Path, text: str) -> Resolved:
    (folder / "config.toml").write_text(text, encoding="utf-8")
    words = ["--config_file", str(folder / "config.toml")]
    elsewhere = known_elsewhere("wan_train_network")
    return parse(ALL_GROUPS, words, prog="train", description="", elsewhere=elsewhere)


def test_there_are_enough_cases():
    assert len(CASES) >= 40
    assert len({text for text, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(("text", "message"), CASES, ids=[c[0][:40] for c in CASES])
def test_a_malformed_file_gives_its_message(tmp_path, text, message):
    with pytest.raises(UserError) as fault:
        read(tmp_path, REQUIRED + text + "\n")
    assert message in str(fault.value)
    assert "config.toml" in str(fault.value)


def test_all_faults_come_in_one_message_with_their_lines(tmp_path):
    body = "max_train_steps = 0\nnetwork_dim = 0\nlearning_rte = 1\nlog_with = 'x'\n"
    with pytest.raises(UserError) as fault:
        read(tmp_path, REQUIRED + body)
    told = str(fault.value)
    assert told.startswith("4 faults")
    assert [f"config.toml line {n}:" in told for n in (5, 6, 7, 8)] == [True] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8_scaled = true", "--fp8_scaled says how --fp8_base quantises"),
        ("min_timestep = 600\nmax_timestep = 400", "min_timestep = 600, max_timestep = 400: the first must be smaller"),
        ("dim_from_weights = true", "give it with --network_weights"),
        ("log_with = 'all'", "give --logging_dir"),
        ("compile = true\ndynamo_backend = 'INDUCTOR'", "give one of them"),
        ("dynamo_backend = 'NVFUSER'", "did you mean INDUCTOR?"),
        ("compile = true\ncompile_fullgraph = true\nnetwork_dropout = 0.1", "leave out the fullgraph option"),
        ("scale_weight_norms = 1\noptimizer_type = 'schedulefree.AdamWScheduleFree'", "in two versions"),
        ("full_finetune = true\nfp8_base = true", "leave out --fp8_base"),
        ("sample_every_n_steps = 3", "give --sample_prompts"),
    ],
)
def test_options_that_do_not_fit_together_are_told_before_anything_is_loaded(tmp_path, text, message):
    with pytest.raises(UserError) as fault:
        checks.check(read(tmp_path, REQUIRED + text + "\n"))
    assert message in str(fault.value)


NAMES = sorted(name for group in ALL_GROUPS for name in group.__dataclass_fields__)
VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-5, 2000), st.floats(), st.text(max_size=8), st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*NAMES, "x", "a-b"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    return value.isoformat() if hasattr(value, "isoformat") else repr(value)


TABLES = st.dictionaries(st.sampled_from([*NAMES, "learning-rate", "nonsense", "resume"]), VALUES, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(top=TABLES, section=TABLES)
def test_a_random_file_resolves_or_is_told_never_more(tmp_path, top, section):
    lines = [f"{name} = {toml(value)}" for name, value in top.items()]
    lines += ["[section]", *(f"{name} = {toml(value)}" for name, value in section.items())]
    try:
        found = read(tmp_path, "\n".join(lines) + "\n")
        checks.check(found)
        checks.ineffective(found)
    except UserError:
        return  # told; any other exception fails the test
    assert found[OptimizerOptions].learning_rate > 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_a_file_of_noise_is_told(tmp_path, text):
    with pytest.raises(UserError):  # at the least, the required options are missing
        read(tmp_path, text)
