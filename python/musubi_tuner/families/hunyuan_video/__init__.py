"""HunyuanVideo: text-to-video, and image-to-video of the SkyReels kind."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Conditioning, Dit, Encoders, FamilySpec, Item, Vae
from musubi_tuner.families.hunyuan_video import keys, options, predict, text
from musubi_tuner.families.hunyuan_video.config import dit_config
from musubi_tuner.families.hunyuan_video.model import HunyuanVideoModel
from musubi_tuner.families.hunyuan_video.options import TextEncoderOptions
from musubi_tuner.families.hunyuan_video.spec import MAG_RATIOS, SPEC
from musubi_tuner.families.hunyuan_video.vae import load_vae
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.nn.vae.video_kl import SCALING, VideoKlVae, sample_latents
from musubi_tuner.weights.encoders import TextPair, found_files
from musubi_tuner.weights.reader import Header

log = logging.getLogger(__name__)


class HunyuanVideoFamily:
    """The calls of `families.base.Family`; see there."""

    spec: FamilySpec = SPEC
    found_files = staticmethod(found_files)

    def option_groups(self, command: str) -> tuple[type, ...]:
        """Encoders first, then the model where the transformer is loaded."""
        groups: Mapping[str, tuple[type, ...]] = {
            "cache_latents": (options.VaeOptions,),
            "cache_text": (options.CacheTextEncoderOptions,),
            "train": (options.EncodingOptions, options.TrainedModelOptions),
            "generate": (options.EncodingOptions, options.ModelOptions),
        }
        return groups.get(command, ())

    def load_encoders(
        self,
        options: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,  # noqa: ARG002 the option text_encoder_dtype tells
    ) -> Encoders | None:
        """LLaVA-Llama-3 and CLIP-L, when `options` name them; latents need no encoder."""
        if not isinstance(options, TextEncoderOptions) or not (options.text_encoder1 or options.text_encoder2):
            return None
        return text.load_text_encoders(options, device=device)

    def load_vae(self, path: str, *, device: torch.device, dtype: torch.dtype, options: Any = None) -> Vae:
        """The causal VAE, with the options' ways to save memory."""
        return load_vae(path, device=device, dtype=dtype, savings=None if options is None else options.savings)

    def encode_latents(
        self,
        items: Sequence[Item],
        vae: Vae,
        encoders: Encoders | None = None,  # noqa: ARG002 the protocol's
    ) -> list[list[dict[str, Tensor]]]:
        """One entry per item: a sample of its posterior [16, F, H, W], unscaled; scaled of a request's picture."""
        if not isinstance(vae, VideoKlVae):
            raise TypeError(f"HunyuanVideo latents are those of its own VAE, not of {type(vae).__name__}")
        if all(item.pixels is None and item.roles == ("start",) for item in items):
            sampled = sample_latents(vae, torch.stack([item.controls[0] for item in items]))
            return [[{"latents": latents}] for latents in sampled * SCALING]
        pixels = [item.pixels for item in items if item.pixels is not None]
        if len(pixels) != len(items):
            raise ValueError("an item without pixels has no latents")
        sampled = sample_latents(vae, torch.stack(pixels)).to(vae.dtype)
        return [[{"latents": latents}] for latents in sampled]

    def encode_condition(self, items: Sequence[Item], encoders: Encoders) -> list[dict[str, Tensor]]:
        """Token features with their mask, and the pooled vector, of each caption."""
        if not isinstance(encoders, TextPair):
            raise TypeError(f"HunyuanVideo encodes text with its two encoders, not with {type(encoders).__name__}")
        return encoders.encode([item.caption for item in items])

    def build_dit(self, header: Header, config: Mapping[str, Any] | None = None, options: Any = None) -> Dit:
        """The transformer on meta; in training it keeps the guidance that it is to be told."""
        sizes = dit_config(header, config)
        guidance = _guidance(sizes.guidance_embed, options)
        wanted = None if options is None else options.dit_in_channels
        if wanted is not None and wanted != sizes.in_channels:
            raise UserError(
                f"--dit_in_channels {wanted}: {header.paths[0]} takes {sizes.in_channels}; leave the option out or "
                "give the other checkpoint"
            )
        with torch.device("meta"):
            return HunyuanVideoModel(sizes, guidance=guidance)

    def rename_dit_key(self, key: str) -> str | None:
        """Wrapper prefixes of repackaged files removed."""
        return keys.rename_dit_key(key)

    def collate(self, entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """See `predict.collate`."""
        return predict.collate(entries)

    def predict(self, dit: Dit, x_t: Tensor, t: Tensor, cond: Conditioning, *, run: Run = direct) -> Tensor:
        """See `predict.predict`."""
        return predict.predict(dit, x_t, t, cond, run=run)

    def mag_ratios(self, options: Any, model: Any = None) -> tuple[float, ...]:  # noqa: ARG002 the protocol's
        """Of 50 steps, published for 960 x 544."""
        return MAG_RATIOS


def _guidance(has_input: bool, chosen: Any) -> float:
    """What the guidance input is told in training; said once."""
    if not isinstance(chosen, options.TrainedModelOptions):
        return 1.0
    if not has_input:
        log.info("this transformer has no guidance input: guidance_scale has no effect")
    else:
        log.info(
            "in training the model is told guidance %g, the number as it is, as established; sampling tells it a "
            "thousandfold, and so does training with --guidance_times_1000",
            chosen.guidance,
        )
    return chosen.guidance


family = HunyuanVideoFamily()
