"""Targets of every architecture in the reference data, on skeletons with its module names, in decided form.

A family that is here declares its own patterns; for the others the data's are used, Qwen-Image's as decided
(modulation excluded).
"""

import json
import logging
from pathlib import Path

import pytest
from torch import nn

from musubi_tuner.adapters.targets import NetworkArgs, find_targets, parse_network_args, table
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.families.base import AdapterTargets

BEHAVIOUR = Path(__file__).parents[1] / "data/reference/behaviour"
ARCHITECTURES = json.loads((BEHAVIOUR / "lora_targets.json").read_text())["architectures"]
ROWS = json.loads((BEHAVIOUR / "lora.json").read_text())["patterns"]

EXCLUDES = {
    "framepack": (r".*(norm).*",),
    "flux_kontext": (r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*", r".*(norm).*"),
    "qwen_image": (r".*(img_mod|txt_mod).*",),
}
DECIDED_COUNTS = {"qwen_image": 720}
DECIDED_ROWS = {
    ("hunyuan_video", "exclude_patterns=[r'.*']"): "leave none of",
    ("hunyuan_video", "exclude_patterns=[r'[']"): "is not a regular expression",
    ("hunyuan_video", "exclude_patterns=not a list"): 240,  # a lone text is one pattern; it matches nothing and warns
    ("hunyuan_video", "exclude_patterns='.*single.*'"): 160,
    ("hunyuan_video", "conv_dim=4"): "'conv_dim' cannot be used",
    ("hunyuan_video", "unknown_key=1"): "'unknown_key' is not known",
    ("flux_kontext", "exclude_patterns=[r'.*single_blocks.*']"): 152,  # beside the defaults, not in their place
    ("flux_kontext", "exclude_patterns=[]"): 228,
    ("qwen_image", ""): 720,
    ("qwen_image", "include_patterns=[r'.*img_mod.*']"): 780,
}
"""Where a decision changes what was recorded: the number of modules, or words of the error."""


def paths_of(templates: dict[str, list[int] | None]) -> list[str]:
    found = []
    for template, span in templates.items():
        numbers = range(span[0], span[1] + 1) if span else (0,)
        found += [template.replace("{i}", str(i)) for i in numbers]
    return found


def skeleton(name: str) -> nn.Module:
    """A model on meta with the architecture's linear layers, its blocks of the classes that are targeted."""
    row = ARCHITECTURES[name]
    lists = list(dict.fromkeys(template.partition(".")[0] for template in row["modules"]))
    kinds = {top: type(cls, (nn.Module,), {}) for top, cls in zip(lists, targets_of(name).block_classes, strict=True)}
    model = nn.Module()
    for path in sorted(paths_of(row["modules"]) + paths_of(row["not_selected"]), key=path_order):
        parent, parts = model, path.split(".")
        for depth, part in enumerate(parts[:-1]):
            if part not in dict(parent.named_children()):
                block = depth == 1 and parts[0] in kinds
                parent.add_module(part, kinds[parts[0]]() if block else nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(parts[-1], nn.Linear(1, 1, device="meta"))
    return model


def path_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def targets_of(name: str) -> AdapterTargets:
    row = ARCHITECTURES[name]
    for family in registry.names():
        spec = registry.get(family).spec
        if spec.network_module == row["lora_module"]:
            return spec.adapter
    return AdapterTargets(tuple(row["target_block_classes"]), EXCLUDES[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_targets_are_the_established_ones(name):
    row = ARCHITECTURES[name]
    chosen = find_targets(skeleton(name), targets_of(name))
    assert len(chosen) == DECIDED_COUNTS.get(name, row["num_lora_modules"])
    expected = {p for p in paths_of(row["modules"]) if name != "qwen_image" or "_mod." not in p}
    assert set(chosen) == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['arch']}-{'-'.join(r['network_args'])}")
def test_patterns_select_what_they_did_or_as_decided(row):
    """`include_mode=add` is the established meaning of include_patterns."""
    expected = DECIDED_ROWS.get((row["arch"], " ".join(row["network_args"])), row.get("selected_count"))
    model, targets = skeleton(row["arch"]), targets_of(row["arch"])
    if isinstance(expected, str):
        with pytest.raises(UserError) as fault:
            find_targets(model, targets, parse_network_args([*row["network_args"], "include_mode=add"]))
        assert expected in str(fault.value)
        return
    chosen = find_targets(model, targets, parse_network_args([*row["network_args"], "include_mode=add"]))
    assert len(chosen) == expected
    if expected == row.get("selected_count"):
        assert set(chosen) == set(paths_of(row["selected"]))


@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        ("hunyuan_video", r".*double_blocks\.0\..*", 10),
        ("hunyuan_video", r".*img_mod.*", 20),
        ("hunyuan_video", r"single_blocks\.5\.linear1", 1),
        ("flux_kontext", r".*img_mod.*", 19),
        ("qwen_image", r".*img_mod.*", 60),
        ("wan_t2v-1.3B", r".*self_attn\.[qk]", 60),
    ],
)
def test_include_alone_targets_exactly_what_matches(name, pattern, count):
    chosen = find_targets(skeleton(name), targets_of(name), NetworkArgs(include_patterns=(pattern,)))
    assert len(chosen) == count


def test_a_pattern_that_matches_nothing_warns_and_the_table_counts_by_kind(caplog):
    args = NetworkArgs(exclude_patterns=("attn", r".*ffn.*"))
    with caplog.at_level(logging.INFO):
        find_targets(skeleton("wan_t2v-1.3B"), targets_of("wan_t2v-1.3B"), args)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("pattern 'attn' matches none of 300 linear layers")
    lines = [line.split() for line in caplog.text.splitlines()]
    assert ["blocks.N.self_attn.q", "30", "of", "30"] in lines
    assert ["blocks.N.ffn.0", "0", "of", "30"] in lines
    assert ["together", "240", "of", "300"] in lines


def test_verbose_lists_every_module(caplog):
    with caplog.at_level(logging.INFO):
        find_targets(skeleton("wan_t2v-1.3B"), targets_of("wan_t2v-1.3B"), parse_network_args(["verbose=True"]))
    listed = {line.strip() for line in caplog.text.splitlines()}
    assert set(paths_of(ARCHITECTURES["wan_t2v-1.3B"]["modules"])) <= listed


def test_a_table_of_one_kind():
    assert table(["a.0.b", "a.1.b", "c"], ["a.1.b"]).splitlines() == [
        "  a.N.b        1 of 2",
        "  c            0 of 1",
        "  together     1 of 3",
    ]


def test_skeletons_have_every_linear_layer_of_the_data():
    for name, row in ARCHITECTURES.items():
        linears = sum(isinstance(m, nn.Linear) for m in skeleton(name).modules())
        assert linears <= row["num_linear_or_conv_total"]
        assert linears == len(paths_of(row["modules"])) + len(paths_of(row["not_selected"]))
