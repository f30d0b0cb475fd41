"""The demo world as the DiT meets it in pre-training: latents and text features in memory, served as batches.

Every scan of pre-training is encoded once in each plain color, and twice moving; captions are encoded once each. An
epoch takes every scan once, in a color drawn by key, and one caption in ten is left empty so that guidance has its
unconditional side. In the mixed part of training a share of the batches holds clips instead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.data.batches import Batch
from musubi_tuner.families.base import Encoders, Family, Item, Vae
from musubi_tuner.flow import keyed
from musubi_tuner.tools.demo import world

Text = Mapping[str, Tensor]
"""What the text cache holds of one caption."""


@dataclass(frozen=True)
class Shelf:
    """Latents of the world. images: `[G, colors, C, 1, h, w]`, digits: `[G]`, clips: `[K, C, F, h, w]`."""

    images: Tensor
    digits: Tensor
    clips: Tensor
    clip_captions: tuple[str, ...]

    def caption(self, glyph: int, color: int) -> str:
        return world.caption(int(self.digits[glyph]), tuple(world.COLORS)[color])


@torch.no_grad()
def fill(vae: Vae, glyphs: world.Glyphs, *, seed: int, clips_per_glyph: int = 2, size: int = 32) -> Shelf:
    """Encode the world with the family's VAE, latents in the scale that the DiT is trained on."""

    def encoded(pixels: Tensor) -> Tensor:
        return torch.cat([vae.encode(part).float() for part in pixels.split(size)])

    images = [encoded(world.paint(glyphs.masks, world.solid(color)).unsqueeze(2)) for color in world.COLORS]
    colors, directions = tuple(world.COLORS), tuple(world.DIRECTIONS)
    clips, captions = [], []
    for index in range(clips_per_glyph * len(glyphs)):
        generator = keyed.generator(seed, "clip", index)
        glyph = index % len(glyphs)
        color = colors[int(torch.randint(len(colors), (), generator=generator))]
        direction = directions[int(torch.randint(len(directions), (), generator=generator))]
        pixels = world.paint(world.moving(glyphs.masks[glyph], direction), world.solid(color))  # [F, 3, H, W]
        clips.append(vae.encode(pixels.transpose(0, 1)[None]).float())
        captions.append(world.caption(int(glyphs.digits[glyph]), color, direction))
    return Shelf(torch.stack(images, dim=1), glyphs.digits, torch.cat(clips), tuple(captions))


def open_shelf(file: Path, vae: Vae, seed: int) -> Shelf:
    """The shelf kept in `file`, or a new one, which is kept there."""
    if not file.exists():
        made = fill(vae, world.load_glyphs(held_out=False), seed=seed)
        content = {"images": made.images, "digits": made.digits, "clips": made.clips, "captions": made.clip_captions}
        torch.save(content, file)
    content = torch.load(file, weights_only=True)
    return Shelf(content["images"], content["digits"], content["clips"], tuple(content["captions"]))


def encode_captions(family: Family, encoders: Encoders, captions: list[str]) -> dict[str, Text]:
    """Text cache entries by caption."""
    items = [Item(caption, height=world.SIZE, width=world.SIZE) for caption in captions]
    return dict(zip(captions, family.encode_condition(items, encoders), strict=True))


def all_captions() -> list[str]:
    """Every sentence of pre-training, and the empty one."""
    directions = (None, *world.DIRECTIONS)
    told = [world.caption(d, color, way) for d in range(10) for color in world.COLORS for way in directions]
    return ["", *told]


@dataclass(frozen=True)
class DigitBatches:
    """A `BatchSource` over a shelf. `mix`: (epoch, share of its batches that hold clips), each until the next; none
    before the first."""

    family: Family
    shelf: Shelf
    texts: Mapping[str, Text]
    seed: int
    image_batch: int = 64
    clip_batch: int = 24
    mix: tuple[tuple[int, float], ...] = ()
    empty_share: float = 0.1

    def __len__(self) -> int:
        return len(self.shelf.images) // self.image_batch

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Batches of epoch `number`: the rest of scans that fills no batch waits for another shuffle."""
        order = torch.randperm(len(self.shelf.images), generator=keyed.generator(self.seed, number, "scans"))
        for index in range(start, len(self)):
            kind = keyed.uniform((), self.seed, number, index, "kind").item()
            if kind < self.clip_share(number):
                yield self._clips(number, index)
            else:
                yield self._images(number, index, order[index * self.image_batch :][: self.image_batch].tolist())

    def clip_share(self, epoch: int) -> float:
        """Share of the batches of `epoch` that hold clips."""
        return max(((start, share) for start, share in self.mix if start <= epoch), default=(0, 0.0))[1]

    def _images(self, number: int, index: int, glyphs: list[int]) -> Batch:
        colors = self.shelf.images.shape[1]
        picks = torch.randint(colors, (len(glyphs),), generator=keyed.generator(self.seed, number, index, "colors"))
        members = tuple(glyph * colors + color for glyph, color in zip(glyphs, picks.tolist(), strict=True))
        captions = [self.shelf.caption(member // colors, member % colors) for member in members]
        return self._batch(self.shelf.images[torch.tensor(glyphs), picks], captions, members, number, index)

    def _clips(self, number: int, index: int) -> Batch:
        generator = keyed.generator(self.seed, number, index, "clips")
        picks = torch.randperm(len(self.shelf.clips), generator=generator)[: self.clip_batch]
        first = self.shelf.images.shape[0] * self.shelf.images.shape[1]
        members = tuple(first + pick for pick in picks.tolist())
        captions = [self.shelf.clip_captions[pick] for pick in picks.tolist()]
        return self._batch(self.shelf.clips[picks], captions, members, number, index)

    def _batch(self, latents: Tensor, captions: list[str], members: tuple[int, ...], number: int, index: int) -> Batch:
        dropped = keyed.uniform((len(captions),), self.seed, number, index, "empty") < self.empty_share
        told = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
        return Batch(latents, self.family.collate([self.texts[caption] for caption in told]), members, number, index)
