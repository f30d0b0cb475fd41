"""HunyuanVideo's VAE from its original file. Its cache holds a sample of the posterior, unscaled.

The transformer is trained on 0.476986 times what the cache holds; the factor is a fact of the cache field, applied
where caches are read.
"""

import dataclasses

import torch

from musubi_tuner.families.hunyuan_video.keys import vae_rename
from musubi_tuner.nn.vae.video_kl import Savings, VideoKlSizes, VideoKlVae, empty_vae, sizes_from_shapes
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.sizes import named_fields


def load_vae(path: str, *, device: torch.device, dtype: torch.dtype, savings: Savings | None = None) -> VideoKlVae:
    """The VAE of the original file (.pt or .safetensors). Raises UserError where it is something else."""
    with open_checkpoint(path) as checkpoint:
        header = checkpoint.header
        rename = vae_rename(header.tensors)
        shapes = {name: info.shape for key, info in header.tensors.items() if (name := rename(key)) is not None}
        sizes = sizes_from_shapes(shapes, header.paths[0])
        named = named_fields(VideoKlSizes, header.metadata.get("musubi.config"), f"{path}, musubi.config")
        with torch.device("meta"):
            model = empty_vae(dataclasses.replace(sizes, **named))
        materialize(model, checkpoint, rename=rename, policy=WeightPolicy(dtype), device=device, progress=False)
    return VideoKlVae(model.eval(), savings)
