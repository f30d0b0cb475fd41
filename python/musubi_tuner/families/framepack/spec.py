"""Facts of FramePack and FramePack-F1 (Zhang & Agrawala 2025; published configurations, cache files, LoRA layouts)."""

from typing import Final

from musubi_tuner.families.base import (
    AdapterTargets,
    CacheField,
    FamilySpec,
    Fp8Targets,
    LatentGeometry,
    SamplingDefaults,
)

TEXT_TOKENS: Final = 512
"""Rows of a caption's features in the cache."""
CAPTION_TOKENS: Final = 256
"""Of these, what a caption can fill."""
WINDOW: Final = 9
"""Latent frames of a section, unless another size is asked for."""

SPEC: Final = FamilySpec(
    name="framepack",
    cache_tag="fp",
    architecture="framepack",
    base_model_version="framepack",
    modelspec_architecture="framepack/lora",
    modelspec_implementation="https://github.com/lllyasviel/FramePack",
    latents=LatentGeometry(channels=16, spatial=8, temporal=4, patch=(1, 2, 2)),
    adapter=AdapterTargets(block_classes=("TransformerBlock", "SingleTransformerBlock"), exclude=(r".*(norm).*",)),
    network_module="networks.lora_framepack",
    fp8=Fp8Targets(include=("transformer_blocks", "single_transformer_blocks"), exclude=("norm",)),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    cache_fields=(
        CacheField("latents", "latents", "video", "latent"),
        CacheField("indices", "latent_indices", "plain", "latent"),
        CacheField("clean", "latents_clean", "history", "latent"),
        CacheField("clean_indices", "clean_latent_indices", "plain", "latent"),
        CacheField("clean_2x", "latents_clean_2x", "history", "latent", required=False),
        CacheField("clean_2x_indices", "clean_latent_2x_indices", "plain", "latent", required=False),
        CacheField("clean_4x", "latents_clean_4x", "history", "latent", required=False),
        CacheField("clean_4x_indices", "clean_latent_4x_indices", "plain", "latent", required=False),
        CacheField("image", "image_embeddings", "plain", "latent"),
        CacheField("text", "llama_vec", "plain", "text"),
        CacheField("mask", "llama_attention_mask", "mask", "text"),
        CacheField("pooled", "clip_l_pooler", "plain", "text"),
    ),
    tasks={
        "i2v": SamplingDefaults(steps=25, guidance=1.0, embedded_guidance=10.0, frames=145, fps=30),
    },
    default_task="i2v",
    target_fps=30.0,
    takes_pictures=("start", "end", "control"),
    reads_controls=True,
    dataset_keys=("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"),
)
