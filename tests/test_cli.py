"""The command table and its exit codes, in one process, with a command and a family of the test's own."""

import logging
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from musubi_tuner import cli, console
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import option
from musubi_tuner.families import registry


@dataclass(frozen=True)
class Shared:
    """Shared options."""

    seed: int = option(1, help="seed", minimum=0)
    rank: int = option(4, help="rank")


@dataclass(frozen=True)
class Own:
    """The family's own."""

    size: int = option(8, help="size")


@pytest.fixture
def calls(monkeypatch):
    """One command, `train alpha` alias `alpha_train`, whose work is to note its options or raise what `fault` holds."""
    noted = SimpleNamespace(options=[], fault=None)

    def work(family, options):
        noted.options.append((family.name, options))
        if noted.fault is not None:
            raise noted.fault

    module = SimpleNamespace(GROUPS=(Shared,), work=work)
    family = SimpleNamespace(
        name="alpha", option_groups=lambda kind: (Own,), spec=SimpleNamespace(option_defaults={"rank": 16})
    )
    monkeypatch.setitem(sys.modules, "musubi_tuner.alpha_work", module)
    monkeypatch.setattr(cli, "KINDS", {"train": cli.Kind("train it", "alpha_work", "GROUPS", "work")})
    monkeypatch.setattr(cli, "SCRIPTS", {"alpha_train": cli.Script("train", "alpha")})
    monkeypatch.setattr(registry, "get", lambda name: family)
    monkeypatch.setattr(console, "configure", lambda: None)
    monkeypatch.delenv("RANK", raising=False)
    return noted


@pytest.mark.parametrize("words", [["train", "alpha"], ["alpha_train"], ["alpha-train"]])
def test_kind_and_family_or_the_script_name_run_the_same_command(calls, words):
    assert cli.main([*words, "--seed", "7"]) == 0
    ((name, options),) = calls.options
    assert name == "alpha"
    assert (options[Shared].seed, options[Shared].rank, options[Own].size) == (7, 16, 8)
    assert options.source("rank") == "family default"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trane", "alpha"], "'trane' is not a command; did you mean train?"),
        (["train"], "no family was given: use `musubi train FAMILY ...` with one of alpha"),
        (["train", "--seed", "1"], "no family was given"),
        (["train", "beta"], "family 'beta' is not known: use `musubi train FAMILY ...` with one of alpha"),
        (["train", "alpha", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["train", "alpha", "--sede", "1"], "--sede is not an option of this command; did you mean --seed?"),
    ],
)
def test_a_users_fault_is_one_sentence_and_code_2(calls, capsys, words, said):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("musubi: error: ")
    assert said in err
    assert calls.options == []


def test_exit_codes_tell_users_faults_from_ours(calls, capsys):
    calls.fault = UserError("no such file")
    assert cli.main(["alpha_train"]) == 2
    assert capsys.readouterr().err == "musubi: error: no such file\n"
    calls.fault = KeyboardInterrupt()
    assert cli.main(["alpha_train"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    calls.fault = ModuleNotFoundError("No module named 'wandb'", name="wandb")
    assert cli.main(["alpha_train"]) == 2
    assert "error: the package wandb is not installed: see `musubi doctor`" in capsys.readouterr().err
    calls.fault = ModuleNotFoundError("No module named 'musubi_tuner.gone'", name="musubi_tuner.gone")
    assert cli.main(["alpha_train"]) == 1
    assert "Traceback" in capsys.readouterr().err
    calls.fault = RuntimeError("a fault of ours")
    assert cli.main(["alpha_train"]) == 1
    assert "RuntimeError: a fault of ours" in capsys.readouterr().err


def test_a_second_process_is_silent_about_users_faults_but_keeps_the_code(calls, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    calls.fault = UserError("no such file")
    assert cli.main(["alpha_train"]) == 2
    assert cli.main(["alpha_train", "--help"]) == 0
    assert capsys.readouterr() == ("", "")


def test_print_config_and_help_do_no_work(calls, capsys):
    assert cli.main(["train", "alpha", "--print_config", "--seed", "3"]) == 0
    page = capsys.readouterr().out
    assert "seed = 3  # command line" in page
    assert "rank = 16  # family default" in page
    assert cli.main(["train", "alpha", "--help"]) == 0
    assert "usage: musubi train alpha" in capsys.readouterr().out
    assert calls.options == []


def test_options_of_the_established_tool_are_warned_of_once(calls, caplog):
    assert cli.main(["train", "alpha", "--network_dim", "4", "--task", "t2v-14B"]) == 0
    (record,) = [r for r in caplog.records if r.name == "musubi_tuner.cli"]
    assert record.getMessage() == (
        "has no effect here yet: network_dim (of flux_kontext_train_network and others); "
        "task (of wan_generate_video and others)"
    )


def test_the_options_page_has_each_group_once_and_the_familys_defaults(calls, monkeypatch):
    kinds = {**cli.KINDS, "again": cli.Kind("do it again", "alpha_work", "GROUPS", "work")}
    monkeypatch.setattr(cli, "KINDS", kinds)
    page = cli.options_page()
    assert page.count("| `--seed` | a whole number, at least 0 | 1 | seed |") == 1
    assert page.count("| `--size` |") == 1
    assert "Defaults of this family: `rank` 16." in page
    assert "As above: Shared options." in page


def test_a_table_entry_exists_for_every_script_file():
    package = cli.Path(cli.__file__).parent
    files = {p.stem for p in package.glob("*.py")} - {"__init__", "__main__", "cli", "console"}
    assert files == set(cli.SCRIPTS)
    for name in files:
        assert f'script("{name}")' in (package / f"{name}.py").read_text()
    assert {s.kind for s in cli.SCRIPTS.values()} <= set(cli.KINDS)


@pytest.fixture
def fresh_logging():
    """The root logger without handlers; everything put back."""
    root, ours = logging.getLogger(), [logging.getLogger(n) for n in ("musubi_tuner", "musubi_kernels")]
    kept = root.handlers[:], root.level, [log.level for log in ours]
    root.handlers[:] = []
    yield root
    logging.captureWarnings(False)
    root.handlers[:], root.level = kept[0], kept[1]
    for log, level in zip(ours, kept[2], strict=True):
        log.setLevel(level)


def test_the_console_shows_our_information_and_others_warnings_once(fresh_logging, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    console.configure()
    console.configure()
    logging.getLogger("musubi_tuner.x").info("ours")
    logging.getLogger("other").info("theirs")
    logging.getLogger("other").warning("mind this")
    assert capsys.readouterr().err == "ours\nwarning: mind this\n"


def test_other_ranks_show_errors_only_with_their_number(fresh_logging, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    console.configure()
    logging.getLogger("musubi_tuner.x").warning("said by rank 0")
    logging.getLogger("musubi_tuner.x").error("lost")
    assert capsys.readouterr().err == "[rank 3] error: lost\n"
