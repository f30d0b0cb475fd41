"""Fingerprints: what a cache file was made of, so that a changed picture, model or option is noticed.

Everything is told by content: media files by a hash of their bytes, captions by a hash of their text, model files by
their size and a sample of their bytes. Names and dates do not count, so a moved or copied dataset stays fresh.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

VERSION = 1
_SAMPLE, _SAMPLES = 1 << 16, 32


@dataclass(frozen=True)
class Fingerprint:
    """What a cache was made of. Two equal ones mean equal content."""

    source: str = ""
    """Hash of the media file's bytes (latent) or of the caption (text)."""
    bucket: tuple[int, int] = (0, 0)
    """Width and height that the source was brought to; (0, 0) in text caches."""
    frames: tuple[int, ...] = ()
    """Frames of the source file that the clip holds; empty for pictures and in text caches."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Model files by identity and options by value, by option name."""
    entries: int = 1
    """Cache files of this item."""
    controls: tuple[str, ...] = ()
    """Size of each control, as `<width>x<height>`, where this part depends on controls."""
    control_sources: tuple[str, ...] = ()
    """Hash of each control's bytes."""
    dataset: Mapping[str, str] = field(default_factory=dict)
    """Keys of the dataset file that the family reads, with their values, in latent caches."""
    version: int = VERSION

    def dump(self) -> str:
        """JSON, sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def parse(text: str) -> "Fingerprint | None":
        """The fingerprint in a file's metadata; None where it is damaged or of another version."""
        try:
            values = json.loads(text)
            if values["version"] != VERSION:
                return None
            width, height = values["bucket"]
            tuples = {name: tuple(values.get(name, ())) for name in ("frames", "controls", "control_sources")}
            return Fingerprint(**{**values, **tuples, "bucket": (width, height)})
        except (ValueError, TypeError, KeyError):
            return None

    def differences(self, wanted: "Fingerprint", *, ignore: Collection[str] = ()) -> list[str]:
        """In words, what of `self` (in the file) is not as `wanted`; `ignore` names fields, `entries` is never told."""
        found = []
        if "source" not in ignore and self.source != wanted.source:
            found.append("its source changed")
        if self.bucket != wanted.bucket:
            was, now = (f"{size[0]} x {size[1]}" for size in (self.bucket, wanted.bucket))
            found.append(f"it was made for {was}, now {now} is wanted")
        if self.frames != wanted.frames:
            found.append("it holds other frames")
        if self.controls != wanted.controls:
            sizes = [", ".join(controls) or "none" for controls in (self.controls, wanted.controls)]
            found.append(f"its controls were {sizes[0]}, now {sizes[1]}")
        elif "control_sources" not in ignore and self.control_sources != wanted.control_sources:
            found.append("a control changed")
        names = sorted({*self.dataset, *wanted.dataset})
        pairs = [(name, self.dataset.get(name), wanted.dataset.get(name)) for name in names]
        found += [f"{name} was {was}, now {now}" for name, was, now in pairs if was != now]
        if "settings" not in ignore:
            names = sorted({*self.settings, *wanted.settings})
            found += [f"{name} changed" for name in names if self.settings.get(name) != wanted.settings.get(name)]
        return found


def content_hash(path: Path) -> str:
    """BLAKE2 of a media file's bytes; of a folder of frames, of its files' names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(path):
        if part != path:
            digest.update(f"{part.name}:{part.stat().st_size}:".encode())
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def modified(path: Path) -> int:
    """When a media file, or the newest file of a folder of frames, was last written (nanoseconds)."""
    return max(part.stat().st_mtime_ns for part in (path, *_parts(path)))


def _parts(path: Path) -> list[Path]:
    return sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]


def text_hash(text: str) -> str:
    """BLAKE2 of a caption."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_identity(path: Path) -> str:
    """Identity of a model file or folder: sizes, and of each file the first MiB and 32 samples of 64 KiB.

    A whole hash of an 11 GB encoder is a minute of disk at every start; two trained models differ in every sample.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}:{size}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            for i in range(_SAMPLES):
                stream.seek(max(size - _SAMPLE, 0) * i // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def option_identity(value: object) -> str:
    """How an option counts: a path by the content of what it names, anything else as written."""
    if isinstance(value, (str, Path)) and value and Path(value).exists():
        return file_identity(Path(value))
    return str(value)
