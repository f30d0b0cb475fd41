"""Established names of the network modules, as `--network_module` takes them: a table, nothing is imported by name.

An entry tells the kind of adapter; targets are always those of the family that is trained. A name that is not here is
refused with what there is.
"""

from collections.abc import Mapping
from typing import Literal

from musubi_tuner.config.errors import UserError

Kind = Literal["lora"]

NETWORKS: Mapping[str, Kind] = {
    "networks.lora": "lora",
    "networks.lora_wan": "lora",
}


def kind_of(name: str) -> Kind:
    """The kind of adapter that a `--network_module` value stands for. UserError with the names there are."""
    plain = name.removeprefix("musubi_tuner.")
    if plain not in NETWORKS:
        raise UserError(f"network_module {name!r} is not offered: use one of {', '.join(NETWORKS)}")
    return NETWORKS[plain]
