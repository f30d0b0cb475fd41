"""A request: everything that decides one picture or clip, the models apart. Previews and generation share it.

Sizes are checked against the family's latent grid before any model is loaded. A seed names the noise: the same seed
gives the same numbers on every device and in every batch position (float32, drawn on the CPU, as other tools that
draw there do).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.section_text import Sectioned
from musubi_tuner.families.base import FamilySpec, Item, LatentGeometry
from musubi_tuner.flow.solvers import SOLVERS

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One thing to sample. Raises UserError for values that no family could serve.

    guidance: scale of classifier-free guidance; 1 turns it off, and `negative` is then not looked at. guidance_high:
    the same where a second transformer, for high noise, predicts; None: as `guidance`. rescale: of guidance, 0 for
    none. shift: of the time grid. solver: a name of `flow.solvers.SOLVERS`. fps: of a written video. embedded_guidance:
    what the transformer is told, None where it has no such input. image, end_image, control_images: files; image may
    name one for each section. control_masks: files, of the controls in turn. control: the file of a clip, or its
    folder. video: a file that sampling begins from, at `strength` of the noise. said: what only the family
    understands, by the names of a prompt line's options.
    """

    prompt: str
    seed: int
    width: int
    height: int
    frames: int = 1
    fps: int = 16
    steps: int = 20
    guidance: float = 5.0
    shift: float = 5.0
    solver: str = "unipc"
    negative: str = ""
    embedded_guidance: float | None = None
    image: str | None = None
    end_image: str | None = None
    control_images: tuple[str, ...] = ()
    control_masks: tuple[str, ...] = ()
    video: str | None = None
    strength: float = 1.0
    rescale: float = 0.0
    guidance_high: float | None = None
    control: str | None = None
    said: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        # a request that comes back from metadata has lists
        object.__setattr__(self, "control_images", tuple(self.control_images))
        object.__setattr__(self, "control_masks", tuple(self.control_masks))
        object.__setattr__(self, "said", tuple((name, value) for name, value in self.said))
        rules = (
            ("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}"),
            ("steps", self.steps, 1 <= self.steps <= MAX_STEPS, f"1 to {MAX_STEPS}"),
            ("flow shift", self.shift, self.shift > 0, "above 0"),
            ("fps", self.fps, self.fps >= 1, "at least 1"),
            ("strength", self.strength, 0 < self.strength <= 1, "above 0 and at most 1"),
            ("guidance rescale", self.rescale, 0 <= self.rescale <= 1, "0 to 1"),
            ("solver", self.solver, self.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
        )
        for name, value, fine, allowed in rules:
            if not fine:
                raise UserError(f"{name} = {value}: must be {allowed}")
        if len(self.control_masks) > len(self.control_images):
            raise UserError(
                f"{len(self.control_masks)} masks for {len(self.control_images)} control pictures: at most one each"
            )

    @property
    def guided(self) -> bool:
        """True when a second branch, with the negative prompt, is needed."""
        return self.guidance != 1.0 or self.guidance_high not in (None, 1.0)

    @property
    def pictures(self) -> tuple[tuple[str, str], ...]:
        """(role, file) of each picture: `start` (one for each section that has its own), `end`, `control`."""
        starts = Sectioned.parse(self.image).values if self.image else ()
        found = [*(("start", path) for path in starts), ("end", self.end_image)]
        found += [("control", path) for path in self.control_images]
        return tuple((role, path) for role, path in found if path)

    @property
    def needs_vae(self) -> bool:
        """True where something that comes with the request is encoded."""
        return bool(self.pictures or self.control or self.video)

    def summary(self) -> str:
        """One line for the log."""
        size = f"{self.width} x {self.height}" + (f" x {self.frames} frames" if self.frames > 1 else "")
        high = "" if self.guidance_high is None else f" (high noise {self.guidance_high:g})"
        solving = f"{self.solver}, {self.steps} steps, guidance {self.guidance:g}{high}, shift {self.shift:g}"
        return f"seed {self.seed}, {size}, {solving}: {self.prompt[:80]}"

    def item(self, caption: str) -> Item:
        """The request as an item without a target, for the family's encode calls."""
        return Item(caption, frames=self.frames, height=self.height, width=self.width, said=dict(self.said))

    def shape(self, geometry: LatentGeometry) -> tuple[int, int, int, int]:
        """Latent shape [C, F, H, W]. Raises UserError with sizes that fit."""
        try:
            return geometry.shape(self.frames, self.height, self.width)
        except ValueError as fault:
            near = fitted(self, geometry)
            raise UserError(
                f"{fault}; nearest that fits: {near.frames} frames, {near.height} x {near.width}"
            ) from fault


def fitted(request: Request, geometry: LatentGeometry) -> Request:
    """The request with its size rounded down to what the latent grid can hold (one patch, one frame at least)."""

    def down(value: int, step: int) -> int:
        return max(value // step, 1) * step

    return replace(
        request,
        frames=max(request.frames - 1, 0) // geometry.temporal * geometry.temporal + 1,
        height=down(request.height, geometry.spatial * geometry.patch[1]),
        width=down(request.width, geometry.spatial * geometry.patch[2]),
    )


def initial_noise(request: Request, spec: FamilySpec, frames: int | None = None) -> Tensor:
    """Standard normal latents [C, F, H, W], float32 on the CPU: what torch's CPU generator draws from the seed.

    frames: of the latents, where they are others than the request's.
    """
    channels, own, *size = request.shape(spec.latents)
    draw = torch.Generator().manual_seed(request.seed)
    return torch.randn((channels, frames or own, *size), generator=draw)
