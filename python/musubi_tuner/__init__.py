"""LoRA training and inference for video and image diffusion transformers on little memory."""

from importlib import metadata

try:
    __version__ = metadata.version("musubi-tuner")
except metadata.PackageNotFoundError:  # run from a checkout by file path, nothing installed
    __version__ = "0.0.0+checkout"
