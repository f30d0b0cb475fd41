"""The `musubi` command and the scripts of established name: a table of commands, their options, and exit codes.

A command is a kind (`train`, `cache_latents`, `cache_text`, `generate`) and a family; the module that does the work is
imported only when its command runs, so `musubi --help` needs no torch. Exit codes: 0 done, 2 a fault that the user can
mend (one sentence), 130 stopped by Ctrl-C, 1 anything else (with its traceback).
"""

import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from musubi_tuner import console
from musubi_tuner.config import flag_table
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import canonical, nearest, options_of, title_of
from musubi_tuner.config.known import ALWAYS, REFUSED, belongs, known_elsewhere
from musubi_tuner.config.options import parse
from musubi_tuner.config.show import markdown, plain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """What all families share of a command: the module that works, its option groups and its entry."""

    title: str
    module: str
    groups: str
    entry: str


@dataclass(frozen=True)
class Script:
    """An established script name: a kind of command for a family."""

    kind: str
    family: str
    defaults: tuple[tuple[str, object], ...] = ()
    """Option defaults of this script, over the family's."""


KINDS = {
    "cache_latents": Kind(
        "encode a data set's images and videos", "data.build_cache", "LATENT_GROUPS", "cache_latents"
    ),
    "cache_text": Kind("encode a data set's captions", "data.build_cache", "TEXT_GROUPS", "cache_text"),
    "train": Kind("train a LoRA", "training.run", "GROUPS", "run"),
    "generate": Kind("generate images and videos", "sampling.generate", "GROUPS", "run"),
}

SCRIPTS = {
    "cache_latents": Script("cache_latents", "hunyuan_video"),
    "cache_text_encoder_outputs": Script("cache_text", "hunyuan_video"),
    "hv_train_network": Script("train", "hunyuan_video"),
    "hv_train": Script("train", "hunyuan_video", (("full_finetune", True),)),
    "hv_generate_video": Script("generate", "hunyuan_video"),
    "fpack_cache_latents": Script("cache_latents", "framepack"),
    "fpack_cache_text_encoder_outputs": Script("cache_text", "framepack"),
    "fpack_train_network": Script("train", "framepack"),
    "fpack_generate_video": Script("generate", "framepack"),
    "wan_cache_latents": Script("cache_latents", "wan"),
    "wan_cache_text_encoder_outputs": Script("cache_text", "wan"),
    "wan_train_network": Script("train", "wan"),
    "wan_generate_video": Script("generate", "wan"),
}

TOOLS = {
    "doctor": ("musubi_tuner.tools.doctor", "versions, devices, kernel backends, and what is missing for what"),
    "demo": ("musubi_tuner.tools.demo.run", "the whole main job on real pictures, in minutes on a CPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`musubi ...`: run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded("musubi", lambda: _dispatch(words))


def script(name: str) -> NoReturn:
    """Run an established script with this process's command line, and exit."""
    sys.exit(guarded(name, lambda: _run_kind(SCRIPTS[name], sys.argv[1:], prog=name)))


def guarded(prog: str, work: Callable[[], int]) -> int:
    """The exit code of `work`, with its exceptions told as the module's docstring says."""
    try:
        return work()
    except UserError as fault:
        return _told(prog, str(fault), 2)
    except KeyboardInterrupt:
        return _told(prog, "stopped by Ctrl-C", 130)
    except BrokenPipeError:  # `musubi ... --help | head`: nobody reads on
        sys.stderr.close()
    except Exception as fault:
        if isinstance(fault, ModuleNotFoundError) and fault.name and not fault.name.startswith("musubi_"):
            return _told(prog, f"the package {fault.name} is not installed: see `musubi doctor` for what is missing", 2)
        traceback.print_exc()
    return 1


def _told(prog: str, message: str, code: int) -> int:
    console.fault(prog, message)
    return code


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        console.show(overview())
        return 0
    if words[0] == "--version":
        console.show(import_module("musubi_tuner").__version__)
        return 0
    name, rest = canonical(words[0]), words[1:]
    if name == "options":
        console.show(options_page())
        return 0
    if name in TOOLS:
        console.configure()
        _find_kernels()
        return int(import_module(TOOLS[name][0]).main(list(rest)))
    if name in SCRIPTS and not (name in KINDS and rest and not rest[0].startswith("-")):
        return _run_kind(SCRIPTS[name], rest, prog=f"musubi {name}")
    if name in KINDS:
        families = sorted({s.family for s in SCRIPTS.values() if s.kind == name})
        if not rest or rest[0].startswith("-") or rest[0] not in families:
            given = (
                f"family {rest[0]!r} is not known" if rest and not rest[0].startswith("-") else "no family was given"
            )
            raise UserError(f"{given}: use `musubi {name} FAMILY ...` with one of {', '.join(families)}")
        return _run_kind(Script(name, rest[0]), rest[1:], prog=f"musubi {name} {rest[0]}")
    close = nearest(name, [*SCRIPTS, *KINDS, *TOOLS, "options"], 0.6)
    raise UserError(
        f"{words[0]!r} is not a command" + (f"; did you mean {close}?" if close else "; see `musubi --help`")
    )


def overview() -> str:
    """The page of `musubi --help`."""
    rows = [(f"{kind} FAMILY", row.title) for kind, row in KINDS.items()] + [
        (n, text) for n, (_, text) in TOOLS.items()
    ]
    lines = ["usage: musubi COMMAND [--option value ...]", "", "commands:"]
    lines += [f"  {name:<22}{text}" for name, text in rows]
    lines += ["", "families: " + ", ".join(sorted({s.family for s in SCRIPTS.values()})), ""]
    lines.append("the same under established names (also as files and with -m):")
    lines += [f"  {name:<34}{s.kind} {s.family}" for name, s in SCRIPTS.items()]
    lines += ["", "`musubi COMMAND FAMILY --help` lists the options; `musubi --version` tells the version."]
    return "\n".join(lines)


def _run_kind(which: Script, argv: Sequence[str], *, prog: str) -> int:
    """Parse the options of a command and do its work."""
    _find_kernels()
    from musubi_tuner.families import registry

    family = registry.get(which.family)
    kind = KINDS[which.kind]
    module = import_module(f"musubi_tuner.{kind.module}")
    options = parse(
        (*getattr(module, kind.groups), *family.option_groups(which.kind)),
        argv,
        prog=prog,
        description=f"{kind.title[0].upper()}{kind.title[1:]} ({which.family}).",
        defaults={**family.spec.option_defaults, **dict(which.defaults)},
        elsewhere=known_elsewhere(established_name(which)),
        script=established_name(which),
    )
    console.configure()
    for warning in options.warnings:
        log.warning("%s", warning)
    asked = options.help or options.print_config
    if asked:
        console.show(asked)
        return 0
    getattr(module, kind.entry)(family, options)
    return 0


def options_page() -> str:
    """docs/options.md: a table of every option group, under the first command that has it."""
    from musubi_tuner.families import registry

    _find_kernels()
    lines = ["# Options", "", *_PAGE_HEAD.splitlines(), ""]
    seen: list[type] = []
    for name, kind in KINDS.items():
        lines += [f"## `musubi {name} FAMILY`: {kind.title}", ""]
        shared = getattr(import_module(f"musubi_tuner.{kind.module}"), kind.groups)
        _add_tables(lines, shared, seen)
        for which in (s for s in SCRIPTS.values() if s.kind == name):
            family = registry.get(which.family)
            own = family.option_groups(name)
            known = {field for group in (*shared, *own) for field in group.__dataclass_fields__}
            changed = {**family.spec.option_defaults, **dict(which.defaults)}
            changed = {k: v for k, v in changed.items() if k in known}
            if not own and not changed:
                continue
            lines += [f"## `musubi {name} {which.family}` (`{established_name(which)}`)", ""]
            _add_tables(lines, own, seen)
            if changed:
                told = ", ".join(f"`{k}` {plain(v)}" for k, v in changed.items())
                lines += [f"Defaults of this family: {told}.", ""]
    return "\n".join([*lines, *_matrix()]).rstrip() + "\n"


def served(script: str) -> set[str]:
    """Every name that a script's own options go by, shorthands included."""
    from musubi_tuner.config.options import ConfigOptions
    from musubi_tuner.families import registry

    which = SCRIPTS[script]
    kind = KINDS[which.kind]
    shared = getattr(import_module(f"musubi_tuner.{kind.module}"), kind.groups)
    own = registry.get(which.family).option_groups(which.kind)
    options = [item for group in (ConfigOptions, *shared, *own) for item in options_of(group)]
    return {name for o in options for name in (*o.spellings, *map(canonical, o.declared.shorthand))}


def established_flags(script: str) -> dict[str, str]:
    """The flags of the established script of this name, each with what becomes of it here (`flag_table`)."""
    ours, kind = served(script), SCRIPTS[script].kind

    def state(name: str) -> str:
        if kind in REFUSED.get(name, ()):
            return flag_table.REFUSED
        if name in ALWAYS:
            return flag_table.ALWAYS
        return flag_table.EFFECTIVE if name in ours else flag_table.WARNS

    return {name: state(name) for name in known_elsewhere(script) if belongs(name, script)}


def _matrix() -> list[str]:
    """What becomes of each established flag in each script; a checkout's tests tell where that is shown."""
    tests = Path(__file__).resolve().parents[2] / "tests"
    return flag_table.lines({script: established_flags(script) for script in SCRIPTS}, flag_table.shown_by(tests))


_PAGE_HEAD = """\
Made by `make docs` from the declarations in the code; a test keeps it current. An option is a flag (`--name value`;
booleans `--name` and `--no-name`) and a key of the TOML file that `--config_file` names; sections of that file are only
for reading. Later layers win: default, the family's default, the file, the command line. `--print_config` shows every
value with the layer that it comes from. Options of the established scripts that are not listed here are accepted and
told, in one warning, to have no effect."""


def _add_tables(lines: list[str], groups: Sequence[type], seen: list[type]) -> None:
    fresh = [group for group in groups if group not in seen]
    again = [title_of(group) for group in groups if group in seen]
    seen += fresh
    if fresh:
        lines.append(markdown(fresh))
    if again:
        lines += [f"As above: {', '.join(again)}.", ""]


def established_name(which: Script) -> str:
    """The script name of a kind and family."""
    return next(name for name, row in SCRIPTS.items() if row == which)


def _find_kernels() -> None:
    """In a checkout where nothing is installed, musubi_kernels lies in the folder `kernels` beside ours."""
    folder = Path(__file__).resolve().parents[2] / "kernels"
    if folder.is_dir() and importlib.util.find_spec("musubi_kernels") is None:
        sys.path.append(str(folder))
