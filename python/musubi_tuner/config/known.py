"""Options of the established tool by script, so that a user's file or command line is understood as a whole.

`known_options.json` holds, by option name, how many words the flag takes and which scripts have it. What a command of
ours does not serve (yet) is accepted with one grouped warning instead of an error.
"""

import json
from functools import cache
from importlib.resources import files

from musubi_tuner.config.command_line import Arity
from musubi_tuner.config.layers import Known

NOT_SERVED = "not served by this version"


@cache
def _table() -> dict[str, tuple[Arity, tuple[str, ...]]]:
    raw = json.loads(files("musubi_tuner.config").joinpath("known_options.json").read_text(encoding="utf-8"))
    scripts = raw["scripts"]
    return {name: (words, tuple(scripts[i] for i in where)) for name, (words, where) in raw["options"].items()}


def known_elsewhere(script: str) -> dict[str, Known]:
    """All options of the established tool by name, each with where it belongs as seen from `script`."""
    return {name: Known(_where(script, scripts), words) for name, (words, scripts) in _table().items()}


def _where(script: str, scripts: tuple[str, ...]) -> str:
    if script in scripts:
        return NOT_SERVED
    return f"of {scripts[0]}" if len(scripts) == 1 else f"of {scripts[0]} and others"
