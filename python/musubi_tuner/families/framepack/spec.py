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

MAG_RATIOS: Final = (
    1.0, 1.26562, 1.23438, 1.03125, 1.02344, 1.03906, 1.01562, 1.03906, 1.05469, 1.02344, 1.03906, 0.99609, 1.03125,
    1.02344, 1.01562, 1.02344, 1.00781, 1.04688, 0.98828, 1.0, 1.00781, 0.98828, 0.94141, 0.94141, 0.78906
)  # fmt: skip
MAG_RATIOS_F1: Final = (
    1.0, 1.25781, 1.08594, 1.02344, 1.00781, 1.02344, 1.00781, 1.02344, 1.05469, 0.99609, 1.03906, 1.00781, 1.01562,
    1.00781, 1.02344, 1.01562, 0.98047, 1.05469, 0.98047, 0.96875, 1.03125, 0.97266, 0.9375, 0.96484, 0.78516
)  # fmt: skip

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
    inputs=("x_embedder", "context_embedder"),
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
    control_masks=True,
    dataset_keys=("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"),
)
