"""Options that only Wan has: its encoders' files, the task, two experts, and unusual sizes."""

from dataclasses import dataclass

from musubi_tuner.config.guidance_steps import GuidanceStepOptions
from musubi_tuner.config.one_frame import OneFrame
from musubi_tuner.config.options import option
from musubi_tuner.families.wan.spec import SPEC

_T5 = "umt5-xxl text encoder in the original layout (models_t5_umt5-xxl-enc-bf16.pth or .safetensors)"
_TOKENIZER = "folder of the umt5 tokenizer (spiece.model, tokenizer.json); looked for beside --t5 when not given"
_FP8_T5 = "keep the text encoder's large weights in scaled FP8"


_CLIP = "CLIP picture encoder of Wan 2.1 (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or .safetensors)"
_CACHE_CPU = "keep the VAE's features between frames in CPU memory: slower, for less memory on the device"


_ONE_FRAME = "one picture from one or two control pictures, each at a time of its own, in place of a clip"


@dataclass(frozen=True)
class CacheLatentOptions:
    """Wan pictures and clips (for the latent cache)"""

    i2v: bool = option(False, help="cache the first frame too, for image-to-video and control models that take one")
    flf2v: bool = option(False, help="cache the first and the last frame, for models that take both")
    clip: str | None = option(None, help=_CLIP + "; for models of version 2.1, implies i2v", metavar="FILE")
    vae_cache_cpu: bool = option(False, help=_CACHE_CPU)
    one_frame: bool = option(False, help=_ONE_FRAME)


@dataclass(frozen=True)
class CacheTextEncoderOptions:
    """Wan text encoder (for the text cache)"""

    t5: str = option("", help=_T5, required=True)
    t5_tokenizer: str | None = option(None, help=_TOKENIZER)
    fp8_t5: bool = option(False, help=_FP8_T5)


@dataclass(frozen=True)
class EncodingOptions:
    """Wan encoders and VAE (for samples)"""

    t5: str | None = option(None, help=_T5)
    t5_tokenizer: str | None = option(None, help=_TOKENIZER)
    fp8_t5: bool = option(False, help=_FP8_T5)
    clip: str | None = option(None, help=_CLIP + "; for samples from a picture", metavar="FILE")
    vae_cache_cpu: bool = option(False, help=_CACHE_CPU)
    one_frame: bool = option(False, help=_ONE_FRAME)

    @property
    def single(self) -> OneFrame | None:
        """How a single picture is made of control pictures; None: none is."""
        return OneFrame() if self.one_frame else None


@dataclass(frozen=True)
class GenerationOptions(EncodingOptions):
    """Wan encoders, VAE and single pictures (for videos)"""

    one_frame_inference: str | None = option(
        None, help="one picture in place of a video: target_index=9,control_index=0;18, or default"
    )

    @property
    def single(self) -> OneFrame | None:
        """See `EncodingOptions.single`."""
        asked = self.one_frame_inference
        return OneFrame() if asked is None and self.one_frame else None if asked is None else OneFrame.parse(asked)


@dataclass(frozen=True)
class ModelOptions:
    """Wan model"""

    task: str = option(SPEC.default_task, help="which model of the family the file holds", choices=tuple(SPEC.tasks))
    dit_high_noise: str | None = option(
        None, help="of Wan 2.2, the transformer for high noise; --dit is then the one for low noise", metavar="FILE"
    )
    timestep_boundary: float | None = option(
        None,
        help="t from which on the one for high noise predicts, 0 to 1 or in thousandths; the task's if not given",
        above=0,
        below=1000,
    )
    offload_inactive_dit: bool = option(False, help="the transformer that does not predict rests in CPU memory")
    model_config: str | None = option(
        None, help="JSON file with the transformer's sizes, for models that are neither published nor self-describing"
    )

    @property
    def boundary(self) -> float | None:
        """The boundary in t, the task's own where none was given; None where it has none."""
        given = self.timestep_boundary
        if given is None:
            return SPEC.tasks[self.task].boundary
        return given / 1000 if given > 1 else given


@dataclass(frozen=True)
class GenerationModelOptions(GuidanceStepOptions, ModelOptions):
    """Wan model (for samples)"""

    ckpt_dir: str | None = option(None, help="folder of a published model; its files stand in for options not given")
    lazy_loading: bool = option(False, help="load each of two transformers when it is needed, and forget the other")
    lora_weight_high_noise: tuple[str, ...] = option((), help="LoRA files for the transformer for high noise")
    lora_multiplier_high_noise: tuple[float, ...] = option(
        (), help="strength of each of them in turn; 1 where none is given"
    )
    guidance_scale_high_noise: float | None = option(
        None, help="guidance while the transformer for high noise predicts; the task's if not given"
    )
