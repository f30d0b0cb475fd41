"""From the keys of a file to the keys of a model: prefixes of repackaged files, and tables of renaming rules.

A rename is a function `str -> str | None` (None: the tensor is not needed). Families hand theirs to
`load.materialize`; the ones here are for the common cases and compose with `chain`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rename = Callable[[str], str | None]

WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "module.")
"""Prefixes that repackaged transformer files carry."""


def same(key: str) -> str | None:
    """Every key as it is."""
    return key


def without_prefix(*prefixes: str) -> Rename:
    """Remove the first of `prefixes` that a key starts with."""

    def rename(key: str) -> str | None:
        for prefix in prefixes:
            if key.startswith(prefix):
                return key[len(prefix) :]
        return key

    return rename


def chain(*renames: Rename) -> Rename:
    """Apply `renames` in turn; a dropped key stays dropped."""

    def rename(key: str) -> str | None:
        current: str | None = key
        for one in renames:
            if current is None:
                return None
            current = one(current)
        return current

    return rename


@dataclass(frozen=True)
class Rules:
    """Substitutions for parts of keys: (pattern, replacement) pairs, each applied once, in order, by `re.sub`.

    `strict` makes a key that no rule touches an error rather than a silent pass; use it where every key changes.
    """

    pairs: Sequence[tuple[str, str]]
    strict: bool = False

    def __call__(self, key: str) -> str | None:
        changed = False
        for pattern, replacement in self.pairs:
            key, count = re.subn(pattern, replacement, key)
            changed = changed or count > 0
        if self.strict and not changed:
            raise ValueError(f"no renaming rule matches key {key!r}")
        return key
