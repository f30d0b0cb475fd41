"""Models for sampling: found and checked first, loaded when needed, freed when done.

A text encoder may be larger than the transformer, so the two never live together: `encode_prompts` loads the encoders,
turns every distinct prompt into its condition once, and lets go. `open_dit` settles all that a header can tell
(architecture, which LoRA modules fit) while nothing is loaded yet; `load_dit` then streams the weights.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Dit, Encoders, Family, HighNoise, OwnSampling
from musubi_tuner.memory.placement import release
from musubi_tuner.nn.attention import set_mode
from musubi_tuner.nn.experts import Experts, Rest
from musubi_tuner.sampling.request import Request
from musubi_tuner.weights.load import Delta, Merge, materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

log = logging.getLogger(__name__)

OpenOne = Callable[[str, Sequence[Merge]], "OpenDit"]
"""Opens a checkpoint with adapters to merge."""

Prompts = Mapping[str, Mapping[str, Tensor]]
"""The condition of every prompt by its text, as the family's `encode_condition` makes it, on the CPU."""


def captions(family: Family, requests: Iterable[Request]) -> dict[str, Request]:
    """The distinct texts that `requests` need, in order, each with the first that does; negatives only where guidance
    uses them."""
    found: dict[str, Request] = {}
    for request in requests:
        texts = family.texts(request.prompt) if isinstance(family, OwnSampling) else (request.prompt,)
        for text in (*texts, request.negative) if request.guided else texts:
            found.setdefault(text, request)
    return found


@torch.no_grad()
def encode(family: Family, encoders: Encoders, requests: Sequence[Request], *, progress: bool = True) -> Prompts:
    """Conditions of every text in `requests`, by loaded encoders."""
    found: dict[str, Mapping[str, Tensor]] = {}
    wanted = captions(family, requests)
    bar = tqdm(wanted.items(), desc="encoding prompts", unit="prompt", disable=not progress or len(wanted) < 4)
    for text, owner in bar:
        entry = family.encode_condition([owner.item(text)], encoders)[0]
        found[text] = {name: tensor.cpu() for name, tensor in entry.items()}
    return found


def encode_prompts(
    family: Family,
    options: Any,
    requests: Sequence[Request],
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    also: Callable[[Encoders], None] | None = None,
) -> Prompts:
    """Load the encoders that `options` (the family's own group) name, encode, let `also` use them too, free them."""
    encoders = family.load_encoders(options, device=device, dtype=dtype)
    if encoders is None:
        hint = f" with --{fields(options)[0].name}" if is_dataclass(options) else ""
        raise UserError(f"prompts cannot be encoded without {family.spec.name}'s text encoder: name its file{hint}")
    found = encode(family, encoders, requests, progress=progress)
    if also is not None:
        also(encoders)
    del encoders
    release(device)
    return found


def read_model_config(path: str | None) -> Mapping[str, Any] | None:
    """The sizes in a `--model_config` file (a JSON object); None for None. Raises UserError."""
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"--model_config {path} cannot be read: {fault.strerror}") from fault
    except ValueError as fault:
        raise UserError(f"--model_config {path} is not JSON: {fault}") from fault
    if not isinstance(content, dict):
        raise UserError(f"--model_config {path} holds {type(content).__name__}: a JSON object of sizes is needed")
    return content


def weight_policy(
    family: Family, *, fp8: bool, scaled: bool, dtype: torch.dtype | None = None, allow_prequantized: bool = False
) -> WeightPolicy:
    """The policy of `--fp8` and `--fp8_scaled`. Raises UserError for the second without the first."""
    if scaled and not fp8:
        raise UserError("--fp8_scaled chooses how FP8 weights are made: give --fp8 too")
    if not fp8:
        return WeightPolicy(dtype)
    return WeightPolicy(dtype, Fp8Policy(family.spec.fp8, scaled=scaled, allow_prequantized=allow_prequantized))


@dataclass(frozen=True)
class _Bound:
    """An adapter that was matched with the model already, so that its warnings come before the long work and once."""

    deltas: Mapping[str, Delta]

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Delta]:
        if not self.deltas.keys() <= shapes.keys():
            raise RuntimeError("an adapter was matched with another model than the one that is loaded")
        return self.deltas


@dataclass(frozen=True)
class OpenDit:
    """A transformer whose file has been looked at: architecture known, adapters matched, no weight read."""

    family: Family
    path: str
    dit: Dit
    merges: tuple[Merge, ...]

    @property
    def boundary(self) -> float | None:
        """The t from which on another transformer predicts; None: none does."""
        return None

    @property
    def moves(self) -> str | None:
        """The option by which whole transformers come and go."""
        return None

    def load(
        self,
        policy: WeightPolicy,
        device: torch.device,
        *,
        host: Sequence[str] = (),
        progress: bool = True,
        prepare: Callable[[Dit], None] | None = None,
    ) -> Dit:
        """Fill the transformer, adapters merged before quantisation; in evaluation mode. Call it once.

        host: paths of modules whose weights stay in host memory. prepare: done to the filled transformer.
        """
        with open_checkpoint(self.path) as checkpoint:
            report = materialize(
                self.dit,
                checkpoint,
                rename=self.family.rename_dit_key,
                policy=policy,
                device=device,
                host=host,
                merge=self.merges,
                progress=progress,
            )
        log.info("%s: %s", self.path, report.summary())
        if prepare is not None:
            prepare(self.dit)
        return self.dit.eval()


@dataclass
class OpenExperts:
    """Two transformers whose files have been looked at; loaded as one that chooses by noise level (`nn.experts`).

    `dit`, `family` and `path` are those of the one for low noise, like everything that is asked of a model before.
    """

    low: OpenDit
    high: OpenDit
    plan: HighNoise
    again: Callable[[OpenDit], OpenDit]
    """Opens the file of an expert once more."""

    @property
    def boundary(self) -> float | None:
        return self.plan.boundary

    @property
    def moves(self) -> str | None:
        return "lazy_loading" if self.plan.lazy else "offload_inactive_dit" if self.plan.offload else None

    @property
    def family(self) -> Family:
        return self.low.family

    @property
    def path(self) -> str:
        return self.low.path

    @property
    def dit(self) -> Dit:
        return self.low.dit

    def load(
        self,
        policy: WeightPolicy,
        device: torch.device,
        *,
        host: Sequence[str] = (),
        progress: bool = True,
        prepare: Callable[[Dit], None] | None = None,
    ) -> Dit:
        """Both, or with `plan.lazy` each when it is needed; `prepare` is done to each that is loaded."""
        rest: Rest = "nowhere" if self.plan.lazy else "device"
        if self.plan.offload and not self.plan.lazy:
            if device.type == "cpu":
                log.warning("offload_inactive_dit has no effect: the model computes on the CPU")
            else:
                rest = "cpu"

        def load(opened: OpenDit) -> Dit:
            """One expert; `opened` itself stays empty where its weights are to be forgotten."""
            source = self.again(opened) if self.plan.lazy else opened
            return source.load(policy, device, host=host, progress=progress, prepare=prepare)

        loads = partial(load, self.low), partial(load, self.high)
        return Experts(*loads, boundary=self.plan.boundary, device=device, rest=rest).eval()


Opened = OpenDit | OpenExperts


def open_dit(
    family: Family,
    path: str,
    *,
    merges: Sequence[Merge] = (),
    config: Mapping[str, Any] | None = None,
    options: Any = None,
    attn_mode: str = "sdpa",
    split_attn: bool = False,
) -> OpenDit:
    """Build the transformer of a checkpoint on meta and match `merges` with it; `options`: the family's own group.

    Raises UserError for what is no checkpoint of this family, for adapters that do not apply and for an attention
    library that is not installed.
    """
    with open_checkpoint(path) as checkpoint:
        dit = family.build_dit(checkpoint.header, config, options)
    set_mode(dit, attn_mode, split=split_attn)
    shapes = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    return OpenDit(family, path, dit, tuple(_Bound(merge.bind(shapes)) for merge in merges))


def open_experts(low: OpenDit, plan: HighNoise, merges: Sequence[Merge], open_one: OpenOne) -> OpenExperts:
    """Open the transformer for high noise beside `low`, with its adapters. Raises UserError as `open_dit`, and for two
    that are not of one kind.

    open_one: opens a file with these merges as `low` was opened.
    """
    high = open_one(plan.path, merges)
    shapes = [{name: tensor.shape for name, tensor in opened.dit.state_dict().items()} for opened in (low, high)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{low.path} and {high.path} are not two experts of one model: their tensors differ; give the files for "
            "low noise and for high noise of the same model"
        )
    return OpenExperts(low, high, plan, lambda opened: open_one(opened.path, opened.merges))
