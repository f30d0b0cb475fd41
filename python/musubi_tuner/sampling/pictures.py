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
from musubi_tuner.sampling import control_clip
from musubi_tuner.sampling.request import Request

log = logging.getLogger(__name__)

Pictures = Mapping[Request, Mapping[str, Tensor]]
"""What the family's `encode_latents` made of each request's pictures, on the CPU; requests without any are absent."""

KEPT = "kept"
"""Field of a request whose latents are one frame among others: how many there are, and its place; not the model's."""

LoadVae = Callable[[], Vae]


def check(request: Request) -> None:
    """Raises UserError for a picture that is not there or is none, and for a control clip that is too short."""
    for _, path in request.pictures:
        try:
            images.image_size(Path(path).expanduser())
        except ValueError as fault:
            raise UserError(f"picture {path} {fault}") from fault
    if request.control is not None:
        control_clip.check(request.control, request.frames)


def check_model(dit: Dit | None, requests: Iterable[Request]) -> None:
    """Compare pictures with what an opened transformer needs, where it has an attribute `pictures` (roles); it takes
    those of an attribute `optional_pictures` too.

    Raises UserError for a request without one of them; a picture that the transformer makes nothing of is told.
    """
    needed = getattr(dit, "pictures", None)
    if not isinstance(needed, tuple):
        return
    taken = {*needed, *getattr(dit, "optional_pictures", ())}
    for request in requests:
        roles = {role for role, _ in request.pictures} | ({"control_clip"} if request.control else set())
        if "control" in roles and "control" not in taken:
            roles = roles - {"control"} | {"start"}  # a single picture is made from any pictures
        missing = [role for role in needed if role not in roles]
        if missing:
            raise UserError(f"this checkpoint {_MISSING[missing[0]]}, or a text-to-video checkpoint")
        if roles - taken:
            kind = "it is text-to-video" if not taken else "it takes " + ", ".join(sorted(taken))
            log.warning("this checkpoint makes nothing of pictures (%s): %s", request.prompt[:60], kind)


_MISSING = {
    "start": "is image-to-video and was given no first frame: give --image_path (--i in a prompt line)",
    "end": "goes from a first to a last frame and was given no last one: give --end_image_path (--ei in a prompt line)",
    "control": "needs a control picture: give --control_image_path (--ci in a prompt line)",
    "control_clip": "needs a control clip: give --control_path (--cn in a prompt line)",
}


def check_fields(dit: Dit | None, requests: Iterable[Request], seen: Pictures) -> None:
    """Compare what was encoded with what an opened transformer is conditioned on, where it has an attribute
    `conditioned_on` (fields, each with a sentence). Raises UserError with the sentence of one that is not there."""
    for name, sentence in getattr(dit, "conditioned_on", {}).items():
        if any(name not in seen.get(request, {}) for request in requests):
            raise UserError(sentence)


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


FIELDS = {"image": "start", "end_image": "end", "control_images": "control", "control": "control_clip"}
"""Fields of a request, by the role of their pictures or clip."""


def encode(
    family: Family,
    encoders: Encoders,
    load_vae: LoadVae,
    requests: Iterable[Request],
    device: torch.device,
) -> dict[Request, Mapping[str, Tensor]]:
    """The fields of every request with pictures or a control; the VAE is loaded only where there is one."""
    wanted = [request for request in dict.fromkeys(requests) if request.pictures or request.control]
    if not wanted:
        return {}
    vae = load_vae()
    found: dict[Request, Mapping[str, Tensor]] = {}
    with torch.no_grad():
        for request in wanted:
            roles, controls = tuple(role for role, _ in request.pictures), tuple(_read(request, device))
            if request.control is not None:
                size = request.frames, request.width, request.height
                roles, controls = (
                    (*roles, "control_clip"),
                    (*controls, control_clip.read(request.control, *size, device)),
                )
            item = replace(request.item(request.prompt), controls=controls, roles=roles)
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
