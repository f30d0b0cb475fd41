"""Facts of Wan 2.1 text-to-video and text-to-image (Wan team 2025; published configurations and LoRA layouts)."""

from typing import Final

from musubi_tuner.families.base import (
    AdapterTargets,
    CacheField,
    FamilySpec,
    Fp8Targets,
    LatentGeometry,
    SamplingDefaults,
)

LATENT_MEAN: Final = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD: Final = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip

SPEC: Final = FamilySpec(
    name="wan",
    cache_tag="wan",
    architecture="wan",
    base_model_version="wan",
    modelspec_architecture="wan2.1/lora",
    modelspec_implementation="https://github.com/Wan-Video/Wan2.1",
    latents=LatentGeometry(channels=16, spatial=8, temporal=4, patch=(1, 2, 2)),
    adapter=AdapterTargets(
        block_classes=("WanAttentionBlock",),
        exclude=(r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
    ),
    network_module="networks.lora_wan",
    fp8=Fp8Targets(
        include=("blocks",),
        exclude=(
            "norm",
            "patch_embedding",
            "text_embedding",
            "time_embedding",
            "time_projection",
            "head",
            "modulation",
            "img_emb",
        ),
    ),
    blocks=("blocks",),
    inputs=("patch_embedding", "text_embedding"),
    cache_fields=(
        CacheField("latents", "latents", "video", "latent"),
        CacheField("text", "t5", "varlen", "text"),
    ),
    tasks={
        "t2v-14B": SamplingDefaults(steps=50, guidance=5.0, shift=5.0),
        "t2v-1.3B": SamplingDefaults(steps=50, guidance=5.0, shift=5.0),
        "t2i-14B": SamplingDefaults(steps=50, guidance=5.0, shift=5.0, frames=1),
    },
    default_task="t2v-14B",
    target_fps=16.0,
)
