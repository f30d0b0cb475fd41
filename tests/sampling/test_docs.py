"""The pages of generation and of the families: their commands are understood whole, and every option is explained."""

import json
import re
import shlex
from pathlib import Path

import pytest

from musubi_tuner import cli
from musubi_tuner.config.fields import options_of
from musubi_tuner.families import registry
from musubi_tuner.sampling.generate import GROUPS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md") if path.name != "options.md"}


def commands() -> list[tuple[str, str, str]]:
    """(page, script, arguments) of every command line of a script in a code block."""
    found = []
    for page, text in PAGES.items():
        for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"(?:python|accelerate launch)\s.*?src/musubi_tuner/(\w+)\.py\s(.*)", line.strip())
                if match and "..." not in line:
                    found.append((page, *match.groups()))
    return found


def test_the_pages_of_three_families_hold_commands():
    scripts = {script for _, script, _ in commands()}
    assert {"hv_train_network", "hv_generate_video", "fpack_train_network", "fpack_generate_video"} <= scripts
    assert {"cache_latents", "cache_text_encoder_outputs", "fpack_cache_latents", "wan_generate_video"} <= scripts


@pytest.mark.parametrize(("page", "script", "words"), commands())
def test_every_command_is_understood_and_nothing_of_it_is_without_effect(page, script, words, capsys, caplog):
    assert page in PAGES
    argv = shlex.split(words, comments=True)
    assert cli.main([script, *argv, "--print_config", "json"]) == 0
    out = capsys.readouterr()
    given = {name for name, value in json.loads(out.out)["options"].items() if value["source"] == "command line"}
    assert len(given) == len({word for word in argv if re.fullmatch(r"--\w+", word)})
    assert "has no effect" not in out.err + caplog.text


def test_every_option_of_generation_is_explained_outside_of_the_generated_page():
    words = set(re.findall(r"[a-z0-9_]{2,}", "\n".join(PAGES.values())))
    groups = [*GROUPS, *(g for name in registry.names() for g in registry.get(name).option_groups("generate"))]
    assert sorted({o.name for group in groups for o in options_of(group)} - words) == []
