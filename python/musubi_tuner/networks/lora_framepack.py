"""Established import name of LoRA for FramePack; the targets come from the family's own spec."""

from musubi_tuner.networks.lora import AdapterSet, attach, attach_tensors, load_lora, save_lora

__all__ = ["AdapterSet", "attach", "attach_tensors", "load_lora", "save_lora"]
