"""docs/training.md and its neighbours name every training option, and every flag that they show exists."""

import re
from pathlib import Path

from musubi_tuner.config.fields import options_of
from musubi_tuner.families import registry
from musubi_tuner.training.config import GROUPS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md") if path.name != "options.md"}


def test_every_training_option_is_explained_outside_of_the_generated_page():
    words = set(re.findall(r"[a-z0-9_]{2,}", "\n".join(PAGES.values())))
    assert [o.name for group in GROUPS for o in options_of(group) if o.name not in words] == []


def test_every_flag_of_the_training_page_exists():
    groups = [*GROUPS, *(g for name in registry.names() for g in registry.get(name).option_groups("train"))]
    options = [o for group in groups for o in options_of(group)]
    known = {s for o in options for s in o.spellings} | {f.lstrip("-") for o in options for f in o.declared.shorthand}
    known |= {"config_file", "print_config", "config_compat", "help"}
    others = {"num_cpu_threads_per_process", "multi_gpu", "num_processes", "logdir"}  # accelerate's, tensorboard's
    shown = set(re.findall(r"--(?:no-)?([a-z0-9_]+)", PAGES["training.md"]))
    assert shown - known - others == {"dynamo_"}  # the launcher's flags of that beginning


def test_the_plots_are_there_and_ours():
    script = (DOCS / "images/make.py").read_text(encoding="utf-8")
    targets = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGES["training.md"])
    assert len(targets) == 6
    for target in targets:
        assert (DOCS / target).read_bytes().startswith(b"\x89PNG")
        assert f'"{Path(target).stem}"' in script or f'"{Path(target).name}"' in script
