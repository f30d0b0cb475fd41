"""Tokenizers from local folders, exactly as their files say; nothing is fetched.

`tokenizer.json` is the whole tokenizer and is taken as it is; a bare `spiece.model` is converted. Where no folder is
named, `find_folder` looks at the usual places beside the encoder's checkpoint and in the Hugging Face cache.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.config.errors import UserError

FILES = ("tokenizer.json", "spiece.model")
"""Either is enough."""


def find_folder(named: str | None, option: str, beside: Path, places: Sequence[str], repo: str) -> Path:
    """The folder of a tokenizer.

    Args:
        named: what the user gave with `--<option>`; a folder, or one of `FILES` in it.
        beside: the encoder's checkpoint. places: folders to look at, relative to the checkpoint's.
        repo: Hugging Face repository whose local copy is looked at last.

    Raises UserError telling which files to put where.
    """
    if named is not None:
        given = Path(named).expanduser()
        folder = given.parent if given.name in FILES else given
        if not _is_tokenizer(folder):
            raise UserError(f"--{option} {named}: there is no {' or '.join(FILES)} in it; name the folder of {repo}'s")
        return folder
    home = beside if beside.is_dir() else beside.parent
    candidates = [home / place for place in places]
    for folder in candidates:
        if _is_tokenizer(folder):
            return folder
    cached = _cached(repo)
    if cached is not None:
        return cached
    raise UserError(
        f"no tokenizer for {beside}, and nothing is downloaded: put {' or '.join(FILES)} of {repo} in {candidates[0]}, "
        f"or name its folder with --{option} "
        f'(to get it: hf download {repo} --include "tokenizer*" --local-dir {candidates[0]})'
    )


def find_words(named: str | None, option: str, beside: Path, places: Sequence[str], repo: str) -> Path:
    """The file that the loaders below read of the folder that `find_folder` gives: the first of `FILES` in it."""
    folder = find_folder(named, option, beside, places, repo)
    return next(folder / name for name in FILES if (folder / name).is_file())


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _cached(repo: str) -> Path | None:
    """The snapshot folder of `repo` in the Hugging Face cache, where one of `FILES` is there."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repo, name) for name in FILES]
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def load_t5_tokenizer(folder: Path) -> Any:
    """A tokenizer of T5's kind (`<pad>`, `</s>` at the end of every text). Raises UserError for files of another."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_json_tokenizer(folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    else:
        from transformers import T5TokenizerFast

        tokenizer = T5TokenizerFast.from_pretrained(folder, extra_ids=0, local_files_only=True)
    ends = tokenizer("").input_ids
    if tokenizer.pad_token_id is None or ends != [tokenizer.convert_tokens_to_ids("</s>")]:
        raise UserError(f"tokenizer {folder}: an empty text gives {ends}, not one </s>: it is not a T5 tokenizer")
    return tokenizer


def load_json_tokenizer(folder: Path, **special: str) -> Any:
    """The tokenizer of `tokenizer.json` in `folder`, exactly as the file says; `special` names its special tokens.

    Raises UserError where the file is not there or not whole.
    """
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {file} cannot be read ({error}); download it again") from error
    return PreTrainedTokenizerFast(tokenizer_file=str(file), padding_side="right", **special)
