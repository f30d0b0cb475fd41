"""Option files and command lines of the established tool, read by our mechanism with that tool's options.

`behaviour/config.json` tells what the established parser made of each file. Where the decisions differ (all levels
flattened, unknown keys and wrong types refused, values converted), the case is asserted in its decided form.
"""

import json
import re
from dataclasses import field, make_dataclass
from pathlib import Path

import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.known import ALWAYS, NEVER, NOT_SERVED, known_elsewhere
from musubi_tuner.config.layers import ALREADY
from musubi_tuner.config.options import option, parse

BEHAVIOUR = Path(__file__).parents[1] / "data/reference/behaviour"
SCRIPTS = json.loads((BEHAVIOUR / "cli.json").read_text())["scripts"]
CASES = json.loads((BEHAVIOUR / "config.json").read_text())["cases"]


def steps_or_share(text: str) -> int | float:
    if text.endswith("%"):
        return float(text[:-1]) / 100
    value = float(text)
    return int(value) if value >= 1 and value.is_integer() else value


def group_of(script: str) -> type:
    """The script's options, from the recorded table, as one of our groups."""
    kinds = {"str": str, "int": int, "float": float, "Path": str, "_int_or_float": int | float, None: str}
    rows = []
    for row in SCRIPTS[script]["options"]:
        if row["dest"] == "config_file":
            continue
        parser = steps_or_share if row["type"] == "_int_or_float" else None
        if row["action"] == "StoreTrue":
            kind, default = bool, False
        elif row["nargs"] == "*":
            kind, default = tuple[kinds[row["type"]], ...], ()
        else:
            kind, default = kinds[row["type"]] | None, row["default"]
        rows.append((row["dest"], kind, option(default, help="as recorded", choices=row["choices"], parse=parser)))
    return make_dataclass(
        script, [(n, k, field(default=f.default, metadata=f.metadata)) for n, k, f in rows], frozen=True
    )


GROUPS = {script: group_of(script) for script in {case["script"] for case in CASES}}

DECIDED = {
    "nested": {"network_dim": 8, "learning_rate": 0.0005, "seed": 7},
    "mixed_array": {"base_weights_multiplier": (0.5, 1.0)},
    "percent": {"lr_warmup_steps": 0.1, "lr_decay_steps": 0.25},
    "dashes": {"learning_rate": 0.001, "network_dim": 4},
    "date": {"training_comment": "2024-01-02"},
    "true_string": {},  # "false" in quotes is false, 0 is false
    "bom": {"seed": 15},
    "upper.TOML": {"seed": 13},
}
"""By file: the options that differ from their defaults, where a decision changes what was recorded."""

REFUSED = {
    "unknown": ("line 1: learning_rte", "did you mean learning_rate?", "line 3: not_an_option"),
    "bad_types": (
        "network_dim = 'sixteen'",
        "max_train_steps = 12.7",
        "mixed_precision = 'fp8'",
        "'nonsense'",
        "'yes'",
    ),
    "dup_sections": ("line 3: network_dim = 8 contradicts 4", "line 5: network_dim = 16 contradicts 4"),
    "section_then_top": ("line 4: seed = 2 contradicts 1 of section_then_top.toml line 2",),
    "array_of_tables": ("line 4: seed = 4 contradicts 3 of array_of_tables.toml line 2",),
    "missing": ("there is no file missing.toml",),
    "missing.toml": ("there is no file missing.toml",),
    "syntax_error": ("syntax_error.toml", "line 1"),
    "dup_key": ("dup_key.toml", "line 2"),
    "only.json": ("this is JSON",),
}
"""By file: what the error must say."""

REFUSED_FLAGS = {
    "--bogus": ("--bogus is not an option",),
    "abc": ("--learning_rate abc: must be a number",),
    "bogus": ("--timestep_sampling bogus: must be one of sigma, uniform",),
    "nope": ("--task nope: must be one of t2v-14B",),
}


def named(argv: list[str]) -> str | None:
    """The option file that counts: the last one."""
    files = [argv[i + 1] for i, a in enumerate(argv) if a in ("--config_file", "--conf")]
    files += [a.partition("=")[2] for a in argv if a.startswith("--config_file=")]
    return files[-1] if files else None


def label(case: dict) -> str:
    return " ".join([case["script"], *case["argv"]])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_recorded_case_resolves_as_recorded_or_as_decided(case, monkeypatch):
    monkeypatch.chdir(BEHAVIOUR / "config_files")
    group, file = GROUPS[case["script"]], named(case["argv"])
    refused = REFUSED.get(file, ()) + sum((REFUSED_FLAGS.get(a, ()) for a in case["argv"]), ())
    if refused:
        with pytest.raises(UserError) as caught:
            parse((group,), case["argv"], prog=case["script"], description="")
        for words in refused:
            assert words in str(caught.value)
        return
    known = known_elsewhere(case["script"])
    found = parse((group,), case["argv"], prog=case["script"], description="", elsewhere=known)[group]
    defaults = group()
    changed = {n: getattr(found, n) for n in group.__dataclass_fields__ if getattr(found, n) != getattr(defaults, n)}
    recorded = {k: tuple(v) if isinstance(v, list) else v for k, v in case.get("non_default", {}).items()}
    expected = DECIDED.get(file, recorded) | {k: v for k, v in recorded.items() if f"--{k}" in case["argv"]}
    own = {k: v for k, v in expected.items() if k in group.__dataclass_fields__ and v != ()}
    assert changed == own
    assert {"config_file", "fp8_scaled"} >= expected.keys() - own.keys() - {"network_args"}


def test_good_values_of_a_refused_file_are_not_among_its_faults(monkeypatch):
    monkeypatch.chdir(BEHAVIOUR / "config_files")
    group = GROUPS["hv_train_network"]
    with pytest.raises(UserError) as caught:
        parse((group,), ["--config_file", "bad_types"], prog="", description="")
    assert str(caught.value).startswith("5 faults")  # "1e-4" and a lone text for a list are converted


def test_every_option_of_the_established_scripts_is_known_with_its_arity():
    for script, rows in SCRIPTS.items():
        known = known_elsewhere(script)
        for row in rows["options"]:
            if not row["flags"][0].startswith("-"):
                continue  # a positional argument of lora_post_hoc_ema
            for flag in row["flags"]:
                found = known[flag.lstrip("-").replace("-", "_")]
                assert found.where in (NOT_SERVED, ALREADY, *NEVER.values())
                assert (found.where == ALREADY) == (flag.lstrip("-") in ALWAYS)
                one = {None: 1, "*": "*", "+": "*", "2": 2, 2: 2, "4": 4, 4: 4}[row["nargs"]]
                assert found.words in ((0,) if row["action"] == "StoreTrue" else (one, "*"))
    assert known_elsewhere("wan_train_network")["one_frame_inference"].where.startswith("of ")


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_full_command_line_of_a_script_gives_one_warning_and_no_fault(script):
    argv = []
    for row in SCRIPTS[script]["options"]:
        if row["flags"][0].startswith("-"):
            count = 0 if row["action"] == "StoreTrue" else {None: 1, "*": 3, "+": 2}.get(row["nargs"], row["nargs"])
            argv += [row["flags"][0], *["-1"] * int(count)]
    argv = [a for i, a in enumerate(argv) if a != "--config_file" and argv[i - 1] != "--config_file"]
    found = parse((), argv, prog=script, description="", elsewhere=known_elsewhere(script))
    (warning,) = found.warnings
    assert warning.startswith("has no effect here yet: ")
    told = re.sub(r" \([^)]*\)|^[^:]*: ", "", warning)
    given = {a.lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}
    assert sorted(re.split("[,;] ", told)) == sorted(given - ALWAYS.keys())
