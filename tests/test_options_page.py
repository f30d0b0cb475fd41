"""The real commands: the options page is current, family defaults exist, established flags keep their form."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from musubi_tuner import cli
from musubi_tuner.config import flag_table
from musubi_tuner.config.fields import options_of
from musubi_tuner.config.known import known_elsewhere
from musubi_tuner.config.options import ConfigOptions, parse
from musubi_tuner.families import registry

ROOT = Path(__file__).parents[1]
ESTABLISHED = json.loads((ROOT / "tests/data/reference/behaviour/cli.json").read_text())["scripts"]


def groups(script: str) -> tuple[type, ...]:
    which = cli.SCRIPTS[script]
    kind = cli.KINDS[which.kind]
    shared = getattr(import_module(f"musubi_tuner.{kind.module}"), kind.groups)
    return (*shared, *registry.get(which.family).option_groups(which.kind))


def test_the_options_page_is_current():
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert page == cli.options_page(), "run `make docs`"


@pytest.mark.parametrize("script", sorted(cli.SCRIPTS))
def test_a_scripts_groups_fit_together_and_have_a_help_page(script):
    family = registry.get(cli.SCRIPTS[script].family)
    found = parse(groups(script), ["--help"], prog=script, description="", defaults=family.spec.option_defaults)
    for group in groups(script):
        assert group.__doc__
        for item in options_of(group):
            assert f"--{item.name}" in found.help
            assert len(item.declared.help) > 3, f"{item.name} needs words"


@pytest.mark.parametrize("name", registry.names())
def test_a_familys_option_defaults_are_options_of_its_commands(name):
    known = {o.name for s, w in cli.SCRIPTS.items() if w.family == name for g in groups(s) for o in options_of(g)}
    assert set(registry.get(name).spec.option_defaults) <= known


@pytest.mark.parametrize("script", sorted(cli.SCRIPTS))
def test_established_flags_keep_their_number_of_values(script):
    rows = {flag.lstrip("-"): row for row in ESTABLISHED[script]["options"] for flag in row["flags"]}
    ours = [option for group in groups(script) for option in options_of(group)]
    for option in ours:
        for name in option.spellings:
            if name in rows:
                nargs = rows[name]["nargs"]
                expected = {None: 1, "2": 2, "*": "*", "+": "*"}.get(nargs, nargs)
                expected = 0 if rows[name]["action"] == "StoreTrue" else expected
                assert (0 if option.is_flag else option.arity or 1) == expected, f"--{name}"
        for flag in option.declared.shorthand:
            assert rows.get(flag.lstrip("-"), {"action": "StoreTrue"})["action"] == "StoreTrue"
    assert {o.name for o in ours} & set(rows), "no option in common with the established script"


@pytest.mark.parametrize("script", sorted(cli.SCRIPTS))
def test_every_established_flag_is_effective_or_told_and_the_page_counts_them(script, record_property):
    flags = cli.established_flags(script)
    names = {f.lstrip("-").replace("-", "_") for row in ESTABLISHED[script]["options"] for f in row["flags"]}
    assert set(flags) == {n for n in names if len(n) > 1}
    counts = {state: list(flags.values()).count(state) for state in flag_table.STATES}
    print(script, counts)  # noqa: T201  # the issue asks
    record_property("flags", counts)
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert f"| `{script}` | {' | '.join(map(str, counts.values()))} |" in page
    argv = []
    for row in ESTABLISHED[script]["options"]:
        flag = row["flags"][0]
        if flags[flag.lstrip("-")] in ("always", "warns"):
            count = 0 if row["action"] == "StoreTrue" else {None: 1, "*": 2, "+": 2}.get(row["nargs"], row["nargs"])
            argv += [flag, *["1"] * int(count)]
    required = [
        word
        for o in (o for g in groups(script) for o in options_of(g))
        if o.declared.required
        for word in (f"--{o.name}", *["1"] * (1 if o.arity in (None, "*") else o.arity))
    ]
    found = parse(groups(script), [*argv, *required], prog=script, description="", elsewhere=known_elsewhere(script))
    told = [w for w in found.warnings if w.startswith("has no effect here yet: ")]
    assert len(told) == bool(counts["warns"])
    parts = [part.split(" (")[0] for w in told for part in w.removeprefix("has no effect here yet: ").split("; ")]
    assert {n for part in parts for n in part.split(", ")} == {n for n, state in flags.items() if state == "warns"}


@pytest.mark.parametrize("script", sorted(cli.SCRIPTS))
def test_every_effective_flag_has_a_test_that_shows_it(script):
    shown = flag_table.shown_by(ROOT / "tests")
    states = cli.established_flags(script)
    assert [name for name, state in states.items() if state != "warns" and name not in shown] == []


def test_a_test_that_shows_an_option_is_a_test_and_names_it():
    marked = list(flag_table.marks(ast.parse("@pytest.mark.shows('a', 'b')\ndef test_x(): pass")))
    assert [(name, test.name) for name, test in marked] == [("a", "test_x"), ("b", "test_x")]
    known = {name for script in cli.SCRIPTS for name in cli.established_flags(script)}
    known |= {o.name for script in cli.SCRIPTS for group in (*groups(script), ConfigOptions) for o in options_of(group)}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        for name, test in flag_table.marks(ast.parse(source)):
            assert test.name.startswith("test_")
            assert name in known, f"{path.name}::{test.name} shows {name}, which is no option"
            unmarked = re.sub(r"@pytest\.mark\.shows\((?:[^)]|\n)*?\)", "", source)
            assert re.search(rf"\b{name}\b", unmarked), f"{path.name}::{test.name} does not name {name}"
