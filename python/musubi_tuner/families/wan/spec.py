"""Facts of Wan 2.1 and 2.2 (Wan team 2025; published configurations, cache files and LoRA layouts)."""

import json
from importlib.resources import files
from typing import Final

from musubi_tuner.families.base import (
    AdapterTargets,
    CacheField,
    FamilySpec,
    Fp8Targets,
    LatentGeometry,
    MagRatios,
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

OFFICIAL_FILES: Final = {
    "dit": ("low_noise_model", "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    "dit_high_noise": ("high_noise_model",),
    "vae": ("Wan2.1_VAE.pth",),
    "t5": ("models_t5_umt5-xxl-enc-bf16.pth",),
    "clip": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
}
"""Files of the published folders, by option."""

_TEXT: Final = SamplingDefaults(steps=50, guidance=5.0, shift=5.0)
_SMALL: Final = {(832, 480): 3.0}
_PICTURE: Final = SamplingDefaults(steps=40, guidance=5.0, shift=5.0)

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
        CacheField("image", "latents_image", "video", "latent", required=False),
        CacheField("control", "latents_control", "video", "latent", required=False),
        CacheField("clip", "clip", "plain", "latent", required=False),
        CacheField("positions", "f_indices", "plain", "latent", required=False),
        CacheField("text", "t5", "varlen", "text"),
    ),
    tasks={
        "t2v-14B": _TEXT,
        "t2v-1.3B": _TEXT,
        "t2i-14B": SamplingDefaults(steps=50, guidance=5.0, shift=5.0, frames=1),
        "i2v-14B": SamplingDefaults(steps=40, guidance=5.0, shift=5.0, shifts=_SMALL),
        "flf2v-14B": _PICTURE,
        "t2v-1.3B-FC": _TEXT,
        "t2v-14B-FC": _TEXT,
        "i2v-14B-FC": _PICTURE,
        "t2v-A14B": SamplingDefaults(steps=40, guidance=3.0, shift=12.0, boundary=0.875, guidance_high=4.0),
        "i2v-A14B": SamplingDefaults(steps=40, guidance=3.5, shift=5.0, boundary=0.9, guidance_high=3.5),
    },
    default_task="t2v-14B",
    target_fps=16.0,
    takes_pictures=("start", "end", "control", "control_clip"),
    reads_controls=True,
    dataset_keys=("fp_1f_clean_indices", "fp_1f_target_index"),
)


def mag_ratios(task: str) -> MagRatios | None:
    """The published ratios of a task's model, of i2v-14B those of its larger size; None where there are none.

    Of the picture model of two experts nothing is skipped before the one for low noise takes over, as published.
    """
    table = json.loads(files(__package__).joinpath("mag_ratios.json").read_text(encoding="utf-8"))
    if task not in table:
        return None
    return MagRatios(tuple(table[task]["with"]), tuple(table[task]["without"]), high_computed=task == "i2v-A14B")
