"""Facts of HunyuanVideo (Tencent 2024; published configurations, cache files and LoRA layouts)."""

from typing import Final

from musubi_tuner.families.base import (
    AdapterTargets,
    CacheField,
    FamilySpec,
    Fp8Targets,
    LatentGeometry,
    SamplingDefaults,
)
from musubi_tuner.nn.vae.video_kl import SCALING

TEXT_TOKENS: Final = 256
"""Tokens of a caption's features in the cache."""

SPEC: Final = FamilySpec(
    name="hunyuan_video",
    cache_tag="hv",
    architecture="hunyuan_video",
    base_model_version="hunyuan_video",
    modelspec_architecture="hunyuan-video/lora",
    modelspec_implementation="https://github.com/Tencent/HunyuanVideo",
    latents=LatentGeometry(channels=16, spatial=8, temporal=4, patch=(1, 2, 2)),
    adapter=AdapterTargets(
        block_classes=("DoubleStreamBlock", "SingleStreamBlock"),
        exclude=(r".*(img_mod|txt_mod|modulation).*",),
    ),
    network_module="networks.lora",
    fp8=Fp8Targets(include=("double_blocks.", "single_blocks."), exclude=("norm", "img_mod", "txt_mod", "modulation")),
    blocks=("double_blocks", "single_blocks"),
    cache_fields=(
        CacheField("latents", "latents", "video", "latent", factor=SCALING),
        CacheField("text", "llm", "plain", "text"),
        CacheField("mask", "llm_mask", "mask", "text"),
        CacheField("pooled", "clipL", "plain", "text"),
    ),
    tasks={
        "t2v": SamplingDefaults(
            steps=50, guidance=1.0, embedded_guidance=6.0, shift=7.0, solver="vanilla", frames=129, fps=24
        )
    },
    default_task="t2v",
    takes_pictures=("start",),
    target_fps=24.0,
    option_defaults={"vae_dtype": "float16"},
)
