"""Tiny text encoders in published layouts, with seeded weights and word-level tokenizers, as files of a user's."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from musubi_tuner.flow import keyed
from musubi_tuner.nn.text import llama

WORDS = ("red", "roof", "temple", "flower", "petal", "of", "a", "the")
LLAMA = {"num_heads": 4, "num_kv_heads": 2}
"""What shapes cannot tell of the tiny decoder (its heads are 8 wide)."""


def seeded(model: nn.Module, name: str) -> nn.Module:
    """The model in evaluation mode with keyed weights that keep activations in range."""
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = 0.2 if value.ndim == 1 else value.shape[1] ** -0.5
            value.copy_(keyed.normal(value.shape, name, key) * scale + (value.ndim == 1 and "norm" in key))
    return model.eval()


def tiny_llama() -> nn.Module:
    """transformers' language model of four layers, whole: the oracle of what is built without its last two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_position_embeddings=512,
    )
    return seeded(LlamaForCausalLM(config), "llama")


def tiny_clip() -> nn.Module:
    """transformers' text tower of two layers; its head is 64 wide as in all published ones."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=12,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=1,
    )
    return seeded(CLIPTextModel(config), "clip")


def tiny_siglip() -> nn.Module:
    """transformers' picture tower of two layers, head and all, for pictures of 56 pixels: 16 tokens, 72 wide."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=72,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=1,
        patch_size=14,
        image_size=56,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    return seeded(SiglipVisionModel(config), "siglip")


def save_siglip(folder: Path) -> Path:
    """`sigclip.safetensors` with the published prefix."""
    state = {key.removeprefix("vision_model."): value.contiguous() for key, value in tiny_siglip().state_dict().items()}
    save_file({f"vision_model.{key}": value for key, value in state.items()}, folder / "sigclip.safetensors")
    return folder / "sigclip.safetensors"


def save_llama(folder: Path) -> Path:
    """`llava_llama3.safetensors` with its tokenizer in the folder `tokenizer`."""
    state = {key: value.contiguous() for key, value in tiny_llama().state_dict().items()}
    save_file(state, folder / "llava_llama3.safetensors", {"musubi.config": json.dumps(LLAMA)})
    save_llama_tokenizer(folder / "tokenizer")
    return folder / "llava_llama3.safetensors"


def save_clip(folder: Path) -> Path:
    """`clip_l.safetensors` with its tokenizer in the folder `tokenizer_2`."""
    state = {key.removeprefix("text_model."): value.contiguous() for key, value in tiny_clip().state_dict().items()}
    save_file({f"text_model.{key}": value for key, value in state.items()}, folder / "clip_l.safetensors")
    save_words(folder / "tokenizer_2", ["<|startoftext|>", "<|endoftext|>"], WORDS, "<|startoftext|> $A <|endoftext|>")
    return folder / "clip_l.safetensors"


def save_llama_tokenizer(folder: Path, instruction_tokens: int = llama.INSTRUCTION_TOKENS) -> None:
    """Words between blanks; as many begin tokens as make the instruction `instruction_tokens` long."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    text = llama.INSTRUCTION
    for token in special:
        text = text.replace(token, " ")
    markers = sum(llama.INSTRUCTION.count(token) for token in special)
    count = len(text.split()) + markers
    words = sorted({*text.split(), *WORDS})
    save_words(folder, special, words, "<|begin_of_text|> " * (instruction_tokens - count) + "$A")


def save_words(folder: Path, special: list[str], words: tuple[str, ...] | list[str], template: str) -> None:
    """`tokenizer.json` of a word-level tokenizer whose special tokens come first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate([*special, "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.add_special_tokens(special)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(token, vocabulary[token]) for token in special if token in template]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    folder.mkdir(parents=True)
    core.save(str(folder / "tokenizer.json"))
