"""Pictures that a request comes with (its first or last frame, controls): found early, read, and encoded once.

They are encoded before the transformer is loaded, by the family's own calls, while its encoders are there; the VAE
comes for that time only.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import images
from musubi_tuner.families.base import Dit, Encoders, Family, FamilySpec, OwnSampling, Vae
from musubi_tuner.sampling.request import Request

log = logging.getLogger(__name__)

Pictures = Mapping[Request, Mapping[str, Tensor]]
"""What the family's `encode_latents` made of each request's pictures, on the CPU; requests without any are absent."""

LoadVae = Callable[[], Vae]


def check(request: Request) -> None:
    """Raises UserError for a picture that is not there or is none."""
    for _, path in request.pictures:
        try:
            images.image_size(Path(path).expanduser())
        except ValueError as fault:
            raise UserError(f"picture {path} {fault}") from fault


def check_model(dit: Dit | None, requests: Iterable[Request]) -> None:
    """Compare pictures with what an opened transformer needs, where it has an attribute `pictures` (roles).

    Raises UserError for a request without one of them; a picture that the transformer makes nothing of is told.
    """
    needed = getattr(dit, "pictures", None)
    if not isinstance(needed, tuple):
        return
    for request in requests:
        roles = {role for role, _ in request.pictures}
        if not roles.issuperset(needed):
            raise UserError(
                "this checkpoint is image-to-video and was given no first frame: give --image_path (--i in a prompt "
                "line), or a text-to-video checkpoint"
            )
        if roles - set(needed):
            log.warning("this checkpoint makes nothing of pictures (%s): it is text-to-video", request.prompt[:60])


def planned(family: Family, options: Any, values: Mapping[str, Any], said: Mapping[str, str]) -> Request:
    """The request of these values, after a family that samples in its own way had its say (`OwnSampling.plan`).

    options: the family's first own group of the command. said: what only the family understands.
    """
    request = Request(**{name: value for name, value in values.items() if value is not None})
    if isinstance(family, OwnSampling):
        told = {**values, "roles": tuple(role for role, _ in request.pictures)}
        request = replace(request, said=tuple(sorted(said.items())), **family.plan(options, told, said))
    check(request)
    return request


def unserved(given: Mapping[str, Any], spec: FamilySpec) -> list[str]:
    """Fields of pictures in `given` that this family makes nothing of."""
    return [name for name, role in FIELDS.items() if given.get(name) and role not in spec.takes_pictures]


FIELDS = {"image": "start", "end_image": "end", "control_images": "control"}
"""Fields of a request, by the role of their pictures."""


def encode(
    family: Family,
    encoders: Encoders,
    load_vae: LoadVae,
    requests: Iterable[Request],
    device: torch.device,
) -> dict[Request, Mapping[str, Tensor]]:
    """The fields of every request with pictures; the VAE is loaded only where there is one."""
    wanted = [request for request in dict.fromkeys(requests) if request.pictures]
    if not wanted:
        return {}
    vae = load_vae()
    found: dict[Request, Mapping[str, Tensor]] = {}
    with torch.no_grad():
        for request in wanted:
            roles = tuple(role for role, _ in request.pictures)
            item = replace(request.item(request.prompt), controls=_read(request, device), roles=roles)
            entry = family.encode_latents([item], vae, encoders)[0][0]
            found[request] = {name: tensor.cpu() for name, tensor in entry.items()}
    return found


def _read(request: Request, device: torch.device) -> Sequence[Tensor]:
    """Each picture `[3, 1, H, W]` in [-1, 1], cropped to the request's size."""
    found = []
    for _, path in request.pictures:
        try:
            pixels = images.read_image(Path(path).expanduser(), (request.width, request.height))
        except ValueError as fault:
            raise UserError(f"picture {path} {fault}") from fault
        values = torch.tensor(pixels, dtype=torch.float32, device=device)
        found.append(values.permute(2, 0, 1).unsqueeze(1) / 127.5 - 1)
    return tuple(found)
