"""Wan 2.1 and 2.2: text, pictures, control clips to video, and text to image; one transformer or two experts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.guidance_steps import GuidanceSteps
from musubi_tuner.families.base import Conditioning, Dit, Encoders, FamilySpec, HighNoise, Item, MagRatios, Vae
from musubi_tuner.families.wan import experts, keys, options, predict
from musubi_tuner.families.wan import vae as coding
from musubi_tuner.families.wan.config import check_task, wan_config
from musubi_tuner.families.wan.model import WanModel
from musubi_tuner.families.wan.options import (
    CacheLatentOptions,
    CacheTextEncoderOptions,
    EncodingOptions,
    GenerationModelOptions,
)
from musubi_tuner.families.wan.spec import OFFICIAL_FILES, SPEC, mag_ratios
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.weights.clip_vision import load_clip_vision
from musubi_tuner.weights.encoders import TextAndPicture
from musubi_tuner.weights.folder import files_in
from musubi_tuner.weights.reader import Header
from musubi_tuner.weights.umt5 import load_text_encoder, tokenizer_file


class WanFamily:
    """The calls of `families.base.Family`; see there."""

    spec: FamilySpec = SPEC

    def option_groups(self, command: str) -> tuple[type, ...]:
        """Encoder options where something is encoded, model options where the transformer is loaded."""
        groups: Mapping[str, tuple[type, ...]] = {
            "cache_latents": (options.CacheLatentOptions,),
            "cache_text": (options.CacheTextEncoderOptions,),
            "train": (options.EncodingOptions, options.ModelOptions),
            "generate": (options.GenerationOptions, options.GenerationModelOptions),
        }
        return groups.get(command, ())

    def load_encoders(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Encoders | None:
        """umt5 and CLIP's picture tower, where `options` name them; the latent cache has use for its options alone."""
        found = TextAndPicture(options)
        if isinstance(options, (CacheTextEncoderOptions, EncodingOptions)) and options.t5:
            words, fp8 = options.t5_tokenizer, options.fp8_t5
            found.text = load_text_encoder(options.t5, words, fp8=fp8, device=device, dtype=dtype)
        if isinstance(options, (CacheLatentOptions, EncodingOptions)) and options.clip:
            found.picture = load_clip_vision(options.clip, device=device, dtype=dtype)
        return found if found.text or found.picture or isinstance(options, CacheLatentOptions) else None

    def found_files(self, options: Any) -> Mapping[str, Path]:
        """The tokenizer, named or found beside umt5."""
        if not isinstance(options, CacheTextEncoderOptions) or not Path(options.t5).exists():
            return {}  # loading says what is wrong
        return {"t5_tokenizer": tokenizer_file(options.t5, options.t5_tokenizer)}

    def load_vae(self, path: str, *, device: torch.device, dtype: torch.dtype, options: Any = None) -> Vae:
        """The causal VAE."""
        known = isinstance(options, (CacheLatentOptions, EncodingOptions))
        return coding.load_vae(path, device=device, dtype=dtype, cache_on_cpu=known and options.vae_cache_cpu)

    def encode_latents(
        self, items: Sequence[Item], vae: Vae, encoders: Encoders | None = None
    ) -> list[list[dict[str, Tensor]]]:
        """One entry per item: latents, with what the options ask for of given frames and controls."""
        return coding.encoded(items, vae, encoders)

    def encode_condition(self, items: Sequence[Item], encoders: Encoders) -> list[dict[str, Tensor]]:
        """Text features of each caption."""
        if not isinstance(encoders, TextAndPicture) or encoders.text is None:
            raise UserError("captions need the text encoder umt5: name it with --t5")
        return [{"text": row} for row in encoders.text.encode([item.caption for item in items])]

    def build_dit(self, header: Header, config: Mapping[str, Any] | None = None, options: Any = None) -> Dit:
        """The transformer on meta. UserError where `options.task` names a published model of another kind or size."""
        sizes = wan_config(header, config)
        if options is not None:
            check_task(options.task, sizes, header.paths[0])
        with torch.device("meta"):
            return WanModel(sizes)

    def rename_dit_key(self, key: str) -> str | None:
        """Wrapper prefixes of repackaged files removed."""
        return keys.rename_dit_key(key)

    def collate(self, entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """See `predict.collate`."""
        if any("text" not in entry for entry in entries):
            raise UserError("a caption has no text features: run wan_cache_text_encoder_outputs for this data set")
        return predict.collate(entries)

    def predict(self, dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
        """See `predict.predict`."""
        return predict.predict(dit, x_t, t, cond, run=run)

    def in_folder(self, options: Any) -> Mapping[str, str]:
        """Files of `--ckpt_dir`."""
        return files_in(options.ckpt_dir, OFFICIAL_FILES)

    def high_noise(self, options: Any) -> HighNoise | None:
        """See `experts.high_noise`."""
        return experts.high_noise(options)

    def without_effect(self, options: Any) -> Sequence[str]:
        """See `experts.without_effect`."""
        return experts.without_effect(options)

    def guidance_steps(self, options: Any) -> GuidanceSteps:
        """See `config.guidance_steps`."""
        return options.guidance_steps() if isinstance(options, GenerationModelOptions) else GuidanceSteps()

    def mag_ratios(self, options: Any, model: Any = None) -> MagRatios | None:  # noqa: ARG002 the protocol's
        """Of 50 or 40 steps, published for most models."""
        return mag_ratios(model.task)


family = WanFamily()
