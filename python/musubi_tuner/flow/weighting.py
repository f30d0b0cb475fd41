"""Loss weights w(t): how much the squared error at a noise level counts.

A table of pure functions `t -> w`, t in (0, 1] with 1 = noise; `None` stands for w = 1. The schemes that shape the
sampling of t instead (`logit_normal`, `mode`) weigh nothing here: they live in `flow.timesteps`.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

Weight = Callable[[Tensor], Tensor]


def sigma_sqrt(t: Tensor) -> Tensor:
    """w = t^-2."""
    return t**-2.0


def cosmap(t: Tensor) -> Tensor:
    """w = 2 / (pi (1 - 2t + 2t^2)), the density of the cosine schedule in t (Esser et al. 2024, section 3.1)."""
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


WEIGHTS: Mapping[str, Weight | None] = {
    "none": None,
    "logit_normal": None,
    "mode": None,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
}
"""By the names of `--weighting_scheme`."""
