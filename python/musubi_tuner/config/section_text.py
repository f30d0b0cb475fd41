"""Values for single sections of a video, as users write them: `0:a cat sits;;;1:it jumps;;;-1:it lies down`.

Sections count from 0 in time, -1 is the last one, `1-3` are three of them. A section that is not named takes the value
of section 0, or the first one where that is not named either. A text without `;;;` is one value for all.
"""

import re
from dataclasses import dataclass

from musubi_tuner.config.errors import UserError

SEPARATOR = ";;;"
_PART = re.compile(r"\s*(-?\d+)(?:-(-?\d+))?\s*:(.*)", re.DOTALL)


@dataclass(frozen=True)
class Sectioned:
    """spans: first and last section of each value, negative ones from the end; values: in the order written."""

    spans: tuple[tuple[int, int], ...]
    values: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> "Sectioned":
        """Raises UserError for a part that does not begin with its section."""
        if SEPARATOR not in text:
            return Sectioned(((0, -1),), (text,))
        spans, values = [], []
        for part in text.split(SEPARATOR):
            found = _PART.fullmatch(part)
            if found is None:
                raise UserError(
                    f"{part.strip()[:60]!r}: with {SEPARATOR} each part begins with its section, like 0: or -1: or 1-2:"
                )
            first, last, value = found.groups()
            spans.append((int(first), int(first if last is None else last)))
            values.append(value.strip())
        return Sectioned(tuple(spans), tuple(values))

    def place(self, section: int, count: int) -> int:
        """Which of the values is that of `section`, 0 for the first of `count` in time."""
        named = [place for place in range(len(self.values)) if self._covers(place, section, count)]
        if named:
            return named[-1]
        return 0 if section == 0 else self.place(0, count)

    def unused(self, count: int) -> tuple[str, ...]:
        """Values that none of `count` sections takes."""
        taken = {self.place(section, count) for section in range(count)}
        return tuple(value for place, value in enumerate(self.values) if place not in taken)

    def _covers(self, place: int, section: int, count: int) -> bool:
        first, last = (number + count if number < 0 else number for number in self.spans[place])
        return first <= section <= last
