"""What a model family is to the rest of the house: a frozen `FamilySpec` of facts and a `Family` of nine calls.

Shared code (data, sampling, training) sees this file only. A family is a folder `families/<name>/` whose package
exposes `family: Family`; `families.registry` finds it by folder. There is no base trainer class: everything that
differs between families is either a fact here or one of the calls below.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from musubi_tuner.config.guidance_steps import GuidanceSteps
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.weights.reader import Header

Conditioning = Mapping[str, Any]
"""Named tensors (or lists of ragged tensors) that `predict` reads; made by `collate`, opaque to shared code."""


@dataclass(frozen=True)
class LatentGeometry:
    """Size of the latent grid: pixels `[3, F, H, W]` become `[channels, (F-1)/temporal + 1, H/spatial, W/spatial]`."""

    channels: int
    spatial: int
    temporal: int
    patch: tuple[int, int, int]
    """Patch of the transformer in latent cells (frames, rows, columns)."""

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent shape [C, F, H, W] of a clip of `frames` x `height` x `width` pixels."""
        step_h, step_w = self.spatial * self.patch[1], self.spatial * self.patch[2]
        if (frames - 1) % self.temporal or height % step_h or width % step_w or min(frames, height, width) < 1:
            raise ValueError(
                f"clip of {frames} frames, {height} x {width} pixels (height x width): frames must be "
                f"1 + {self.temporal} k, height a multiple of {step_h}, width of {step_w}"
            )
        return (self.channels, (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial)


@dataclass(frozen=True)
class AdapterTargets:
    """Default LoRA targets: every Linear inside modules of `block_classes` whose dotted path no `exclude` matches."""

    block_classes: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    """Regular expressions, matched in full against the dotted module path."""


@dataclass(frozen=True)
class Fp8Targets:
    """Which checkpoint keys become FP8: `.weight` keys that hold an `include` and no `exclude` substring."""

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheField:
    """One tensor of a cache file: its name in shared code and in `Conditioning`, and its key in the file.

    layout: `video` -> `<key>_<F>x<H>x<W>_<dtype>` with the tensor's own size, `history` -> the same with the size of
    `latents` in place of its own, `image` -> like `video`, stored as `[C, H, W]` and given to shared code as
    `[C, 1, H, W]`; `varlen` -> `varlen_<key>_<dtype>`, `plain` -> `<key>_<dtype>`, `mask` -> `<key>`.
    The field named `latents` is the training target, `[C, F, H, W]`.
    """

    name: str
    key: str
    layout: Literal["video", "history", "image", "varlen", "plain", "mask"]
    file: Literal["latent", "text"]
    required: bool = True
    numbered: bool = False
    """Several of a kind: names `<name>_0`, `<name>_1`, ..., keys `<key>_0...`, `<key>_1...`."""
    factor: float = 1.0
    """What the file's tensor is multiplied by when it is read: from the file's scale to the transformer's."""


@dataclass(frozen=True)
class SamplingDefaults:
    """What generation uses when the user says nothing."""

    steps: int
    guidance: float
    embedded_guidance: float | None = None
    """Guidance that the transformer is told as an input; None: it has no such input."""
    shift: float | None = None
    solver: str = "unipc"
    size: tuple[int, int] = (256, 256)
    """Width, height in pixels."""
    frames: int = 81
    fps: int = 16
    boundary: float | None = None
    """Of a model of two experts: the t from which on the one for high noise predicts."""
    guidance_high: float | None = None
    """Guidance where that one predicts."""
    shifts: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Shifts of pictures of certain sizes (width, height), in place of `shift`."""

    def shift_of(self, width: int, height: int) -> float | None:
        """The shift at this size, whichever way it is turned."""
        return self.shifts.get((width, height), self.shifts.get((height, width), self.shift))


@dataclass(frozen=True)
class FamilySpec:
    """Facts of a family. Anything that computes belongs in `Family`."""

    name: str
    """Folder name and name on the command line."""
    cache_tag: str
    """Architecture part of cache file names, e.g. `wan`."""
    architecture: str
    """`architecture` in cache metadata."""
    base_model_version: str
    """`ss_base_model_version` of LoRA files."""
    modelspec_architecture: str
    modelspec_implementation: str
    latents: LatentGeometry
    adapter: AdapterTargets
    network_module: str
    """Established name of the LoRA module, e.g. `networks.lora_wan`."""
    fp8: Fp8Targets
    blocks: tuple[str, ...]
    """Attribute names of the transformer's block lists, in running order."""
    cache_fields: tuple[CacheField, ...]
    tasks: Mapping[str, SamplingDefaults]
    """`--task` values with their sampling defaults."""
    default_task: str
    inputs: tuple[str, ...] = ()
    """Modules of the transformer that make tokens of latents and text, called before the blocks."""
    target_fps: float | None = None
    """Frame rate that training clips are brought to."""
    resolution_step: int = 16
    takes_pictures: tuple[str, ...] = ()
    """What a request may come with, by role: the pictures `start`, `end`, `control`, and a clip, `control_clip`."""
    reads_controls: bool = False
    """Whether items' controls are encoded, any number of them, though no cache field named `control` says so."""
    control_masks: bool = False
    """Whether the opacity of a control says what of it counts (`Item.masks`)."""
    dataset_keys: tuple[str, ...] = ()
    """Keys of a dataset file that only this family gives a meaning to (`Item.said`); see `data.spec_keys.SPECIAL`."""
    text_sees_controls: bool = False
    """Whether `encode_condition` looks at the items' controls, so that the text cache depends on them."""
    modelspec_resolution: str = "1280x720"
    option_defaults: Mapping[str, object] = field(default_factory=dict)
    """Option defaults that differ from the house's, by option name."""


@dataclass(frozen=True)
class Item:
    """One thing to encode: a training item, a preview or a generation request (then `pixels` is None).

    pixels: `[C, F, H, W]` float32 in [-1, 1], already cropped to its bucket; several target pictures of one item lie
    on F. controls: same layout, any sizes.
    masks: where the spec has `control_masks`, of each control `[1, F, H, W]` float32 in [0, 1], None for an opaque one.
    roles: of a request, what each control is: `start`, `end`, `control`, or `control_clip` of its length.
    said: what the dataset file says to this family alone, by its `dataset_keys`, lists as tuples; of a request, what
    its prompt line says to it.
    """

    caption: str
    pixels: Tensor | None = None
    controls: tuple[Tensor, ...] = ()
    frames: int = 1
    height: int = 0
    width: int = 0
    roles: tuple[str, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)


class Encoders(Protocol):
    """Text encoders, image encoders and tokenizers: whatever the family has; opaque to shared code."""

    def to(self, device: torch.device) -> "Encoders": ...


class Vae(Protocol):
    """Pixels `[B, 3, F, H, W]` in [-1, 1] <-> latents `[B, C, F', H', W']` in the scale that the DiT is trained on."""

    def to(self, device: torch.device) -> "Vae": ...
    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


Dit = nn.Module
"""A transformer: embed -> run(blocks, h, ctx) -> head; `forward` takes `run`. Block lists are named in the spec."""


@runtime_checkable
class FindsFiles(Protocol):
    """A family that reads files which no option need name: tokenizers beside an encoder, say."""

    def found_files(self, options: Any) -> Mapping[str, Path]:
        """Such files by option name, for the options that a cache command hands to `load_encoders`; caches depend on
        them. Nothing large is read. UserError where one is needed and not there."""
        ...


@runtime_checkable
class Family(Protocol):
    """The calls. `options` arguments are the family's own frozen option dataclass (`option_groups`)."""

    spec: FamilySpec

    def option_groups(self, command: str) -> tuple[type, ...]:
        """The family's own option dataclasses for `cache_latents`, `cache_text`, `train`, `generate`.

        The first one is what `load_encoders` and `load_vae` are handed for that command, the second one, if there
        is any, what `build_dit` is handed.
        """
        ...

    def load_encoders(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Encoders | None:
        """The encoders that `options` ask for: text encoders for `cache_text`, image encoders (if the family has
        any) for `cache_latents`, both for `train` (previews) and `generate`. None: nothing is needed."""
        ...

    def load_vae(self, path: str, *, device: torch.device, dtype: torch.dtype, options: Any = None) -> Vae: ...

    def encode_latents(
        self, items: Sequence[Item], vae: Vae, encoders: Encoders | None = None
    ) -> list[list[dict[str, Tensor]]]:
        """For items of one shape: the latent cache entries of each item, by `CacheField.name`.

        Most families make one entry of an item; a sectioned family makes one of each section, in order. Of a request
        with pictures (no `pixels`, but `controls`) it is one entry of what sampling needs, by names of the family's.
        """
        ...

    def encode_condition(self, items: Sequence[Item], encoders: Encoders) -> list[dict[str, Tensor]]:
        """What the text cache holds, by `CacheField.name`; may look at the items' images."""
        ...

    def build_dit(self, header: Header, config: Mapping[str, Any] | None = None, options: Any = None) -> Dit:
        """The transformer on the meta device; sizes from `config`, metadata `musubi.config` or the shapes.

        What else `options` ask of the model (what it is told in training, say) is kept on the model.
        """
        ...

    def rename_dit_key(self, key: str) -> str | None:
        """Module path of a checkpoint key (prefixes of repackaged files removed); None: the key is dropped."""
        ...

    def collate(self, entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Pad or mask ragged tensors of a batch, by field name.

        In training an entry has all fields of both caches; `latents` is stacked by the caller, and here only to be
        looked at (a first frame). In sampling it has what `encode_condition` gave and, where the task has embedded
        guidance, the scalar `guidance`.
        """
        ...

    def predict(self, dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
        """Velocity `[B, C, F, H, W]` at `x_t: [B, C, F, H, W]`, `t: [B]` in (0, 1] (float32 or float64)."""
        ...


@dataclass(frozen=True)
class Tools:
    """What a family that samples in its own way is handed for one request.

    denoise: noise `[C, F, H, W]`, the fields of this run (they join the text's) and which of the request's texts it is
    told -> latents of that shape, float32 on the CPU; schedule, solver, guidance and step cache are bound already, and
    begin anew in each call.
    draw: standard normal numbers of a shape, from the request's seed, one after the other.
    """

    denoise: Callable[[Tensor, Mapping[str, Tensor], str], Tensor]
    draw: Callable[[Sequence[int]], Tensor]


@runtime_checkable
class OwnSampling(Protocol):
    """The calls of a family whose sampling is not one loop of denoising; a family without them gets that loop."""

    def plan(self, options: Any, values: Mapping[str, Any], said: Mapping[str, str]) -> Mapping[str, Any]:
        """Values of a request (`frames`, `shift`, `solver`, ...) in place of `values`, where None means not given.

        options: the family's first own group of the command. said: what the prompt's entry says to this family alone;
        `said` among the values returned joins it. Raises UserError for what cannot be made.
        """
        ...

    def texts(self, prompt: str) -> Sequence[str]:
        """The texts that a prompt holds, one for each part of what is sampled; most hold one, themselves."""
        ...

    def generate(self, options: Any, item: Item, pictures: Mapping[str, Tensor], tools: Tools) -> Tensor:
        """Latents `[C, F, H, W]` of a request, `pictures` being what `encode_latents` made of its controls."""
        ...


@dataclass(frozen=True)
class HighNoise:
    """A second transformer, for t from `boundary` on, and what is asked for it alone.

    path: its checkpoint. offload: whichever does not predict rests on the CPU. lazy: it is not even loaded.
    lora_weight, lora_multiplier: adapters to merge into it, in generation. guidance: where it predicts.
    """

    path: str
    boundary: float
    offload: bool = False
    lazy: bool = False
    lora_weight: tuple[str, ...] = ()
    lora_multiplier: tuple[float, ...] = ()
    guidance: float | None = None


@runtime_checkable
class HasFolder(Protocol):
    """The call of a family whose models are published in folders that its command can be given."""

    def in_folder(self, options: Any) -> Mapping[str, str]:
        """Files by the options that they are for, of the folder that `options`, the group of the model, name; these
        options may belong to any group. Raises UserError."""
        ...


@runtime_checkable
class HasExperts(Protocol):
    """The call of a family with models of two transformers that share the noise levels (`nn.experts`)."""

    def high_noise(self, options: Any) -> HighNoise | None:
        """The second transformer that `options`, the family's group of the model, name; None: there is one alone.

        Raises UserError for what cannot go together.
        """
        ...

    def without_effect(self, options: Any) -> Sequence[str]:
        """A sentence for each of these options that was given and changes nothing."""
        ...


@runtime_checkable
class HasGuidanceSteps(Protocol):
    """The call of a family whose command has options of this kind."""

    def guidance_steps(self, options: Any) -> GuidanceSteps:
        """What `options`, the family's group of the model, ask for. Raises UserError for what cannot be."""
        ...


@dataclass(frozen=True)
class MagRatios:
    """Measured ratios, one a step. without: of the branch without the prompt, where they differ.

    high_computed: every step of the transformer for high noise is computed.
    """

    ratios: tuple[float, ...]
    without: tuple[float, ...] | None = None
    high_computed: bool = False


@runtime_checkable
class HasMagRatios(Protocol):
    """The call of a family whose change of the blocks from step to step was measured (`sampling.step_cache`)."""

    def mag_ratios(self, options: Any, model: Any = None) -> tuple[float, ...] | MagRatios | None:
        """The ratios of the model that the family's own groups, the first and that of the model, ask for, one a step;
        None: this one was not measured."""
        ...
