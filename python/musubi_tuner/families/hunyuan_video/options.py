"""Options that only HunyuanVideo has: two text encoders, ways to save the VAE's memory, and guidance in training."""

from dataclasses import dataclass

from musubi_tuner.config.options import option
from musubi_tuner.memory.placement import DTYPES, dtype_name
from musubi_tuner.nn.vae.video_kl import Savings

_LLM = "LLaVA-Llama-3 text encoder: llava_llama3_fp16.safetensors, or the folder of its repository"
_CLIP = "CLIP-L text encoder: clip_l.safetensors, or the folder of its repository"
_TOKENIZER = "folder with tokenizer.json of {}; looked for beside the encoder and in the Hugging Face cache"
TILE = 256


@dataclass(frozen=True)
class VaeOptions:
    """HunyuanVideo VAE"""

    vae_tiling: bool = option(False, help=f"code frames in tiles of {TILE} pixels that are blended: much less memory")
    vae_spatial_tile_sample_min_size: int | None = option(
        None, help="side of the tiles in pixels; turns tiling on", minimum=64
    )
    vae_chunk_size: int | None = option(
        None, help="frames that a convolution works on at once: less memory, the same numbers", minimum=1
    )

    @property
    def savings(self) -> Savings:
        """The options as the VAE takes them."""
        size = self.vae_spatial_tile_sample_min_size
        return Savings(size or (TILE if self.vae_tiling else None), self.vae_chunk_size)


@dataclass(frozen=True)
class TextEncoderOptions:
    """HunyuanVideo text encoders"""

    text_encoder1: str | None = option(None, help=_LLM)
    text_encoder2: str | None = option(None, help=_CLIP)
    tokenizer1: str | None = option(None, help=_TOKENIZER.format("Llama 3"))
    tokenizer2: str | None = option(None, help=_TOKENIZER.format("CLIP"))
    text_encoder_dtype: str = option(
        "float16", help="dtype of both text encoders, and of cached features", choices=tuple(DTYPES), parse=dtype_name
    )
    fp8_llm: bool = option(False, help="keep the large weights of text_encoder1 in scaled FP8")


@dataclass(frozen=True)
class CacheTextEncoderOptions(TextEncoderOptions):
    """HunyuanVideo text encoders (for the text cache)"""

    text_encoder1: str | None = option("", help=_LLM, required=True)
    text_encoder2: str | None = option("", help=_CLIP, required=True)


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
