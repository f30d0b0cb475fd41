"""HunyuanVideo's two text encoders: LLaVA-Llama-3 for token features, CLIP-L for one pooled vector.

Each is read from its single file or its repository's folder; what is not needed of the files (vision tower, output
layer, the language model's last layers) is not read. The cache holds 256 rows per caption and a mask of the real ones;
the rows after a caption's end are zero.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import Fp8Targets
from musubi_tuner.families.hunyuan_video.options import TextEncoderOptions
from musubi_tuner.families.hunyuan_video.spec import TEXT_TOKENS
from musubi_tuner.memory.placement import DTYPES
from musubi_tuner.nn.text import clip, llama
from musubi_tuner.nn.text.tokenizers import find_words
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Header, open_checkpoint
from musubi_tuner.weights.sizes import named_fields

log = logging.getLogger(__name__)


@dataclass
class TextEncoders:
    """Captions -> what the text cache holds."""

    llm: llama.LlamaText
    clip: clip.ClipText

    def to(self, device: torch.device) -> "TextEncoders":
        """Move to `device`; the same object."""
        self.llm.model.to(device)
        self.clip.model.to(device)
        return self

    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """For each caption text `[256, W]`, mask `[256]` int64 and pooled `[P]`."""
        rows, pooled = self.llm.encode(captions), self.clip.encode(captions)
        entries = []
        for row, vector in zip(rows, pooled, strict=True):
            text = row.new_zeros(TEXT_TOKENS, row.shape[1])
            text[: len(row)] = row
            mask = (torch.arange(TEXT_TOKENS) < len(row)).long()
            entries.append({"text": text, "mask": mask, "pooled": vector.clone()})
        return entries


def load_text_encoders(options: TextEncoderOptions, *, device: torch.device) -> TextEncoders:
    """Both encoders on `device`. Raises UserError naming the file at fault, tokenizers before weights."""
    if not options.text_encoder1 or not options.text_encoder2:
        raise UserError("HunyuanVideo has two text encoders: name both, with --text_encoder1 and --text_encoder2")
    words1, words2 = found_files(options).values()
    tokenizer1, tokenizer2 = llama.load_tokenizer(words1.parent), clip.load_tokenizer(words2.parent)
    dtype = DTYPES[options.text_encoder_dtype]
    fp8 = Fp8Policy(Fp8Targets(include=llama.FP8_LINEARS)) if options.fp8_llm else None
    with open_checkpoint(options.text_encoder2) as checkpoint:
        sizes2 = clip.sizes_from_shapes(_shapes(checkpoint.header), checkpoint.header.paths[0])
        sizes2 = dataclasses.replace(sizes2, **_named(clip.ClipSizes, checkpoint.header))
        tower = clip.empty_clip(sizes2, tokenizer2.eos_token_id)
        rename2 = {key: clip.model_key(key, tower) for key in checkpoint.header.tensors}
        policy = WeightPolicy(dtype)
        materialize(tower, checkpoint, rename=rename2.__getitem__, policy=policy, device=device, progress=False)
    with open_checkpoint(options.text_encoder1) as checkpoint:
        sizes1 = llama.sizes_from_shapes(_shapes(checkpoint.header), checkpoint.header.paths[0])
        sizes1 = dataclasses.replace(sizes1, **_named(llama.LlamaSizes, checkpoint.header))
        decoder = llama.empty_decoder(sizes1)
        rename1 = {key: llama.decoder_key(key, sizes1.num_layers) for key in checkpoint.header.tensors}
        policy = WeightPolicy(dtype, fp8)
        report = materialize(decoder, checkpoint, rename=rename1.__getitem__, policy=policy, device=device)
    log.info("%s: %s", options.text_encoder1, report.summary())
    return TextEncoders(
        llama.LlamaText(decoder.to(device).eval(), tokenizer1, TEXT_TOKENS),
        clip.ClipText(tower.to(device).eval(), tokenizer2, sizes2.max_position_embeddings),
    )


def found_files(options: object) -> dict[str, Path]:
    """The tokenizer of each text encoder. Raises UserError where one has none."""
    if not isinstance(options, TextEncoderOptions):
        return {}
    rows = (options.text_encoder1, options.tokenizer1, llama), (options.text_encoder2, options.tokenizer2, clip)
    return {
        f"tokenizer{n}": find_words(given, f"tokenizer{n}", Path(path or ""), kind.TOKENIZER_PLACES, kind.REPOSITORY)
        for n, (path, given, kind) in enumerate(rows, start=1)
    }


def _shapes(header: Header) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in header.tensors.items()}


def _named(kind: type, header: Header) -> dict[str, object]:
    return named_fields(kind, header.metadata.get("musubi.config"), f"{header.paths[0]}, musubi.config")
