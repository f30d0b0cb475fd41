"""From a checkpoint to a model, one tensor at a time.

The model is built on meta, so it costs nothing; the checkpoint's header says which tensors there are. `materialize`
first settles everything that can fail (`plan`), then streams the data in file order: rows are read into one staging
buffer, merged, quantised or cast, and written to their final place. Peak memory is the model in its final form and a
few megabytes.

A merged weight is rounded to the file's dtype before it is quantised or cast, so loading with an adapter gives to the
bit what merging it into the file first would give.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from musubi_kernels import quantize_fp8
from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.linear import FP8_DTYPES, Fp8Linear, mode_used, scale_shape
from musubi_tuner.weights.keys import Rename, same
from musubi_tuner.weights.place import empty_weight
from musubi_tuner.weights.plan import Placement, model_tensors, plan_loading, slot_of
from musubi_tuner.weights.policy import FP8_FILE_DTYPES, Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Checkpoint

CHUNK_BYTES = 2 << 20
"""Rows are staged in pieces of about this size: small beside any model, large beside the cost of a read."""

Delta = Callable[[int, int], Tensor]
"""(first row, row after the last) -> what to add to these rows, float32."""


class Merge(Protocol):
    """An adapter to add to weights while they are loaded (`adapters.merge.LoraMerge`)."""

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Delta]:
        """The deltas by name of the model's tensors, given all names and shapes. Called once, before any data is
        read; what does not apply is told here (warning or UserError)."""
        ...


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `fp8`: paths of slots that compute in FP8; `kept`: selected for FP8 but not linear layers."""

    tensors: int
    bytes_read: int
    bytes_final: int
    fp8: tuple[str, ...]
    kept: tuple[str, ...]
    merged: tuple[str, ...]
    dropped: tuple[str, ...]
    seconds: float

    def summary(self) -> str:
        """One line for the log."""
        gib = 1 << 30
        text = (
            f"{self.tensors} tensors, {self.bytes_read / gib:.2f} GiB read in {self.seconds:.1f} s, "
            f"{self.bytes_final / gib:.2f} GiB held"
        )
        if self.fp8:
            text += f", {len(self.fp8)} layers in FP8"
        if self.merged:
            text += f", {len(self.merged)} weights merged with adapters"
        return text


def materialize(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    rename: Rename = same,
    policy: WeightPolicy | None = None,
    device: torch.device | str = "cpu",
    host: Sequence[str] = (),
    merge: Sequence[Merge] = (),
    progress: bool = True,
) -> LoadReport:
    """Fill `model` (built on meta) from `checkpoint`, quantising, casting and merging on the way.

    Linears that the policy selects become `nn.linear.Fp8Linear`. All parameters end up frozen
    (`requires_grad=False`); full fine-tuning unfreezes them. Tied parameters stay tied.

    host: paths of modules whose tensors end in host memory; `device` makes them too, a few rows at a time.

    Raises UserError for a file that does not fit (missing, unexpected and misshapen tensors in one error), FP8 files
    that the policy does not allow, inf or NaN in a weight to quantise, and everything that `Checkpoint.read` raises.
    """
    started = time.monotonic()
    policy = policy or WeightPolicy()
    plan = plan_loading(model, checkpoint, rename, policy)
    shapes = {placement.name: placement.info.shape for placement in plan.placements}
    deltas = _bind_all(merge, shapes, frozenset(f"{path}.weight" for path in plan.fp8), plan.placements)
    places = _Places(torch.device(device), tuple(f"{path}." for path in host))
    loader = _Loader(model, checkpoint, policy, places, deltas)
    total = sum(placement.info.nbytes for placement in plan.placements)
    file = checkpoint.header.paths[0].name if checkpoint.header.paths else "weights"
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {file}", disable=not progress) as bar:
        for placement in plan.placements:
            loader.place(placement, bar)
    for path in plan.unit_scales:
        name = f"{path}.scale_weight"
        _set(model, (name,), torch.ones((), device=places.of(name)))
    _require_real(model)
    return LoadReport(
        tensors=len(plan.placements),
        bytes_read=total,
        bytes_final=sum(t.nbytes for t in {id(t): t for t in model_tensors(model).values()}.values()),
        fp8=plan.fp8,
        kept=plan.kept,
        merged=tuple(deltas),
        dropped=plan.dropped,
        seconds=time.monotonic() - started,
    )


def _bind_all(
    merges: Sequence[Merge],
    shapes: Mapping[str, tuple[int, ...]],
    fp8_names: frozenset[str],
    placements: Sequence[Placement],
) -> dict[str, list[Delta]]:
    """Deltas of all adapters by tensor name, in the order given."""
    deltas: dict[str, list[Delta]] = {}
    for adapter in merges:
        for name, delta in adapter.bind(shapes).items():
            deltas.setdefault(name, []).append(delta)
    given = {p.name for p in placements if not p.quantize} & fp8_names & deltas.keys()
    if given:
        raise UserError(
            f"an adapter cannot be merged into weights that the checkpoint holds in FP8 ({len(given)} of them): "
            "give the BF16 checkpoint, or apply the adapter without merging"
        )
    return deltas


@dataclass(frozen=True)
class _Places:
    """Where tensors end: on `device`, but on the host where their name begins with one of `host`."""

    device: torch.device
    host: tuple[str, ...]

    def of(self, name: str) -> torch.device:
        return torch.device("cpu") if name.startswith(self.host) else self.device


class _Loader:
    """Puts tensors in their places; owns the staging buffer."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        policy: WeightPolicy,
        places: _Places,
        deltas: Mapping[str, list[Delta]],
    ) -> None:
        self.model, self.checkpoint, self.policy, self.deltas = model, checkpoint, policy, deltas
        self.places, self.device = places, places.device
        self._staging = torch.empty(0, dtype=torch.uint8)

    def place(self, placement: Placement, bar: Any) -> None:
        """Load one tensor into the model."""
        if placement.quantize:
            assert self.policy.fp8 is not None
            weight, scale = self._quantized(placement, self.policy.fp8, bar)
            place = self.places.of(placement.name)
            _set(self.model, placement.names, weight.to(place))
            _set(self.model, (placement.name.removesuffix(".weight") + ".scale_weight",), scale.to(place))
        else:
            _set(self.model, placement.names, self._cast(placement, bar))

    def _cast(self, placement: Placement, bar: Any) -> Tensor:
        """The tensor in the policy's dtype on the device; codes, scales and integers as they are."""
        info = placement.info
        dtype, place = self._dtype_for(placement), self.places.of(placement.name)
        plain = place.type == "cpu" and dtype == info.dtype and placement.name not in self.deltas
        if plain or not info.shape:
            out = empty_weight(info.shape, info.dtype, "cpu")
            bar.update(info.nbytes)
            return self.checkpoint.read(placement.source, out=out).to(place, dtype)
        result = empty_weight(info.shape, dtype, place)
        through = self.device if placement.name in self.deltas else place
        for first, rows in self._chunks(placement, bar, through):
            result[first : first + len(rows)].copy_(rows)
        return result

    def _dtype_for(self, placement: Placement) -> torch.dtype:
        """FP8 slots and integers keep the file's dtype; the rest takes the policy's."""
        stored = placement.info.dtype
        in_slot = isinstance(slot_of(self.model, placement.name)[0], Fp8Linear)
        if not stored.is_floating_point or (in_slot and not placement.name.endswith(".bias")):
            return stored
        if stored in FP8_FILE_DTYPES:  # an unscaled cast of something that is no linear layer
            return self.policy.dtype or torch.bfloat16
        return self.policy.dtype or stored

    def _quantized(self, placement: Placement, fp8: Fp8Policy, bar: Any) -> tuple[Tensor, Tensor]:
        """FP8 codes and scales, in the layout of the whole tensor however it is chunked."""
        info = placement.info
        if not fp8.scaled:
            return self._plain_fp8(placement, fp8, bar), torch.ones((), device=self.device)
        if mode_used(info.shape, fp8.mode, fp8.block_size) == "tensor":
            whole = torch.empty(info.shape, dtype=info.dtype, device=self.device)
            for first, rows in self._chunks(placement, bar):
                whole[first : first + len(rows)] = rows
            return _quantize_rows(placement, whole, 0, fp8)
        done = self._quantized_by_rows(placement, fp8, None, bar)
        if done is None:  # some float16 scale would be subnormal: the whole tensor takes float32 scales
            done = self._quantized_by_rows(placement, fp8, torch.float32, _NoBar())
        assert done is not None
        return done

    def _quantized_by_rows(
        self, placement: Placement, fp8: Fp8Policy, scale_dtype: torch.dtype | None, bar: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Quantise row chunks into place; None when the chunks' scales do not agree on a dtype."""
        shape = placement.info.shape
        place = self.places.of(placement.name)
        weight = empty_weight(shape, FP8_DTYPES[fp8.fmt], place)
        layout = scale_shape(shape, fp8.mode, fp8.block_size)
        scales = empty_weight(layout, scale_dtype or placement.info.dtype, place)
        agreed = True
        # float16 scales may turn out to need float32; what is on another device is copied there
        straight = weight.device == self.device and scales.dtype != torch.float16
        for first, rows in self._chunks(placement, bar):
            last = first + len(rows)
            out = (weight[first:last], scales[first:last]) if straight else None
            codes, scale = _quantize_rows(placement, rows, first, fp8, scale_dtype=scale_dtype, out=out)
            if not straight:
                agreed = agreed and scale.dtype == scales.dtype
                weight[first:last] = codes
                scales[first:last] = scale
        return (weight, scales) if agreed else None

    def _plain_fp8(self, placement: Placement, fp8: Fp8Policy, bar: Any) -> Tensor:
        """A cast that saturates; the scale is 1."""
        dtype = FP8_DTYPES[fp8.fmt]
        largest = torch.finfo(dtype).max
        weight = empty_weight(placement.info.shape, dtype, self.places.of(placement.name))
        for first, rows in self._chunks(placement, bar):
            _require_finite(placement, rows, first)
            weight[first : first + len(rows)] = rows.float().clamp(-largest, largest).to(dtype)
        return weight

    def _chunks(
        self, placement: Placement, bar: Any, device: torch.device | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) in the file's dtype, adapters merged, on `device` (None: the loader's).

        Valid until the next step.
        """
        info, device = placement.info, device or self.device
        count = info.shape[0]
        row_bytes = info.nbytes // count if count else 0
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        if self._staging.numel() < step * row_bytes:
            self._staging = torch.empty(step * row_bytes, dtype=torch.uint8)
        for first in range(0, count, step):
            last = min(first + step, count)
            out = self._staging[: (last - first) * row_bytes].view(info.dtype).view(last - first, *info.shape[1:])
            rows = self.checkpoint.read(placement.source, slice(first, last), out=out).to(device)
            for delta in self.deltas.get(placement.name, ()):
                rows = rows.float() + delta(first, last).to(device)
            yield first, rows.to(info.dtype)
            bar.update((last - first) * row_bytes)


class _NoBar:
    """Stands for the progress bar where bytes are read a second time."""

    def update(self, count: int) -> None:
        pass


def _quantize_rows(
    placement: Placement,
    rows: Tensor,
    first: int,
    fp8: Fp8Policy,
    *,
    scale_dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows from `first` on, in `out` where that is given."""
    try:
        return quantize_fp8(
            rows,
            mode=fp8.mode,
            block_size=fp8.block_size,
            fmt=fp8.fmt,
            scale_dtype=scale_dtype,
            search=fp8.search,
            out=out,
        )
    except ValueError:
        _require_finite(placement, rows, first)
        raise


def _require_finite(placement: Placement, rows: Tensor, first: int) -> None:
    places = (~torch.isfinite(rows)).nonzero()
    if len(places):
        row, *rest = places[0].tolist()
        raise UserError(
            f"checkpoint {placement.info.file}: {placement.source} holds {rows[tuple(places[0])].item()} at "
            f"{[row + first, *rest]}; a weight to quantize must be finite: download the file again"
        )


def _set(model: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Put `tensor` in the slots `names` (one object for all of them), as parameter or buffer as declared."""
    parameter: nn.Parameter | None = None
    for name in names:
        owner, leaf = slot_of(model, name)
        if leaf in owner._parameters:
            parameter = parameter if parameter is not None else nn.Parameter(tensor, requires_grad=False)
            owner._parameters[leaf] = parameter
        else:
            owner._buffers[leaf] = tensor


def _require_real(model: nn.Module) -> None:
    """What is still on meta is not in the state dictionary, so no file can fill it: a fault of the model's code."""
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"{type(model).__name__}: non-persistent tensors left on meta: {', '.join(left)}")
