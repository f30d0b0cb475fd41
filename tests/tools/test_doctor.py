"""`musubi doctor`: what it finds, and that a fault of one probe hides nothing."""

import json
import platform
from types import SimpleNamespace

import pytest
import torch

from musubi_tuner.tools import doctor


def run(capsys, *argv: str) -> tuple[int, str]:
    code = doctor.main(list(argv))
    return code, capsys.readouterr().out


def test_the_page_names_versions_devices_backends_and_features(capsys):
    _, page = run(capsys)
    for words in (
        "versions",
        platform.python_version(),
        "devices",
        "kernel backends",
        "reference",
        "features",
        "wandb",
    ):
        assert words in page
    rows = {r["name"]: r for s in json.loads(run(capsys, "--json")[1]) for r in s["rows"]}
    assert rows["reference"]["state"] == "ok"
    assert rows["torch threads"]["note"] == str(torch.get_num_threads())
    assert ("CUDA" in rows) != torch.cuda.is_available()


def test_a_broken_probe_is_a_row_and_the_exit_code(capsys, monkeypatch):
    def broken() -> bool:
        raise RuntimeError("driver lost")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    code, page = run(capsys)
    assert code == 1
    assert "! torch" in page
    assert "RuntimeError: driver lost" in page
    assert "building from source" in page


def test_a_missing_package_is_told_with_what_it_serves():
    ghost = doctor.Feature("ghostly logs", "no_such_module_here", "no-such-dist", "pip install it")
    (row,) = doctor.features([ghost])
    assert (row.name, row.state, row.note) == ("ghostly logs", "missing", "needs no-such-dist: pip install it")
    there = doctor.Feature("tests", "pytest", "pytest", "")
    assert doctor.features([there])[0].note == f"pytest {pytest.__version__}"


@pytest.mark.parametrize(
    ("name", "wanted", "state"),
    [("torch", ">=2.6", "ok"), ("torch", ">=99", "broken"), ("no-such-dist", ">=1", "broken"), ("torch", "", "ok")],
)
def test_a_required_package_must_be_there_and_in_its_range(name, wanted, state):
    row = doctor.required(name, wanted)
    assert row.state == state
    assert state == "ok" or "pip install" in row.note


def test_requirements_of_extras_and_other_pythons_are_left_out():
    lines = ["torch>=2.6", "tomli>=2; python_version < '3.0'", "wandb>=1; extra == 'train'", "av"]
    assert doctor.requirements(lines) == [("torch", ">=2.6"), ("av", "")]


def test_help_and_unknown_flags(capsys):
    code, page = run(capsys, "--help")
    assert (code, "--json" in page) == (0, True)
    with pytest.raises(ValueError, match="did you mean --json"):
        doctor.main(["--jsn"])


def test_a_cuda_device_is_described(monkeypatch):
    facts = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    rows = {row.name: row for row in doctor.devices()}
    assert rows["cuda:0"].note.startswith("Some GPU, sm_90, 141.0 GiB, CUDA ")
