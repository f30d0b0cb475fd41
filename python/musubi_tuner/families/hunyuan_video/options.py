"""Options that only HunyuanVideo has: two text encoders, ways to save the VAE's memory, and guidance in training."""

from dataclasses import dataclass

from musubi_tuner.config.options import option
from musubi_tuner.memory.placement import DTYPES, dtype_name
from musubi_tuner.nn.vae.video_kl import SavingOptions
from musubi_tuner.weights.encoders import CLIP_HELP, LLM_HELP, PairOptions


@dataclass(frozen=True)
class VaeOptions(SavingOptions):
    """HunyuanVideo VAE"""


@dataclass(frozen=True)
class TextEncoderOptions(PairOptions):
    """HunyuanVideo text encoders"""

    text_encoder_dtype: str = option(
        "float16", help="dtype of both text encoders, and of cached features", choices=tuple(DTYPES), parse=dtype_name
    )


@dataclass(frozen=True)
class CacheTextEncoderOptions(TextEncoderOptions):
    """HunyuanVideo text encoders (for the text cache)"""

    text_encoder1: str | None = option("", help=LLM_HELP, required=True)
    text_encoder2: str | None = option("", help=CLIP_HELP, required=True)


@dataclass(frozen=True)
class EncodingOptions(VaeOptions, TextEncoderOptions):
    """HunyuanVideo text encoders and VAE (for samples)"""


@dataclass(frozen=True)
class ModelOptions:
    """HunyuanVideo model"""

    dit_in_channels: int | None = option(
        None, help="the transformer's input channels: the file tells; another number given here is an error"
    )
    model_config: str | None = option(
        None, help="JSON file with the transformer's sizes, for models that are neither published nor self-describing"
    )


@dataclass(frozen=True)
class TrainedModelOptions(ModelOptions):
    """HunyuanVideo model (in training)"""

    guidance_scale: float = option(
        1.0, help="embedded guidance that the model is told in training, as it is", minimum=0
    )
    guidance_times_1000: bool = option(
        False, help="tell the model a thousand times guidance_scale, the unit that it is told in sampling"
    )

    @property
    def guidance(self) -> float:
        """What the guidance input is told."""
        return self.guidance_scale * (1000.0 if self.guidance_times_1000 else 1.0)
