"""Pictures that a request comes with (its first or last frame, controls): found early, read, and encoded once.

They are encoded before the transformer is loaded, by the family's own calls, while its encoders are there; the VAE
comes for that time only.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.data import images
from musubi_tuner.data.buckets import Buckets
from musubi_tuner.families.base import Dit, Encoders, Family, FamilySpec, Item, OwnSampling, Vae
from musubi_tuner.sampling import clips
from musubi_tuner.sampling.request import Request

log = logging.getLogger(__name__)

Pictures = Mapping[Request, Mapping[str, Tensor]]
"""What the family's `encode_latents` made of each request's pictures, on the CPU; requests without any are absent."""

KEPT = "kept"
"""Field of a request whose latents are one frame among others: how many there are, and its place; not the model's."""

LoadVae = Callable[[], Vae]


def check(request: Request) -> None:
    """Raises UserError for a picture or a mask that is not there or is none, and for a control clip too short."""
    for path in (*(path for _, path in request.pictures), *request.control_masks):
        try:
            images.image_size(Path(path).expanduser())
        except ValueError as fault:
            raise UserError(f"picture {path} {fault}") from fault
    if request.control is not None:
        clips.require_control(request.control, request.frames)


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
        plan = dict(family.plan(options, told, said))
        words = {**said, **plan.pop("said", {})}
        request = replace(request, said=tuple(sorted(words.items())), **plan)
    elif sum(role == "start" for role, _ in request.pictures) > 1:
        raise UserError(f"--image_path {request.image}: this model makes no sections: give one picture")
    check(request)
    return request


def size_like(request: Request, spec: FamilySpec) -> dict[str, int] | None:
    """Width and height with the area of a single picture's request, in the shape of its first control (or start).

    None for a video, and where there is no such picture.
    """
    paths = {role: path for role, path in reversed(request.pictures) if role != "end"}
    if request.frames != 1 or not paths:
        return None
    choice = Buckets((request.width, request.height), enabled=True, step=spec.resolution_step)
    width, height = choice.choose(images.image_size(Path(paths.get("control") or paths["start"]).expanduser()))
    return {"width": width, "height": height}


def unserved(given: Mapping[str, Any], spec: FamilySpec) -> list[str]:
    """Fields of pictures in `given` that this family makes nothing of."""
    idle = [name for name, role in FIELDS.items() if given.get(name) and role not in spec.takes_pictures]
    return [*idle, "control_masks"] if given.get("control_masks") and not spec.control_masks else idle


FIELDS = {"image": "start", "end_image": "end", "control_images": "control", "control": "control_clip"}
"""Fields of a request, by the role of their pictures or clip."""


def encode(
    family: Family,
    encoders: Encoders,
    load_vae: LoadVae,
    requests: Iterable[Request],
    device: torch.device,
) -> dict[Request, Mapping[str, Tensor]]:
    """The fields of every request with pictures, a control or a `video`; the VAE is loaded only where there is one."""
    wanted = [request for request in dict.fromkeys(requests) if request.needs_vae]
    if not wanted:
        return {}
    vae = load_vae()
    found: dict[Request, Mapping[str, Tensor]] = {}
    with torch.no_grad():
        for request in wanted:
            entry: Mapping[str, Tensor] = {}
            if request.pictures or request.control:
                entry = family.encode_latents([_item(family.spec, request, device)], vae, encoders)[0][0]
            clip = {} if request.video is None else {"video": _clip(family, request, vae, encoders, device)}
            found[request] = {name: tensor.cpu() for name, tensor in {**entry, **clip}.items()}
    return found


def _item(spec: FamilySpec, request: Request, device: torch.device) -> Item:
    """The request with its pictures and control clip, their roles and the masks of its controls."""
    roles, controls = tuple(role for role, _ in request.pictures), _read(request, device)
    masks = _masks(request, device) if spec.control_masks else ()
    if request.control is not None:
        size = request.frames, request.width, request.height
        clip = clips.read(request.control, *size, device, option="control_path")
        roles, controls, masks = (*roles, "control_clip"), (*controls, clip), (*masks, None) if masks else ()
    return replace(request.item(request.prompt), controls=controls, roles=roles, masks=masks)


def _clip(family: Family, request: Request, vae: Vae, encoders: Encoders | None, device: torch.device) -> Tensor:
    """Latents of `request.video` in the transformer's scale, encoded as a clip of a dataset is."""
    size = request.frames, request.width, request.height
    item = replace(
        request.item(request.prompt), pixels=clips.read(str(request.video), *size, device, option="video_path")
    )
    factor = next(field.factor for field in family.spec.cache_fields if field.name == "latents")
    return family.encode_latents([item], vae, encoders)[0][0]["latents"].float() * factor


def _masks(request: Request, device: torch.device) -> tuple[Tensor | None, ...]:
    """Of each picture, what counts of it, `[1, 1, H, W]` in [0, 1]: a control's mask, or else its opacity."""
    files = iter(request.control_masks)
    size, found = (request.width, request.height), list[Tensor | None]()
    for role, path in request.pictures:
        named = next(files, None) if role == "control" else None
        if named is not None:
            grey = images.read_grey(Path(named).expanduser(), size)
        else:
            grey = images.read_alpha(Path(path).expanduser(), size) if role == "control" else None
        values = None if grey is None else torch.tensor(grey, dtype=torch.float32, device=device) / 255
        found.append(None if values is None else values[None, None])
    return tuple(found)


def _read(request: Request, device: torch.device) -> tuple[Tensor, ...]:
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
