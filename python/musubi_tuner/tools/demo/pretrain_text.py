"""The demo's text side: a small sentencepiece tokenizer and a frozen random umt5, both made in seconds.

The tokenizer is a unigram model with byte fallback, trained on the world's own sentences and a list of plain words, so
that any caption can be written. The encoder has umt5's structure at width 64; its weights are seeded noise that leaves
each token recognizable and lets a little of its neighbors through, which is all that the world's captions ask for.
Weights are given under the names of Wan's own umt5 file.
"""

import io
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.flow import keyed
from musubi_tuner.tools.demo import world

_PIECES = 600
_WORDS = """
a an the and or of in on at to from with without over under above below between behind before after into onto out off
is are was be has have had do does did can may will not no yes very more most less least some any all each every one two
three four five six seven eight nine ten zero first second third last next other same new old big small large little
tall short long wide narrow thick thin round square straight curved open closed top bottom left right up down middle
center side edge corner front back near far high low fast slow still moving turning rising falling sliding standing
lying bright dark light pale deep plain clean soft sharp smooth rough striped dotted color colors colorful rainbow
red orange yellow green cyan blue purple white black grey brown pink violet gold silver hue shade gradient paint ink
digit digits number numbers figure letter line lines stroke strokes shape shapes mark sign picture image video clip
frame scan hand handwritten drawing drawn written painted background ground paper page wall table room house door window
garden tree flower leaf grass river sea sky sun moon star cloud rain snow wind fire stone sand road bridge city street
person man woman child boy girl people face eye hair head arm foot dog cat bird horse fish car train boat plane wheel
morning evening night day summer winter spring autumn warm cold quiet calm happy style look view close wide shot camera
"""


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the encoder, by the names that umt5's original configuration uses."""

    vocab_size: int
    dim: int = 64
    dim_attn: int = 64
    dim_ffn: int = 128
    num_heads: int = 4
    encoder_layers: int = 2
    num_buckets: int = 32
    max_distance: int = 128
    shared_pos: bool = False
    max_length: int = 16


def sentences() -> Iterator[str]:
    """The tokenizer's corpus: every caption of the world, and the word list in pairs and threes."""
    directions = (None, *world.DIRECTIONS)
    for digit, color, direction in itertools.product(range(10), world.COLORS, directions):
        yield world.caption(digit, color, direction)
    words = sorted(set(_WORDS.split()))
    order = torch.randperm(len(words) * 12, generator=keyed.generator("demo", "corpus")).tolist()
    shuffled = [words[i % len(words)] for i in order]
    for start in range(0, len(shuffled), 3):
        yield " ".join(shuffled[start : start + 3])


def make_tokenizer(folder: Path) -> int:
    """Write `spiece.model`, `tokenizer.json` and `tokenizer_config.json` to `folder`; the number of pieces."""
    import sentencepiece
    from transformers import T5TokenizerFast

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="unigram",
        vocab_size=_PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5TokenizerFast.from_pretrained(folder, extra_ids=0, local_files_only=True)
    tokenizer.save_pretrained(folder)
    _allow_bytes(folder)
    return len(tokenizer)


def _allow_bytes(folder: Path) -> None:
    """Turn byte fallback on in the saved files: the conversion from sentencepiece leaves it off."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["byte_fallback"] = True
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, content["decoder"]]}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {
        # read as saved: T5's own class would rebuild the tokenizer without bytes
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def make_encoder(config: TextConfig, seed: int) -> dict[str, Tensor]:
    """Seeded weights of the encoder in the original layout, float32."""

    def noise(name: str, *shape: int, scale: float) -> Tensor:
        return keyed.normal(shape, seed, "umt5", name) * scale

    tensors = {"token_embedding.weight": noise("token_embedding", config.vocab_size, config.dim, scale=1.0)}
    for layer in range(config.encoder_layers):
        block = f"blocks.{layer}"
        tensors[f"{block}.norm1.weight"] = torch.ones(config.dim)
        for part in ("q", "k", "v"):
            scale = (0.35 if part != "v" else 0.5) / math.sqrt(config.dim)
            tensors[f"{block}.attn.{part}.weight"] = noise(block + part, config.dim_attn, config.dim, scale=scale)
        scale = 0.5 / math.sqrt(config.dim_attn)
        tensors[f"{block}.attn.o.weight"] = noise(block + "o", config.dim, config.dim_attn, scale=scale)
        tensors[f"{block}.norm2.weight"] = torch.ones(config.dim)
        for part in ("gate.0", "fc1"):
            scale = 1 / math.sqrt(config.dim)
            tensors[f"{block}.ffn.{part}.weight"] = noise(block + part, config.dim_ffn, config.dim, scale=scale)
        scale = 0.5 / math.sqrt(config.dim_ffn)
        tensors[f"{block}.ffn.fc2.weight"] = noise(block + "fc2", config.dim, config.dim_ffn, scale=scale)
        buckets = noise(block + "pos", config.num_buckets, config.num_heads, scale=0.5)
        tensors[f"{block}.pos_embedding.embedding.weight"] = buckets
    tensors["norm.weight"] = torch.ones(config.dim)
    return tensors


def write(folder: Path, seed: int) -> None:
    """`t5.safetensors` (bf16, with its `musubi.config`) and the tokenizer's files."""
    from safetensors.torch import save_file

    config = TextConfig(vocab_size=make_tokenizer(folder / "tokenizer"))
    tensors = {name: tensor.bfloat16() for name, tensor in make_encoder(config, seed).items()}
    save_file(tensors, folder / "t5.safetensors", {"musubi.config": json.dumps(asdict(config)), "format": "pt"})
