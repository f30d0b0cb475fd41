"""What samples of a batch bring: captions of different lengths as one tensor, their means, fields of one size."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from musubi_tuner.config.errors import UserError


def cut_to_longest(rows: Sequence[Tensor], masks: Sequence[Tensor], command: str) -> tuple[Tensor, Tensor | None]:
    """Features `[B, T, W]` of `rows: [N, W]` each, zero after each caption's end, and lengths `[B]`.

    The lengths are None where all captions have T tokens: nothing to hide, so every attention library can serve.
    Raises UserError, naming the `command` that mends it, for a mask whose real tokens are not the first ones.
    """
    parts = [row[: _length(mask, command)] for row, mask in zip(rows, masks, strict=True)]
    lengths = [len(part) for part in parts]
    text = parts[0].new_zeros(len(parts), max(lengths), parts[0].shape[1])
    for i, part in enumerate(parts):
        text[i, : len(part)] = part
    return text, None if len(set(lengths)) == 1 else torch.tensor(lengths)


def _length(mask: Tensor, command: str) -> int:
    count = int(mask.sum())
    if count < 1 or not bool(mask[:count].all()):
        raise UserError(
            f"a text cache has a mask with {count} real tokens that are not the first ones: make it anew with "
            f"{command} --recache"
        )
    return count


def stacked(name: str, entries: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """One field of all entries. Raises UserError where one has another length or none."""
    shapes = {tuple(entry[name].shape) if name in entry else None for entry in entries}
    if len(shapes) > 1:
        told = ", ".join("none" if shape is None else "x".join(map(str, shape)) for shape in shapes)
        raise UserError(
            f"items of one batch have {name} of different sizes ({told}): give them batch_size = 1, or sections and "
            "controls of one kind"
        )
    return torch.stack([entry[name] for entry in entries])


def mean_of_real(text: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean [B, W] float32 over the real rows of `text: [B, T, W]`."""
    if lengths is None:
        return text.float().mean(1)
    real = torch.arange(text.shape[1], device=text.device) < lengths.unsqueeze(1)  # [B, T]
    return (text.float() * real.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1)
