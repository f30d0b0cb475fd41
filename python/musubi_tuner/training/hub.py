"""Copies of what a run saves in a repository of the Hugging Face hub, and states that come back from there.

A repository that cannot be written to is told before training. After that an upload may fail without harm: the file
lies on the disk, a warning names it, and the run goes on. The token is given to the hub's library alone; no log,
metadata or state has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.training.events import Quiet, State

log = logging.getLogger(__name__)

TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class HubOptions:
    """Hugging Face hub"""

    huggingface_repo_id: str | None = option(
        None, help="repository that every saved file is copied to; made if it is not there", metavar="OWNER/NAME"
    )
    huggingface_repo_type: str | None = option(None, help="kind of the repository; model if not given", choices=TYPES)
    huggingface_path_in_repo: str | None = option(None, help="folder in it; the top if not given", metavar="FOLDER")
    huggingface_token: str | None = option(None, help="token for this run; better a login, or the variable HF_TOKEN")
    huggingface_repo_visibility: str | None = option(
        None, help="of a repository that is made; private if not given", choices=("public", "private")
    )
    save_state_to_huggingface: bool = option(False, help="copy states too")
    resume_from_huggingface: bool = option(
        False, help="resume names a state on the hub: OWNER/NAME/FOLDER, then :REVISION and :TYPE where needed"
    )
    async_upload: bool = option(False, help="copy in the background; the end of the run waits for it")


def open_api(token: str | None) -> Any:
    """The hub's own interface."""
    from huggingface_hub import HfApi

    return HfApi(token=token)


class Uploads(Quiet):
    """Sends files and states as they are saved; the last events of a run wait until all are sent."""

    def __init__(self, chosen: HubOptions, api: Any) -> None:
        self._chosen, self._api = chosen, api
        self._pool = ThreadPoolExecutor(1, "musubi-upload") if chosen.async_upload else None

    def send(self, path: Path) -> None:
        """Copy a saved file, or a state's folder where these are wanted."""
        if path.is_dir() and not self._chosen.save_state_to_huggingface:
            return
        if self._pool is not None:
            self._pool.submit(self._send, path)
        else:
            self._send(path)

    def finish(self, _state: State) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def stopped(self, state: State) -> None:
        self.finish(state)

    def _send(self, path: Path) -> None:
        chosen = self._chosen
        place = "/".join(part for part in ((chosen.huggingface_path_in_repo or "").strip("/"), path.name) if part)
        where = {"repo_id": chosen.huggingface_repo_id, "repo_type": chosen.huggingface_repo_type or "model"}
        try:
            if path.is_dir():
                self._api.upload_folder(folder_path=str(path), path_in_repo=place, **where)
            else:
                self._api.upload_file(path_or_fileobj=str(path), path_in_repo=place, **where)
        except Exception as fault:  # whatever the network does, the file is on the disk and the run goes on
            log.warning("%s was not copied to %s: %s", path, where["repo_id"], _told(fault, chosen))
        else:
            log.info("copied %s to %s", path.name, where["repo_id"])


def open_uploads(chosen: HubOptions, *, api: Callable[[str | None], Any] | None = None) -> Uploads | None:
    """Make sure of the repository that the options name; None where they name none. Raises UserError."""
    if chosen.huggingface_repo_id is None:
        return None
    hub = (api or open_api)(chosen.huggingface_token)
    try:
        hub.create_repo(
            repo_id=chosen.huggingface_repo_id,
            repo_type=chosen.huggingface_repo_type or "model",
            private=chosen.huggingface_repo_visibility != "public",
            exist_ok=True,
        )
    except Exception as fault:  # a wrong name, token or network: the library has a class of its own for each
        raise UserError(
            f"huggingface_repo_id = {chosen.huggingface_repo_id}: the repository cannot be used: "
            f"{_told(fault, chosen)}; check its name, the network, and the token (`hf auth login`)"
        ) from None
    return Uploads(chosen, hub)


def fetched(resume: str, chosen: HubOptions, *, api: Callable[[str | None], Any] | None = None) -> str:
    """The local copy of the state `OWNER/NAME/FOLDER[:REVISION[:TYPE]]`. Raises UserError."""
    path, _, rest = resume.partition(":")
    revision, _, kind = rest.partition(":")
    parts = path.strip("/").split("/")
    if len(parts) < 3 or kind not in ("", *TYPES):
        raise UserError(
            f"resume = {resume!r}: with --resume_from_huggingface give OWNER/NAME/FOLDER, then :REVISION and "
            f":TYPE where needed (one of {', '.join(TYPES)})"
        )
    folder = "/".join(parts[2:])
    try:
        copy = (api or open_api)(chosen.huggingface_token).snapshot_download(
            repo_id="/".join(parts[:2]),
            repo_type=kind or chosen.huggingface_repo_type or "model",
            revision=revision or None,
            allow_patterns=[f"{folder}/*"],
        )
    except Exception as fault:
        raise UserError(f"resume = {resume!r} cannot be fetched: {_told(fault, chosen)}") from None
    if not (Path(copy) / folder).is_dir():
        raise UserError(f"resume = {resume!r}: the repository has no folder {folder}")
    log.info("fetched the state %s", resume)
    return str(Path(copy) / folder)


def _told(fault: Exception, chosen: HubOptions) -> str:
    """The first line of the library's message, without the token."""
    text = next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
    return text.replace(chosen.huggingface_token, "***") if chosen.huggingface_token else text
