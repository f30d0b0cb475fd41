"""Options that only Wan has: its text encoder's files, the task, and unusual sizes."""

from dataclasses import dataclass

from musubi_tuner.config.options import option
from musubi_tuner.families.wan.spec import SPEC

_T5 = "umt5-xxl text encoder in the original layout (models_t5_umt5-xxl-enc-bf16.pth or .safetensors)"
_TOKENIZER = "folder of the umt5 tokenizer (spiece.model, tokenizer.json); looked for beside --t5 when not given"
_FP8_T5 = "keep the text encoder's large weights in scaled FP8"


@dataclass(frozen=True)
class CacheTextEncoderOptions:
    """Wan text encoder (for the text cache)."""

    t5: str = option("", help=_T5, required=True)
    t5_tokenizer: str | None = option(None, help=_TOKENIZER)
    fp8_t5: bool = option(False, help=_FP8_T5)


@dataclass(frozen=True)
class TextEncoderOptions:
    """Wan text encoder (for samples)."""

    t5: str | None = option(None, help=_T5)
    t5_tokenizer: str | None = option(None, help=_TOKENIZER)
    fp8_t5: bool = option(False, help=_FP8_T5)


@dataclass(frozen=True)
class ModelOptions:
    """Wan model."""

    task: str = option(SPEC.default_task, help="which model of the family the file holds", choices=tuple(SPEC.tasks))
    model_config: str | None = option(
        None, help="JSON file with the transformer's sizes, for models that are neither published nor self-describing"
    )
