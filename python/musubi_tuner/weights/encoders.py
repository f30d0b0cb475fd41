"""A language model and CLIP's text tower from their files: features of tokens, and one vector, of a caption.

Several video models are told by this pair. Sizes come from shapes, what they cannot tell from `musubi.config`; of the
files only what is needed is read; both tokenizers are tried before any weight is.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.nn.text import clip, llama
from musubi_tuner.nn.text.tokenizers import find_words
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.sizes import named_fields

log = logging.getLogger(__name__)

LLM_HELP = "LLaVA-Llama-3 text encoder: llava_llama3_fp16.safetensors, or the folder of its repository"
CLIP_HELP = "CLIP-L text encoder: clip_l.safetensors, or the folder of its repository"
_TOKENIZER = "folder with tokenizer.json of {}; looked for beside the encoder and in the Hugging Face cache"

Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class PairOptions:
    """Text encoders"""

    text_encoder1: str | None = option(None, help=LLM_HELP)
    text_encoder2: str | None = option(None, help=CLIP_HELP)
    tokenizer1: str | None = option(None, help=_TOKENIZER.format("Llama 3"))
    tokenizer2: str | None = option(None, help=_TOKENIZER.format("CLIP"))
    fp8_llm: bool = option(False, help="keep the large weights of text_encoder1 in scaled FP8")


@dataclass(frozen=True)
class _LlmWeights:
    """Which of the language model's weights can be FP8."""

    include: tuple[str, ...] = llama.FP8_LINEARS
    exclude: tuple[str, ...] = ()


@dataclass
class TextPair:
    """Captions -> features of their tokens and a pooled vector. rows: that the features of a caption are padded to."""

    llm: llama.LlamaText
    clip: clip.ClipText
    rows: int

    def to(self, device: torch.device) -> "TextPair":
        """Move to `device`; the same object."""
        self.llm.model.to(device)
        self.clip.model.to(device)
        return self

    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """For each caption text `[rows, W]`, zero after its end, mask `[rows]` int64 and pooled `[P]`."""
        entries = []
        for row, vector in zip(self.llm.encode(captions), self.clip.encode(captions), strict=True):
            rest = row.new_zeros(self.rows - len(row), row.shape[1])
            mask = (torch.arange(self.rows) < len(row)).long()
            entries.append({"text": torch.cat([row, rest]), "mask": mask, "pooled": vector.clone()})
        return entries


def load_pair(
    options: PairOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    rows: int,
    owner: str,
    task: str | None = None,
) -> TextPair:
    """Both encoders on `device`. Raises UserError naming the file at fault; `owner` is what needs them.

    tokens: that a caption has at most; longer ones are cut. task: another system prompt.
    """
    if not options.text_encoder1 or not options.text_encoder2:
        raise UserError(f"{owner} has two text encoders: name both, with --text_encoder1 and --text_encoder2")
    beside1, beside2 = Path(options.text_encoder1), Path(options.text_encoder2)
    words_file, pieces_file = found_files(options).values()
    words, pieces = llama.load_tokenizer(words_file.parent), clip.load_tokenizer(pieces_file.parent)

    def tower(sizes: Any) -> tuple[nn.Module, Rename]:
        model = clip.empty_clip(sizes, pieces.eos_token_id)
        return model, lambda key: clip.model_key(key, model)

    def decoder(sizes: Any) -> tuple[nn.Module, Rename]:
        return llama.empty_decoder(sizes), lambda key: llama.decoder_key(key, sizes.num_layers)

    fp8 = Fp8Policy(_LlmWeights()) if options.fp8_llm else None
    pooled, sizes = _loaded(beside2, clip.sizes_from_shapes, tower, WeightPolicy(dtype), device)
    features, _ = _loaded(beside1, llama.sizes_from_shapes, decoder, WeightPolicy(dtype, fp8), device)
    tokens_of, pooled_of = (
        llama.LlamaText(features, words, tokens, task),
        clip.ClipText(pooled, pieces, sizes.max_position_embeddings),
    )
    return TextPair(tokens_of, pooled_of, rows)


def found_files(options: object) -> dict[str, Path]:
    """The tokenizer of each text encoder, named or found beside it. Raises UserError where one has none."""
    if not isinstance(options, PairOptions):
        return {}
    rows = (options.text_encoder1, options.tokenizer1, llama), (options.text_encoder2, options.tokenizer2, clip)
    return {
        f"tokenizer{n}": find_words(given, f"tokenizer{n}", Path(path or ""), kind.TOKENIZER_PLACES, kind.REPOSITORY)
        for n, (path, given, kind) in enumerate(rows, start=1)
    }


def _loaded(
    path: Path,
    sizes_of: Callable[..., Any],
    build: Callable[[Any], tuple[nn.Module, Rename]],
    policy: WeightPolicy,
    device: torch.device,
) -> tuple[nn.Module, Any]:
    """The model of a file, and its sizes."""
    with open_checkpoint(path) as checkpoint:
        header = checkpoint.header
        sizes = sizes_of({key: info.shape for key, info in header.tensors.items()}, header.paths[0])
        said = named_fields(type(sizes), header.metadata.get("musubi.config"), f"{header.paths[0]}, musubi.config")
        sizes = dataclasses.replace(sizes, **said)
        model, rename = build(sizes)
        report = materialize(model, checkpoint, rename=rename, policy=policy, device=device, progress=False)
    log.info("%s: %s", path, report.summary())
    return model.to(device).eval(), sizes


@dataclass
class TextAndPicture:
    """A text encoder and a picture encoder, None for what a command did not name, and its options."""

    options: Any
    text: Any = None
    picture: Any = None

    def to(self, device: torch.device) -> "TextAndPicture":
        """Move to `device`; the same object."""
        for part in (self.text, self.picture):
            if part is not None:
                part.to(device)
        return self
