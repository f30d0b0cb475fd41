"""Guidance in some steps only, and by a model with blocks left out: what it is, and the options that ask for it."""

from dataclasses import dataclass, replace
from typing import Literal

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option


@dataclass(frozen=True)
class GuidanceSteps:
    """Classifier-free guidance in some steps only, and by a model with blocks left out.

    mode, ratio: the share of the steps that are guided, and which they are: `early`, `late`, `middle` and `early_late`
    say where the others lie, `alternate` spreads them. layers: blocks left out in the steps from the share `start` to
    `end`: in the branch without the prompt (`uncond`), or in a third branch (`original`) from which the result is led
    away with `scale`.
    """

    mode: Literal["early", "late", "middle", "early_late", "alternate", "none"] = "none"
    ratio: float = 1.0
    layers: tuple[int, ...] = ()
    layer_mode: Literal["original", "uncond"] = "original"
    scale: float = 3.0
    start: float = 0.0
    end: float = 0.3


@dataclass(frozen=True)
class GuidanceStepOptions:
    """Guidance by step"""

    cfg_skip_mode: str = option(
        "none",
        help="with cfg_apply_ratio, where the steps without guidance lie; alternate spreads them",
        choices=("early", "late", "middle", "early_late", "alternate", "none"),
    )
    cfg_apply_ratio: float | None = option(
        None, help="share of the steps that are guided; the others take half the time", minimum=0, maximum=1
    )
    slg_layers: str | None = option(None, help="blocks that are left out in skip-layer guidance, e.g. 4,5,6")
    slg_mode: str | None = option(
        None,
        help="leave them out in a third branch that is led away from (original) or in the one without the prompt",
        choices=("original", "uncond"),
    )
    slg_scale: float = option(3.0, help="how far it is led away, with original")
    slg_start: float = option(0.0, help="share of the steps after which they are left out", minimum=0, maximum=1)
    slg_end: float = option(0.3, help="share of the steps until which they are left out", minimum=0, maximum=1)

    def guidance_steps(self) -> GuidanceSteps:
        """What the options ask for. Raises UserError for a list of blocks that is none."""
        found = GuidanceSteps()
        if self.cfg_skip_mode != "none" and self.cfg_apply_ratio is not None:
            found = replace(found, mode=self.cfg_skip_mode, ratio=self.cfg_apply_ratio)  # type: ignore[arg-type]
        if self.slg_mode is None or self.slg_layers is None:
            return found
        words = [word.strip() for word in self.slg_layers.split(",")]
        if not all(word.isdigit() for word in words):
            raise UserError(f"--slg_layers {self.slg_layers}: numbers of blocks with commas between them, e.g. 4,5,6")
        return replace(
            found,
            layers=tuple(map(int, words)),
            layer_mode=self.slg_mode,  # type: ignore[arg-type]  # a choice of the option
            scale=self.slg_scale,
            start=self.slg_start,
            end=self.slg_end,
        )
