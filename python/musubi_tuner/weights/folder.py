"""Files of a published repository's folder, by the option that each of them is for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from musubi_tuner.config.errors import UserError


def files_in(folder: str | None, names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The first of the `names` of each option that is in `folder`; nothing without a folder.

    Raises UserError where the folder is not there or holds none of them.
    """
    if folder is None:
        return {}
    root = Path(folder).expanduser()
    there = {option: [root / name for name in wanted if (root / name).exists()] for option, wanted in names.items()}
    found = {option: str(paths[0]) for option, paths in there.items() if paths}
    if not found:
        every = ", ".join(name for wanted in names.values() for name in wanted)
        raise UserError(f"{folder} is not the folder of a published repository: it holds none of {every}")
    return found
