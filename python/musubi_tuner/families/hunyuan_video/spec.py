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

MAG_RATIOS: Final = (
    1.0, 1.06971, 1.29073, 1.11245, 1.09596, 1.05233, 1.01415, 1.05672, 1.00848, 1.03632, 1.02974, 1.00984, 1.03028,
    1.00681, 1.06614, 1.05022, 1.02592, 1.01776, 1.02985, 1.00726, 1.03727, 1.01502, 1.00992, 1.03371, 0.9976,
    1.02742, 1.0093, 1.01869, 1.00815, 1.01461, 1.01152, 1.03082, 1.0061, 1.02162, 1.01999, 0.99063, 1.01186, 1.0217,
    0.99947, 1.01711, 0.9904, 1.00258, 1.00878, 0.97039, 0.97686, 0.94315, 0.97728, 0.91154, 0.86139, 0.76592
)  # fmt: skip

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
    inputs=("img_in", "txt_in"),
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
