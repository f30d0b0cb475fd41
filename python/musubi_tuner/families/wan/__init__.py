"""Wan 2.1: text-to-video and text-to-image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Conditioning, Dit, Encoders, FamilySpec, Item, Vae
from musubi_tuner.families.wan import keys, options, predict, text, vae
from musubi_tuner.families.wan.config import check_task, wan_config
from musubi_tuner.families.wan.model import WanModel
from musubi_tuner.families.wan.options import CacheTextEncoderOptions
from musubi_tuner.families.wan.spec import SPEC
from musubi_tuner.nn.runner import Run, direct
from musubi_tuner.weights.reader import Header


class WanFamily:
    """The calls of `families.base.Family`; see there."""

    spec: FamilySpec = SPEC

    def option_groups(self, command: str) -> tuple[type, ...]:
        """Text encoder options where text is encoded, model options where the transformer is loaded."""
        groups: Mapping[str, tuple[type, ...]] = {
            "cache_text": (options.CacheTextEncoderOptions,),
            "train": (options.TextEncoderOptions, options.ModelOptions),
            "generate": (options.TextEncoderOptions, options.ModelOptions),
        }
        return groups.get(command, ())

    def load_encoders(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Encoders | None:
        """umt5, when `options.t5` names it."""
        if options is None or not options.t5:
            return None
        return text.load_text_encoder(options.t5, options.t5_tokenizer, fp8=options.fp8_t5, device=device, dtype=dtype)

    def found_files(self, options: Any) -> Mapping[str, Path]:
        """The tokenizer, named or found beside umt5."""
        if not isinstance(options, CacheTextEncoderOptions) or not Path(options.t5).exists():
            return {}  # loading says what is wrong
        return {"t5_tokenizer": text.tokenizer_file(options.t5, options.t5_tokenizer)}

    def load_vae(
        self,
        path: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        options: Any = None,  # noqa: ARG002 the protocol's
    ) -> Vae:
        """The causal VAE."""
        return vae.load_vae(path, device=device, dtype=dtype)

    def encode_latents(
        self,
        items: Sequence[Item],
        vae: Vae,
        encoders: Encoders | None = None,  # noqa: ARG002 the protocol's
    ) -> list[list[dict[str, Tensor]]]:
        """One entry per item: its latents [16, F, H, W]."""
        pixels = [item.pixels for item in items if item.pixels is not None]
        if len(pixels) != len(items):
            raise ValueError("an item without pixels has no latents")
        return [[{"latents": latents}] for latents in vae.encode(torch.stack(pixels))]

    def encode_condition(self, items: Sequence[Item], encoders: Encoders) -> list[dict[str, Tensor]]:
        """Text features of each caption."""
        if not isinstance(encoders, text.WanTextEncoder):
            raise TypeError(f"Wan encodes text with umt5, not with {type(encoders).__name__}")
        return [{"text": row} for row in encoders.encode([item.caption for item in items])]

    def build_dit(
        self,
        header: Header,
        config: Mapping[str, Any] | None = None,
        options: Any = None,
    ) -> Dit:
        """The transformer on meta. UserError where `options.task` names a published model of another size."""
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


family = WanFamily()
