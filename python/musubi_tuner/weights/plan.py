"""Everything about a load that can be settled before data is read: which slot each tensor of a file goes to.

`plan_loading` renames keys, puts `Fp8Linear` slots in the model, and compares the file with the model: what is
missing, unexpected or of another shape is told in one error. The result is a list of placements in file order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.linear import fp8_slot, replace_linears
from musubi_tuner.weights.keys import Rename
from musubi_tuner.weights.policy import FP8_FILE_DTYPES, Fp8Policy, WeightPolicy, read_stamp
from musubi_tuner.weights.reader import Checkpoint, Header, TensorInfo
from musubi_tuner.weights.sources import some

_QUANTIZABLE = (torch.bfloat16, torch.float16, torch.float32)
_FOREIGN_SCALE = ".weight_scale"
_FOREIGN_EXTRAS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


@dataclass(frozen=True)
class Placement:
    """One tensor's way: from `source` in the file to `names` in the model (several where weights are tied)."""

    source: str
    info: TensorInfo
    names: tuple[str, ...]
    quantize: bool

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Plan:
    """placements: in file order. unit_scales: slots of FP8 weights that a file of another tool leaves unscaled."""

    placements: tuple[Placement, ...]
    fp8: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    unit_scales: tuple[str, ...]


def plan_loading(model: nn.Module, checkpoint: Checkpoint, rename: Rename, policy: WeightPolicy) -> Plan:
    """Put FP8 slots in `model` (on meta) and find the place of every tensor. Raises UserError as described above."""
    header = checkpoint.header
    sources, dropped = _rename_all(header, rename)
    quantized = {
        name: key
        for name, key in sources.items()
        if header.tensors[key].dtype in FP8_FILE_DTYPES and not name.endswith(_FOREIGN_EXTRAS)
    }
    unit_scales: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    if quantized:
        _allow_quantized_file(header, quantized, policy)
        sources, more = _read_foreign_names(sources)
        dropped += more
        given, unit_scales = _place_given_slots(model, header, sources, quantized)
    elif policy.fp8 is not None:
        fresh = _place_fresh_slots(model, policy.fp8, sources, header)
    computed = {f"{path}.scale_weight" for path in (*fresh, *unit_scales)}
    groups = _tied_groups(model)
    _require_complete(model, header, sources, groups, computed)
    placements = [
        Placement(key, header.tensors[key], groups[name], quantize=name.removesuffix(".weight") in set(fresh))
        for name, key in sources.items()
    ]
    files = {path: number for number, path in enumerate(header.paths)}
    placements.sort(key=lambda p: (files[p.info.file], p.info.start))
    kept = _kept(policy.fp8, sources, fresh) if not quantized else ()
    return Plan(tuple(placements), given or fresh, kept, tuple(dropped), unit_scales)


def _rename_all(header: Header, rename: Rename) -> tuple[dict[str, str], list[str]]:
    """Model name -> file key, and the file keys that are not wanted."""
    sources: dict[str, str] = {}
    dropped: list[str] = []
    for key in header.tensors:
        name = rename(key)
        if name is None:
            dropped.append(key)
        elif name in sources:
            raise UserError(
                f"checkpoint {_file(header)}: {key!r} and {sources[name]!r} are both {name!r}; it mixes two layouts"
            )
        else:
            sources[name] = key
    return sources, dropped


def _place_fresh_slots(model: nn.Module, fp8: Fp8Policy, sources: Mapping[str, str], header: Header) -> tuple[str, ...]:
    """FP8 slots for the linears that the policy selects; scales take the file's dtype."""

    def build(path: str, linear: nn.Linear) -> nn.Module:
        dtype = header.tensors[sources[f"{path}.weight"]].dtype
        mode = fp8.mode if fp8.scaled else "tensor"
        return fp8_slot(linear, mode=mode, block_size=fp8.block_size, fmt=fp8.fmt, scale_dtype=dtype)

    def select(path: str, _: nn.Linear) -> bool:
        key = sources.get(f"{path}.weight")
        return fp8.selects(f"{path}.weight") and key is not None and header.tensors[key].dtype in _QUANTIZABLE

    return replace_linears(model, select, build)


def _allow_quantized_file(header: Header, quantized: Mapping[str, str], policy: WeightPolicy) -> None:
    """Refuse FP8 weights that nobody asked for, or that are not ours."""
    file, count = _file(header), len(quantized)
    stamp = read_stamp(header.metadata, file)
    if policy.fp8 is None:
        raise UserError(
            f"checkpoint {file} holds {count} FP8 weights: add --fp8_base --fp8_scaled (--fp8 --fp8_scaled "
            "for inference), or give the BF16 release"
        )
    if stamp is None and not policy.fp8.allow_prequantized:
        raise UserError(
            f"checkpoint {file} holds {count} FP8 weights that another tool quantized "
            f"(first: {next(iter(quantized.values()))}): give the BF16 or FP16 release, or add --allow_prequantized "
            "to use them as they are"
        )


def _read_foreign_names(sources: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Other tools' names of scales become ours; activation scales and markers are dropped."""
    ours: dict[str, str] = {}
    dropped: list[str] = []
    for name, key in sources.items():
        if name.endswith(_FOREIGN_EXTRAS):
            dropped.append(key)
        elif name.endswith(_FOREIGN_SCALE):
            ours[name.removesuffix(_FOREIGN_SCALE) + ".scale_weight"] = key
        else:
            ours[name] = key
    return ours, dropped


def _place_given_slots(
    model: nn.Module, header: Header, sources: Mapping[str, str], quantized: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Slots with the file's own formats and scale shapes: all their paths, and those without a scale (it is 1)."""
    unscaled: list[str] = []
    # FP8 tensors of other kinds are cast back by the loader; a scale for one has no place in the model and is told

    def build(path: str, linear: nn.Linear) -> nn.Module:
        fmt = "e5m2" if header.tensors[quantized[f"{path}.weight"]].dtype == torch.float8_e5m2 else "e4m3"
        slot = fp8_slot(linear, mode="tensor", fmt=fmt)
        key = sources.get(f"{path}.scale_weight")
        if key is None:
            unscaled.append(path)
            return slot
        scale = header.tensors[key]
        _check_given_scale(path, linear, scale)
        slot.scale_weight = torch.empty(scale.shape, dtype=scale.dtype, device=slot.weight.device)
        return slot

    placed = replace_linears(model, lambda path, _: f"{path}.weight" in quantized, build)
    return placed, tuple(unscaled)


def _check_given_scale(path: str, linear: nn.Linear, scale: TensorInfo) -> None:
    rows, columns = linear.out_features, linear.in_features
    blocks = scale.shape[1] if len(scale.shape) == 3 else 1
    allowed: list[tuple[int, ...]] = [(), (1,), (rows, 1)]
    if blocks and columns % blocks == 0:
        allowed.append((rows, blocks, 1))
    if scale.shape not in allowed:
        raise UserError(
            f"checkpoint {scale.file}: the scale of {path} has shape {list(scale.shape)}; for a weight "
            f"[{rows}, {columns}] it must be [], [1], [{rows}, 1] or [{rows}, {columns} / block, 1]"
        )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names."""
    return dict(model.state_dict(keep_vars=True))


def _tied_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Each name -> all names of the same tensor, its own first."""
    by_id: dict[int, list[str]] = {}
    tensors = model_tensors(model)
    for name, tensor in tensors.items():
        by_id.setdefault(id(tensor), []).append(name)
    return {name: (name, *(n for n in by_id[id(t)] if n != name)) for name, t in tensors.items()}


def _require_complete(
    model: nn.Module,
    header: Header,
    sources: Mapping[str, str],
    groups: Mapping[str, tuple[str, ...]],
    computed: set[str],
) -> None:
    tensors = model_tensors(model)
    wanted = tensors.keys() - computed
    missing = [n for n in tensors if n in wanted and not any(other in sources for other in groups[n])]
    unexpected = [name for name in sources if name not in wanted]
    shapes = [
        f"{name} (file {list(header.tensors[key].shape)}, model {list(tensors[name].shape)})"
        for name, key in sources.items()
        if name in wanted and header.tensors[key].shape != tuple(tensors[name].shape)
    ]
    if not (missing or unexpected or shapes):
        return
    parts: Sequence[tuple[list[str], str]] = (
        (missing, "missing"),
        (unexpected, "unexpected"),
        (shapes, "of another shape"),
    )
    told = "; ".join(f"{len(names)} tensors {what}: {some(names)}" for names, what in parts if names)
    fitting = len(wanted) - len(missing) - len(shapes)
    hint = "it is a file of another model or family" if 2 * fitting < len(wanted) else "it is incomplete or modified"
    raise UserError(f"checkpoint {_file(header)} does not fit {type(model).__name__}, {hint}: {told}")


def _kept(fp8: Fp8Policy | None, sources: Mapping[str, str], fresh: tuple[str, ...]) -> tuple[str, ...]:
    """Weights that the patterns select but that are no linear slots."""
    if fp8 is None:
        return ()
    slots = {f"{path}.weight" for path in fresh}
    return tuple(name for name in sources if fp8.selects(name) and name not in slots)


def _file(header: Header) -> str:
    if not header.paths:
        return "(no file)"
    return str(header.paths[0]) if len(header.paths) == 1 else f"{header.paths[0]} (+{len(header.paths) - 1} parts)"


def slot_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns tensor `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
