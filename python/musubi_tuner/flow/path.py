"""The one flow convention of the house: t in (0, 1], 1 is noise.

    x_t = (1 - t) x0 + t e,    v = dx_t/dt = e - x0

Every family adapts its own clock, sign and packing to this in `predict`; trainer, loss, solvers, guidance and step
caches speak nothing else (rectified flow: Liu et al. 2022; flow matching: Lipman et al. 2022).
"""

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Shape `t: [B]` as `[B, 1, ..., 1]` with the rank, dtype and device of `like`."""
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"t has shape {tuple(t.shape)}: one value per sample is needed, [{like.shape[0]}]")
    return t.to(device=like.device, dtype=like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t e for `x0, noise: [B, ...]`, `t: [B]`."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The regression target v = e - x0, of the shape of `x0`."""
    return noise - x0


def clean(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean sample that `v` points to from `x_t`: x0 = x_t - t v."""
    return x_t - expand(t, x_t) * v
