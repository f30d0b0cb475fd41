"""What sampling writes: PNG, numbered frames, MP4 and latents; each appears whole or not at all.

Pixels come as `[3, F, H, W]` in [-1, 1]. Pictures and clips carry what made them (prompt, seed, settings) in their
metadata unless told otherwise: PNG text chunks, the MP4 comment, safetensors metadata.
"""

import json
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError
from musubi_tuner.sampling.request import Request
from musubi_tuner.weights.reader import open_checkpoint
from musubi_tuner.weights.write import atomic_file, atomic_save_safetensors

LATENT_VERSION = "1"
_LATENT, _REQUEST, _FAMILY, _FORMAT = "latent", "musubi.request", "musubi.family", "musubi.latent_version"

_CODECS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("libx264", {"crf": "16", "preset": "medium"}),
    ("mpeg4", {"qmin": "2", "qmax": "4"}),
)
"""Encoders in order of preference; the second is part of every FFmpeg. Near-transparent quality: samples are judged."""


def to_bytes(pixels: Tensor) -> Tensor:
    """uint8 frames [F, H, W, 3] on the CPU from `pixels: [3, F, H, W]` in [-1, 1], rounded half to even."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def describe(request: Request) -> dict[str, str]:
    """The request as text, for metadata."""
    return {name: str(value) for name, value in asdict(request).items() if value not in (None, ())}


def write_png(path: Path, frame: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Write `frame: [H, W, 3]` uint8 as PNG, with `text` as its text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    with atomic_file(path) as file:
        Image.fromarray(frame.numpy()).save(file, format="PNG", pnginfo=info)


def write_frames(folder: Path, frames: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Write `frames: [F, H, W, 3]` uint8 as `00000.png`, ...; the folder appears when all are there."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        for number, frame in enumerate(frames):
            write_png(temporary / f"{number:05d}.png", frame, text)
        temporary.replace(folder)
    except OSError as fault:
        raise UserError(f"cannot write the frames {folder}: {fault.strerror}") from fault
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_video(path: Path, frames: Tensor, fps: int, text: Mapping[str, str] | None = None) -> None:
    """Write `frames: [F, H, W, 3]` uint8 as MP4 (H.264 where FFmpeg has it, else MPEG-4 part 2; yuv420p).

    Raises UserError for odd sizes, which this pixel format cannot hold.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"video of {height} x {width} pixels: height and width must be even; use --output_type images")
    with atomic_file(path) as file:
        _encode(file, frames, fps, json.dumps(text, ensure_ascii=False) if text else None)


def _encode(file: BinaryIO, frames: Tensor, fps: int, comment: str | None) -> None:
    import av

    codec, options = _codec()
    with av.open(file, mode="w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream(codec, rate=fps, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.thread_count = 1 if frames.shape[1] * frames.shape[2] < 256 * 256 else 0
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())


def _codec() -> tuple[str, Mapping[str, str]]:
    """The first encoder that this FFmpeg has."""
    import av

    for name, options in _CODECS:
        try:
            av.codec.Codec(name, "w")
        except ValueError:  # av's UnknownCodecError is one
            continue
        return name, options
    raise UserError("this FFmpeg can encode neither H.264 nor MPEG-4: use --output_type images")


def write_latents(path: Path, latents: Tensor, request: Request, family: str, *, metadata: bool = True) -> None:
    """Write `latents: [C, F, H, W]` as float32 with the request that made them (`read_latents` takes them back)."""
    about = {_FORMAT: LATENT_VERSION, _FAMILY: family}
    if metadata:
        about[_REQUEST] = json.dumps(asdict(request), ensure_ascii=False)
    atomic_save_safetensors(path, {_LATENT: latents.float()}, about)


def read_latents(path: str, family: str) -> tuple[Tensor, Mapping[str, Any]]:
    """Latents [C, F, H, W] of such a file and the request's values, {} where it has none.

    Raises UserError for other files, other families and newer formats.
    """
    with open_checkpoint(path) as file:
        about = file.header.metadata
        if _LATENT not in file.header.tensors or len(file.header.tensors[_LATENT].shape) != 4:
            raise UserError(f"{path} holds no latents: give a file that --output_type latent has written")
        if about.get(_FAMILY, family) != family:
            raise UserError(f"{path} holds latents of {about[_FAMILY]}; this command decodes those of {family}")
        if about.get(_FORMAT, LATENT_VERSION) > LATENT_VERSION:
            raise UserError(f"{path} has latent format {about[_FORMAT]}, newer than this version: update musubi-tuner")
        return file.read(_LATENT), json.loads(about.get(_REQUEST, "{}"))


def free_stem(folder: Path, stem: str, taken: Collection[str] = ()) -> str:
    """`stem`, or `stem_2`, `stem_3`, ... : the first that is not `taken` and that no file in `folder` begins with."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    number, found = 1, stem
    while found in taken or any(name == found or name.startswith((f"{found}.", f"{found}_latent.")) for name in there):
        number += 1
        found = f"{stem}_{number}"
    return found
