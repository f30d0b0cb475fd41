"""FramePack and FramePack-F1: image-to-video in sections, and single pictures from control pictures."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.section_text import Sectioned
from musubi_tuner.families.base import Conditioning, Dit, Encoders, FamilySpec, Item, Tools, Vae
from musubi_tuner.families.framepack import generate, keys, options, predict, text
from musubi_tuner.families.framepack import vae as coding
from musubi_tuner.families.framepack.config import dit_config
from musubi_tuner.families.framepack.model import FramePackModel
from musubi_tuner.families.framepack.spec import MAG_RATIOS, MAG_RATIOS_F1, SPEC, WINDOW
from musubi_tuner.nn.rope import RopeScaling
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.nn.vae.video_kl import SavingOptions
from musubi_tuner.weights.encoders import found_files
from musubi_tuner.weights.reader import Header

log = logging.getLogger(__name__)


class FramePackFamily:
    """The calls of `families.base.Family` and `OwnSampling`; see there."""

    spec: FamilySpec = SPEC
    found_files = staticmethod(found_files)

    def option_groups(self, command: str) -> tuple[type, ...]:
        """Encoders first, then the model where the transformer is loaded."""
        groups: Mapping[str, tuple[type, ...]] = {
            "cache_latents": (options.CacheLatentOptions,),
            "cache_text": (options.CacheTextEncoderOptions,),
            "train": (options.EncodingOptions, options.TrainedModelOptions),
            "generate": (options.GenerationOptions, options.ModelOptions),
        }
        return groups.get(command, ())

    def load_encoders(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Encoders | None:
        """The encoders that `options` name: SigLIP for pictures, LLaVA-Llama-3 and CLIP-L for text."""
        return text.load_encoders(options, device=device, dtype=dtype)

    def load_vae(self, path: str, *, device: torch.device, dtype: torch.dtype, options: Any = None) -> Vae:
        """The causal VAE, with the options' ways to save memory."""
        return coding.load_vae(path, device=device, dtype=dtype, **_vae_settings(options))

    def encode_latents(
        self, items: Sequence[Item], vae: Vae, encoders: Encoders | None = None
    ) -> list[list[dict[str, Tensor]]]:
        """An entry for each section of a clip, for one picture with its controls, or for a request's pictures."""
        if not isinstance(vae, coding.SectionVae):
            raise TypeError(f"FramePack latents are those of its own VAE, not of {type(vae).__name__}")
        picture, chosen = _for_pictures(encoders)
        if items[0].pixels is None:
            return [[coding.request_fields(item, vae, picture)] for item in items]
        if not isinstance(chosen, options.CacheLatentOptions):
            raise TypeError("clips are encoded by the options of the latent cache")
        return coding.training_entries(items, vae, picture, chosen)

    def encode_condition(self, items: Sequence[Item], encoders: Encoders) -> list[dict[str, Tensor]]:
        """Token features with their mask, and the pooled vector, of each caption."""
        if not isinstance(encoders, text.AllEncoders) or encoders.text is None:
            raise UserError("captions need both text encoders: name them with --text_encoder1 and --text_encoder2")
        return encoders.text.encode([item.caption for item in items])

    def build_dit(self, header: Header, config: Mapping[str, Any] | None = None, options: Any = None) -> Dit:
        """The transformer on meta; it keeps the guidance of training, and the rope scaling of sampling."""
        sizes, guidance, scaling = dit_config(header, config), _guidance(options), _rope_scaling(options)
        with torch.device("meta"):
            return FramePackModel(sizes, guidance=guidance, rope_scaling=scaling)

    def rename_dit_key(self, key: str) -> str | None:
        """Wrapper prefixes of repackaged files removed."""
        return keys.rename_dit_key(key)

    def collate(self, entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """See `predict.collate`."""
        return predict.collate(entries)

    def predict(self, dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
        """See `predict.predict`."""
        return predict.predict(dit, x_t, t, cond, run=run)

    def plan(self, options: Any, values: Mapping[str, Any], said: Mapping[str, str]) -> Mapping[str, Any]:
        """See `generate.plan`."""
        return generate.plan(options, values, said)

    def texts(self, prompt: str) -> Sequence[str]:
        """One for each section that has its own."""
        return Sectioned.parse(prompt).values

    def generate(self, options: Any, item: Item, pictures: Mapping[str, Tensor], tools: Tools) -> Tensor:
        """See `generate.generate`."""
        return generate.generate(options, item, pictures, tools)

    def mag_ratios(self, options: Any, model: Any = None) -> tuple[float, ...]:  # noqa: ARG002 the protocol's
        """Of 25 steps, published for each model."""
        return MAG_RATIOS_F1 if options.f1 else MAG_RATIOS


def _vae_settings(chosen: Any) -> dict[str, Any]:
    savings = chosen.savings if isinstance(chosen, SavingOptions) else None
    if not isinstance(chosen, options.EncodingOptions):
        return {"savings": savings, "window": WINDOW}
    return {"savings": savings, "window": None if chosen.bulk_decode else chosen.latent_window_size}


def _for_pictures(encoders: Encoders | None) -> tuple[coding.PictureEncoder, Any]:
    """The picture encoder and the options that it was loaded for. Raises UserError where there is none."""
    if not isinstance(encoders, text.AllEncoders) or encoders.picture is None:
        raise UserError("pictures need SigLIP: name it with --image_encoder")
    return encoders.picture, encoders.options


def _guidance(chosen: Any) -> float:
    """What the guidance input is told in training; said once."""
    if not isinstance(chosen, options.TrainedModelOptions):
        return predict.GUIDANCE_UNIT
    log.info("in training the model is told guidance %g, a thousand times guidance_scale", chosen.guidance)
    return chosen.guidance


def _rope_scaling(chosen: Any) -> RopeScaling | None:
    if not isinstance(chosen, options.ModelOptions) or chosen.rope_scaling_timestep_threshold is None:
        return None
    return RopeScaling(chosen.rope_scaling_timestep_threshold, chosen.rope_scaling_factor)


family = FramePackFamily()
