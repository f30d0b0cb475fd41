"""The demo: a small world of handwritten digits, the base model pre-trained on it, and a LoRA that teaches one look."""
