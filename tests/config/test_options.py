"""The option mechanism: layers, sources, conversions, and what it says when something is wrong."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Known, Resolved, option, parse


def ratio(text: str) -> int | float:
    """`10%` -> 0.1, whole numbers from 1 -> int."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError("must be a count of steps or a share like 10%") from None
    return int(value) if value >= 1 and value.is_integer() else value


@dataclass(frozen=True)
class Learning:
    """Learning."""

    learning_rate: float = option(2e-6, help="step size", above=0)
    lr_warmup_steps: int | float = option(0, help="warm-up", parse=ratio, minimum=0)
    optimizer_args: tuple[str, ...] = option((), help="key=value")
    seed: int | None = option(None, help="seed")
    betas: tuple[float, float] = option((0.9, 0.999), help="betas", minimum=0, below=1)


@dataclass(frozen=True)
class Model:
    """Model files."""

    vae: str | None = option(None, help="VAE file")
    folder: Path | None = option(None, help="a folder")
    fp8_base: bool = option(False, help="fp8 weights")
    keep: bool = option(True, help="on unless said")
    attn_mode: str = option(
        "sdpa",
        help="attention",
        choices=("sdpa", "flash", "xformers"),
        shorthand={"--sdpa": "sdpa", "--flash_attn": "flash", "--xformers": "xformers"},
    )
    network_dim: int = option(4, help="rank", minimum=1, maximum=128)
    lora_weight: tuple[str, ...] = option((), help="LoRA files", flags=("--lora", "-l"))
    wandb_api_key: str | None = option(None, help="key")


def run(*argv: str, defaults=None, elsewhere=None, groups=(Learning, Model)) -> Resolved:
    return parse(groups, argv, prog="prog", description="Words.", defaults=defaults, elsewhere=elsewhere)


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    return str(tmp_path / "config")


def fault(*argv: str, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        run(*argv, **kwargs)
    return str(caught.value)


@pytest.mark.shows("config_file")
def test_every_layer_wins_over_the_one_before_and_is_named_as_the_source(tmp_path):
    config = write(tmp_path, "\n[a]\nnetwork_dim = 16\nlearning_rate = 1e-4\n")
    found = run(defaults={"network_dim": 8, "vae": "family.safetensors", "of_another_command": 3})
    assert (found[Model].network_dim, found.source("network_dim")) == (8, "family default")
    assert (found[Learning].learning_rate, found.source("learning_rate")) == (2e-6, "default")
    assert not found.given("network_dim")
    found = run("--config_file", config, "--learning_rate", "2e-6", defaults={"network_dim": 8})
    assert (found[Model].network_dim, found.source("network_dim")) == (16, "config.toml line 3")
    assert (found[Learning].learning_rate, found.source("learning_rate")) == (2e-6, "command line")
    assert found.given("network_dim")
    assert found.given("learning_rate")
    assert found.source("vae") == "default"
    assert found.warnings == []


def test_booleans_switch_on_and_off_over_a_file(tmp_path):
    config = write(tmp_path, "fp8_base = true\nkeep = false\n")
    assert run("--config_file", config)[Model] == Model(fp8_base=True, keep=False)
    for off in ("--no-fp8_base", "--no_fp8_base", "--no-fp8-base"):
        assert run("--config_file", config, off, "--keep")[Model] == Model(fp8_base=False, keep=True)


def test_flags_take_dashes_equals_signs_negative_numbers_and_other_spellings():
    found = run("--learning-rate=3e-4", "--seed", "-7", "-l", "a", "b", "--vae", "-1e-4", "--betas", "0", ".5")
    assert found[Learning] == Learning(learning_rate=3e-4, seed=-7, betas=(0.0, 0.5))
    assert found[Model] == Model(lora_weight=("a", "b"), vae="-1e-4")
    assert run("--lora")[Model].lora_weight == ()
    assert found[Learning].betas[0].__class__ is float


def test_a_flag_may_be_cut_short_where_it_can_mean_one_option_only():
    found = run("--learn", "1e-3")
    assert found[Learning].learning_rate == 1e-3
    assert found.warnings == ["--learn is read as --learning_rate"]
    assert "--s is not an option" in fault("--s", "1")  # seed, sdpa


def test_a_file_is_flattened_at_any_depth_and_lists_replace_lists(tmp_path):
    config = write(tmp_path, 'optimizer_args = ["a=1"]\n[x.y.z]\nseed = 5\n[x]\nbetas = [0, 0.5]\n')
    found = run("--config_file", config, "--optimizer_args", "b=2", "c=(1,2)")
    assert found[Learning] == Learning(optimizer_args=("b=2", "c=(1,2)"), seed=5, betas=(0.0, 0.5))
    assert found.source("seed") == "config.toml line 3"


@pytest.mark.parametrize(
    ("text", "name", "value", "note"),
    [
        ('learning_rate = "1e-4"', "learning_rate", 1e-4, "text in quotes"),
        ('seed = "12"', "seed", 12, "text in quotes"),
        ("seed = 12.0", "seed", 12, None),
        ("learning_rate = 1", "learning_rate", 1.0, None),
        ('lr_warmup_steps = "10%"', "lr_warmup_steps", 0.1, None),
        ("lr_warmup_steps = 0.5", "lr_warmup_steps", 0.5, None),
        ('fp8_base = "true"', "fp8_base", True, "text in quotes"),
        ("fp8_base = 1", "fp8_base", True, "a number"),
        ("vae = 2024-01-02", "vae", "2024-01-02", "a date"),
        ("vae = 17", "vae", "17", "a number"),
        ('vae = "17"', "vae", "17", None),
        ('optimizer_args = "a=1"', "optimizer_args", ("a=1",), "a list of one"),
        ('betas = ["0.5", 0]', "betas", (0.5, 0.0), "text in quotes"),
        ('"learning-rate" = 0.5', "learning_rate", 0.5, None),
        ('lora = ["x"]', "lora_weight", ("x",), None),
        ('folder = "a/b"', "folder", Path("a/b"), None),
    ],
)
def test_values_of_a_file_are_converted_where_they_can_mean_one_thing(tmp_path, text, name, value, note):
    resolved = run("--config_file", write(tmp_path, text))
    got = resolved.as_dict()[name]
    assert got == value
    assert type(got) is type(value)
    if note is None:
        assert resolved.warnings == []
    else:
        assert len(resolved.warnings) == 1
        assert resolved.warnings[0].startswith(f"config.toml line 1: {text.split(' ')[0]} = ")
        assert note in resolved.warnings[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('seed = "many"', "seed = 'many': must be a whole number"),
        ("seed = 1.5", "seed = 1.5: must be a whole number"),
        ("seed = true", "seed = True: must be a whole number"),
        ("seed = [1]", "seed = [1]: is a list; give one value (a whole number)"),
        ("learning_rate = 0", "learning_rate = 0: must be above 0"),
        ("learning_rate = inf", "learning_rate = inf: must be finite"),
        ('learning_rate = "nan"', "learning_rate = 'nan': must be finite"),
        ("network_dim = 500", "network_dim = 500: must be at least 1 and at most 128"),
        ("betas = [0.5]", "betas = [0.5]: needs a list of 2 values, 1 were given"),
        ("betas = [0.5, 1]", "betas = [0.5, 1]: must be at least 0 and below 1"),
        ('fp8_base = "yes"', "fp8_base = 'yes': must be true or false"),
        ("fp8_base = 2", "fp8_base = 2: must be true or false"),
        ('attn_mode = "fash"', "must be one of sdpa, flash, xformers; did you mean flash?"),
        ('lr_warmup_steps = "soon"', "must be a count of steps or a share like 10%"),
        ("vae = true", "vae = True: must be text"),
        ('learning_rte = "x"', "learning_rte is not an option of this command; did you mean learning_rate?"),
        ("qqqq = 1", "qqqq is not an option of this command (see --help for all)"),
        ("optimizer_args = { decay = 1 }", 'optimizer_args takes a list like ["decay=value"]'),
        ('[[datasets]]\nimage_directory = "x"', "looks like a data set file, give it with --dataset_config"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_what_is_allowed(tmp_path, text, said):
    told = fault("--config_file", write(tmp_path, text))
    assert told.startswith(f"config.toml line {1 + text.count(chr(10))}: ")
    assert said in told


def test_all_faults_of_file_and_command_line_come_in_one_error(tmp_path):
    config = write(tmp_path, 'seed = "x"\n[a]\nnetwork_dim = 0\nlearning_rte = 1\n')
    told = fault("--config_file", config, "--learning_rate", "-1", "--betas", "1", "--bogus", "3", "word")
    assert told.splitlines() == [
        "6 faults in the options:",
        "  config.toml line 1: seed = 'x': must be a whole number",
        "  config.toml line 3: network_dim = 0: must be at least 1 and at most 128",
        "  config.toml line 4: learning_rte is not an option of this command; did you mean learning_rate?",
        "  --learning_rate -1: must be above 0",
        "  --betas 1: takes 2 values, 1 was given",
        "  --bogus is not an option of this command (see --help)",
    ]


def test_the_same_key_in_two_sections_warns_when_equal_and_stops_when_not(tmp_path):
    found = run("--config_file", write(tmp_path, "[a]\nseed = 1\n[b]\nseed = 1.0\n"))
    assert found[Learning].seed == 1
    assert found.warnings == ["config.toml line 4: seed was given before (config.toml line 2), with the same value"]
    told = fault("--config_file", write(tmp_path, "[a]\nseed = 1\n[b]\nseed = 2\n[c]\nseed = 3"))
    assert "config.toml line 4: seed = 2 contradicts 1 of config.toml line 2" in told
    assert "config.toml line 6: seed = 3 contradicts 1 of config.toml line 2" in told


def test_options_known_elsewhere_give_one_grouped_warning(tmp_path):
    elsewhere = {"dit": "of train", "rare": Known("of merge", 0), "two": Known("of train", 2), "seed": "of train"}
    config = write(tmp_path, 'dit = "x"\nseed = 3\n')
    found = run("--config_file", config, "--two", "1", "2", "--rare", "--seed", "4", elsewhere=elsewhere)
    assert found[Learning].seed == 4
    assert found.warnings == ["has no effect here yet: dit, two (of train); rare (of merge)"]
    assert "'3' after --two belongs to no option" in fault("--two", "1", "2", "3", elsewhere=elsewhere)


@pytest.mark.shows("config_compat")
def test_config_compat_turns_unknown_keys_into_a_warning_but_not_wrong_values(tmp_path):
    config = write(tmp_path, "learning_rte = 1\nqqqq = 2\n")
    found = run("--config_file", config, "--config_compat")
    assert len(found.warnings) == 1
    assert "line 1: learning_rte" in found.warnings[0]
    assert "line 2: qqqq" in found.warnings[0]
    assert run("--config_file", write(tmp_path, "config_compat = true\nqqqq = 2\n")).warnings
    told = fault("--config_file", write(tmp_path, "config_compat = true\nqqqq = 2\nseed = []\n"))
    assert told.startswith("config.toml line 3: seed = []")


def test_shorthands_stand_for_a_choice_in_file_and_on_the_command_line(tmp_path):
    config = write(tmp_path, "flash_attn = true\nsdpa = false\n")
    found = run("--config_file", config)
    assert (found[Model].attn_mode, found.source("attn_mode")) == ("flash", "config.toml line 1")
    found = run("--config_file", config, "--xformers")
    assert (found[Model].attn_mode, found.source("attn_mode")) == ("xformers", "command line")
    found = run("--xformers", "--flash_attn")
    assert found[Model].attn_mode == "flash"  # the order of declaration ranks them
    assert found.warnings == ["command line: xformers, flash_attn exclude each other; flash_attn counts"]
    assert "sdpa and attn_mode = 'flash' exclude each other" in fault("--sdpa", "--attn_mode", "flash")
    assert run("--sdpa", "--attn_mode", "sdpa")[Model].attn_mode == "sdpa"
    assert "must be true or false" in fault("--config_file", write(tmp_path, 'sdpa = "yes"'))


def test_words_after_a_switch_are_told_not_swallowed():
    assert "--fp8_base takes no value, 'false' was given: write --fp8_base or --no-fp8_base" in fault(
        "--fp8_base", "false"
    )
    assert "--fp8_base=true: --fp8_base takes no value" in fault("--fp8_base=true")
    assert "--learning_rate: needs a value" in fault("--learning_rate", "--fp8_base")
    assert "--no-seed is not an option" in fault("--no-seed")


def test_secrets_are_shown_nowhere(tmp_path):
    config = write(tmp_path, 'wandb_api_key = "sesame"\n')
    for kind in ("toml", "json"):
        shown = run("--config_file", config, "--print_config", kind).print_config
        assert "sesame" not in shown
        assert "(hidden)" in shown
    assert "wandb_api_key" not in run("--config_file", config).as_dict()
    assert "sesame" not in fault("--wandb_api_key", "--seed", "1") + fault("--wandb_api_key=sesame", "--seed", "x")
    assert "sesame" not in fault("--config_file", write(tmp_path, 'wandb_api_key = ["sesame"]'))
    twice = write(tmp_path, '[a]\nwandb_api_key = "sesame"\n[b]\nwandb_api_key = "sesame2"')
    assert "sesame" not in fault("--config_file", twice)


@pytest.mark.shows("print_config")
def test_print_config_gives_a_file_that_resolves_to_the_same_values(tmp_path):
    argv = ["--learning_rate", "1e-05", "--vae", 'a "b" \\ \tü\x7f', "--optimizer_args", "a=1", "b='x'", "--fp8_base"]
    argv += ["--attn_mode", "flash", "--folder", "x/y", "--lr_warmup_steps", "5%"]
    shown = run(*argv, "--print_config", defaults={"seed": 9}).print_config
    assert "seed = 9  # family default" in shown
    again = run("--config_file", write(tmp_path, shown))
    assert again.as_dict() | {"config_file": None} == run(*argv, defaults={"seed": 9}).as_dict()
    assert again.warnings == []


def test_print_config_as_json_tells_value_and_source():
    told = json.loads(run("--betas", "0", "0.5", "--print_config", "json").print_config)
    assert told["command"] == "prog"
    assert told["options"]["betas"] == {"value": [0.0, 0.5], "source": "command line"}
    assert told["options"]["seed"] == {"value": None, "source": "default"}
    assert "print_config" not in told["options"]


def test_a_group_checks_its_fields_together_and_required_options_are_asked_for():
    @dataclass(frozen=True)
    class Pair:
        """Pair."""

        low: int = option(0, help="low")
        high: int = option(9, help="high")
        dataset_config: str | None = option(None, help="data set file", required=True)

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise UserError(f"low = {self.low} is above high = {self.high}: swap them")

    assert "--dataset_config is required (data set file)" in fault(groups=(Pair,))
    assert fault("--low", "10", "--dataset_config", "x", groups=(Pair,)) == "low = 10 is above high = 9: swap them"
    assert "--dataset_config is required" in fault("--dataset_config", "", groups=(Pair,))
    shown = run("--print_config", groups=(Pair,)).print_config
    assert "high = 9  # default" in shown
    assert "# dataset_config = (required)  # default" in shown
    assert run("--dataset_config", "x", groups=(Pair,))[Pair].dataset_config == "x"


def test_help_lists_every_option_with_its_range_and_this_commands_default():
    text = run("--help", defaults={"network_dim": 32}).help
    assert text.startswith("usage: prog [--option value ...]")
    for name in ("--learning_rate X", "--fp8_base, --no-fp8_base", "--betas X X", "--lora_weight [TEXT ...]", "--sdpa"):
        assert name in text
    assert "rank (at least 1 and at most 128; default 32)" in text
    assert run("-h").help == run("--help").help


def test_declarations_that_contradict_are_the_programmers_fault():
    @dataclass(frozen=True)
    class Twin:
        """Twin."""

        seed: int | None = option(None, help="another seed")

    @dataclass(frozen=True)
    class Same:
        """Same."""

        seed: int | None = option(None, help="seed")

    @dataclass(frozen=True)
    class Plain:
        """Plain."""

        seed: int = 3

    @dataclass(frozen=True)
    class Odd:
        """Odd."""

        table: dict[str, int] | None = option(None, help="no")

    with pytest.raises(TypeError, match="declared twice"):
        run(groups=(Learning, Twin))
    shared = run("--seed", "3", groups=(Learning, Same))
    assert (shared[Learning].seed, shared[Same].seed) == (3, 3)
    with pytest.raises(TypeError, match="option\\(default"):
        run(groups=(Plain,))
    with pytest.raises(TypeError, match="unions or tuples"):
        run(groups=(Odd,))
    with pytest.raises(TypeError, match="family default network_dim = 0"):
        run(defaults={"network_dim": 0})
    with pytest.raises(KeyError):
        run(groups=(Same,))[Learning]


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path):
    write(tmp_path, "seed = 1")
    assert "did you mean config.toml?" in fault("--config_file", str(tmp_path / "confg"))
    assert "there is no folder" in fault("--config_file", str(tmp_path / "no" / "config.toml"))
    assert "--config_file: needs a value" in fault("--config_file")
    assert "give the path of a TOML file" in fault("--config_file=")
    assert "there is no file" in fault("--config_file", str(tmp_path))
    (tmp_path / "utf16.toml").write_bytes("seed = 1".encode("utf-16"))
    assert "save it as UTF-8" in fault("--config_file", str(tmp_path / "utf16"))
