"""The established flags, script by script, for docs/options.md: what becomes of each, and which test shows it.

A test that shows the effect of options says so itself, by the mark `shows("name", ...)`; in a checkout the marks are
read from the sources of the tests, so that the page names a test for every flag that it calls effective.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

EFFECTIVE, ALWAYS, WARNS, REFUSED = STATES = "effective", "always", "warns", "refused"

HEAD = """\
`effective`: the option does what it says; the last column names the test that shows it. `always`: it asks for what is
done in any case, and is taken in silence. `warns`: it is accepted and told to have no effect. `refused`: it is an error
that says what to use. An empty cell: the established script of that name has no such flag, and a file that holds it is
told where it belongs."""


def lines(columns: Mapping[str, Mapping[str, str]], shown: Mapping[str, str]) -> list[str]:
    """Markdown. columns: by script, the state of each of its flags. shown: the test of each option, by its name."""
    found = ["## Established flags, script by script", "", *HEAD.splitlines(), ""]
    found += ["| script | " + " | ".join(STATES) + " |", "|---" * (len(STATES) + 1) + "|"]
    found += [f"| `{script}` | {counts(flags)} |" for script, flags in columns.items()]
    found += ["", "| flag | " + " | ".join(f"`{s}`" for s in columns) + " | shown by |"]
    found.append("|---" * (len(columns) + 2) + "|")
    for name in sorted({name for flags in columns.values() for name in flags}):
        states = [flags.get(name, "") for flags in columns.values()]
        test = f"`{shown[name]}`" if name in shown and set(states) - {"", WARNS} else ""
        found.append(f"| `--{name}` | " + " | ".join([*states, test]) + " |")
    return found


def counts(flags: Mapping[str, str]) -> str:
    """The number of a script's flags in each state, as cells of a row."""
    return " | ".join(str(list(flags.values()).count(state)) for state in STATES)


def shown_by(tests: Path) -> dict[str, str]:
    """By option: `file::test` of the first test under `tests` that is marked to show it."""
    found: dict[str, str] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for name, function in marks(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(name, f"{path.relative_to(tests).as_posix()}::{function.name}")
    return found


def marks(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(option, test) of every `shows` mark."""
    for function in (node for node in module.body if isinstance(node, ast.FunctionDef)):
        for mark in function.decorator_list:
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == "shows":
                names = [a.value for a in mark.args if isinstance(a, ast.Constant)]
                yield from ((str(name), function) for name in names)
