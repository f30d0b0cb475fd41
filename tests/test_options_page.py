"""The real commands: the options page is current, family defaults exist, established flags keep their form."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from musubi_tuner import cli
from musubi_tuner.config.fields import options_of
from musubi_tuner.config.options import parse
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
