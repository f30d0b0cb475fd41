"""One-frame mode: a single picture at a time of its own, told of control pictures at theirs.

The settings as users write them: `--one_frame_inference target_index=9,control_index=0;10,no_post`, `--of` of a prompt
line, and the `fp_1f_*` keys of a dataset file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from musubi_tuner.config.errors import UserError

_SWITCHES = {"no_post": "post", "no_2x": "half", "no_4x": "quarter"}


@dataclass(frozen=True)
class OneFrame:
    """Times of a picture and of its controls, and which empty history it is told of.

    target: time index of the picture, None: where a section would end. controls: of each control picture, None: 0 for
    a single one. post, half, quarter: empty frames at full, half and quarter resolution after it, as a section has.
    """

    target: int | None = None
    controls: tuple[int, ...] | None = None
    post: bool = True
    half: bool = True
    quarter: bool = True

    def times(self, count: int) -> tuple[int, ...]:
        """The times of `count` controls. Raises UserError where times and controls do not pair."""
        times = (0,) * min(count, 1) if self.controls is None else self.controls
        if len(times) != count or not count:
            told = "no times" if not times else "times " + ", ".join(map(str, times))
            raise UserError(
                f"one-frame mode: {count} control pictures and {told}: give at least one picture, and a time for each "
                "(fp_1f_clean_indices in the dataset file, control_index=0;10 in sampling)"
            )
        return times

    @staticmethod
    def of_dataset(keys: Mapping[str, object], *, half: bool, quarter: bool) -> "OneFrame":
        """What a dataset's `fp_1f_*` keys, which were checked, say."""
        times, target = keys.get("fp_1f_clean_indices"), keys.get("fp_1f_target_index")
        controls = tuple(times) if isinstance(times, Sequence) else None
        chosen = target if isinstance(target, int) else None
        return OneFrame(chosen, controls, not keys.get("fp_1f_no_post", False), half, quarter)

    @staticmethod
    def parse(text: str) -> "OneFrame":
        """`target_index=9,control_index=0;10,no_post,no_2x,no_4x`, or `default`. Raises UserError."""
        target: int | None = None
        controls: tuple[int, ...] | None = None
        switches = dict.fromkeys(_SWITCHES.values(), True)
        for part in (word.strip() for word in text.split(",")):
            name, _, value = part.partition("=")
            try:
                if name in _SWITCHES and not value:
                    switches[_SWITCHES[name]] = False
                elif name == "target_index":
                    target = _index(value)
                elif name == "control_index":
                    controls = tuple(_index(number) for number in value.split(";"))
                elif part not in ("default", ""):
                    raise ValueError
            except ValueError as fault:
                allowed = ", ".join(_SWITCHES)
                raise UserError(
                    f"one_frame_inference: {part!r} is none of target_index=9, control_index=0;10, {allowed}, default"
                ) from fault
        return OneFrame(target, controls, **switches)


def _index(text: str) -> int:
    """A time index. Raises ValueError."""
    if int(text) < 0:
        raise ValueError
    return int(text)
