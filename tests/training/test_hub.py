"""Copies on the Hugging Face hub, with an object of the test's own for the hub: what is sent, and no token is told."""

import logging
import shutil
import threading
from pathlib import Path

import pytest
from safetensors import safe_open

from musubi_tuner.config.errors import UserError
from musubi_tuner.training import checks, hub, run
from musubi_tuner.training.hub import HubOptions, fetched, open_uploads
from training_place import FAMILY, make_place, options_of

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


class Hub:
    """Notes what is asked of it; `fault` is raised by every upload or, with `closed`, by every call."""

    def __init__(self, fault: Exception | None = None, *, closed: bool = False) -> None:
        self.calls, self.fault, self.closed = [], fault, closed
        self.gate = threading.Event()
        self.gate.set()
        self.store = Path()

    def _note(self, name: str, **given) -> None:
        self.gate.wait(30)
        self.calls.append((name, given))
        if self.fault is not None and (self.closed or name.startswith("upload")):
            raise self.fault

    def create_repo(self, **given) -> None:
        self._note("create", **given)

    def upload_file(self, *, path_or_fileobj, path_in_repo, **where) -> None:
        assert Path(path_or_fileobj).is_file()
        self._note("upload_file", place=path_in_repo, **where)

    def upload_folder(self, *, folder_path, path_in_repo, **where) -> None:
        assert (Path(folder_path) / "manifest.json").is_file()
        self._note("upload_folder", place=path_in_repo, **where)

    def snapshot_download(self, **given) -> str:
        self._note("download", **given)
        return str(self.store)

    @property
    def places(self) -> list[str]:
        return [given["place"] for name, given in self.calls if name.startswith("upload")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def remote(monkeypatch) -> Hub:
    found = Hub()
    tokens = []
    monkeypatch.setattr(hub, "open_api", lambda token: tokens.append(token) or found)
    found.tokens = tokens
    return found


def train(place: Path, out: Path, *words: str) -> None:
    run.run(FAMILY, options_of(place, out, "--max_train_steps", "2", *words))


WORDS = ("--huggingface_repo_id", "me/brush", "--huggingface_token", TOKEN)


@pytest.mark.shows(
    "huggingface_repo_id",
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_token",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
)
def test_saved_files_and_states_are_copied_and_the_token_is_told_nobody(place, tmp_path, remote, caplog, capfd):
    words = [*WORDS, "--huggingface_path_in_repo", "/loras/", "--save_every_n_steps", "1", "--save_state"]
    words += ["--logging_dir", str(tmp_path / "log"), "--log_config", "--huggingface_repo_visibility", "public"]
    with caplog.at_level(logging.DEBUG):
        train(place, tmp_path / "a", *words, "--huggingface_repo_type", "dataset")
    where = {"repo_id": "me/brush", "repo_type": "dataset"}
    assert remote.calls[0] == ("create", {**where, "private": False, "exist_ok": True})
    files = ["study-step00000001.safetensors", "study-step00000002.safetensors", "study.safetensors"]
    assert remote.places == [f"loras/{name}" for name in files]
    assert all(given.items() >= where.items() for _, given in remote.calls)
    assert remote.tokens == [TOKEN]
    train(place, tmp_path / "b", *WORDS, "--save_state_on_train_end", "--save_state_to_huggingface")
    assert remote.places[3:] == ["study.safetensors", "study-state"]
    assert remote.calls[4][1]["private"] is True
    told = capfd.readouterr()
    assert TOKEN not in caplog.text + told.out + told.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    with safe_open(tmp_path / "a/study.safetensors", "pt") as file:
        assert "ss_steps" in file.metadata()


@pytest.mark.shows("async_upload")
def test_copies_in_the_background_are_waited_for_at_the_end(tmp_path):
    remote = Hub()
    uploads = open_uploads(HubOptions(huggingface_repo_id="me/brush", async_upload=True), api=lambda _token: remote)
    (tmp_path / "x.safetensors").write_bytes(b"x")
    remote.gate.clear()
    uploads.send(tmp_path / "x.safetensors")  # returns while the hub does not answer
    assert remote.places == []
    threading.Timer(0.1, remote.gate.set).start()
    uploads.finish(None)
    assert remote.places == ["x.safetensors"]


def test_an_upload_that_fails_is_a_warning_and_a_repository_that_is_shut_ends_it_before_training(
    place, tmp_path, remote, caplog, monkeypatch
):
    remote.fault = RuntimeError(f"\n401 for token {TOKEN}\nmore")
    train(place, tmp_path / "a", *WORDS)
    assert (tmp_path / "a/study.safetensors").is_file()
    assert "study.safetensors was not copied to me/brush: 401 for token ***" in caplog.text
    remote.closed = True
    monkeypatch.setattr("musubi_tuner.sampling.models.materialize", lambda *_a, **_k: pytest.fail("read the weights"))
    with pytest.raises(
        UserError, match=r"me/brush: the repository cannot be used: 401 for token \*\*\*; check"
    ) as told:
        train(place, tmp_path / "b", *WORDS)
    assert TOKEN not in str(told.value)


@pytest.mark.shows("resume_from_huggingface")
def test_a_state_comes_back_from_the_hub(place, tmp_path, remote, caplog):
    train(place, tmp_path / "one", "--save_state_on_train_end")
    remote.store = tmp_path / "cache"
    shutil.copytree(tmp_path / "one/study-state", remote.store / "runs/study-state")
    words = ["--resume", "me/brush/runs/study-state:v2", "--resume_from_huggingface", "--max_train_steps", "3"]
    with caplog.at_level(logging.INFO):
        train(place, tmp_path / "two", *words)
    ((_, asked),) = remote.calls
    assert asked == {
        "repo_id": "me/brush",
        "repo_type": "model",
        "revision": "v2",
        "allow_patterns": ["runs/study-state/*"],
    }
    assert "after step 2" in caplog.text


@pytest.mark.parametrize(
    ("resume", "sentence"),
    [
        ("me/brush", "give OWNER/NAME/FOLDER"),
        ("me/brush/state:v2:modle", "one of model, dataset, space"),
        ("me/brush/gone", "the repository has no folder gone"),
    ],
)
def test_states_that_are_not_there_are_told(tmp_path, resume, sentence):
    remote = Hub()
    remote.store = tmp_path
    with pytest.raises(UserError, match=sentence):
        fetched(resume, HubOptions(), api=lambda _token: remote)


def test_a_hub_that_does_not_answer_is_told():
    with pytest.raises(UserError, match="cannot be fetched: no route"):
        fetched("me/brush/x", HubOptions(), api=lambda _token: Hub(OSError("no route"), closed=True))


def test_hub_options_without_a_repository_are_named(tmp_path):
    words = ["--async_upload", "--huggingface_token", TOKEN, "--huggingface_path_in_repo", "x"]
    told = checks.ineffective(options_of(tmp_path, tmp_path, *words))
    assert sorted(sentence.split()[0] for sentence in told) == [
        "async_upload",
        "huggingface_path_in_repo",
        "huggingface_token",
    ]
    with pytest.raises(UserError, match="fetches what --resume names"):
        checks.check(options_of(tmp_path, tmp_path, "--resume_from_huggingface"))


def test_the_hub_s_own_interface_has_the_calls(monkeypatch):
    """What is called exists in the installed library under these names; no request is made."""
    import inspect

    api = hub.open_api(None)
    wanted = {
        "create_repo": {"repo_id", "repo_type", "private", "exist_ok"},
        "upload_file": {"path_or_fileobj", "path_in_repo", "repo_id", "repo_type"},
        "upload_folder": {"folder_path", "path_in_repo", "repo_id", "repo_type"},
        "snapshot_download": {"repo_id", "repo_type", "revision", "allow_patterns"},
    }
    for name, parameters in wanted.items():
        assert parameters <= set(inspect.signature(getattr(api, name)).parameters)
