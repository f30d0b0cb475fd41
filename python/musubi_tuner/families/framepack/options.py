"""Options that only FramePack has: its encoders' files, how sections are made, and what the model is told."""

from dataclasses import dataclass

from musubi_tuner.config.options import option
from musubi_tuner.families.framepack.spec import WINDOW
from musubi_tuner.memory.placement import DTYPES, dtype_name
from musubi_tuner.nn.vae.video_kl import SavingOptions
from musubi_tuner.weights.encoders import CLIP_HELP, LLM_HELP, PairOptions

_SIGLIP = "SigLIP picture encoder: sigclip_vision_patch14_384.safetensors, or the folder of its repository"
_MODEL_CONFIG = "JSON file with the transformer's sizes, for models that are neither published nor self-describing"


@dataclass(frozen=True)
class SectionOptions:
    """FramePack sections"""

    f1: bool = option(
        False,
        help="FramePack-F1: sections follow one another in time (otherwise the last one is made first)",
        flags=("--vanilla_sampling",),
    )
    one_frame: bool = option(False, help="one picture from control pictures, in place of a video from its first frame")


@dataclass(frozen=True)
class CacheLatentOptions(SavingOptions, SectionOptions):
    """FramePack pictures and sections (for the latent cache)"""

    image_encoder: str = option("", help=_SIGLIP, required=True)
    one_frame_no_2x: bool = option(False, help="with --one_frame: no tokens for the history at half resolution")
    one_frame_no_4x: bool = option(False, help="with --one_frame: no tokens for the history at quarter resolution")


@dataclass(frozen=True)
class TextEncoderOptions(PairOptions):
    """FramePack text encoders"""

    text_encoder_dtype: str = option(
        "bfloat16", help="dtype of both text encoders, and of cached features", choices=tuple(DTYPES), parse=dtype_name
    )


@dataclass(frozen=True)
class CacheTextEncoderOptions(TextEncoderOptions):
    """FramePack text encoders (for the text cache)"""

    text_encoder1: str | None = option("", help=LLM_HELP, required=True)
    text_encoder2: str | None = option("", help=CLIP_HELP, required=True)


@dataclass(frozen=True)
class EncodingOptions(SavingOptions, TextEncoderOptions, SectionOptions):
    """FramePack encoders, VAE and sections (for samples)"""

    image_encoder: str | None = option(None, help=_SIGLIP)
    latent_window_size: int = option(WINDOW, help="latent frames of a section", minimum=1)
    bulk_decode: bool = option(
        False, help="decode all sections at once, in place of overlapping pieces: more memory for long videos"
    )


@dataclass(frozen=True)
class GenerationOptions(EncodingOptions):
    """FramePack encoders, VAE and sections (for videos)"""

    video_seconds: float = option(5.0, help="length of the video, brought to whole sections", above=0)
    video_sections: int | None = option(None, help="number of sections, in place of seconds", minimum=1)
    latent_paddings: str | None = option(
        None,
        help="how many sections lie between a section and the start, in the order in which they are made, e.g. 3,2,1,0",
    )
    custom_system_prompt: str | None = option(
        None, help="task of text_encoder1, in place of the one that the model was trained with"
    )
    one_frame_inference: str | None = option(
        None,
        help="one picture in place of a video: target_index=9,control_index=0;10,no_post,no_2x,no_4x, or default",
    )


@dataclass(frozen=True)
class TrainedModelOptions:
    """FramePack model (in training)"""

    guidance_scale: float = option(
        1.0, help="distilled guidance that the model is told in training, a thousandfold as in sampling", minimum=0
    )
    model_config: str | None = option(None, help=_MODEL_CONFIG)

    @property
    def guidance(self) -> float:
        """What the guidance input is told."""
        return 1000.0 * self.guidance_scale


@dataclass(frozen=True)
class ModelOptions:
    """FramePack model"""

    rope_scaling_timestep_threshold: float | None = option(
        None,
        help="from this timestep on (of 1000), rows and columns lie rope_scaling_factor times as far apart: for "
        "pictures larger than the model was trained on",
        minimum=0,
        maximum=1000,
    )
    rope_scaling_factor: float = option(0.5, help="distance of rows and columns there", above=0)
    model_config: str | None = option(None, help=_MODEL_CONFIG)
