"""LoRA files as users have them: from the keys of any known spelling to factors by module path.

A key is a module name and a suffix. Suffixes come in pairs of conventions (`lora_down`/`lora_up`, `lora_A`/`lora_B`
and older ones), with `.alpha`, `.diff`/`.diff_b` for whole deltas, and the factors of LoHa and LoKr (`products`).
Names are dotted paths or paths with every dot an underscore, behind one of the prefixes that trainers and runtimes use.
Underscored names are resolved against the model's real paths, never by guessing dots.

What matches no module, or is of a kind that is not read here, is listed; the caller decides what that means.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from musubi_tuner.adapters import products
from musubi_tuner.config.errors import UserError
from musubi_tuner.weights.sources import some

_log = logging.getLogger(__name__)

PREFIX = "lora_unet_"
"""Our own files: prefix + path with dots as underscores."""

_PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_PARTS: Mapping[str, str] = {
    **{down: "down" for down, _ in _PAIRS},
    **{up: "up" for _, up in _PAIRS},
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    **{f".{part}": part for part in (*products.PARTS, *products.TUCKER)},
}
_SUFFIXES = sorted(_PARTS, key=len, reverse=True)
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet__",
    PREFIX,
    "lycoris_",
)
_AXES = 2
"""A weight with factors has at least its two axes, out and in."""


@dataclass(frozen=True)
class Factors:
    """One module's adapter. down `[rank, in]`, up `[out, rank]`; diff and diff_b are added to weight and bias.

    product: of factors of another kind (LoHa, LoKr), which can be merged only.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    diff: Tensor | None = None
    diff_b: Tensor | None = None
    product: products.Product | None = None

    @property
    def changes_weight(self) -> bool:
        """False for an adapter of the bias alone."""
        return self.down is not None or self.diff is not None or self.product is not None

    @property
    def only_merges(self) -> bool:
        """True for what a module beside the weight cannot hold: whole deltas, products, biases."""
        return self.down is None or any(part is not None for part in (self.diff, self.diff_b, self.product))

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without an alpha (or with alpha 0)."""
        return self.alpha / self.rank if self.alpha and self.rank else 1.0

    def delta(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of what is added to the weight at multiplier 1, float32."""
        parts = []
        if self.up is not None and self.down is not None:
            product = self.up[first:last].float().flatten(1) @ self.down.float().flatten(1)
            parts.append(self.scale * product.reshape(-1, *self.down.shape[1:]))
        if self.diff is not None:
            parts.append(self.diff[first:last].float())
        if self.product is not None:
            if last is None:
                raise ValueError("rows of a product are asked for by their first and last")
            parts.append(self.product.rows(first, last))
        if not parts:
            raise ValueError("these factors change no weight")
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class Resolved:
    """Factors by module path, and the keys of the file that found no module or are of a kind not read."""

    modules: Mapping[str, Factors]
    unmatched: tuple[str, ...] = ()
    misfits: tuple[str, ...] = field(default=())
    """Modules whose factors have the wrong shape, each with the reason."""


def lora_name(path: str, prefix: str = PREFIX) -> str:
    """The name of module `path` in our files."""
    return prefix + path.replace(".", "_")


def resolve(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Resolved:
    """Sort a file's tensors to the modules of a model. shapes: module path -> weight shape `[out, in]`."""
    underscored = _underscored(shapes)
    parts: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unmatched: list[str] = []
    for key, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        path = None if suffix is None else _path_of(key.removesuffix(suffix), shapes, underscored)
        if path is None or suffix is None:
            unmatched.append(key)
            continue
        part = _PARTS[suffix]
        if part in parts.setdefault(path, {}):
            raise UserError(f"LoRA file: module {path} has its {part!r} twice, under two spellings ({key!r})")
        parts[path][part] = tensor
        keys.setdefault(path, []).append(key)
    modules: dict[str, Factors] = {}
    misfits: list[str] = []
    for path, found in parts.items():
        alpha = float(found["alpha"]) if "alpha" in found else None
        try:
            product = products.product_of(found, alpha, shapes[path])
            _check_fit(found, shapes[path])
        except ValueError as reason:
            misfits.append(f"{path} ({reason})")
            continue
        if found.keys() == {"alpha"}:
            unmatched += keys[path]
        else:
            down, up, diff, diff_b = (found.get(part) for part in ("down", "up", "diff", "diff_b"))
            modules[path] = Factors(down, up, alpha, diff, diff_b, product)
    return Resolved(modules, tuple(unmatched), tuple(misfits))


def _underscored(paths: Iterable[str]) -> dict[str, str]:
    """Path with dots as underscores -> path. Two paths of one spelling are a fault of the model."""
    table: dict[str, str] = {}
    for path in paths:
        name = path.replace(".", "_")
        if name in table:
            raise ValueError(f"modules {table[name]} and {path} have one LoRA name, {name}")
        table[name] = path
    return table


def _path_of(name: str, paths: Mapping[str, object], underscored: Mapping[str, str]) -> str | None:
    for prefix in (*_PREFIXES, ""):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            if rest in paths:
                return rest
            if rest in underscored:
                return underscored[rest]
    return None


def _check_fit(found: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raises ValueError with the reason why these tensors do not fit a weight of `shape`."""
    down, up, diff, bias = (found.get(part) for part in ("down", "up", "diff", "diff_b"))
    reason = None
    if (down is None) != (up is None):
        reason = f"only its {'up' if down is None else 'down'} factor is there"
    elif down is not None and up is not None and not _is_low_rank(down, up, shape):
        reason = f"down {list(down.shape)} and up {list(up.shape)} for a weight {list(shape)}"
    elif diff is not None and tuple(diff.shape) != shape:
        reason = f"diff {list(diff.shape)} for a weight {list(shape)}"
    elif bias is not None and tuple(bias.shape) != shape[:1]:
        reason = f"diff_b {list(bias.shape)} for {shape[0]} outputs"
    elif not all(t.dtype.is_floating_point for name, t in found.items() if name != "alpha"):
        reason = "factors that are not floating point"
    if reason:
        raise ValueError(reason)


def _is_low_rank(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> bool:
    """down `[rank, in, *kernel]`, up `[out, rank, 1...]`: linear layers, and convolutions with a 1 x 1 up factor."""
    if not down.dim() == up.dim() == len(shape) >= _AXES:
        return False
    return tuple(down.shape[1:]) == shape[1:] and tuple(up.shape) == (shape[0], down.shape[0], *(1,) * (up.dim() - 2))


def require_applicable(found: Resolved, label: str, paths: Iterable[str], *, strict: bool) -> None:
    """Tell what of a LoRA file does not apply: one warning; an error with `strict`, and always when nothing applies.

    label: the file, for the message. paths: the model's modules, of which some are named where nothing applies.
    """
    left = [*found.unmatched, *found.misfits]
    if not found.modules:
        raise UserError(
            f"LoRA {label}: none of its {len(left)} entries fits this model; it has {some(left, 3)}, "
            f"the model {some(map(lora_name, paths), 3)}: is it a LoRA of another family?"
        )
    if not left:
        return
    told = f"LoRA {label}: {len(left)} entries do not apply to this model: {some(left)}"
    if strict:
        raise UserError(f"{told}; use a LoRA of this model")
    _log.warning("%s; %d modules apply", told, len(found.modules))


def is_adapter_file(keys: Iterable[str]) -> bool:
    """True where at least one key looks like a factor of an adapter that is read here."""
    return any(key.endswith(tuple(_SUFFIXES)) for key in keys)
