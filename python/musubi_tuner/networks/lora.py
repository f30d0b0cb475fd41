"""Established import name of the LoRA network: see `adapters`."""

from musubi_tuner.adapters.attach import AdapterSet, attach, attach_tensors
from musubi_tuner.adapters.files import load_lora, save_lora

__all__ = ["AdapterSet", "attach", "attach_tensors", "load_lora", "save_lora"]
