"""Cut a command line into flags and the words that belong to them. No option of ours is positional.

A token is a flag when it starts with two dashes and a letter and has no white space before its `=`; so negative
numbers (`-1e-4`) and prompts (`a cat --w 512`) are values. A flag may be cut short where only one option begins
with it, and its inner dashes may be underscores.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from musubi_tuner.config.fields import canonical

Arity = int | str
"""How many words a flag takes: a count, "?" (none or one) or "*"."""

_FLAG = re.compile(r"--[A-Za-z][^\s=]*(=|$)")


@dataclass(frozen=True)
class Words:
    """One flag with its words. `name` is canonical; `flag` is what was typed; `known` says whether it was found."""

    name: str
    flag: str
    words: tuple[str, ...]
    known: bool
    shortened: bool = False


@dataclass(frozen=True)
class Cut:
    """A command line in pieces: flags in order, and words that belong to none, each with the flag before it."""

    flags: tuple[Words, ...]
    stray: tuple[tuple[str, str | None], ...]


def cut(
    argv: Sequence[str], arities: Mapping[str, Arity], *, short: Sequence[str] = ("-h",), whole: Collection[str] = ()
) -> Cut:
    """Split `argv` by the arities of canonical flag names. An unknown flag takes all words up to the next flag.

    short: flags with one dash. whole: names that may not be cut short.
    """
    abridged = [name for name in arities if name not in whole]
    flags: list[Words] = []
    stray: list[tuple[str, str | None]] = []
    position = 0

    def is_flag(token: str) -> bool:
        return _FLAG.match(token) is not None or token in short

    while position < len(argv):
        token = argv[position]
        position += 1
        if not is_flag(token):
            stray.append((token, flags[-1].flag if flags else None))
            continue
        typed, _, inline = token.partition("=")
        name = _full_name(canonical(typed), arities, abridged)
        arity: Arity = "*" if name is None else arities[name]
        words = [inline] if "=" in token else []
        most = {"*": len(argv), "?": 1}.get(arity, arity) if isinstance(arity, str) else arity
        while position < len(argv) and len(words) < int(most) and "=" not in token and not is_flag(argv[position]):
            if arity == "?" and argv[position] not in ("json", "toml"):
                break
            words.append(argv[position])
            position += 1
        known = canonical(typed) if name is None else name
        flags.append(Words(known, typed, tuple(words), name is not None, name is not None and name != canonical(typed)))
    return Cut(tuple(flags), tuple(stray))


def _full_name(name: str, exact: Collection[str], abridged: Collection[str]) -> str | None:
    if name in exact:
        return name
    longer = [full for full in abridged if full.startswith(name)]
    return longer[0] if len(longer) == 1 else None
