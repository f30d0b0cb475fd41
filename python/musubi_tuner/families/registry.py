"""Families are found by folder: `families/<name>/` with a module attribute `family`. No list to keep."""

from importlib import import_module
from pathlib import Path

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Family


def names() -> tuple[str, ...]:
    """Names of all family folders, sorted; nothing is imported."""
    here = Path(__file__).parent
    return tuple(sorted(p.parent.name for p in here.glob("*/spec.py")))


def get(name: str) -> Family:
    """The family of that name. Raises UserError naming the families there are."""
    if name not in names():
        raise UserError(f"family {name!r} is not known: use one of {', '.join(names())}")
    found = import_module(f"musubi_tuner.families.{name}").family
    if not isinstance(found, Family):
        raise TypeError(f"families/{name} does not satisfy the Family protocol of families/base.py")
    return found
