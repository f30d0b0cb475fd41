"""Sizes that shapes cannot tell: JSON in a checkpoint's metadata (`musubi.config`) or in a file of the user's.

The names are the fields of the architecture's own dataclass; a name that is none of them is an error, not a default.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.reader import Header

T = TypeVar("T")


def named_fields(kind: type, given: str | Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Fields of the dataclass `kind` in a JSON object; lists become tuples. UserError names an unknown field."""
    if given is None:
        return {}
    try:
        content = json.loads(given) if isinstance(given, str) else dict(given)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds {type(content).__name__}: a JSON object of sizes is needed")
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise UserError(f"{where}: {unknown[0]} is not a size of this model; use {', '.join(known)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def members(keys: Iterable[str | None], prefix: str) -> int:
    """Members of the list of modules at `prefix` (with its dot) that `keys` name."""
    return len({key[len(prefix) :].split(".")[0] for key in keys if key is not None and key.startswith(prefix)})


def configured(kind: type[T], sizes: Mapping[str, Any], header: Header, given: Mapping[str, Any] | None) -> T:
    """The configuration `kind(**sizes)` of the model in `header`, where `given` (`--model_config`) wins over the file's
    metadata, that over `sizes` (from shapes). Raises UserError for sizes that do not fit together."""
    path = header.paths[0]
    named = named_fields(kind, header.metadata.get("musubi.config"), f"{path}, musubi.config")
    try:
        return kind(**{**sizes, **named, **named_fields(kind, given, "--model_config")})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
