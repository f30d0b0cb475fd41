"""`--debug_mode`: look at what would be encoded, instead of encoding it.

Every item is shown as the model will see it: in its bucket, clips as a strip of up to eight of their frames, controls
beside. `console` draws with half blocks in 24-bit colours, two pixels a character; `image` hands a picture to the
system's viewer, as Pillow finds it. Between items the terminal asks what to do next, unless a number is given.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageShow

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.data.sources import MediaItem, Scan, read_controls, read_pixels

_STRIP = 8


@dataclass(frozen=True)
class ViewOptions:
    """Looking at the dataset"""

    debug_mode: str | None = option(
        None, help="show the items in a window or in the terminal; nothing is cached", choices=("image", "console")
    )
    console_width: int = option(80, help="characters in a row of the terminal's pictures", minimum=8)
    console_back: str | None = option(
        None, help='colour around the terminal\'s pictures, e.g. black or "#404040"', metavar="COLOR"
    )
    console_num_images: int | None = option(
        None, help="show this many items of each dataset without asking", minimum=1, metavar="N"
    )


Pixels = NDArray[np.uint8]
"""`[H, W, 3]`."""
Draw = Callable[[Pixels, str], None]
"""(picture, its title): show it."""


def view(
    scans: Sequence[Scan], options: ViewOptions, *, stdin: TextIO | None = None, out: TextIO | None = None
) -> None:
    """Show the items of each dataset.

    Raises:
        UserError: nobody can be asked what to show next, no viewer was found, or a colour is none.
    """
    source, target = stdin or sys.stdin, out or sys.stdout
    if options.console_num_images is None and not source.isatty():
        raise UserError(
            f"--debug_mode {options.debug_mode} asks after each item, and the input is no terminal: "
            "say how many items of each dataset to show with --console_num_images"
        )
    draw = _to_viewer if options.debug_mode == "image" else _to_console(options, target)
    for found in scans:
        for number, item in enumerate(found.items[: options.console_num_images], start=1):
            title = f"[{number}/{len(found.items)}] {_told(item)}"
            target.write(title + "\n")
            try:
                shown = picture(item)
            except ValueError as error:
                target.write(f"  {item.path} {error}\n")
            else:
                draw(shown, title)
            answer = "" if options.console_num_images else _asked(source, target)
            if answer == "q":
                return
            if answer == "d":
                break


def _told(item: MediaItem) -> str:
    frames, height, width = item.shape
    clip = f", {frames} frames from {item.frames[0]}" if item.frames else ""
    beside = "".join(f" + {control.path.name} ({_size(control.size)})" for control in item.controls)
    return f"{item.path.name} ({_size(item.size)}) -> {width}x{height}{clip}{beside}: {item.caption!r}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _asked(source: TextIO, target: TextIO) -> str:
    """What the user wants next: empty for the next item, d for the next dataset, q (or the end of input) to stop."""
    target.write("Enter: next item, d: next dataset, q: stop > ")
    target.flush()
    line = source.readline()
    return line.strip().lower()[:1] if line else "q"


def picture(item: MediaItem) -> Pixels:
    """The item's frames and controls side by side, at the height of the tallest.

    Raises:
        ValueError: a file cannot be decoded.
    """
    parts = [frame for clip in (read_pixels(item), *read_controls(item)) for frame in _frames(clip.numpy())]
    height = max(part.shape[0] for part in parts)
    padded = [np.pad(part, ((0, height - part.shape[0]), (0, 0), (0, 0))) for part in parts]
    return np.concatenate(padded, axis=1)


def _frames(pixels: NDArray[np.float32]) -> Iterator[Pixels]:
    """Up to `_STRIP` frames of `pixels: [3, F, H, W]`, evenly spread, as `[H, W, 3]`."""
    for index in np.unique(np.linspace(0, pixels.shape[1] - 1, _STRIP).round().astype(int)):
        yield np.round((pixels[:, index].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def _to_viewer(pixels: Pixels, title: str) -> None:
    if not ImageShow.show(Image.fromarray(pixels), title):
        raise UserError("no program that shows pictures was found (xdg-open, display, eog): use --debug_mode console")


def _to_console(options: ViewOptions, out: TextIO) -> Draw:
    try:
        back = ImageColor.getrgb(options.console_back)[:3] if options.console_back else None
    except ValueError as error:
        raise UserError(f"--console_back {options.console_back}: use a colour name, or #rrggbb") from error
    return lambda pixels, _: out.writelines(f"{line}\n" for line in half_blocks(pixels, options.console_width, back))


def half_blocks(pixels: Pixels, width: int, back: tuple[int, ...] | None = None) -> list[str]:
    """Lines of `width` characters at most: each shows an upper and a lower pixel; `back` puts a margin around."""
    inner = width - 2 if back else width
    columns = min(inner, pixels.shape[1])
    rows = max(round(pixels.shape[0] * columns / pixels.shape[1] / 2), 1)
    small = np.asarray(Image.fromarray(pixels).resize((columns, 2 * rows), Image.Resampling.BOX))
    if back:
        small = np.stack(
            [np.pad(small[..., c], ((2, 2), (1, 1)), constant_values=back[c]) for c in range(3)], axis=-1
        ).astype(np.uint8)
    pairs = zip(small[::2].tolist(), small[1::2].tolist(), strict=True)
    return ["".join(map(_cell, upper, lower)) + "\x1b[0m" for upper, lower in pairs]


def _cell(upper: Sequence[int], lower: Sequence[int]) -> str:
    return "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m\u2580".format(*upper, *lower)
